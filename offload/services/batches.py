"""Writers one after the other, for what is long under way: a copy, a repair."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager

from offload import compose
from offload.catalog.store import Catalog
from offload.engine.packwriter import PackWriter
from offload.engine.pins import HeldPin, PinKind
from offload.engine.repository import Repository
from offload.ids import new_id
from offload.instance import Instance
from offload.journal import Operation
from offload.quantity import Watermark
from offload.services import stores


class Batches:
    """Writers one after the other, each with an index object of its own: what one of them has sent
    stays when the next is killed."""

    def __init__(self, op: Operation, repository: Repository, min_free: Watermark) -> None:
        self.op = op
        self.repository = repository
        self.stored_bytes = 0
        self.packs: set[str] = set()
        self._min_free = min_free
        self._count = 0

    @contextmanager
    def writer(self) -> Iterator[PackWriter]:
        """The next one; its index object is out when the block ends."""
        self._count += 1
        name = new_id()
        store = self.repository.store.spec.text()
        self.op.intend(f"batch-{self._count}", "abort-packs", {"store": store, "writer": name})
        # a pin of its own: prune leaves the packs of a writer that has one
        with (
            HeldPin(self.repository, PinKind.WRITER, ident=name),
            PackWriter(self.repository, name, min_free=self._min_free) as writer,
        ):
            yield writer
            writer.finish()
        self.stored_bytes += writer.stored_bytes
        self.packs |= writer.packs.keys()
        self.op.done(f"batch-{self._count}")


def undo_packs(instance: Instance, catalog: Catalog, args: Mapping[str, str]) -> None:  # noqa: ARG001
    """Remove the packs of a batch whose index object is not out; others may build on the rest."""
    store = compose.open_store(args["store"])
    try:
        with closing(Repository.open(store, instance.cache_dir)) as repository:
            stores.remove_unfinished(repository, args["writer"])
    finally:
        store.close()
