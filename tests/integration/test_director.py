"""The director's order, policy and labels: real volumes on XFS, parts that do as they are told."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from offload import compose
from offload.errors import CleanupError, OffloadError, PolicyError, UnavailableError
from offload.model import Consistency, Instant, TimeMark
from offload.services import director
from offload.services.context import Context, open_context
from offload.services.director import CreateOptions
from offload.snapshots.reflink import ReflinkProvider

pytestmark = pytest.mark.needs_root

APPLICATION = CreateOptions(consistency=Consistency.APPLICATION)
FILESYSTEM = CreateOptions(consistency=Consistency.FILESYSTEM)
CRASH = CreateOptions(consistency=Consistency.CRASH)


@dataclass
class Behaviour:
    """What a scripted part is to do, and what it did."""

    reaches: Consistency = Consistency.FILESYSTEM
    fails_at: str = ""  # check, arm, freeze or thaw
    breaks_at: str = ""  # still_frozen or thaw
    hangs_s: float = 0.0  # in freeze
    image_at: datetime | None = None
    events: list[tuple[str, str, float]] = field(default_factory=list)


BEHAVIOURS: dict[str, Behaviour] = {}  # part's name → what it does
EVENTS: list[tuple[str, str]] = []  # (part, what happened), in the order of all


class ScriptedPart:
    """A part for both tables; its name is `VM.KIND`."""

    def __init__(self, vm: str, entry: Any, _instance: Any) -> None:
        self.name = f"{vm}.{entry.kind}"
        self.kind = entry.kind
        self.behaviour = BEHAVIOURS.setdefault(self.name, Behaviour())
        self.unbroken = True
        self.held = False
        self.what = ("/data",)
        self.output = "said something"

    @property
    def image_at(self) -> datetime | None:
        return self.behaviour.image_at

    def _do(self, event: str) -> None:
        EVENTS.append((self.name, event))
        if self.behaviour.fails_at == event:
            raise UnavailableError(f"{self.name} cannot {event}", code="freeze-failed")
        if self.behaviour.breaks_at == event:
            self.unbroken = False

    def check(self) -> None:
        self._do("check")

    def undos(self) -> list[tuple[str, dict[str, str]]]:
        return []

    def arm(self, deadline_s: float) -> None:
        assert deadline_s == 5
        self._do("arm")

    def freeze(self, until: float) -> Consistency:
        assert 0 < until - time.monotonic() <= 5
        time.sleep(self.behaviour.hangs_s)
        self._do("freeze")
        self.held = True
        return self.behaviour.reaches

    def still_frozen(self) -> bool:
        self._do("still_frozen")
        return self.unbroken

    def thaw(self) -> None:
        if self.held:
            self.held = False
            self._do("thaw")

    def close(self) -> None:
        self.thaw()


CONFIG = """
state_dir = "{folder}/state"
runtime_dir = "{folder}/run"
[volumes.db]
provider = "reflink"
path = "{pool}/db.raw"
[volumes.web]
provider = "reflink"
path = "{pool}/web.raw"
[volumes.other]
provider = "reflink"
path = "{pool}/other.raw"
[groups.shop]
volumes = ["db", "web"]
deadline_s = 5
atomic = "{atomic}"
[groups.rest]
volumes = ["other"]
deadline_s = 5
[vms.one]
volumes = ["db"]
freeze = {{ kind = "qemu-ga", socket = "/one" }}
[[vms.one.applications]]
kind = "postgresql"
host = "/one"
user = "u"
[[vms.one.applications]]
kind = "mysql"
host = "/one"
user = "u"
[vms.two]
volumes = ["db", "web"]
freeze = {{ kind = "qemu-ga", socket = "/two" }}
[vms.far]
volumes = ["other"]
freeze = {{ kind = "qemu-ga", socket = "/far" }}
{more}
"""

Open = Callable[..., Context]


@pytest.fixture
def open_shop(tmp_path: Path, xfs_pool: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Open]:
    EVENTS.clear()
    BEHAVIOURS.clear()
    place = f"{__name__}:ScriptedPart"
    monkeypatch.setitem(compose.FREEZERS, "qemu-ga", place)
    for kind in ("postgresql", "mysql"):
        monkeypatch.setitem(compose.APPLICATIONS, kind, place)
    for name in ("db", "web", "other"):
        (xfs_pool / f"{name}.raw").write_bytes(name.encode() * 100000)
    path = tmp_path / "offload.toml"
    opened = []

    def start(atomic: str = "require", more: str = "") -> Context:
        path.write_text(CONFIG.format(folder=tmp_path, pool=xfs_pool, atomic=atomic, more=more))
        path.chmod(0o600)
        manager = open_context(path)
        opened.append(manager)
        return manager.__enter__()

    yield start
    for manager in opened:
        manager.__exit__(None, None, None)


def did(event: str) -> list[str]:
    """Which parts, in which order."""
    return [part for part, what in EVENTS if what == event]


def nothing_left(ctx: Context, pool: Path) -> bool:
    clones = list(pool.glob(".offload/**/*.raw"))
    return ctx.catalog.timemarks() == [] and clones == []


def test_applications_of_all_vms_are_held_before_the_first_file_system(open_shop: Open) -> None:
    ctx = open_shop()
    BEHAVIOURS["one.mysql"] = Behaviour(reaches=Consistency.APPLICATION, hangs_s=0.3)
    BEHAVIOURS["one.postgresql"] = Behaviour(reaches=Consistency.APPLICATION)
    mark = director.create(ctx, "shop", FILESYSTEM)
    freezes = did("freeze")
    assert freezes[:2] == ["one.postgresql", "one.mysql"]
    assert sorted(freezes[2:]) == ["one.qemu-ga", "two.qemu-ga"]
    thaws = did("thaw")
    assert [part for part in thaws if part.startswith("one")] == [
        "one.qemu-ga", "one.mysql", "one.postgresql"
    ]  # fmt: skip
    last_check = max(i for i, (_, what) in enumerate(EVENTS) if what == "still_frozen")
    first_thaw = min(i for i, (_, what) in enumerate(EVENTS) if what == "thaw")
    assert last_check < first_thaw
    one = report_of(mark, "one")
    assert [part.name for part in one.parts] == ["one.postgresql", "one.mysql", "one.qemu-ga"]
    assert one.consistency is Consistency.APPLICATION
    assert report_of(mark, "two").consistency is Consistency.FILESYSTEM
    assert mark.consistency is Consistency.FILESYSTEM, "the weakest VM's"
    assert (mark.instant, mark.skew_ms) == (Instant.HELD, 0.0)


def report_of(mark: TimeMark, vm: str) -> Any:
    return next(report for report in mark.reports if report.vm == vm)


def test_freeze_time_counts_from_the_first_that_is_kept_waiting(
    open_shop: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A CHECKPOINT keeps nobody waiting: it is done first, and is no part of the freeze."""
    monkeypatch.setattr(ScriptedPart, "holds_nothing", property(_is_mysql), raising=False)
    ctx = open_shop()
    BEHAVIOURS["one.mysql"] = Behaviour(reaches=Consistency.APPLICATION, hangs_s=2)
    BEHAVIOURS["one.postgresql"] = Behaviour(reaches=Consistency.APPLICATION)
    mark = director.create(ctx, "shop", FILESYSTEM)
    one = report_of(mark, "one")
    assert [part.kind for part in one.parts] == ["mysql", "postgresql", "qemu-ga"]
    assert one.parts[0].freeze_ms >= 2000
    assert one.parts[0].held_ms == 0
    assert 0 < mark.freeze_ms < 2000
    assert one.held_ms <= mark.freeze_ms


