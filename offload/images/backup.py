"""One volume of a backup, opened from its store alone: what nbdkit's plugin serves."""

from __future__ import annotations

from contextlib import ExitStack

from offload import compose
from offload.engine.pins import pinned_manifest
from offload.engine.readimage import StoredImage
from offload.engine.repository import Repository
from offload.errors import NotFoundError
from offload.model import BackupSource
from offload.store import Exclusive


class BackupImage(StoredImage):
    """A `StoredImage` that owns its repository; a pin keeps what it reads while it is open."""

    def __init__(self, source: BackupSource) -> None:
        with ExitStack() as stack:
            store = compose.open_store(source.store)
            stack.callback(store.close)
            if isinstance(store, Exclusive) and store.exclusion_is_sound():
                stack.enter_context(store.lock(exclusive=False, wait_s=10))
            repository = Repository.open(store, source.cache_dir)
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
            self._held = stack.pop_all()

    def close(self) -> None:
        """Close the repository and let go of the store. Idempotent."""
        super().close()
        self._held.close()


def open_backup_image(source: BackupSource) -> BackupImage:
    """Open it; NotFoundError, UnavailableError or IntegrityError if that cannot be done."""
    return BackupImage(source)
