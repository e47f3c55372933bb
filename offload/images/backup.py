"""One volume of a backup, opened from its store alone: what nbdkit's plugin serves."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING

from offload import compose
from offload.engine.blockcache import BlockCache
from offload.engine.lockedcache import cached
from offload.engine.pins import pinned_manifest
from offload.engine.readimage import StoredImage
from offload.engine.repository import Repository
from offload.errors import NotFoundError
from offload.model import BackupSource
from offload.store import Exclusive, Store

if TYPE_CHECKING:
    from offload.engine.readahead import ReadAhead


class BackupImage(StoredImage):
    """A `StoredImage` that owns its repository; a pin keeps what it reads while it is open.

    Of a store that is far (not a folder of this machine) it is read ahead, and through a cache on
    disk.
    """

    def __init__(self, source: BackupSource) -> None:
        with ExitStack() as stack:
            store = compose.open_store(source.store)
            stack.callback(store.close)
            if isinstance(store, Exclusive) and store.exclusion_is_sound():
                stack.enter_context(store.lock(exclusive=False, wait_s=10))
            cache = _cache_of(source, store)
            seen = store if cache is None else cached(store, cache)
            repository = Repository.open(seen, source.cache_dir)
            stack.callback(repository.close)
            manifest, _ = stack.enter_context(pinned_manifest(repository, source.backup))
            record = manifest.backup.image(source.volume)
            if record is None:
                raise NotFoundError(
                    f"backup {source.backup} has no volume '{source.volume}'",
                    code="unknown-volume",
                )
            super().__init__(
                repository, bytes.fromhex(record.root), record.size_bytes, record.sector_size
            )
            self._ahead = (
                _read_ahead(self, source, store, cache)
                if source.memory_bytes and _is_far(store)
                else None
            )
            if self._ahead is not None:
                stack.callback(self._ahead.close)
            self._held = stack.pop_all()

    def chunk(self, slot: int, *, keep: bool) -> bytes | bytearray | None:
        """The content of a slot; see `StoredImage`."""
        if self._ahead is None:
            return super().chunk(slot, keep=keep)
        return self._ahead.get(slot)

    def close(self) -> None:
        """Close the repository and let go of the store. Idempotent."""
        super().close()
        self._held.close()


def _is_far(store: Store) -> bool:
    """Whether a read is a round trip: what can be held alone is a folder of this machine."""
    return not isinstance(store, Exclusive)


def _cache_of(source: BackupSource, store: Store) -> BlockCache | None:
    if not source.cache_bytes or not _is_far(store):
        return None
    return BlockCache(source.block_dir or source.cache_dir / "blocks", source.cache_bytes)


def _read_ahead(
    image: StoredImage, source: BackupSource, store: Store, cache: BlockCache | None
) -> ReadAhead:
    from offload.engine.readahead import ReadAhead  # not for the many views of stores that are near
    from offload.engine.slots import SlotReader

    chunk = image.shape.chunk_bytes
    return ReadAhead(
        SlotReader(image, store, cache),
        image.shape.slots,
        ahead=source.ahead_bytes // chunk,
        memory=max(source.memory_bytes // chunk, 2),
    )


def open_backup_image(source: BackupSource) -> BackupImage:
    """Open it; NotFoundError, UnavailableError or IntegrityError if that cannot be done."""
    return BackupImage(source)