def _is_mysql(part: ScriptedPart) -> bool:
    return bool(part.kind == "mysql")


def test_only_vms_with_disks_on_the_groups_volumes_are_told(open_shop: Open) -> None:
    ctx = open_shop()
    director.create(ctx, "rest")
    assert {part for part, _ in EVENTS} == {"far.qemu-ga"}


def test_catalog_gives_the_report_back_as_it_was(open_shop: Open) -> None:
    ctx = open_shop()
    mark = director.create(ctx, "shop")
    assert ctx.catalog.timemark(mark.id) == mark
    assert all(part.at is not None and part.held_ms > 0 for part in mark.reports[0].parts)


@pytest.mark.parametrize("step", ["check", "arm", "freeze"])
def test_vm_that_cannot_be_frozen_fails_the_timemark_and_all_is_thawed(
    open_shop: Open, xfs_pool: Path, step: str
) -> None:
    ctx = open_shop()
    BEHAVIOURS["two.qemu-ga"] = Behaviour(fails_at=step)
    with pytest.raises(UnavailableError, match=f"two.qemu-ga cannot {step}"):
        director.create(ctx, "shop", FILESYSTEM)
    assert sorted(did("thaw")) == sorted(p for p in did("freeze") if not p.startswith("two"))
    assert nothing_left(ctx, xfs_pool)


@pytest.mark.parametrize("step", ["check", "arm", "freeze"])
def test_vm_that_cannot_be_frozen_is_recorded_where_crash_is_accepted(
    open_shop: Open, step: str
) -> None:
    ctx = open_shop(atomic="record")
    BEHAVIOURS["two.qemu-ga"] = Behaviour(fails_at=step)
    mark = director.create(ctx, "shop", CRASH)
    two = report_of(mark, "two")
    assert (two.frozen, two.consistency) == (False, Consistency.CRASH)
    assert f"cannot {step}" in two.detail
    assert report_of(mark, "one").frozen
    assert (mark.consistency, mark.instant) == (Consistency.CRASH, Instant.NONE)
    assert any("vm:two" in warning for warning in mark.warnings)


def test_application_that_fails_lowers_its_vm_where_that_is_accepted(open_shop: Open) -> None:
    ctx = open_shop()
    BEHAVIOURS["one.mysql"] = Behaviour(fails_at="freeze")
    mark = director.create(ctx, "shop", FILESYSTEM)
    one = report_of(mark, "one")
    assert (one.frozen, one.consistency) == (True, Consistency.FILESYSTEM)
    assert [part.ok for part in one.parts] == [True, False, True]
    assert "one.mysql" not in did("thaw")
    assert any("one.mysql cannot freeze" in warning for warning in mark.warnings)


