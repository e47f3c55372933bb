"""Stores: making, opening, listing and checking them."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime

from offload import compose
from offload.catalog.store import Catalog
from offload.engine.manifests import Folds, read_folds, read_manifest
from offload.engine.pins import drop_pin
from offload.engine.repository import Repository
from offload.engine.tree import TreeReader
from offload.errors import (
    IntegrityError,
    NotFoundError,
    OffloadError,
    PrivilegeError,
    UnavailableError,
)
from offload.format import layout
from offload.format.index import decode_index
from offload.format.manifest import Manifest
from offload.format.pack import read_footer
from offload.format.sealed import seal_object, unseal_object
from offload.ids import new_id
from offload.model import Backup, BackupSource, ImageRecord
from offload.services import chain, locks
from offload.services.context import Context
from offload.store import Exclusive, Store, Sweepable
from offload.storespec import StoreSpec

log = logging.getLogger(__name__)

_FOUND = ".found"  # notes of what a store's server honours: probes/ID.found
_GRACE_S = 3600.0  # a store that nobody can hold alone: whoever overlooked a pin has an hour


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreSummary:
    """One configured store. Sizes in bytes; None where the store cannot be opened."""

    name: str
    kind: str
    url: str
    state: str  # ok, not initialised, or what is wrong
    id: str = ""
    backups: int = 0
    packs: int = 0
    chunks: int = 0
    stored_bytes: int | None = None
    raw_bytes: int | None = None
    free_bytes: int | None = None
    size_bytes: int | None = None
    format_version: int = layout.FORMAT_VERSION
    chunk_bytes: int | None = None
    zstd_level: int | None = None
    key_version: int | None = None  # of what is written now; None: not encrypted
    honours: Mapping[str, str] = field(default_factory=dict)  # by its server, when it was made


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckReport:
    """What `store check` found. `problems` are sentences; empty means whole."""

    name: str
    problems: tuple[str, ...]
    packs: int
    chunks: int
    backups: int
    orphan_packs: tuple[str, ...]  # packs that no index object knows: `prune` removes them
    rebuilt: int | None  # backups entered in the catalog, with --rebuild-catalog
    head: str | None  # of the chain of manifests


def spec_of(ctx: Context, name: str) -> StoreSpec:
    """How a configured store is opened."""
    return ctx.instance.config.store(name).spec()


@contextmanager
def opened(
    ctx: Context, name: str, *, exclusive: bool, wait_s: float = 5.0
) -> Iterator[Repository]:
    """A configured store, opened and held with others (shared) or against them (exclusive), where
    it can be held. What must stay while it is used needs a pin (`offload.engine.pins`)."""
    store = compose.open_store(spec_of(ctx, name))
    try:
        require_initialised(store, name)
        with _held(store, exclusive=exclusive, wait_s=wait_s):
            repository = Repository.open(store, ctx.instance.cache_dir)
            try:
                yield repository
            finally:
                repository.index.close()
    finally:
        store.close()


def require_initialised(store: Store, name: str) -> None:
    """UnavailableError (`store-unavailable`, `store-not-initialised`) if there is no store."""
    store.space_bytes()  # a missing folder is reported before a lock file is tried
    if not store.exists(layout.STORE_OBJECT):
        raise UnavailableError(
            f"the store {name} ({store.url}) is not initialised",
            code="store-not-initialised",
            hint=f"make it with: offload store init {name}",
        )


def _held(store: Store, *, exclusive: bool, wait_s: float) -> AbstractContextManager[None]:
    if isinstance(store, Exclusive) and store.exclusion_is_sound():
        return store.lock(exclusive=exclusive, wait_s=wait_s)
    return nullcontext()  # pins alone say who is there


def grace_of(ctx: Context, name: str, store: Store) -> float:
    """How long a tombstone stands before its packs go, in seconds."""
    given = ctx.instance.config.store(name).grace
    if given is not None:
        return given
    alone = isinstance(store, Exclusive) and store.exclusion_is_sound()
    return 0.0 if alone else _GRACE_S


def backup_source(ctx: Context, backup: Backup, image: ImageRecord) -> BackupSource:
    """How one volume of a backup is read."""
    return BackupSource(
        store=spec_of(ctx, backup.store).text(),
        backup=backup.id,
        volume=image.volume,
        size_bytes=image.size_bytes,
        cache_dir=ctx.instance.cache_dir,
        sector_size=image.sector_size,
    )


def sweep_temporary(store: Store, part: str, *, min_age_s: float = 0.0) -> int:
    """Remove temporary objects of an unfinished writer, where the kind of store has such."""
    return store.sweep(part, min_age_s=min_age_s) if isinstance(store, Sweepable) else 0


def remove_unfinished(repository: Repository, writer: str) -> None:
    """Delete what a dead writer left, its pin last. Idempotent.

    Once its index object is out, others may build on its packs: these are prune's then. The object
    may have been merged into another meanwhile, so that all are asked.
    """
    store = repository.store
    if not any(layout.pack_writer(pack) == writer for pack in repository.index.packs()):
        remove_packs(store, writer)
    sweep_temporary(store, writer)
    drop_pin(store, writer)


def remove_packs(store: Store, writer: str) -> None:
    """Delete all packs of one writer. Idempotent. Whose credentials can only add leaves them: no
    index object names them, and a prune with other credentials takes them for unneeded."""
    try:
        for pack in list(store.list(f"{layout.PACKS}{writer[:2]}/")):
            if pack.rpartition("/")[2].startswith(f"{writer}-"):
                store.delete(pack)
    except PrivilegeError as error:
        if error.code != "store-denied":
            raise
        log.warning("packs of %s are left to a prune: %s", writer, error.message)


def listing(ctx: Context) -> list[StoreSummary]:
    """All configured stores; one that cannot be opened says why in `state`."""
    found = []
    for name in sorted(ctx.instance.config.stores):
        try:
            found.append(show(ctx, name))
        except OffloadError as error:
            state = "not initialised" if error.code == "store-not-initialised" else error.message
            kind = ctx.instance.config.stores[name].kind
            found.append(
                StoreSummary(name=name, kind=kind, url=spec_of(ctx, name).url, state=state)
            )
    return found


def show(ctx: Context, name: str) -> StoreSummary:
    """One store, opened."""
    with opened(ctx, name, exclusive=False) as repository:
        chunks, stored, raw = repository.index.totals()
        space = repository.store.space_bytes()
        return StoreSummary(
            name=name,
            kind=ctx.instance.config.store(name).kind,
            url=repository.store.url,
            state="ok",
            id=repository.parameters.store_id,
            backups=sum(1 for _ in repository.store.list(layout.MANIFESTS)),
            packs=sum(1 for _ in repository.store.list(layout.PACKS)),
            chunks=chunks,
            stored_bytes=stored,
            raw_bytes=raw,
            free_bytes=space[0] if space else None,
            size_bytes=space[1] if space else None,
            chunk_bytes=repository.parameters.chunk_bytes,
            zstd_level=repository.parameters.zstd_level,
            key_version=repository.keys.current.number or None,
            honours={**_last_probe(repository), **locks.summary(repository.store)},
        )


def note_probe(repository: Repository, found: Mapping[str, str]) -> None:
    """Keep what the store's server was found to honour."""
    name = f"{layout.PROBES}{new_id()}{_FOUND}"
    value = {"probed_at": datetime.now(UTC).isoformat(timespec="seconds"), "found": dict(found)}
    repository.store.put(name, [seal_object(name, value, repository.keys)])


