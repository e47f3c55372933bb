"""One volume of a backup, opened from its store alone: what nbdkit's plugin serves."""

from __future__ import annotations

from contextlib import ExitStack

from offload import compose
from offload.engine.readimage import StoredImage
from offload.engine.repository import Repository
from offload.errors import NotFoundError
from offload.format import layout
from offload.format.manifest import decode_manifest
from offload.model import BackupSource
from offload.store import Exclusive


class BackupImage(StoredImage):
    """A `StoredImage` that owns its repository and holds the store against prune while open."""

    def __init__(self, source: BackupSource) -> None:
        with ExitStack() as stack:
            store = compose.open_store(source.store)
            stack.callback(store.close)
            if isinstance(store, Exclusive):
                stack.enter_context(store.lock(exclusive=False, wait_s=10))
            repository = Repository.open(store, source.cache_dir)
            stack.callback(repository.close)
            name = layout.manifest_name(source.backup)
            manifest = decode_manifest(name, store.get(name), repository.keys, "")
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
