"""TimeMarks: the director that freezes, snapshots and thaws a group, and their end.

What a crash leaves at each step of `create` (all intents are durable before the first freeze):

| killed | left | recovery |
| --- | --- | --- |
| before the freeze | folders at most | removed with the planned snapshots |
| while frozen | the guardian of each quiescer thaws at once | thaw again, snapshots deleted |
| between thaw and catalog | snapshots without a row | snapshots deleted |
| after the row | a complete TimeMark that nobody was told of | row and snapshots deleted |
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from json import loads

from offload import compose
from offload.catalog.store import Catalog
from offload.config import GroupConfig
from offload.errors import BusyError, CleanupError, NotFoundError, OffloadError, PolicyError
from offload.holds import claim_timemark
from offload.ids import new_id
from offload.instance import Instance
from offload.journal import Operation, step
from offload.model import (
    Consistency,
    Instant,
    QuiesceReport,
    Snapshot,
    TimeMark,
    TimeMarkId,
    Volume,
)
from offload.progress import NoProgress, Progress
from offload.quiesce import Quiescer
from offload.services import pools
from offload.services.context import Context
from offload.services.undo import dump
from offload.snapshot import Plan, SnapshotProvider, VolumeState

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class CreateOptions:
    """How a TimeMark is wanted. `purpose`: who makes it (user, mount, backup)."""

    consistency: Consistency | None = None  # the least accepted; None: the group's
    keep: bool = False
    purpose: str = "user"
    id: str | None = None  # chosen beforehand by a caller that journals it


def create(
    ctx: Context,
    group: str,
    options: CreateOptions | None = None,
    progress: Progress | None = None,
) -> TimeMark:
    """Take a TimeMark of a group.

    Raises PolicyError (`not-atomic`, `consistency-not-reached`, `pool-full`, `snapshot-too-slow`),
    and what providers and quiescers raise; then nothing is left behind and all is thawed.
    """
    return _Director(ctx, group, options or CreateOptions(), progress or NoProgress()).run()


@dataclass(slots=True)
class _Held:
    """One quiescer in use."""

    quiescer: Quiescer
    reached: Consistency | None = None
    began: float = 0.0
    freeze_ms: float = 0.0
    held_ms: float = 0.0
    unbroken: bool = False
    error: OffloadError | None = None

    def report(self) -> QuiesceReport:
        good = self.reached is not None and self.unbroken
        detail = self.quiescer.output
        if self.error is not None:
            detail = self.error.message
        elif not self.unbroken:
            detail = "the freeze had ended by itself before the snapshot was complete"
        return QuiesceReport(
            name=self.quiescer.name,
            kind=self.quiescer.kind,
            volumes=self.quiescer.volumes,
            frozen=good,
            consistency=self.reached if good and self.reached else Consistency.CRASH,
            freeze_ms=round(self.freeze_ms, 1),
            held_ms=round(self.held_ms, 1),
            detail=detail,
        )


class _Director:
    def __init__(
        self, ctx: Context, group: str, options: CreateOptions, progress: Progress
    ) -> None:
        self.ctx = ctx
        self.name = group
        self.options = options
        self.progress = progress
        self.config: GroupConfig = ctx.instance.config.group(group)
        self.id = TimeMarkId(options.id or new_id())
        self.least = options.consistency or self.config.consistency
        self.volumes = [ctx.instance.config.volume(v) for v in self.config.volumes]
        self.freeze_ms = 0.0
        self.warnings: list[str] = []

    def run(self) -> TimeMark:
        providers = self._providers()
        states = {v.name: providers[v.provider].inspect(v) for v in self.volumes}
        pools.ensure_room(self.ctx, states)
        with ExitStack() as stack:
            held = [_Held(q) for q in self._quiescers(stack)]
            plans = self._plans(providers)
            self.warnings += [note for _, plan in plans for note in plan.notes]
            self._refuse_early(plans, held, states)
            with self.ctx.journal.operation("timemark", self.name) as op:
                self._announce(op, plans, held)
                for provider, plan in plans:
                    provider.prepare(plan)
                step("timemark.prepared")
                made = self._hold_and_snapshot(plans, held)
                timemark = self._judge(plans, held, made)
                for provider, _ in plans:
                    provider.settle([s for s in made if s.provider == provider.name])
                step("timemark.settled")
                self.ctx.catalog.add_timemark(timemark)
                op.done("catalog")
        return timemark

    def _providers(self) -> dict[str, SnapshotProvider]:
        names = dict.fromkeys(v.provider for v in self.volumes)
        return {n: compose.snapshot_provider(n, self.ctx.instance.id) for n in names}

    def _plans(
        self, providers: Mapping[str, SnapshotProvider]
    ) -> list[tuple[SnapshotProvider, Plan]]:
        return [
            (provider, provider.plan(self.id, [v for v in self.volumes if v.provider == name]))
            for name, provider in providers.items()
        ]

    def _quiescers(self, stack: ExitStack) -> list[Quiescer]:
        made = []
        for entry in self.config.quiesce:
            quiescer = compose.quiescer(entry, self.config.volumes, self.ctx.instance)
            stack.callback(quiescer.close)
            quiescer.check()
            made.append(quiescer)
        return made

    # -- before the freeze -----------------------------------------------------------------------

    def _refuse_early(
        self,
        plans: Sequence[tuple[SnapshotProvider, Plan]],
        held: Sequence[_Held],
        states: Mapping[str, VolumeState],
    ) -> None:
        """Refuse what cannot end well before anything is frozen."""
        covered = {v for h in held for v in h.quiescer.volumes}
        missing = [v.name for v in self.volumes if v.name not in covered]
        if not _one_instant(plans) and missing:
            self._not_atomic(missing)
        self._refuse_freezing_twice(held, states)
        reached = _reached_alone(plans)
        weak = [v for v in missing if reached[v].rank < self.least.rank]
        if weak:
            raise PolicyError(
                f"group {self.name} asks for {self.least} consistency, but nothing quiesces "
                + ", ".join(weak),
                code="consistency-not-reached",
                hint=f"add a [[groups.{self.name}.quiesce]] entry, or accept less: "
                "--consistency crash",
            )
        estimate = sum(plan.estimate_s for _, plan in plans)
        if held and estimate > self.config.deadline_s:
            extents = sum(s.extents for s in states.values())
            raise PolicyError(
                f"the snapshots of group {self.name} would take about {estimate:.1f} s "
                f"({extents} extents), longer than its deadline of {self.config.deadline_s:g} s",
                code="snapshot-too-slow",
                hint="defragment the volumes (xfs_fsr, btrfs filesystem defragment) "
                f"or raise groups.{self.name}.deadline_s",
            )

    def _refuse_freezing_twice(
        self, held: Sequence[_Held], states: Mapping[str, VolumeState]
    ) -> None:
        """What freezes a file system with its device cannot do so while it is frozen."""
        for entry in held:
            twice = [v for v in entry.quiescer.freezes if states[v].freezes_itself]
            if twice:
                raise PolicyError(
                    f"{entry.quiescer.name} freezes file systems on {', '.join(twice)}, which the "
                    "snapshot freezes itself: it would fail",
                    code="frozen-twice",
                    hint=f"remove their mount points from mounts in [[groups.{self.name}.quiesce]]"
                    "; writers of several volumes are held by pre and post commands",
                )

    def _not_atomic(self, missing: Sequence[str]) -> None:
        what = (
            f"the writers of {', '.join(missing)} cannot be held, and snapshots of group "
            f"{self.name} are not one instant without that"
        )
        if self.config.atomic == "require":
            raise PolicyError(
                what,
                code="not-atomic",
                hint=f"add a [[groups.{self.name}.quiesce]] entry that holds them, "
                'or accept it with atomic = "record"',
            )
        self.warnings.append(what)

    def _announce(
        self,
        op: Operation,
        plans: Sequence[tuple[SnapshotProvider, Plan]],
        held: Sequence[_Held],
    ) -> None:
        """All intents, durable before the first freeze; undone in reverse: thaw first."""
        op.intend("catalog", "forget-timemark", {"id": self.id})
        for provider, plan in plans:
            for volume, ref in zip(plan.volumes, plan.refs, strict=True):
                op.intend(f"snapshot-{volume.name}", "delete-snapshot", _ref(provider.name, ref))
        for number, entry in enumerate(held):
            for action, args in entry.quiescer.undos():
                op.intend(f"freeze-{number}", action, args)

    # -- the freeze ------------------------------------------------------------------------------

    def _hold_and_snapshot(
        self, plans: Sequence[tuple[SnapshotProvider, Plan]], held: Sequence[_Held]
    ) -> list[Snapshot]:
        """Freeze all, snapshot all, thaw all. The thaw runs whatever happens."""
        for entry in held:
            entry.quiescer.arm(self.config.deadline_s)
        began = time.monotonic()
        made: list[Snapshot] = []
        try:
            self._freeze(held)
            step("timemark.frozen")
            if self._may_go_on(held):
                for provider, plan in plans:
                    made += provider.snapshot(plan)
                    step(f"timemark.snapshot.{provider.name}")
            for entry in held:
                if entry.reached is not None:
                    entry.unbroken = entry.quiescer.still_frozen()
        finally:
            self._thaw(held)
            self.freeze_ms = (time.monotonic() - began) * 1000 if held else 0.0
        step("timemark.thawed")
        self._raise_failed(held)
        return made

    def _freeze(self, held: Sequence[_Held]) -> None:
        if not held:
            return
        with ThreadPoolExecutor(max_workers=len(held)) as crew:
            list(crew.map(self._freeze_one, held))

    def _freeze_one(self, entry: _Held) -> None:
        entry.began = time.monotonic()
        try:
            entry.reached = entry.quiescer.freeze()
        except OffloadError as error:
            entry.error = error
        entry.freeze_ms = (time.monotonic() - entry.began) * 1000

    def _may_go_on(self, held: Sequence[_Held]) -> bool:
        """A failed freeze ends the TimeMark, unless the group accepts crash-consistent ones."""
        tolerant = self.least is Consistency.CRASH and self.config.atomic == "record"
        return tolerant or all(entry.error is None for entry in held)

    def _raise_failed(self, held: Sequence[_Held]) -> None:
        if not self._may_go_on(held):
            raise next(entry.error for entry in held if entry.error is not None)

    def _thaw(self, held: Sequence[_Held]) -> None:
        failed = []
        for entry in reversed(held):
            if entry.reached is None:
                entry.quiescer.close()
                continue
            try:
                entry.quiescer.thaw()
            except OffloadError as error:
                failed.append(error)
            entry.held_ms = (time.monotonic() - entry.began) * 1000
            entry.quiescer.close()
        if failed:
            raise CleanupError(
                "; ".join(error.message for error in failed),
                code="thaw-failed",
                hint="thaw by hand at once (fsfreeze --unfreeze), then: offload recover",
            )

    # -- after the thaw --------------------------------------------------------------------------

    def _judge(
        self,
        plans: Sequence[tuple[SnapshotProvider, Plan]],
        held: Sequence[_Held],
        made: Sequence[Snapshot],
    ) -> TimeMark:
        """Label what was reached, honestly; refuse it if that is less than was asked for."""
        reports = tuple(entry.report() for entry in held)
        level = _reached_alone(plans)
        for report in reports:
            if report.frozen:
                for volume in report.volumes:
                    level[volume] = max(level[volume], report.consistency, key=lambda c: c.rank)
        covered = {v for report in reports if report.frozen for v in report.volumes}
        instant = _one_instant(plans) or (
            Instant.HELD if all(v.name in covered for v in self.volumes) else Instant.NONE
        )
        consistency = min(level.values(), key=lambda c: c.rank)
        broken = [r.name for r in reports if not r.frozen]
        if broken:
            self.warnings.append("not held: " + ", ".join(broken))
        self._refuse_weak(consistency, instant, reports)
        for warning in self.warnings:
            self.progress.message(warning)
        return TimeMark(
            id=self.id,
            group=self.name,
            created_at=datetime.now(UTC),
            snapshots=_in_order(self.volumes, made),
            consistency=consistency,
            instant=instant,
            freeze_ms=round(self.freeze_ms, 1),
            purpose=self.options.purpose,
            keep=self.options.keep,
            reports=reports,
            warnings=tuple(dict.fromkeys(self.warnings)),
        )

    def _refuse_weak(
        self, consistency: Consistency, instant: Instant, reports: Sequence[QuiesceReport]
    ) -> None:
        why = "; ".join(f"{r.name}: {r.detail}" for r in reports if not r.frozen)
        if consistency.rank < self.least.rank:
            raise PolicyError(
                f"the TimeMark of group {self.name} reached {consistency} consistency only, "
                f"{self.least} was asked for" + (f" ({why})" if why else ""),
                code="consistency-not-reached",
                hint="mend the cause, or accept less: --consistency crash",
            )
        if instant is Instant.NONE and self.config.atomic == "require":
            raise PolicyError(
                f"the snapshots of group {self.name} are not of one instant"
                + (f" ({why})" if why else ""),
                code="not-atomic",
                hint='mend the cause, or accept it with atomic = "record"',
            )


def _one_instant(plans: Sequence[tuple[SnapshotProvider, Plan]]) -> Instant | None:
    """ONE where the storage makes one instant of the whole group by itself."""
    if len(plans) == 1 and plans[0][1].instant_alone is Instant.ONE:
        return Instant.ONE
    return None


def _reached_alone(plans: Sequence[tuple[SnapshotProvider, Plan]]) -> dict[str, Consistency]:
    """What each volume's snapshot reaches without a quiescer."""
    return {
        volume.name: level
        for _, plan in plans
        for volume, level in zip(
            plan.volumes,
            plan.consistency or [Consistency.CRASH] * len(plan.volumes),
            strict=True,
        )
    }


