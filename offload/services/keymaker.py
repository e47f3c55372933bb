"""Making secrets and wrappers of a key ring, each in the journal first.

A change of keys has one commit point, an object in the store. Killed before it, everything that was
made is taken back; killed after it, everything stays.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path

from blake3 import blake3

from offload import compose
from offload.catalog.store import Catalog
from offload.errors import BusyError, ConfigError
from offload.filesystem import fsync_folder
from offload.format import layout
from offload.format.keyfile import Secret, WrapperKind, key_file_text, recovery_text, wrap
from offload.format.keys import KEY_BYTES, KeyRing
from offload.format.layout import Parameters
from offload.ids import new_id
from offload.instance import Instance
from offload.journal import Operation, step
from offload.store import Store

# How a fresh recovery key gets to its owner: into a file that is made, or shown by a function that
# returns when it is known to be kept.
HandOver = Path | Callable[[str], None]


class KeyMaker:
    """Makes what a change of keys needs; `commit` names the object that is its commit point."""

    def __init__(self, op: Operation, store: Store, parameters: Parameters, *, commit: str) -> None:
        self.op = op
        self.store = store
        self.parameters = parameters
        self.commit = commit
        self._count = 0

    def _intend(self, **what: str) -> None:
        self._count += 1
        args = {"store": self.store.spec.text(), "commit": self.commit}
        self.op.intend(
            f"key-{self._count}",
            "abort-key",
            {**args, "object": "", "file": "", "print": "", **what},
        )

    def key_file(self, path: Path) -> Secret:
        """Make a key file, 0600, in a folder that is made 0700 if it is missing."""
        value = secrets.token_bytes(KEY_BYTES)
        self._file(path, key_file_text(value), "key file")
        return Secret(kind=WrapperKind.FILE, value=value)

    def recovery_key(self, to: HandOver) -> Secret:
        """A fresh recovery key, handed over."""
        value = secrets.token_bytes(KEY_BYTES)
        text = recovery_text(value)
        if isinstance(to, Path):
            self._file(to, text, "recovery key")
        else:
            to(text)
        return Secret(kind=WrapperKind.RECOVERY, value=value)

    def _file(self, path: Path, text: str, what: str) -> None:
        if os.path.lexists(path):
            raise _exists(path, what)
        self._intend(file=str(path), print=_fingerprint(text))
        _write(path, text, what)
        step("key.file.written")

    def wrap(self, ring: KeyRing, secret: Secret, label: str, ident: str | None = None) -> str:
        """Put a wrapper; returns its id."""
        ident = ident or new_id()
        name = layout.key_name(ident)
        raw = wrap(ring, secret, ident=ident, label=label, store_id=self.parameters.store_id)
        self._intend(object=name)
        self.store.put(name, [raw])
        step("key.wrapper.written")
        return ident


def _fingerprint(text: str) -> str:
    """Tells a file with this random secret from another, and says nothing about it."""
    return blake3(text.encode()).hexdigest()


def _write(path: Path, text: str, what: str) -> None:
    """A new file of one line, 0600, durable. BusyError (`secret-exists`), ConfigError
    (`secret-unwritable`)."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(fd, "w", encoding="ascii") as out:
            out.write(text + "\n")
            out.flush()
            os.fsync(out.fileno())
        fsync_folder(path.parent)
    except FileExistsError as error:
        raise _exists(path, what) from error
    except OSError as error:
        raise ConfigError(
            f"cannot write the {what} to {path}: {error.strerror}", code="secret-unwritable"
        ) from error


def _exists(path: Path, what: str) -> BusyError:
    return BusyError(
        f"there is a file {path} already, and a {what} never replaces one",
        code="secret-exists",
        hint="give another name, or move that file away",
    )


def undo_key(instance: Instance, catalog: Catalog, args: Mapping[str, str]) -> None:  # noqa: ARG001
    """Take back a wrapper, or a file with a secret, unless the change has got through."""
    store = compose.open_store(args["store"])
    try:
        if store.exists(args["commit"]):
            return
        if args["object"]:
            store.delete(args["object"])
    finally:
        store.close()
    if args["file"]:
        _remove_ours(Path(args["file"]), args["print"])


def _remove_ours(path: Path, wanted: str) -> None:
    """Remove a file if it holds just that secret, or nothing yet."""
    try:
        text = path.read_text(encoding="utf-8").removesuffix("\n")
    except (FileNotFoundError, UnicodeDecodeError):
        return
    if not text or _fingerprint(text) == wanted:
        path.unlink(missing_ok=True)
