"""SQLite: the WAL is emptied and the write lock held, from before the freeze to after the thaw."""

from __future__ import annotations

import fcntl
import os
import struct
from pathlib import Path

from offload.configs.quiesce import SqliteApplication
from offload.errors import ConfigError, NotFoundError, UnavailableError
from offload.instance import Instance
from offload.model import Consistency
from offload.quiescers.guarded import GuardedPart
from offload.quiescers.holder import Holder, Targets

_MAGIC = b"SQLite format 3\0"  # sqlite.org/fileformat.html, 1.3
_WAL_VERSION = 2  # byte 18, the file format write version
_RESERVED_BYTE = 0x40000001  # sqlite3 os.h: PENDING_BYTE + 1
_WAL_WRITE_LOCK = 120  # sqlite.org/walformat.html, 2.3: of the -shm file
_FLOCK = "hhqqi4x"  # struct flock of 64 bit Linux: type, whence, start, length, pid


class SqlitePart(GuardedPart):
    """One `kind = "sqlite"` entry. The guardian holds the lock."""

    kind = "sqlite"

    def __init__(self, vm: str, entry: SqliteApplication, instance: Instance) -> None:  # noqa: ARG002
        self._path = entry.path
        order = {"path": str(entry.path), "timeout_s": entry.timeout_s}
        super().__init__(f"sqlite:{entry.path}", Holder(instance, Targets(sqlite=(order,))))

    def check(self) -> None:
        """Raises NotFoundError (`no-database`), ConfigError (`symlink`, `not-a-database`),
        UnavailableError (`application-refused`: no right to write). Opens nothing as a database."""
        path = self._path
        if path.is_symlink():
            raise ConfigError(
                f"{path} is a symlink: SQLite's other files lie beside the database itself",
                code="symlink",
                hint=f"name the database: {path.resolve()}",
            )
        try:
            with path.open("rb") as database:
                head = database.read(len(_MAGIC))
        except FileNotFoundError as error:
            raise NotFoundError(f"there is no database {path}", code="no-database") from error
        except OSError as error:
            raise ConfigError(
                f"cannot read {path}: {error.strerror}", code="not-a-database"
            ) from error
        if head not in (_MAGIC, b""):  # one without a table has no bytes yet
            raise ConfigError(
                f"{path} is no SQLite database, or an encrypted one", code="not-a-database"
            )
        if not os.access(path, os.W_OK) or not os.access(path.parent, os.W_OK):
            raise UnavailableError(
                f"{path}: locking needs the right to write to it and to its folder",
                code="application-refused",
            )

    def undos(self) -> list[tuple[str, dict[str, str]]]:
        """`thaw-sqlite`: the lock goes with the guardian; its marker is left."""
        return [("thaw-sqlite", self._holder.undo_args())]

    def freeze(self, until: float) -> Consistency:
        """Raises UnavailableError (`freeze-failed`): no lock in time, damaged, gone."""
        self._holder.freeze(until)
        self._frozen = True
        self.what = (str(self._path),)
        self._notes.append(self._holder.said[str(self._path)])
        return Consistency.APPLICATION

    def still_frozen(self) -> bool:
        """Whether the guardian has not let go, and the kernel knows of its lock on the file that
        has this name now."""
        if not self._frozen:
            return False
        if not self._holder.still_frozen():
            self._break(self._holder.broken)
        elif not self._locked():
            self._break(f"nobody locks what is {self._path} now")
        return self.unbroken

    def _locked(self) -> bool:
        """A record lock of the guardian, in whichever file the journal mode has it."""
        shm = self._path.with_name(f"{self._path.name}-shm")
        try:
            with self._path.open("rb") as database:
                wal = database.read(19)[18:] == bytes([_WAL_VERSION])
            file, offset = (shm, _WAL_WRITE_LOCK) if wal else (self._path, _RESERVED_BYTE)
            return lock_owner(file, offset) == self._holder.pid
        except OSError:
            return False

    @property
    def output(self) -> str:
        """What became of the WAL."""
        return "; ".join(self._notes)


def lock_owner(path: Path, offset: int) -> int | None:
    """Which other process would keep us from writing to a byte, by its record locks."""
    with path.open("rb") as file:
        wanted = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, offset, 1, 0)
        kind, _, _, _, pid = struct.unpack(_FLOCK, fcntl.fcntl(file, fcntl.F_GETLK, wanted))
    return None if kind == fcntl.F_UNLCK else pid
