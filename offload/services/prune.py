"""Prune: forget backups by rules, and free what no backup needs, beside all who use the store.

The protocol, and why it is safe: docs/design/store-protocol.md. Steps and what a crash leaves:

| step | what a crash after it leaves |
| --- | --- |
| 1 a pin says that a prune is at work | the pin: recovery takes it away, or it expires |
| 2 manifests of the forgotten backups are deleted | their space: the next prune frees it |
| 2a deltas that no kept backup ends at are merged into new packs | the packs: removed |
| 2b an index object names these packs | chunks that nobody needs: the next prune frees them |
| 2c `folds/PRUNE` has the new roots; earlier folds are deleted | both: the newest counts |
| 3 live chunks of half-empty packs are copied to new packs | packs no index names: removed |
| 4 an index object names the new packs | chunks at two places: the next prune drops one |
| 5 a tombstone says which packs will go | the tombstone: the next prune goes on with it |
| 6 index objects without these packs replace those with them | both: they say the same |
| 7 the packs are deleted, then the tombstone | some of them: the next prune goes on |

An unreadable manifest, pin or page aborts before any pack is deleted.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from offload import compose
from offload.catalog.store import Catalog
from offload.configs.stores import KeepConfig
from offload.engine.deletions import deleted_of, sweep_deletions
from offload.engine.fences import sweep_fences
from offload.engine.fold import FoldReport, fold, images_of, publish
from offload.engine.liveset import LiveSet
from offload.engine.manifests import void_folds
from offload.engine.mark import Manifests, Marker, Roots, find_roots, unsafe
from offload.engine.packplan import PackPlan, copy_live, plan_packs
from offload.engine.packwriter import PackWriter
from offload.engine.pins import HeldPin, PinKind
from offload.engine.repository import Repository
from offload.engine.retention_lock import locked_packs
from offload.engine.sweep import delete_packs, drop_from_index
from offload.engine.tombstones import Sight, Tombstone, look, packs_of, put_tombstone
from offload.errors import IntegrityError
from offload.format import layout
from offload.ids import new_id
from offload.instance import Instance
from offload.journal import Operation, step
from offload.progress import NoProgress, Progress
from offload.retention import KeepRules, Verdict, judge
from offload.services import backups as finished
from offload.services import legalholds, locks, stores
from offload.services.context import Context
from offload.services.prune_wait import (
    OWN,
    Waiting,
    bury_the_dead,
    due_tombstones,
    give_way,
    settle,
)

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class PruneReport:
    """What was (with `dry_run`: would be) forgotten and freed. Sizes in bytes.

    `waiting`: what goes with a later prune, and what it waits for.
    """

    store: str
    verdicts: tuple[Verdict, ...]
    dry_run: bool
    packs_deleted: int
    packs_rewritten: int
    freed_bytes: int
    live_bytes: int
    waiting: tuple[Waiting, ...] = ()
    folded: int = 0  # deltas that went into another piece
    folded_bytes: int = 0  # written for that


def rules_of(config: KeepConfig | None) -> KeepRules:
    """The configured rules of a store; none keeps everything."""
    if config is None:
        return KeepRules()
    return KeepRules(
        last=config.last,
        hourly=config.hourly,
        daily=config.daily,
        weekly=config.weekly,
        monthly=config.monthly,
        yearly=config.yearly,
        within_s=config.within,
        tags=config.tags,
        min_age_s=config.min_age,
    )


def prune(
    ctx: Context,
    store: str,
    *,
    rules: KeepRules | None = None,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> PruneReport:
    """Apply keep rules (the store's own unless given) and free space.

    Raises BusyError (`prune-running`) while another prune is at work in the store, IntegrityError
    (`prune-unsafe`) if something cannot be read: then no pack is deleted.
    """
    chosen = rules or rules_of(ctx.instance.config.store(store).keep)
    shown = progress or NoProgress()
    alone = bury_the_dead(ctx, store, dry_run=dry_run)
    with stores.opened(ctx, store, exclusive=False) as repository:
        if dry_run:
            with closing(LiveSet(repository.index)) as live:
                return _Prune(ctx, repository, store, live, shown, alone=alone).rehearse(chosen)
        ident = new_id()
        with ctx.journal.operation("prune", repository.store.url) as op:
            op.intend("packs", "abort-prune", _args(repository, ident))
            with (
                HeldPin(repository, PinKind.PRUNE, ident=ident) as pin,
                closing(LiveSet(repository.index)) as live,
            ):
                step("prune.pinned")
                run = _Prune(ctx, repository, store, live, shown, alone=alone)
                try:
                    report = run.run(chosen, op, pin)
                except IntegrityError:
                    pin.look()  # given up: another prune has deleted what this one saw
                    raise
            op.done("packs")
    return report


def _args(repository: Repository, ident: str) -> dict[str, str]:
    return {"store": repository.store.spec.text(), "backup": ident}


@dataclass(frozen=True, slots=True)
class _Outcome:
    """What was swept and what waits: tombstones by their prunes. `packs` were there, with sizes."""

    own: str
    swept: frozenset[str]
    waiting: Sequence[Waiting]
    tombstones: Mapping[str, Tombstone]
    packs: Mapping[str, int]


class _Prune:
    """One prune of one store."""

    def __init__(
        self,
        ctx: Context,
        repository: Repository,
        store: str,
        live: LiveSet,
        progress: Progress,
        *,
        alone: bool,
    ) -> None:
        self.ctx = ctx
        self.repository = repository
        self.store = store
        self.live = live
        self.marker = Marker(repository, live)
        self.progress = progress
        self.alone = alone
        self.now = repository.store.now()
        self._manifests: Manifests = {}  # that were read
        self.grace_s = stores.grace_of(ctx, store, repository.store)

    def run(self, rules: KeepRules, op: Operation, pin: HeldPin) -> PruneReport:
        """Do it all; see the table above."""
        give_way(self.repository, pin.id, self.now)
        seen = look(self.repository)
        pin.seen(sorted(seen.tombstones))
        self.repository.index.rely_on(seen.reliable)
        roots = self._find_roots()
        roots = settle(self.repository, self.store, roots, pin.id, self.now)
        verdicts = self._judge(roots, rules, note=True)
        verdicts = self._forget(op, verdicts)
        for ident in roots.void:
            self.repository.store.delete(layout.manifest_name(ident))
        for name in void_folds(self.repository.store):
            self.repository.store.delete(name)
        step("prune.forgotten")
        # anew: what was forgotten may be pinned by now
        folded, roots = self._fold(pin, seen, self._find_roots())
        plan, sight = self._plan(seen, roots)
        plan = self._copy(op, plan)
        pin.look()
        if plan.frees:
            put_tombstone(self.repository, pin.id, plan.frees)
            step("prune.tombstone.put")
        swept, waiting, last = self._sweep(op, pin)
        sweep_fences(self.repository.store, self.now)
        sweep_deletions(self.repository.store, self.now)
        tombstones = {**sight.tombstones, **last.tombstones}
        outcome = _Outcome(pin.id, swept, waiting, tombstones, sight.packs)
        report = self._report(verdicts, plan, outcome)
        return replace(report, folded=folded.merged, folded_bytes=folded.written_bytes)

    def rehearse(self, rules: KeepRules) -> PruneReport:
        """Say what `run` would do, and change nothing. What folding would free is not known."""
        seen = look(self.repository)
        roots = self._find_roots()
        verdicts = self._judge(roots, rules, note=False)
        gone = {v.backup.id for v in verdicts if not v.kept}
        staying = tuple(b for b in roots.backups if b.id not in gone)
        there = () if self.alone else [p for p in roots.pins if not p.expired(self.now)]
        plan, sight = self._plan(seen, replace(roots, backups=staying, pins=tuple(there)))
        tombstones = dict(sight.tombstones)
        if plan.frees:
            own = Tombstone(prune=OWN, host="", packs=frozenset(plan.frees), put_at=self.now)
            tombstones[OWN] = own
        due, waiting = due_tombstones(tombstones, there, self.now, self.grace_s)
        outcome = _Outcome(OWN, due, waiting, tombstones, sight.packs)
        return replace(self._report(verdicts, plan, outcome), dry_run=True)

    def _find_roots(self) -> Roots:
        return find_roots(self.repository, self.store, self._manifests)

    # -- what stays ------------------------------------------------------------------------------

    def _judge(self, roots: Roots, rules: KeepRules, *, note: bool) -> list[Verdict]:
        """What the rules say; what is shown by a view stays all the same."""
        self._miss_nothing(roots, note=note)
        held = (
            legalholds.note(self.ctx, self.store, self.repository)
            if note
            else legalholds.held(self.repository)
        )
        shown = finished.shown_by(self.ctx)
        verdicts = judge(roots.backups, rules, datetime.now(UTC), held.keys())
        going = [v.backup for v in verdicts if not v.kept]
        why = {
            ident: f"locked until {locks.show(until)}"
            for ident, until in locks.locked_backups(self.repository, going).items()
        }
        why |= {b.id: f"shown by view {shown[b.id]}" for b in going if b.id in shown}
        return [
            replace(v, reasons=(why[v.backup.id],), missed=()) if v.backup.id in why else v
            for v in verdicts
        ]

    def _miss_nothing(self, roots: Roots, *, note: bool) -> None:
        known = {b.id for b in self.ctx.catalog.backups(store=self.store)}
        going = {  # by another command of this host
            i.args["backup"]
            for i in self.ctx.journal.running_intents()
            if i.undo == "delete-backup"
        }
        lost = known - {b.id for b in roots.backups} - set(roots.void) - going
        deleted = deleted_of(self.repository, lost)  # by other hosts
        if note:
            for backup in deleted:
                self.ctx.catalog.delete_backup(backup)
        lost -= deleted
        if lost:
            raise unsafe(
                f"the store {self.store} lacks the manifests of {', '.join(sorted(lost))}, which "
                "the catalog knows",
                "bring them back; if they were deleted elsewhere: "
                f"offload store check {self.store} --rebuild-catalog",
            )

    def _forget(self, op: Operation, verdicts: Sequence[Verdict]) -> list[Verdict]:
        """Delete what the rules do not keep; a hold that was placed meanwhile does."""
        stay = {
            v.backup.id
            for number, v in enumerate((v for v in verdicts if not v.kept), 1)
            if not finished.erase(self.ctx, op, self.repository, v.backup, number=number)
        }
        return [
            replace(v, reasons=("held",), missed=()) if v.backup.id in stay else v for v in verdicts
        ]

    def _mark(self, roots: Roots) -> None:
        self.progress.start("marking", None)
        self.marker.mark(roots.backups, roots.pins)
        self.progress.finish("marking")

    def _fold(self, pin: HeldPin, seen: Sight, roots: Roots) -> tuple[FoldReport, Roots]:
        """Merge the steps at which no kept backup ends; the new roots count from here on.

        Its packs bear the id of this prune, so that with the prune they are given up, too.
        """
        pinned = [
            (bytes.fromhex(image.root), image.size_bytes)
            for other in roots.pins
            if other.id != pin.id
            for image in other.images
        ]
        locked = locked_packs(self.repository, seen.packs).keys()
        try:
            with PackWriter(self.repository, pin.id) as writer:
                images = images_of(roots.backups)
                report = fold(self.repository, writer, images, pinned=pinned, locked=locked)
                writer.finish()
        except IntegrityError as error:
            raise unsafe(error.message, "see: offload verify --all") from error
        step("prune.folded")
        kept = {backup.id for backup in roots.backups}
        for old in publish(self.repository, pin.id, roots.folds, kept, report.roots):
            self.repository.store.delete(old)
        return report, self._find_roots() if report.roots else roots

    # -- what goes -------------------------------------------------------------------------------

    def _plan(self, seen: Sight, roots: Roots) -> tuple[PackPlan, Sight]:
        """Plan for the packs that were there when this began, but for those of running writers."""
        self._mark(roots)
        sight = look(self.repository, seen.tombstones)  # the index knows all that is marked now
        dead = sight.dead & sight.packs.keys()
        self._choose(sight.reliable, dead)
        packs = {p: size for p, size in sight.packs.items() if p in seen.packs and p not in dead}
        busy = {p for p in packs if layout.pack_writer(p) in roots.writers}
        busy |= locked_packs(self.repository, packs).keys()
        busy |= self.live.unreadable()  # what is bad is not copied on, and its pack has more
        plan = plan_packs(self.repository, self.live, packs, untouched=busy)
        # what is in a pack that stays need not be copied
        self._choose(sight.reliable - plan.frees.keys(), dead | plan.rewrite.keys())
        return plan, sight

    def _choose(self, usable: frozenset[str], last: frozenset[str]) -> None:
        missing = self.live.choose(usable, last, self.repository.quarantine.places)
        if missing:
            raise unsafe(
                f"{missing} chunks that are in use are missing from the store {self.store}",
                "see which backups and ranges it hits: offload verify --all",
            )

    def _copy(self, op: Operation, plan: PackPlan) -> PackPlan:
        """Copy what is in use of the packs to be rewritten; those that cannot be read stay."""
        if not plan.rewrite:
            return plan
        failed = self._copy_out(op, "copies", frozenset(plan.rewrite))
        for pack, why in failed.items():
            log.warning("%s stays as it is: %s", pack, why)
        return replace(
            plan,
            keep=[*plan.keep, *failed],
            rewrite={p: n for p, n in plan.rewrite.items() if p not in failed},
        )

    def _copy_out(self, op: Operation, name: str, packs: frozenset[str]) -> dict[str, str]:
        """Copy what is in use of some packs to new ones, of a writer id of their own."""
        ident = new_id()
        op.intend(name, "abort-prune", _args(self.repository, ident))
        with (
            HeldPin(self.repository, PinKind.PRUNE, ident=ident),
            PackWriter(self.repository, ident) as writer,
        ):
            failed = copy_live(self.repository, writer, self.live, packs)
            writer.finish()
        step("prune.packs.copied")
        op.done(name)
        return failed

    def _sweep(self, op: Operation, pin: HeldPin) -> tuple[frozenset[str], list[Waiting], Sight]:
        """Delete the packs whose time has come; returns their tombstones, and what waits."""
        sight = look(self.repository)
        roots = self._find_roots()  # pins: after all tombstones are out
        others = [p for p in roots.pins if p.id != pin.id]
        now = self.repository.store.now()
        due, waiting = due_tombstones(sight.tombstones, others, now, self.grace_s)
        if due:
            self._mark(roots)
            last = look(self.repository, sight.tombstones)
            self._rescue(op, last)
            doomed = packs_of(sight.tombstones[prune] for prune in due)
            step("prune.sweep.before")
            drop_from_index(self.repository, doomed | last.vanished, roots.writers)
            delete_packs(self.repository, doomed & last.packs.keys(), due)
        else:
            drop_from_index(self.repository, frozenset(), roots.writers)
        return due, waiting, sight

    def _rescue(self, op: Operation, sight: Sight) -> None:
        """Copy out of dead packs what is in use after all: what is dead stays dead."""
        dead = sight.dead & sight.packs.keys()
        self._choose(sight.reliable, dead)
        needed = frozenset(dead & self.live.used().keys())
        if not needed:
            return
        failed = self._copy_out(op, "rescue", needed)
        if failed:
            raise unsafe(
                f"chunks in use cannot be copied: {'; '.join(sorted(failed.values()))}",
                "see which backups it hits: offload verify --all",
            )

    def _report(self, verdicts: list[Verdict], plan: PackPlan, outcome: _Outcome) -> PruneReport:
        own = outcome.own in outcome.swept
        old = packs_of(outcome.tombstones[t] for t in outcome.swept if t != outcome.own)
        sizes = outcome.packs
        freed = sum(sizes.get(p, 0) for p in old)
        return PruneReport(
            store=self.store,
            verdicts=tuple(verdicts),
            dry_run=False,
            packs_deleted=len(old & sizes.keys()) + (len(plan.drop) if own else 0),
            packs_rewritten=len(plan.rewrite),
            freed_bytes=freed + (sum(plan.frees.values()) if own else 0),
            live_bytes=plan.live_bytes,
            waiting=tuple(
                w.sized(sizes, outcome.tombstones[w.prune].packs, plan.frees)
                for w in outcome.waiting
            ),
        )


def undo_prune(instance: Instance, catalog: Catalog, args: Mapping[str, str]) -> None:  # noqa: ARG001
    """After a crash: once an index object names the copies they are in use and stay; before, they
    are removed. What has a tombstone is the next prune's. The pin goes last."""
    store = compose.open_store(args["store"])
    with closing(Repository.open(store, instance.cache_dir)) as repository:
        stores.remove_unfinished(repository, args["backup"])