def test_application_that_fails_ends_it_where_application_is_asked_for(
    open_shop: Open, xfs_pool: Path
) -> None:
    ctx = open_shop(more='[groups.solo]\nvolumes = ["db"]\ndeadline_s = 5\n')
    BEHAVIOURS["one.mysql"] = Behaviour(fails_at="freeze")
    with pytest.raises(OffloadError, match=r"one\.mysql cannot freeze"):
        director.create(ctx, "solo", APPLICATION)
    assert did("thaw").count("one.postgresql") == 1, "what was held before it is let go"
    assert not [part for part in did("freeze") if part.endswith("qemu-ga")], (
        "no file system is frozen for nothing"
    )
    assert nothing_left(ctx, xfs_pool)


@pytest.mark.parametrize("step", ["still_frozen", "thaw"])
def test_freeze_that_broke_is_never_called_consistent(
    open_shop: Open, xfs_pool: Path, step: str
) -> None:
    """Found out by a check before the thaw, or only by what the thaw says."""
    ctx = open_shop()
    BEHAVIOURS["two.qemu-ga"] = Behaviour(breaks_at=step)
    with pytest.raises(PolicyError) as caught:
        director.create(ctx, "shop", FILESYSTEM)
    assert caught.value.code == "consistency-not-reached"
    assert nothing_left(ctx, xfs_pool)
    with pytest.raises(PolicyError) as caught:
        director.create(ctx, "shop", CRASH)
    assert caught.value.code == "not-atomic", "a volume's writers went on in between"


def test_application_that_broke_lowers_its_vm(open_shop: Open) -> None:
    ctx = open_shop()
    BEHAVIOURS["one.mysql"] = Behaviour(reaches=Consistency.APPLICATION, breaks_at="still_frozen")
    mark = director.create(ctx, "shop", FILESYSTEM)
    assert report_of(mark, "one").consistency is Consistency.FILESYSTEM
    assert any("one.mysql" in warning for warning in mark.warnings)


def test_vm_with_a_least_of_its_own_is_judged_by_it(open_shop: Open) -> None:
    more = '[vms.test]\nvolumes = ["other"]\nconsistency = "crash"\n'
    more += 'freeze = { kind = "qmp", socket = "/nobody/there" }\n'
    more += '[groups.all]\nvolumes = ["db", "other"]\ndeadline_s = 5\nconsistency = "filesystem"\n'
    ctx = open_shop(more=more)
    mark = director.create(ctx, "all")
    assert mark.consistency is Consistency.CRASH, "and the label is honest"
    with pytest.raises(PolicyError) as caught:
        director.create(ctx, "all", FILESYSTEM)
    assert "VM test" in caught.value.message


def test_vm_with_disks_outside_of_the_group_is_said_to_be_partial(open_shop: Open) -> None:
    ctx = open_shop(more='[groups.half]\nvolumes = ["web"]\ndeadline_s = 5\n')
    mark = director.create(ctx, "half")
    assert any("db too, outside of group half" in warning for warning in mark.warnings)


def test_thaw_that_cannot_be_confirmed_is_loud_and_leaves_no_timemark(
    open_shop: Open, xfs_pool: Path
) -> None:
    ctx = open_shop()
    BEHAVIOURS["one.qemu-ga"] = Behaviour(fails_at="thaw")
    with pytest.raises(CleanupError) as caught:
        director.create(ctx, "shop")
    assert caught.value.code == "thaw-failed"
    assert "one.qemu-ga cannot thaw" in caught.value.message
    assert {"two.qemu-ga", "one.mysql", "one.postgresql"} <= set(did("thaw")), "all the others are"
    assert nothing_left(ctx, xfs_pool)


def test_snapshot_that_fails_after_the_freeze_thaws_all(
    open_shop: Open, xfs_pool: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ctx = open_shop()

    def fail(_self: ReflinkProvider, _plan: Any) -> Any:
        raise UnavailableError("the pool is gone")

    monkeypatch.setattr(ReflinkProvider, "snapshot", fail)
    with pytest.raises(UnavailableError, match="the pool is gone"):
        director.create(ctx, "shop")
    assert sorted(did("thaw")) == sorted(did("freeze"))
    assert nothing_left(ctx, xfs_pool)


def test_images_of_an_instant_of_their_own_have_a_skew(open_shop: Open) -> None:
    """And their writers are not held over the snapshots."""
    ctx = open_shop(atomic="record")
    early = datetime(2026, 1, 1, 12, 0, 0, tzinfo=UTC)
    BEHAVIOURS["one.qemu-ga"] = Behaviour(image_at=early)
    BEHAVIOURS["two.qemu-ga"] = Behaviour(image_at=early.replace(second=3))
    mark = director.create(ctx, "shop")
    assert mark.skew_ms == 3000
    assert mark.instant is Instant.NONE
    assert report_of(mark, "one").image_at == early
    assert ctx.catalog.timemark(mark.id) == mark
