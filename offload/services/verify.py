"""Verify: is every byte of the backups what was written?

| level | reads |
| --- | --- |
| quick | manifests, trees, index objects, the end of each pack: that all is there, no data |
| sampled | the chunks of a share of each backup, chosen anew each time |
| full | of all backups: each pack once, from start to end; of named ones: their chunks |
| in parts | as quick, and of the packs those that have gone longest without a full check |

Then the trees say which backup, volume and byte range a damaged chunk hits. A pack that is found
bad is noted in the store (`engine/quarantine.py`); a note on a pack that reads well is lifted.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime

from offload.engine.deletions import deleted_of
from offload.engine.manifests import read_folds, read_manifest
from offload.engine.pins import HeldPin, PinKind, images_of
from offload.engine.repository import Repository
from offload.engine.verified import VerifiedPacks, choose_packs
from offload.errors import OffloadError, UnavailableError
from offload.extents import normalize
from offload.format import layout
from offload.model import Backup
from offload.progress import NoProgress, Progress
from offload.services import stores, verify_packs, verify_trees
from offload.services.context import Context


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyOptions:
    """How much is read. `sample` the share of each backup's chunks; `older_than_s` and
    `budget_bytes` choose packs (verifying in parts)."""

    quick: bool = False
    sample: float | None = None
    older_than_s: float | None = None
    budget_bytes: int | None = None

    @property
    def in_parts(self) -> bool:
        """Whether only some packs are read."""
        return self.older_than_s is not None or self.budget_bytes is not None

    def describe(self) -> str:
        """For the catalog."""
        if self.quick:
            return "quick"
        return "full" if self.sample is None else f"sample {self.sample:.0%}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """Something that is not what was written. `length` 0: not a range of an image.

    `backup` and `volume` are empty for damage that hits no backup (repairable or unused objects).
    """

    store: str
    backup: str
    volume: str
    offset: int
    length: int
    what: str


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyReport:
    """What was checked, in stored bytes, and what was found.

    `packs`, `packs_read`: of the stores verified as a whole. `oldest`: since when every pack of
    them has been read in full; None if one never was, or nobody asked.
    """

    problems: tuple[Problem, ...]
    backups: int
    checked_bytes: int
    chunks: int
    sampled: float | None
    level: str
    packs: int = 0
    packs_read: int = 0
    oldest: datetime | None = None
    quarantined: tuple[str, ...] = ()  # packs noted by this run
    lifted: tuple[str, ...] = ()


def verify(
    ctx: Context,
    wanted: Sequence[str] = (),
    *,
    all_backups: bool = False,
    options: VerifyOptions | None = None,
    store: str | None = None,
    progress: Progress | None = None,
) -> VerifyReport:
    """Verify named backups, or all (of one store, or of every configured one).

    Damage is reported, never raised; what cannot be opened at all is.
    """
    chosen = options or VerifyOptions()
    per_store: dict[str, list[Backup]] = defaultdict(list)
    if all_backups:
        for name in [store] if store else sorted(ctx.instance.config.stores):
            per_store[name] = []
    for prefix in wanted:
        known = ctx.catalog.backup(prefix.removeprefix("backup:").partition("/")[0])
        per_store[known.store].append(known)
    tally = verify_packs.Tally()
    count = 0
    for name, named in per_store.items():
        with stores.opened(ctx, name, exclusive=False) as repository:
            run = _Run(
                ctx, name, repository,
                options=chosen, tally=tally, progress=progress or NoProgress(),
            )  # fmt: skip
            backups = run.manifests(None if all_backups else named)
            with _held(repository, backups):
                there = [b for b in backups if run.is_there(b)]
                run.everything(there) if all_backups else run.named(there)
            count += len(there)
    return VerifyReport(
        problems=tuple(merged(tally.problems)),
        backups=count,
        checked_bytes=tally.checked_bytes,
        chunks=tally.chunks,
        sampled=chosen.sample,
        level="in parts" if chosen.in_parts else chosen.describe(),
        packs=tally.packs,
        packs_read=tally.packs_read,
        oldest=None if tally.never else tally.oldest,
        quarantined=tuple(sorted(tally.quarantined)),
        lifted=tuple(sorted(tally.lifted)),
    )


@contextmanager
def _held(repository: Repository, backups: Sequence[Backup]) -> Iterator[None]:
    """Pinned, so that no prune makes damage of what is deleted meanwhile; a store that cannot be
    written to is read without."""
    with ExitStack() as stack:
        images = [image for backup in backups for image in images_of(backup)]
        try:
            stack.enter_context(HeldPin(repository, PinKind.READER, images=images))
        except UnavailableError as error:
            if error.code != "store-read-only":
                raise
        yield


class _Run:
    """One store."""

    def __init__(
        self,
        ctx: Context,
        store: str,
        repository: Repository,
        *,
        options: VerifyOptions,
        tally: verify_packs.Tally,
        progress: Progress,
    ) -> None:
        self.ctx = ctx
        self.repository = repository
        self.store = store
        self.options = options
        self.tally = tally
        self.progress = progress
        self.notes = verify_packs.Notes(repository, tally)
        self.trees = verify_trees.Trees(repository, store, tally, self.notes, progress)

    def everything(self, backups: Sequence[Backup]) -> None:
        """All of a store, each object once."""
        if self.options.sample is not None:
            self._chunks(backups)
            return
        packs = self._opened_packs()
        packs.indexes()
        path = self.repository.index.path.with_name(
            f"{self.repository.parameters.store_id}.verified.db"
        )
        with closing(VerifiedPacks(path)) as verified:
            how = self._packs(packs, verified)
        self.notes.finish()
        self.trees.map_damage(backups)
        self._note(backups, how)

    def _opened_packs(self) -> verify_packs.Packs:
        return verify_packs.Packs(
            self.repository, self.store, self.tally, self.notes, self.progress
        )

    def _chunks(self, backups: Sequence[Backup]) -> None:
        for backup in backups:
            self.trees.read(backup, self.options.sample)
        self.notes.finish()
        self._note(backups, self.options.describe())

    def _packs(self, packs: verify_packs.Packs, verified: VerifiedPacks) -> str:
        """Read packs, or their ends; returns what may be said of the backups afterwards."""
        options, times = self.options, verified.times()
        now = datetime.now(UTC)
        full = set(packs.sizes)
        if options.quick:
            full = set()
        elif options.in_parts:
            full = set(
                choose_packs(
                    packs.sizes, times, now,
                    older_than_s=options.older_than_s, budget_bytes=options.budget_bytes,
                )
            )  # fmt: skip
        packs.ends(sorted(set(packs.sizes) - full))
        packs.read(sorted(full))
        sound = self.notes.sound()
        verified.forget([name for name in {*full, *times} - sound if name in full or
                         name not in packs.sizes])  # fmt: skip
        verified.note(sorted(sound), now)
        times = verified.times()
        since = [times.get(name) for name in packs.sizes]
        for at in since:
            self.tally.never |= at is None
            if at is not None and (self.tally.oldest is None or at < self.tally.oldest):
                self.tally.oldest = at
        if not options.in_parts:
            return options.describe()
        read = [at for at in since if at is not None]
        if len(read) == len(since) and read:
            return f"in parts, all since {min(read):%Y-%m-%d}"
        return f"in parts, {len(read)} of {len(since)} packs so far"

    def named(self, found: Sequence[Backup]) -> None:
        """The trees of these backups, and their chunks (or a sample, or none of them)."""
        if not self.options.quick:
            self._chunks(found)
            return
        packs = self._opened_packs()
        packs.ends(sorted(self.trees.packs_of(found) & set(packs.sizes)))
        self.notes.finish()
        self.trees.map_damage(found)
        self._note(found, self.options.describe())

    def is_there(self, backup: Backup) -> bool:
        """Whether it still is, now that it is pinned: not deleted a moment ago."""
        return self.repository.store.exists(layout.manifest_name(backup.id))

    def manifests(self, chosen: Sequence[Backup] | None) -> list[Backup]:
        """The backups as their manifests say; a missing or damaged manifest is a problem."""
        expected = self.ctx.catalog.backups(store=self.store) if chosen is None else list(chosen)
        names = {layout.manifest_name(b.id): str(b.id) for b in expected}
        if chosen is None:
            for name in self.repository.store.list(layout.MANIFESTS):
                names.setdefault(name, name.removeprefix(layout.MANIFESTS))
            unseen = [b.id for b in expected if not self.is_there(b)]
            for ident in deleted_of(self.repository, unseen):  # by other hosts
                del names[layout.manifest_name(ident)]
        found = []
        folds = read_folds(self.repository)
        for ident in names.values():
            try:
                found.append(read_manifest(self.repository, ident, self.store, folds).backup)
            except OffloadError as error:
                self.tally.problem(self.store, f"the manifest: {error.message}", backup=ident)
        return found

    def _note(self, backups: Sequence[Backup], how: str) -> None:
        now = datetime.now(UTC)
        for backup in backups:
            hits = sum(1 for p in self.tally.problems if p.backup == backup.id)
            self.ctx.catalog.add_backup(backup)
            self.ctx.catalog.note_verified(backup.id, now, how, hits)


def merged(problems: Sequence[verify_packs.Found]) -> Iterator[Problem]:
    """Neighbouring ranges of one volume with one cause as one problem."""
    ranges: dict[tuple[str, str, str, str], list[tuple[int, int]]] = defaultdict(list)
    for p in problems:
        key = (p.store, p.backup, p.volume, p.what)
        ranges[key] += [(p.start, p.end)] if p.end > p.start else []
        if p.end <= p.start:
            yield Problem(
                store=p.store, backup=p.backup, volume=p.volume, offset=0, length=0, what=p.what
            )
    for (store, backup, volume, what), found in ranges.items():
        for start, end in normalize(found):
            yield Problem(
                store=store,
                backup=backup,
                volume=volume,
                offset=start,
                length=end - start,
                what=what,
            )