def _in_order(volumes: Sequence[Volume], made: Sequence[Snapshot]) -> tuple[Snapshot, ...]:
    by_name = {s.volume: s for s in made}
    return tuple(by_name[v.name] for v in volumes)


def _ref(provider: str, ref: Mapping[str, str]) -> dict[str, str]:
    return {"provider": provider, "ref": dump(dict(ref))}


# -- the end of a TimeMark ---------------------------------------------------------------------


def users(ctx: Context, timemark: str) -> list[str]:
    """Names of the views that show a TimeMark."""
    start = f"timemark:{timemark}/"
    return [view.name for view in ctx.catalog.views() if view.origin.startswith(start)]


def check_deletable(ctx: Context, timemark: TimeMark) -> None:
    """BusyError (`timemark-in-use`) if a view shows it."""
    shown = users(ctx, timemark.id)
    if shown:
        raise BusyError(
            f"timemark {timemark.id} is shown by {', '.join(shown)}",
            code="timemark-in-use",
            hint=f"first: offload unmount {' '.join(shown)}",
        )


def delete(ctx: Context, prefix: str) -> TimeMark:
    """Delete a TimeMark and its snapshots. BusyError while a view, backup or restore reads it."""
    timemark = ctx.catalog.timemark(prefix)
    check_deletable(ctx, timemark)
    with claim_timemark(ctx.instance, timemark.id):
        check_deletable(ctx, timemark)
        with ctx.journal.operation("timemark-delete", timemark.id) as op:
            # one intent for all: of several, a crash between two would make half durable
            op.intend("all", "delete-timemark", {"id": timemark.id})
            for snapshot in timemark.snapshots:
                provider = compose.snapshot_provider(snapshot.provider, ctx.instance.id)
                provider.delete(dict(snapshot.ref))
                op.done(f"snapshot-{snapshot.volume}")
            _forget(ctx.catalog, timemark.id)
            op.done("catalog")
    return timemark


