"""The director: freezes all quiescers of a group, snapshots all its volumes, thaws.

Applications of all VMs first, then the file systems of all VMs, each in parallel under one
deadline; then the snapshots; then it is asked whether every freeze has lasted; then the thaw, which
runs whatever happens, in reverse, where a freeze succeeded.

What a crash leaves at each step of `create` (all intents are durable before the first freeze):

| killed | left | recovery |
| --- | --- | --- |
| before the freeze | folders at most | removed with the planned snapshots |
| while frozen | the guardian of each quiescer thaws at once | thaw again, snapshots deleted |
| between thaw and catalog | snapshots without a row | snapshots deleted |
| after the row | a complete TimeMark that nobody was told of | row and snapshots deleted |
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime

from offload import compose
from offload.config import GroupConfig
from offload.errors import OffloadError, PolicyError
from offload.ids import new_id
from offload.journal import Operation, step
from offload.machine import Machine
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
from offload.services import groups, pools
from offload.services.context import Context
from offload.services.groups import Resolved
from offload.services.held import Held, Holding
from offload.services.undo import dump
from offload.snapshot import Plan, SnapshotProvider, VolumeState


@dataclass(frozen=True, slots=True, kw_only=True)
class CreateOptions:
    """How a TimeMark is wanted. `purpose`: who makes it (user, mount, backup)."""

    consistency: Consistency | None = None  # the least accepted; None: the group's
    keep: bool = False
    purpose: str = "user"
    id: str | None = None  # chosen beforehand by a caller that journals it
    resolved: Resolved | None = None  # looked up beforehand, with `machines`
    machines: tuple[Machine, ...] | None = None


def create(
    ctx: Context,
    group: str,
    options: CreateOptions | None = None,
    progress: Progress | None = None,
) -> TimeMark:
    """Take a TimeMark of a group.

    Raises PolicyError (`not-atomic`, `consistency-not-reached`, `pool-full`, `snapshot-too-slow`),
    what `groups.resolve` raises, and what providers and quiescers raise; then nothing is left
    behind and all is thawed.
    """
    return _Director(ctx, group, options or CreateOptions(), progress or NoProgress()).run()


class _Director:
    def __init__(
        self, ctx: Context, group: str, options: CreateOptions, progress: Progress
    ) -> None:
        self.ctx = ctx
        self.name = group
        self.options = options
        self.progress = progress
        self.resolved = options.resolved or groups.resolve(ctx, group)
        self.config: GroupConfig = self.resolved.config
        self.id = TimeMarkId(options.id or new_id())
        self.least = options.consistency or self.config.consistency
        self.volumes = [ctx.instance.config.volume(v) for v in self.config.volumes]
        self.freeze_ms = 0.0
        self.taken_at = datetime.now(UTC)  # of the snapshots
        self.warnings: list[str] = list(self.resolved.notes)
        self.machines = options.machines or ()

    def run(self) -> TimeMark:
        providers = self._providers()
        states = {v.name: providers[v.provider].inspect(v) for v in self.volumes}
        pools.ensure_room(self.ctx, states)
        with ExitStack() as stack:
            held = Holding(
                [Held(q, q.least or self.least) for q in self._quiescers(stack)],
                self.config.deadline_s,
                self.progress,
            )
            held.check()
            plans = self._plans(providers)
            self.warnings += [note for _, plan in plans for note in plan.notes]
            self._refuse_early(plans, held.entries, states)
            self._raise_fatal(plans, held)
            self._keep_settings()
            with self.ctx.journal.operation("timemark", self.name) as op:
                self._announce(op, plans, held.entries)
                for provider, plan in plans:
                    provider.prepare(plan)
                step("timemark.prepared")
                made = self._hold_and_snapshot(plans, held)
                timemark = self._judge(plans, held.entries, made)
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
        """Of the group's own entries, and of the VMs with disks on its volumes; of no others."""
        made: list[Quiescer] = []
        for entry in self.config.quiesce:
            made.append(compose.quiescer(entry, self.config.volumes, self.ctx.instance))
            stack.callback(made[-1].close)
        config = self.ctx.instance.config
        for name, vm in groups.to_quiesce(config, self.resolved, self.least).items():
            least = self.options.consistency or vm.consistency or self.least
            made.append(
                compose.vm_quiescer(name, vm, least, self.config.volumes, self.ctx.instance)
            )
            stack.callback(made[-1].close)
            outside = [volume for volume in vm.volumes if volume not in self.config.volumes]
            if outside:
                self.warnings.append(
                    f"VM {name} has disks on {', '.join(outside)} too, outside of group "
                    f"{self.name}: its image is not whole"
                )
        return made

    def _keep_settings(self) -> None:
        """Of its VMs, before anything is frozen. A TimeMark without them is better than none."""
        known = self.ctx.instance.config.vms_of(self.name)
        if self.options.machines is not None or not (self.resolved.vms or known):
            return
        from offload.services import machines  # the engine with it

        self.machines, warnings = machines.capture(self.ctx, self.resolved.chosen, self.name)
        self.warnings += warnings

    # -- before the freeze -----------------------------------------------------------------------

    def _refuse_early(
        self,
        plans: Sequence[tuple[SnapshotProvider, Plan]],
        held: Sequence[Held],
        states: Mapping[str, VolumeState],
    ) -> None:
        """Refuse what cannot end well before anything is frozen."""
        covered = {v for h in held for v in h.quiescer.volumes}
        missing = [v.name for v in self.volumes if v.name not in covered]
        going_on = {v for h in held if not h.quiescer.holds for v in h.quiescer.volumes}
        loose = [v.name for v in self.volumes if v.name in going_on or v.name not in covered]
        if not _one_instant(plans) and loose:
            self._not_atomic(loose)
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
        self, held: Sequence[Held], states: Mapping[str, VolumeState]
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
        held: Sequence[Held],
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
        self, plans: Sequence[tuple[SnapshotProvider, Plan]], held: Holding
    ) -> list[Snapshot]:
        """Freeze all, snapshot all, thaw all. The thaw runs whatever happens."""
        made: list[Snapshot] = []
        try:
            held.arm()
            step("timemark.armed")
            if not self._fatal(plans, held):
                held.hold()
            if not self._fatal(plans, held):
                held.freeze()
            step("timemark.frozen")
            if not self._fatal(plans, held):
                for provider, plan in plans:
                    made += provider.snapshot(plan)
                    step(f"timemark.snapshot.{provider.name}")
                self.taken_at = datetime.now(UTC)
                held.check_unbroken()
                step("timemark.checked")
        finally:
            self.freeze_ms = held.thaw()
        step("timemark.thawed")
        held.raise_stuck()
        self._raise_fatal(plans, held)
        return made

    def _raise_fatal(self, plans: Sequence[tuple[SnapshotProvider, Plan]], held: Holding) -> None:
        for error in self._fatal(plans, held):
            raise error

    def _fatal(
        self, plans: Sequence[tuple[SnapshotProvider, Plan]], held: Holding
    ) -> list[OffloadError]:
        """What ends the TimeMark: a freeze that failed, unless a crash-consistent image is accepted
        of that VM, and one instant does not depend on it."""
        loose_is_fine = _one_instant(plans) is not None or self.config.atomic == "record"
        return [
            entry.error
            for entry in held.entries
            if entry.error is not None and not (entry.least is Consistency.CRASH and loose_is_fine)
        ]

    # -- after the thaw --------------------------------------------------------------------------

    def _judge(
        self,
        plans: Sequence[tuple[SnapshotProvider, Plan]],
        held: Sequence[Held],
        made: Sequence[Snapshot],
    ) -> TimeMark:
        """Label what was reached, honestly; refuse it if that is less than was asked for."""
        reports = tuple(entry.report() for entry in held)
        level = self._levels(_reached_alone(plans), reports)
        instant = _one_instant(plans) or self._instant(reports)
        consistency = min(level.values(), key=lambda c: c.rank)
        broken = [r.name for r in reports if not r.frozen]
        if broken:
            self.warnings.append("not held: " + ", ".join(broken))
        self._refuse_weak(level, instant, held, reports)
        self.warnings += [
            f"{r.name} reached {r.consistency} consistency only: {bad.name}: {bad.detail}"
            for r in reports
            for bad in r.parts
            if r.frozen and not (bad.ok and bad.unbroken)
        ]
        for warning in self.warnings:
            self.progress.message(warning)
        return TimeMark(
            id=self.id,
            group=self.name,
            created_at=self.taken_at,
            snapshots=_in_order(self.volumes, made),
            consistency=consistency,
            instant=instant,
            freeze_ms=round(self.freeze_ms, 1),
            skew_ms=round(self._skew_ms(reports), 1),
            purpose=self.options.purpose,
            keep=self.options.keep,
            reports=reports,
            warnings=tuple(dict.fromkeys(self.warnings)),
            machines=self.machines,
        )

    def _levels(
        self, alone: Mapping[str, Consistency], reports: Sequence[QuiesceReport]
    ) -> dict[str, Consistency]:
        """What each volume's snapshot reached: that of the weakest VM on it. Entries of the group
        itself complete each other."""
        return {volume: _level_of(volume, alone[volume], reports) for volume in alone}

    def _instant(self, reports: Sequence[QuiesceReport]) -> Instant:
        """HELD where each volume's writers, all of them, were held."""
        held = {v for r in reports if r.frozen for v in r.volumes}
        loose = {v for r in reports if r.vm and (r.image_at or not r.frozen) for v in r.volumes}
        whole = all(v.name in held - loose for v in self.volumes)
        return Instant.HELD if whole else Instant.NONE

    def _skew_ms(self, reports: Sequence[QuiesceReport]) -> float:
        """Between the VMs' own images where they have some; what was held at one instant is of the
        snapshots'."""
        if not any(report.image_at for report in reports):
            return 0.0
        times = [report.image_at or self.taken_at for report in reports]
        return (max(times) - min(times)).total_seconds() * 1000

    def _refuse_weak(
        self,
        level: Mapping[str, Consistency],
        instant: Instant,
        held: Sequence[Held],
        reports: Sequence[QuiesceReport],
    ) -> None:
        """Each VM by its own least; a volume without VMs by the group's."""
        of_vms = {v for entry in held if entry.quiescer.vm for v in entry.quiescer.volumes}
        weak = [
            f"volume {volume} reached {reached} consistency only, {self.least}"
            for volume, reached in level.items()
            if volume not in of_vms and reached.rank < self.least.rank
        ]
        weak += [
            f"VM {report.vm} reached {report.consistency} consistency only, {entry.least}"
            for entry, report in zip(held, reports, strict=True)
            if report.vm
            and min((level[v] for v in report.volumes), key=lambda c: c.rank).rank
            < entry.least.rank
            and report.consistency.rank < entry.least.rank
        ]
        why = "; ".join(_why(report) for report in reports if _why(report))
        if weak:
            raise PolicyError(
                f"the TimeMark of group {self.name} was not kept: {weak[0]} was asked for"
                + (f" ({why})" if why else ""),
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


def _level_of(volume: str, alone: Consistency, reports: Sequence[QuiesceReport]) -> Consistency:
    vms = [r.consistency for r in reports if r.vm and volume in r.volumes]
    entries = [r.consistency for r in reports if not r.vm and volume in r.volumes]
    if entries:
        vms.append(max(entries, key=lambda c: c.rank))
    quiesced = min(vms, key=lambda c: c.rank) if vms else alone
    return max(alone, quiesced, key=lambda c: c.rank)


def _why(report: QuiesceReport) -> str:
    """What went wrong in it; of what was held and is as a power cut leaves it, the first that it
    said; else empty."""
    bad = [f"{p.name}: {p.detail}" for p in report.parts if not (p.ok and p.unbroken)]
    if report.frozen and not bad:
        weak = report.consistency is Consistency.CRASH and report.detail
        return f"{report.name}: {report.detail.splitlines()[0]}" if weak else ""
    return "; ".join(bad) or f"{report.name}: {report.detail}"


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
