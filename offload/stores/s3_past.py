"""A store as it was at a moment: what was put, hidden or forged since does not count.

It stands on versions and on the store's own stamps, which nobody who may only write can set. With
object lock it is the way back after an attacker who had the store's credentials *and its keys*,
whose objects are as good as ours but for their time. It is read-only.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from datetime import datetime
from itertools import groupby

from offload.errors import NotFoundError, UnavailableError
from offload.format import layout
from offload.objectlock import LockableStore
from offload.store import Buffer, ObjectInfo, Version
from offload.storespec import StoreSpec


class PastStore:
    """See `offload.store`. Each folder is listed once: what was cannot change."""

    def __init__(self, inner: LockableStore, moment: datetime) -> None:
        self.inner = inner
        self.moment = moment
        self.spec: StoreSpec = inner.spec
        self.url = inner.url
        self._mutex = threading.Lock()
        self._folders: dict[str, dict[str, Version]] = {}

    def put(
        self,
        name: str,  # noqa: ARG002
        parts: Sequence[Buffer],  # noqa: ARG002
        *,
        retain_until: datetime | None = None,  # noqa: ARG002
    ) -> int:
        """Refused."""
        raise self._read_only()

    def delete(self, name: str) -> None:  # noqa: ARG002
        """Refused."""
        raise self._read_only()

    def _read_only(self) -> UnavailableError:
        return UnavailableError(
            f"the store {self.url} is shown as of {self.moment:%Y-%m-%d %H:%M:%S}Z, read-only",
            code="store-read-only",
            hint="remove as_of of the store to write to it",
        )

    def get(self, name: str) -> bytes:
        """The whole object."""
        return self.inner.get_version(self._version(name), 0, None)

    def get_range(self, name: str, offset: int, length: int) -> bytes:
        """Exactly `length` bytes; see the contract."""
        return self.inner.get_version(self._version(name), offset, length)

    def size(self, name: str) -> int:
        """The object's size in bytes."""
        return self._version(name).size_bytes

    def exists(self, name: str) -> bool:
        """Whether the object was there."""
        return name in self._folder(name)

    def list(self, prefix: str) -> Iterator[str]:
        """Names below a folder, in name order."""
        return (info.name for info in self.infos(prefix))

    def infos(self, prefix: str) -> Iterator[ObjectInfo]:
        """The same, with size and time."""
        for name, version in self._folder(prefix).items():
            if name.startswith(prefix):
                yield ObjectInfo(
                    name=name, size_bytes=version.size_bytes, modified=version.modified
                )

    def _version(self, name: str) -> Version:
        found = self._folder(name).get(name)
        if found is None:
            raise NotFoundError(f"no object {name} in {self.url}", code="no-object")
        return found

    def _folder(self, name: str) -> dict[str, Version]:
        folder = name if name == layout.STORE_OBJECT else f"{name.partition('/')[0]}/"
        with self._mutex:
            if folder not in self._folders:
                self._folders[folder] = dict(self._then(folder))
            return self._folders[folder]

    def _then(self, folder: str) -> Iterator[tuple[str, Version]]:
        for name, group in groupby(self.inner.versions(folder), key=lambda v: v.name):
            newest = next((v for v in group if v.modified <= self.moment), None)
            if newest is not None and not newest.deleted:
                yield name, newest

    def now(self) -> datetime:
        """The store's clock: of today."""
        return self.inner.now()

    def space_bytes(self) -> tuple[int, int] | None:
        """Of the store below."""
        return self.inner.space_bytes()

    def close(self) -> None:
        """Close the store below."""
        self.inner.close()