def delete_if_unused(ctx: Context, timemark: str) -> bool:
    """Delete a TimeMark that offload made for itself, once nothing needs it any more.

    Needed by: a view, a running reader, being the parent of the next incremental.
    """
    if _unneeded(ctx.catalog, timemark) is None:
        return False
    try:
        delete(ctx, timemark)
    except BusyError:
        return False
    except OffloadError as error:  # what it served for is done; the journal keeps it for later
        log.warning("timemark %s could not be deleted yet: %s", timemark, error.message)
        return False
    return True


def _unneeded(catalog: Catalog, timemark: str) -> TimeMark | None:
    """The TimeMark, if offload made it for itself and neither a view nor a parent link needs it."""
    try:
        known = catalog.timemark(timemark)
    except NotFoundError:
        return None
    if known.purpose == "user" or known.keep or _is_parent(catalog, known.id):
        return None
    start = f"timemark:{known.id}/"
    return None if any(v.origin.startswith(start) for v in catalog.views()) else known


def _is_parent(catalog: Catalog, timemark: str) -> bool:
    return any(link.timemark == timemark for link in catalog.parents())


def _forget(catalog: Catalog, timemark: str) -> None:
    catalog.drop_parents(timemark)
    catalog.delete_timemark(timemark)


def undo_snapshot(instance: Instance, catalog: Catalog, args: Mapping[str, str]) -> None:  # noqa: ARG001
    """Delete a snapshot, made or half made."""
    compose.snapshot_provider(args["provider"], instance.id).delete(loads(args["ref"]))


def undo_timemark(instance: Instance, catalog: Catalog, args: Mapping[str, str]) -> None:  # noqa: ARG001
    """Forget a TimeMark whose snapshots are gone."""
    _forget(catalog, args["id"])


def undo_delete(instance: Instance, catalog: Catalog, args: Mapping[str, str]) -> None:
    """Finish the deletion of a TimeMark: the row goes last, it names the snapshots."""
    try:
        known = catalog.timemark(args["id"])
    except NotFoundError:
        return
    for snapshot in known.snapshots:
        compose.snapshot_provider(snapshot.provider, instance.id).delete(dict(snapshot.ref))
    _forget(catalog, known.id)


def undo_unused(instance: Instance, catalog: Catalog, args: Mapping[str, str]) -> None:
    """Delete TimeMarks (`ids`, JSON) that offload made for itself, where nothing needs them."""
    for timemark in loads(args["ids"]):
        if _unneeded(catalog, timemark) is None:
            continue
        try:
            with claim_timemark(instance, timemark):
                undo_delete(instance, catalog, {"id": timemark})
        except BusyError:
            continue  # somebody reads it; it stays, and goes with the next backup or prune