def _last_probe(repository: Repository) -> dict[str, str]:
    """The newest such note; empty if there is none."""
    objects = repository.store
    known = [info for info in objects.infos(layout.PROBES) if info.name.endswith(_FOUND)]
    if not known:
        return {}
    newest = max(known, key=lambda info: info.modified).name
    try:
        value = unseal_object(newest, objects.get(newest), repository.keys)
    except IntegrityError as error:
        return {"probed": error.message}
    return {"probed": value["probed_at"], **value["found"]}


def adopt(catalog: Catalog, backups: Sequence[Backup]) -> None:
    """Enter finished backups, and make those whose TimeMark still stands parents again."""
    for done in sorted(backups, key=lambda b: (b.created_at, b.finished_at)):
        catalog.add_backup(done)
        try:
            mark = catalog.timemark(done.timemark)
        except NotFoundError:
            continue
        for image in done.images:
            if mark.snapshot(image.volume) is not None:
                catalog.set_parent(done.store, image.volume, mark.id, done.id)


def manifests(repository: Repository, store: str) -> Iterator[tuple[str, Manifest | OffloadError]]:
    """Every manifest of a store by object name, as it is read now, or what is wrong with it."""
    folds: Folds | None = None  # each manifest says for itself that they cannot be read
    with suppress(IntegrityError, UnavailableError):
        folds = read_folds(repository)
    for name in repository.store.list(layout.MANIFESTS):
        ident = name.removeprefix(layout.MANIFESTS)
        try:
            yield name, read_manifest(repository, ident, store, folds)
        except (IntegrityError, UnavailableError, NotFoundError) as error:
            yield name, error


