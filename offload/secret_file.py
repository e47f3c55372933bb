"""Secrets lie in files of one line that only their owner may read.

They are never on a command line, in the configuration's printed form, in a log, in the journal or
in the catalog.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from pydantic import SecretStr

from offload.errors import ConfigError

_MAX_BYTES = 4096


def read_secret(path: Path, what: str) -> SecretStr:
    """The secret in `path`, without the end of its line; `what` names it in errors.

    Raises ConfigError (`secret-missing`, `secret-unsafe`, `secret-invalid`).
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        raise ConfigError(
            f"cannot read the {what} in {path}: {error.strerror}",
            code="secret-missing",
            hint="write it there, one line, mode 0600",
        ) from error
    try:
        check_private(fd, path, what)
        raw = os.read(fd, _MAX_BYTES + 1)
    finally:
        os.close(fd)
    try:
        text = raw.decode("utf-8").removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as error:
        raise ConfigError(f"the {what} in {path} is no text", code="secret-invalid") from error
    if not text or "\n" in text or len(raw) > _MAX_BYTES:
        raise ConfigError(f"the {what} in {path} must be one line of text", code="secret-invalid")
    return SecretStr(text)


def check_private(fd: int, path: Path, what: str) -> None:
    """Refuse a file that is not regular, or that others than its owner may read or write."""
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        raise ConfigError(f"the {what} {path} is no regular file", code="secret-unsafe")
    if status.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise ConfigError(
            f"others may read the {what} in {path}",
            code="secret-unsafe",
            hint=f"chmod 600 {path}",
        )
    if status.st_uid not in (0, os.geteuid()):
        raise ConfigError(
            f"the {what} in {path} belongs to another user (uid {status.st_uid})",
            code="secret-unsafe",
            hint=f"chown {os.geteuid()} {path}",
        )
