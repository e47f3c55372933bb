"""CHAP of a view in a tgtd that keeps one secret a user name, for all views of its portal.

So a secret that was changed cannot be given to a server that lives on with the old one: the other
views' initiators would be locked out, or, for a moment, not be asked at all. What was given is
known by a salted hash in the server's folder.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
from pathlib import Path

from pydantic import SecretStr

from offload.errors import BusyError, ConfigError
from offload.iscsi import Chap
from targets.tgt_mgmt import Management

_FILE = "chap"
_SALT_BYTES = 16
_COST = 1 << 12  # scrypt: 4 MiB, some 10 ms. Who can read the hash can read the secret's own file.


def check(chap: Chap | None) -> None:
    """Raise ConfigError (`chap-user-invalid`, `chap-user-twice`) for what tgtd cannot take."""
    if chap is None:
        return
    for user in (chap.user, chap.mutual_user or ""):
        if "," in user or not (user.isprintable() or not user):
            raise ConfigError(
                f"tgt takes no CHAP user '{user}'",
                code="chap-user-invalid",
                hint="choose a name without commas",
            )
    if chap.user == chap.mutual_user:
        raise ConfigError(
            "tgt keeps one secret a name, and [iscsi.chap] has one name for both directions",
            code="chap-user-twice",
            hint="choose another mutual_user",
        )


def apply(management: Management, folder: Path, tid: int, chap: Chap) -> None:
    """Ask the initiators of a target for CHAP, and answer those that ask it for the same.

    `folder` is the server's. Raises BusyError (`chap-secret-changed`).
    """
    _keep(management, folder, chap.user, chap.secret)
    management.bind_account(tid, chap.user)
    if chap.mutual_user is not None and chap.mutual_secret is not None:
        _keep(management, folder, chap.mutual_user, chap.mutual_secret)
        management.bind_account(tid, chap.mutual_user, outgoing=True)


def _keep(management: Management, folder: Path, user: str, secret: SecretStr) -> None:
    given = _load(folder)
    if user in management.accounts():
        salt, digest = given.get(user, ("", ""))
        if not hmac.compare_digest(_hash(secret, salt), digest):
            raise BusyError(
                f"the CHAP secret of '{user}' has changed since views were mounted at this portal",
                code="chap-secret-changed",
                hint="choose a new user name too, or unmount those views first",
            )
        return
    salt = os.urandom(_SALT_BYTES).hex()
    _save(folder, {**given, user: (salt, _hash(secret, salt))})
    management.new_account(user, secret)


def _hash(secret: SecretStr, salt: str) -> str:
    text = secret.get_secret_value().encode()
    return hashlib.scrypt(text, salt=salt.encode(), n=_COST, r=8, p=1).hex()


def _load(folder: Path) -> dict[str, tuple[str, str]]:
    try:
        text = (folder / _FILE).read_text()
    except FileNotFoundError:
        return {}
    return {user: (salt, digest) for user, (salt, digest) in json.loads(text).items()}


def _save(folder: Path, given: dict[str, tuple[str, str]]) -> None:
    temp = folder / f"{_FILE}.new"
    fd = os.open(temp, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "w", encoding="utf-8") as out:
        json.dump(given, out)
    temp.replace(folder / _FILE)