def check(
    ctx: Context,
    name: str,
    *,
    rebuild_catalog: bool = False,
    rebuild_index: bool = False,
    expect_head: str | None = None,
) -> CheckReport:
    """Check a store's structure without reading the data: seals, footers, trees, references, and
    that it shows what the catalog knows and, with `expect_head`, what was noted.

    `rebuild_catalog` enters what the store holds into the catalog, and drops what it does not.
    `rebuild_index` first makes the index anew from the packs; it needs the store for itself alone.
    """
    chain.check_expected(expect_head)
    if rebuild_index:
        with opened(ctx, name, exclusive=True) as repository:
            _rebuild_index(repository)
    with opened(ctx, name, exclusive=False) as repository:
        checker = _Checker(repository, name)
        checker.indexes()
        checker.packs()
        backups = checker.backups()
        shown = chain.read_chain(repository)
        rebuilt = None
        if rebuild_catalog:
            ctx.catalog.replace_backups(name, backups)
            adopt(ctx.catalog, backups)
            from offload.services import legalholds  # which opens stores from here

            legalholds.note(ctx, name, repository)
            rebuilt = len(backups)
        checker.problems += chain.missing(
            shown, repository, ctx.catalog, name, expected=expect_head
        )
        return CheckReport(
            name=name,
            problems=tuple(checker.problems),
            packs=checker.pack_count,
            chunks=repository.index.totals()[0],
            backups=len(backups),
            orphan_packs=tuple(checker.orphans),
            rebuilt=rebuilt,
            head=shown.head,
        )


def _rebuild_index(repository: Repository) -> None:
    """One index object out of what all packs say of themselves, then the old ones go.

    Killed in between, both stand and say the same.
    """
    objects = repository.store
    old = list(objects.list(layout.INDEXES))
    packs = {pack: repository.pack_entries(pack) for pack in objects.list(layout.PACKS)}
    repository.put_index(layout.index_name(new_id()), packs)
    for name in old:
        objects.delete(name)
    repository.refresh()


class _Checker:
    """Collects problems instead of stopping at the first."""

    def __init__(self, repository: Repository, store: str) -> None:
        self.repository = repository
        self.store = store
        self.problems: list[str] = []
        self.orphans: list[str] = []
        self.pack_count = 0

    def indexes(self) -> None:
        """Every index object's hash, and that the packs it names are there."""
        objects = self.repository.store
        present = set(objects.list(layout.PACKS))
        known: set[str] = set()
        for name in objects.list(layout.INDEXES):
            try:
                known |= set(decode_index(name, objects.get(name), self.repository.keys))
            except OffloadError as error:
                self.problems.append(error.message)
                known |= present
        self.problems += [f"pack {pack} is missing" for pack in sorted(known - present)]
        self.orphans = sorted(present - known)
        self.pack_count = len(present)

    def packs(self) -> None:
        """Every pack's footer."""
        objects = self.repository.store
        for name in objects.list(layout.PACKS):

            def read(offset: int, length: int, name: str = name) -> bytes:
                return objects.get_range(name, offset, length)

            try:
                read_footer(name, objects.size(name), read, self.repository.keys)
            except OffloadError as error:
                self.problems.append(error.message)

    def backups(self) -> list[Backup]:
        """Every manifest, and that all chunks under its roots are known to the index."""
        whole = []
        for name, found in manifests(self.repository, self.store):
            if isinstance(found, OffloadError):
                self.problems.append(found.message)
                continue
            whole.append(found.backup)
            for image in found.backup.images:
                self._image(name, image)
        return whole

    def _image(self, name: str, image: ImageRecord) -> None:
        shape = self.repository.shape(image.size_bytes)
        tree = TreeReader(self.repository, bytes.fromhex(image.root), shape)
        try:
            for page in tree.data_pages():
                ids = {
                    ident
                    for leaf in tree.leaf_page(page)
                    if leaf is not None
                    for ident in (leaf.base, *leaf.deltas)
                }
                missing = len(ids) - len(self.repository.index.find_many(list(ids)))
                if missing:
                    at = page * shape.page_bytes
                    self.problems.append(
                        f"{name}: volume {image.volume} lacks {missing} chunks between byte {at} "
                        f"and {min(at + shape.page_bytes, image.size_bytes)}"
                    )
        except OffloadError as error:
            self.problems.append(f"{name}: volume {image.volume}: {error.message}")
