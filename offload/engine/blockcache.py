"""A cache on disk of what was read from packs, shared by all processes of an instance.

Kept is what the store gave: compressed, and in an encrypted store encrypted as it lies there, so
that the cache shows nothing that the store does not. A place in a pack never changes its content
(names are not reused), so nothing has to be made invalid. A file a record, named by its place, with
a hash before the content; whoever reads it checks the decoded chunk against its id besides.

| left by a crash | what happens |
| --- | --- |
| a temporary file | removed by an eviction once it is an hour old |
| a file torn by a power cut | its hash does not fit: it goes, the store is asked |

Bounded: eviction takes what was used longest ago. Each process looks after it has written a part of
the bound, so that so many processes may go that far over it for a while.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import threading
import time
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path

from blake3 import blake3

from offload.format import layout
from offload.ids import new_id
from offload.store import Buffer, ObjectInfo, Store
from offload.storespec import StoreSpec

log = logging.getLogger(__name__)

_HASH = 16  # bytes before the content: against accidents, not attackers
_PART = 16  # of the bound: what a process writes between two evictions
_KEEP = 0.9  # of the bound is left by an eviction
_TOUCH_S = 60.0  # how exactly the last use is known
_STALE_S = 3600.0


class BlockCache:
    """Records of packs in a folder. Safe from any thread and from several processes.

    Never a reason to fail: what cannot be read or written is missing.
    """

    def __init__(self, folder: Path, bound_bytes: int) -> None:
        self.folder = folder
        self.bound_bytes = bound_bytes
        self._fresh = 0  # bytes written since this process has looked for the bound
        self._mutex = threading.Lock()

    def get(self, pack: str, offset: int, length: int) -> bytes | None:
        """What was kept of this place, whole, or None."""
        path = self._path(pack, offset, length)
        try:
            with path.open("rb") as file:
                raw = file.read()
                self._touch(file.fileno())
        except OSError:
            return None
        content = raw[_HASH:]
        if len(content) == length and raw[:_HASH] == _hash(content):
            return content
        with contextlib.suppress(OSError):
            path.unlink()
        return None

    def put(self, pack: str, offset: int, content: Buffer) -> None:
        """Keep it."""
        path = self._path(pack, offset, len(content))
        temp = path.with_name(f"{new_id()}.part")
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            path.parent.mkdir(exist_ok=True, mode=0o700)
            fd = os.open(temp, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            with os.fdopen(fd, "wb") as file:
                file.write(_hash(content))
                file.write(content)
            temp.rename(path)
        except OSError as error:
            log.info("not cached: %s", error)
            with contextlib.suppress(OSError):
                temp.unlink()
            return
        if self._due(len(content)):
            self._evict()

    def _path(self, pack: str, offset: int, length: int) -> Path:
        name = blake3(f"{pack}:{offset}:{length}".encode()).hexdigest(16)
        return self.folder / name[:2] / name[2:]

    def _touch(self, fd: int) -> None:
        """Note the use, by which eviction goes: file systems need not keep access times."""
        if time.time() - os.fstat(fd).st_mtime > _TOUCH_S:
            os.utime(fd)

    def _due(self, count: int) -> bool:
        with self._mutex:
            self._fresh += count
            if self._fresh * _PART < self.bound_bytes:
                return False
            self._fresh = 0
            return True

    def _evict(self) -> None:
        """Down to the bound; one process at a time, the others go on."""
        with contextlib.suppress(OSError):
            fd = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self._sweep()
            finally:
                os.close(fd)

    def _sweep(self) -> None:
        now = time.time()
        found = []
        for entry in _files(self.folder):
            with contextlib.suppress(OSError):
                status = entry.stat()
                if entry.name.endswith(".part"):
                    if now - status.st_mtime > _STALE_S:
                        Path(entry.path).unlink()
                    continue
                found.append((status.st_mtime, status.st_size, entry.path))
        total = sum(size for _, size, _ in found)
        if total <= self.bound_bytes:
            return
        for _, size, path in sorted(found):
            with contextlib.suppress(OSError):
                Path(path).unlink()
            total -= size
            if total <= self.bound_bytes * _KEEP:
                return


def _files(folder: Path) -> Iterator[os.DirEntry[str]]:
    with os.scandir(folder) as parts:
        for part in parts:
            if part.is_dir(follow_symlinks=False):
                with contextlib.suppress(OSError), os.scandir(part.path) as entries:
                    yield from entries


def _hash(content: Buffer) -> bytes:
    return blake3(content).digest(_HASH)


class CachedStore:
    """A store whose packs are read through a cache, record by record. All else goes to the store.

    It hides what else the store can (locks, versions): it is for readers. See `lockedcache`, too.
    """

    def __init__(self, store: Store, cache: BlockCache) -> None:
        self.store = store
        self.cache = cache
        self.spec: StoreSpec = store.spec
        self.url = store.url

    def get_range(self, name: str, offset: int, length: int) -> bytes:
        """From the cache, else from the store, and kept."""
        if not name.startswith(layout.PACKS):
            return self.store.get_range(name, offset, length)
        known = self.cached_as(name)
        found = self.cache.get(known, offset, length)
        if found is None:
            found = self.store.get_range(name, offset, length)
            self.cache.put(known, offset, found)
        return found

    def cached_as(self, name: str) -> str:
        """The name of a pack in the cache; of another time it may have had other bytes."""
        moment = self.spec.options.get("as_of")
        return f"{name}@{moment}" if moment else name

    def put(
        self, name: str, parts: Sequence[Buffer], *, retain_until: datetime | None = None
    ) -> int:
        """To the store."""
        return self.store.put(name, parts, retain_until=retain_until)

    def get(self, name: str) -> bytes:
        """From the store."""
        return self.store.get(name)

    def size(self, name: str) -> int:
        """Of the store."""
        return self.store.size(name)

    def exists(self, name: str) -> bool:
        """In the store."""
        return self.store.exists(name)

    def list(self, prefix: str) -> Iterator[str]:
        """Of the store."""
        return self.store.list(prefix)

    def infos(self, prefix: str) -> Iterator[ObjectInfo]:
        """Of the store."""
        return self.store.infos(prefix)

    def now(self) -> datetime:
        """The store's clock."""
        return self.store.now()

    def delete(self, name: str) -> None:
        """From the store; what is cached of it nobody asks for again."""
        self.store.delete(name)

    def space_bytes(self) -> tuple[int, int] | None:
        """Of the store."""
        return self.store.space_bytes()

    def close(self) -> None:
        """Close the store."""
        self.store.close()
