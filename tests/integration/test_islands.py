"""Islands: the order of things, what is refused, what errors leave. The hypervisor and the backup
host live in this process's memory; volumes, servers, catalog and journal are real."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pytest

from offload import compose
from offload.errors import (
    BusyError,
    CleanupError,
    NotFoundError,
    OffloadError,
    PolicyError,
    UnavailableError,
    UsageError,
)
from offload.hypervisor import IslandRequest, Standing, Step
from offload.inventory import Inventory, InventoryChange, InventoryVm
from offload.island import IslandState, Placeholder, Shown
from offload.machine import DiskKind, Machine, MachineDisk
from offload.model import Consistency, Exposure, View
from offload.services import (
    director,
    island,
    island_away,
    migrate,
    placeholders,
    recover,
    status,
)
from offload.services import mount as mounts
from offload.services.context import Context, open_context
from offload.services.island_record import IslandOptions

MIB = 1 << 20
CONFIG = """
state_dir = "{folder}/state"
runtime_dir = "{folder}/run"
[pool]
min_free = "0%"
[volumes.db]
provider = "copy"
path = "{folder}/db.raw"
[volumes.web]
provider = "copy"
path = "{folder}/web.raw"
[groups.shop]
hypervisor = "kvm"
vms = ["db", "web"]
atomic = "record"
[groups.plain]
volumes = ["db"]
atomic = "record"
[hypervisors.kvm]
kind = "libvirt"
[hypervisors.vc]
kind = "vsphere"
server = "vc"
user = "u"
password_file = "{folder}/none"
[backup_hosts.island]
hypervisor = "kvm"
"""


@dataclass
class World:
    """What the hypervisor and the backup host of a test have, and what they are to do."""

    vms: list[InventoryVm] = field(default_factory=list)
    events: list[str] = field(default_factory=list)
    standing: dict[str, str] = field(default_factory=dict)  # placeholder's id → its island's
    fails: dict[str, OffloadError] = field(default_factory=dict)  # by what is called
    views: dict[str, tuple[str, ...]] = field(default_factory=dict)  # URIs, by island
    requests: list[IslandRequest] = field(default_factory=list)

    def told(self, what: str) -> None:
        self.events.append(what)
        if what in self.fails:
            raise self.fails[what]


WORLD = World()


class MemoryHypervisor:
    """A Hypervisor whose VMs are those of WORLD."""

    def __init__(self, name: str, entry: Any, _instance: object) -> None:
        self.name = name
        self.kind = entry.kind

    def __enter__(self) -> Self:
        WORLD.told("connect")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        pass

    def inventory(self) -> Inventory:
        return Inventory(hypervisor=self.name, taken_at=datetime.now(UTC), vms=tuple(WORLD.vms))

    def changes(self, _wait_s: float) -> InventoryChange:
        raise AssertionError("nobody follows here")

    def find(self, wanted: str) -> str:
        return next(vm.id for vm in WORLD.vms if vm.name == wanted)

    def machine(self, vm_id: str) -> Machine:
        WORLD.told(f"machine {vm_id}")
        (found,) = (vm for vm in WORLD.vms if vm.id == vm_id)
        return Machine(
            name=found.name,
            kind=self.kind,
            hypervisor=self.name,
            id=found.id,
            uuid=found.id,
            definition=f"<domain><name>{found.name}</name></domain>",
            disks=found.disks,
        )


class MemoryHost:
    """A BackupHost whose placeholders are those of WORLD."""

    kind = "libvirt"

    def __init__(self, name: str, _entry: object, instance: Any) -> None:
        self.name = name
        self._instance = instance

    def export(self) -> tuple[str, Exposure, bool]:
        return "nbd", Exposure(transport="unix"), False

    def check(self) -> list[str]:
        WORLD.told("check")
        return ["the host is slow"]

    def refuse(self, request: IslandRequest) -> list[str]:
        assert request.views == ()
        WORLD.told("refuse")
        self._refuse_taken(request)
        return []

    def _refuse_taken(self, request: IslandRequest) -> None:
        names = {f"p-{machine.name}" for machine in request.machines}
        if names & {key.partition("/")[2] for key in WORLD.standing}:
            raise BusyError("a placeholder has this name", code="name-taken")

    def plan(self, request: IslandRequest) -> dict[str, str]:
        WORLD.told("plan")
        return {"mark": request.id}

    def build(
        self, request: IslandRequest, record: Mapping[str, str], step: Step
    ) -> tuple[Placeholder, ...]:
        self._refuse_taken(request)
        WORLD.requests.append(request)
        WORLD.views[request.id] = tuple(shown.view.uri for shown in request.views)
        made = []
        for machine in request.machines:
            WORLD.told(f"build {machine.name}")
            key = f"{record['mark']}/p-{machine.name}"
            WORLD.standing[key] = record["mark"]
            step("register")
            made.append(
                Placeholder(
                    id=key,
                    name=f"p-{machine.name}",
                    vm=machine.name,
                    hypervisor=machine.hypervisor,
                    production=machine.id,
                    at=request.at,
                    shown=request.shown,
                    consistency=request.consistency[machine.name],
                    disks=machine.disks,
                )
            )
        return tuple(made)

    def take_down(self, record: Mapping[str, str], step: Step) -> None:
        WORLD.told("take down")
        for key in [key for key, mark in WORLD.standing.items() if mark == record["mark"]]:
            del WORLD.standing[key]
            step("unregister")

    def look(
        self, _record: Mapping[str, str], placeholders: Sequence[Placeholder]
    ) -> list[Standing]:
        WORLD.told("look")
        return [
            Standing(placeholder=entry.id, there=entry.id in WORLD.standing, power="off")
            for entry in placeholders
        ]

    def create(self, *_what: object) -> str:
        raise AssertionError("nothing is restored here")

    def destroy(self, _vm_id: str) -> None:
        raise AssertionError("nothing is restored here")


@pytest.fixture
def folder() -> Iterator[Path]:
    made = Path(tempfile.mkdtemp(prefix="ol-"))  # short: unix sockets lie in it
    yield made
    shutil.rmtree(made)


@pytest.fixture
def ctx(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Context]:
    monkeypatch.setattr(f"{__name__}.WORLD", World())
    monkeypatch.setitem(compose.HYPERVISORS, "libvirt", f"{__name__}:MemoryHypervisor")
    monkeypatch.setitem(compose.HYPERVISORS, "vsphere", f"{__name__}:MemoryHypervisor")
    monkeypatch.setitem(compose.BACKUP_HOSTS, "libvirt", f"{__name__}:MemoryHost")
    for name in ("db", "web"):
        (folder / f"{name}.raw").write_bytes(name.encode() * MIB)
        WORLD.vms.append(vm(folder, name))
    config = folder / "offload.toml"
    config.write_text(CONFIG.format(folder=folder))
    config.chmod(0o600)
    with open_context(config) as opened:
        yield opened
        WORLD.fails.clear()
        island_away.unmount_all(opened, all_views=True, force=True)
        assert WORLD.standing == {}


def vm(folder: Path, name: str, *more: str) -> InventoryVm:
    """With a disk on the volume of its name, and of `more`."""
    disks = tuple(
        MachineDisk(
            name=f"vd{letter}",
            kind=DiskKind.FILE,
            path=str(folder / f"{volume}.raw"),
            size_bytes=(folder / f"{volume}.raw").stat().st_size,
        )
        for letter, volume in zip("abc", (name, *more), strict=False)
    )
    return InventoryVm(id=f"id-{name}", name=name, power="on", disks=disks)


def left(ctx: Context) -> tuple[int, int, int, int]:
    """Islands, views, TimeMarks, unfinished operations."""
    catalog = ctx.catalog
    return (
        len(catalog.islands()),
        len(catalog.views()),
        len(catalog.timemarks()),
        len(ctx.journal.leftovers()),
    )


def served(ctx: Context) -> list[bool]:
    return [entry.alive for entry in mounts.views(ctx)]


# -- mount and unmount -----------------------------------------------------------------------------


def test_island_of_a_group_stands_on_a_fresh_timemark(ctx: Context) -> None:
    made = island.mount(ctx, "shop")
    assert made.island.name == "shop-island"
    assert made.island.state is IslandState.STANDING
    assert [view.name for view in made.views] == ["shop-island-db", "shop-island-web"]
    assert [p.name for p in made.island.placeholders] == ["p-db", "p-web"]
    assert ctx.catalog.islands() == [made.island]
    assert "the host is slow" in made.warnings
    (mark,) = ctx.catalog.timemarks()
    assert made.island.origin == f"timemark:{mark.id}"
    assert [m.name for m in mark.machines] == ["db", "web"]
    assert served(ctx) == [True, True]
    assert {entry.island for entry in mounts.views(ctx)} == {"shop-island"}
    (request,) = WORLD.requests
    assert [shown.volume for shown in request.views] == ["db", "web"]
    assert request.at == mark.created_at
    assert (request.shown, request.consistency) == (Shown.GROUP, {"db": "crash", "web": "crash"})
    before_production = ["check", "connect", "connect", "machine id-db", "machine id-web", "refuse"]
    assert WORLD.events == [*before_production, "plan", "build db", "build web"]

    gone = island_away.unmount_all(ctx, ["shop-island"])
    assert [entry.name for entry in gone.islands] == ["shop-island"]
    assert len(gone.views) == 2
    assert left(ctx) == (0, 0, 0, 0)
    assert WORLD.standing == {}


def test_island_of_named_vms_shows_their_volumes_only(ctx: Context) -> None:
    made = island.mount(ctx, "shop", IslandOptions(vms=("web",), name="small"))
    assert made.island.name == "small"
    assert [view.name for view in made.views] == ["small-web"]
    assert [p.vm for p in made.island.placeholders] == ["web"]


def test_island_of_a_timemark_leaves_it(ctx: Context) -> None:
    mark = director.create(ctx, "shop")
    made = island.mount(ctx, f"timemark:{mark.id[:6]}")
    assert made.island.origin == f"timemark:{mark.id}"
    assert made.island.placeholders[0].at == mark.created_at
    island_away.unmount_all(ctx, all_views=True)
    assert left(ctx) == (0, 0, 1, 0)


def test_two_islands_stand_side_by_side_and_go_alone(ctx: Context) -> None:
    first = island.mount(ctx, "shop", IslandOptions(vms=("db",)))
    second = island.mount(ctx, "shop", IslandOptions(vms=("web",)))
    assert second.island.name == "shop-island-2"
    island_away.unmount_all(ctx, [first.island.name])
    assert ctx.catalog.islands() == [second.island]
    assert served(ctx) == [True]


def test_unmount_of_a_group_takes_what_mounting_it_made(ctx: Context) -> None:
    mark = director.create(ctx, "shop")
    old = island.mount(ctx, f"timemark:{mark.id}", IslandOptions(vms=("db",), name="old"))
    island.mount(ctx, "shop", IslandOptions(vms=("web",)))
    mounts.mount(ctx, ["shop"])
    gone = island_away.unmount_all(ctx, group="shop")
    assert [entry.name for entry in gone.islands] == ["shop-island"]
    assert len(gone.views) == 3
    assert ctx.catalog.islands() == [old.island]
    with pytest.raises(NotFoundError):
        island_away.unmount_all(ctx, group="shoop")


def test_views_of_an_island_are_not_unmounted_alone(ctx: Context) -> None:
    made = island.mount(ctx, "shop")
    for names in ([made.views[0].name], []):
        with pytest.raises(BusyError) as refused:
            mounts.unmount(ctx, names, all_views=not names, force=True)
        assert refused.value.code == "view-in-island"
        assert refused.value.hint.endswith("offload unmount shop-island")
    with pytest.raises(BusyError, match="is a disk of placeholders"):
        migrate.migrate(ctx, made.views[0].name, str(ctx.instance.state_dir / "home.raw"))
    assert served(ctx) == [True, True]


def test_timemark_of_an_island_is_not_deleted(ctx: Context) -> None:
    from offload.services import timemark

    made = island.mount(ctx, "shop")
    with pytest.raises(BusyError):
        timemark.delete(ctx, made.island.origin.removeprefix("timemark:"))


# -- which instant ---------------------------------------------------------------------------------


def with_images(ctx: Context, at: datetime) -> str:
    """A TimeMark as VM snapshots leave it: `db` has a quiesced image of its own."""
    mark = director.create(ctx, "shop")
    from offload.model import QuiesceReport

    report = QuiesceReport(
        name="vm:db", kind="vmware", vm="db", volumes=("db",), frozen=True,
        consistency=Consistency.FILESYSTEM, image_at=at, image_in="offload.i.s",
    )  # fmt: skip
    ctx.catalog.delete_timemark(mark.id)
    ctx.catalog.add_timemark(replace(mark, reports=(report,)))
    return f"timemark:{mark.id}"


@pytest.mark.parametrize(
    ("asked", "shown", "db"),
    [
        (None, Shown.VM, "filesystem"),
        (Shown.VM, Shown.VM, "filesystem"),
        (Shown.GROUP, Shown.GROUP, "crash"),
    ],
)
def test_island_shows_the_instant_that_was_asked_for(
    ctx: Context, asked: Shown | None, shown: Shown, db: str
) -> None:
    at = datetime(2026, 11, 20, 22, tzinfo=UTC)
    island.mount(ctx, with_images(ctx, at), IslandOptions(shows=asked))
    (request,) = WORLD.requests
    assert request.shown is shown
    assert request.consistency == {"db": db, "web": "crash"}
    assert request.vm_at == {"db": at}
    assert request.vm_snapshot == {"db": "offload.i.s"}  # it is in the copy, whatever is shown


def test_instant_that_no_vm_has_is_refused(ctx: Context) -> None:
    mark = director.create(ctx, "shop")
    with pytest.raises(UsageError) as refused:
        island.mount(ctx, f"timemark:{mark.id}", IslandOptions(shows=Shown.VM))
    assert refused.value.code == "no-vm-image"


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("what", "options", "code"),
    [
        ("shop", IslandOptions(host="nohost"), "unknown-backup-host"),
        ("shop", IslandOptions(name="Bad Name"), "bad-name"),
        ("shop", IslandOptions(vms=("nobody",)), "unknown-vm"),
        ("shoop", IslandOptions(), "unknown-group"),
        ("plain", IslandOptions(), "group-without-vms"),
        ("timemark:zzz", IslandOptions(), "unknown-timemark"),
        ("timemark:zzz/db", IslandOptions(), "bad-origin"),
        ("backup:zzz", IslandOptions(), "unknown-backup"),
    ],
)
def test_island_that_makes_no_sense_is_refused_before_anything(
    ctx: Context, what: str, options: IslandOptions, code: str
) -> None:
    with pytest.raises(OffloadError) as refused:
        island.mount(ctx, what, options)
    assert refused.value.code == code
    assert "\n" not in refused.value.message
    assert left(ctx) == (0, 0, 0, 0)


def test_island_of_a_name_that_is_taken_is_refused(ctx: Context) -> None:
    island.mount(ctx, "shop", IslandOptions(name="one", vms=("db",)))
    for name in ("one", "one-db"):
        with pytest.raises(BusyError) as refused:
            island.mount(ctx, "shop", IslandOptions(name=name, vms=("web",)))
        assert refused.value.code == "name-taken"
    with pytest.raises(BusyError):
        mounts.mount(ctx, ["plain"], mounts.MountOptions(name="one"))


def test_timemark_without_settings_of_vms_is_refused(ctx: Context) -> None:
    mark = director.create(ctx, "plain")
    with pytest.raises(UsageError) as refused:
        island.mount(ctx, f"timemark:{mark.id}")
    assert refused.value.code == "no-vm-settings"


def test_vm_that_has_no_disk_on_the_volumes_is_refused(ctx: Context) -> None:
    mark = director.create(ctx, "shop")
    moved = [replace(m, disks=(replace(m.disks[0], volume="gone"),)) for m in mark.machines]
    ctx.catalog.delete_timemark(mark.id)
    ctx.catalog.add_timemark(replace(mark, machines=(mark.machines[0], moved[1])))
    with pytest.raises(PolicyError) as refused:
        island.mount(ctx, f"timemark:{mark.id}")
    assert refused.value.code == "vm-without-disks"
    assert "web" in refused.value.message
    assert left(ctx) == (0, 0, 1, 0)


def test_vm_of_another_kind_of_hypervisor_is_refused(ctx: Context) -> None:
    mark = director.create(ctx, "shop")
    ctx.catalog.delete_timemark(mark.id)
    machines = tuple(replace(machine, kind="vsphere") for machine in mark.machines)
    ctx.catalog.add_timemark(replace(mark, machines=machines))
    with pytest.raises(UsageError) as refused:
        island.mount(ctx, f"timemark:{mark.id}")
    assert refused.value.code == "wrong-host"


def test_two_vms_of_one_name_are_refused_and_stand_one_by_one(ctx: Context) -> None:
    mark = director.create(ctx, "shop")
    ctx.catalog.delete_timemark(mark.id)
    twins = tuple(replace(machine, name="twin") for machine in mark.machines)
    ctx.catalog.add_timemark(replace(mark, machines=twins))
    with pytest.raises(UsageError) as refused:
        island.mount(ctx, f"timemark:{mark.id}")
    assert refused.value.code == "same-names"
    assert "id-db, id-web" in refused.value.hint
    made = island.mount(ctx, f"timemark:{mark.id}", IslandOptions(vms=("id-web",)))
    assert [p.production for p in made.island.placeholders] == ["id-web"]


def test_settings_that_cannot_be_had_are_a_warning_for_a_timemark_and_an_error_for_an_island(
    ctx: Context,
) -> None:
    WORLD.fails["machine id-db"] = UnavailableError("the file is locked")
    mark = director.create(ctx, "shop")
    assert [machine.name for machine in mark.machines] == ["web"]
    assert any("the file is locked" in warning for warning in mark.warnings)
    with pytest.raises(UnavailableError, match="the file is locked"):
        island.mount(ctx, "shop")


# -- what errors leave -----------------------------------------------------------------------------


@pytest.mark.parametrize("at", ["check", "refuse", "plan", "build db", "build web"])
def test_mount_that_fails_leaves_nothing(ctx: Context, at: str) -> None:
    WORLD.fails[at] = UnavailableError("the host went away")
    with pytest.raises(UnavailableError, match="went away"):
        island.mount(ctx, "shop")
    assert left(ctx) == (0, 0, 0, 0)
    assert WORLD.standing == {}


def test_mount_that_fails_and_cannot_be_taken_down_keeps_its_views_served(ctx: Context) -> None:
    WORLD.fails |= {
        "build web": UnavailableError("the host went away"),
        "take down": CleanupError("still there"),
    }
    with pytest.raises(UnavailableError) as failed:
        island.mount(ctx, "shop")
    assert any("still there" in note for note in failed.value.__notes__)
    assert left(ctx) == (1, 2, 1, 1)
    assert served(ctx) == [True, True]
    (stuck,) = ctx.catalog.islands()
    assert stuck.state is IslandState.BUILDING

    with pytest.raises(CleanupError, match="still there"):
        ctx.journal.recover()
    assert served(ctx) == [True, True]

    del WORLD.fails["take down"]
    ctx.journal.recover()
    assert left(ctx) == (0, 0, 0, 0)
    assert WORLD.standing == {}


def test_unmount_that_fails_keeps_the_views_served_and_is_tried_again(ctx: Context) -> None:
    island.mount(ctx, "shop")
    WORLD.fails["take down"] = CleanupError("a backup reads it", hint="wait")
    with pytest.raises(CleanupError, match="a backup reads it"):
        island_away.unmount_all(ctx, ["shop-island"])
    assert WORLD.events.count("take down") == 1
    assert left(ctx) == (1, 2, 1, 0)
    assert served(ctx) == [True, True]
    assert ctx.catalog.islands()[0].state is IslandState.GOING
    assert any("half gone" in alarm for alarm in status.collect(ctx).alarms)

    report = recover.recover(ctx)
    assert report.taken_down == ()
    assert any("a backup reads it (wait)" in warning for warning in report.warnings)

    WORLD.fails.clear()
    assert [entry.name for entry in recover.recover(ctx).taken_down] == ["shop-island"]
    assert left(ctx) == (0, 0, 0, 0)


def test_island_that_cannot_go_does_not_keep_the_others(ctx: Context) -> None:
    stuck = island.mount(ctx, "shop", IslandOptions(vms=("db",), name="stuck"))
    mounts.mount(ctx, ["plain"])
    WORLD.fails["take down"] = CleanupError("still there")
    with pytest.raises(CleanupError):
        island_away.unmount_all(ctx, all_views=True)
    assert [view.id for view in ctx.catalog.views()] == list(stuck.island.views)


def test_views_of_an_island_are_served_again_at_their_addresses(ctx: Context) -> None:
    from offload.services.undo import run_undo

    made = island.mount(ctx, "shop")
    for view in made.views:  # what a reboot does
        end_server(ctx, view)
    assert served(ctx) == [False, False]
    (looked,) = placeholders.look(ctx)
    assert looked.dead == ("shop-island-db", "shop-island-web")
    recover.recover(ctx)
    assert served(ctx) == [True, True]
    assert [view.uri for view in ctx.catalog.views()] == [view.uri for view in made.views]
    assert ctx.catalog.islands() == [made.island]
    # an unmount that was cut off before it had announced that the island goes
    run_undo(ctx.instance, ctx.catalog, "withdraw-view", {"id": made.views[0].id})
    assert served(ctx) == [True, True]
    ctx.catalog.update_island(replace(made.island, state=IslandState.GOING))
    with pytest.raises(CleanupError, match="is not gone for sure"):
        run_undo(ctx.instance, ctx.catalog, "withdraw-view", {"id": made.views[0].id})


def end_server(ctx: Context, view: View) -> None:
    target = compose.target(view.target, ctx.instance)
    target.withdraw(ctx.instance.views_dir / view.id, view.server)


# -- list, check, refresh --------------------------------------------------------------------------


def findings(ctx: Context) -> list[tuple[str, str]]:
    return [(f.placeholder or f.vm, f.what) for f in placeholders.check(ctx).findings]


def test_check_of_what_stands_as_production_is_finds_nothing(ctx: Context) -> None:
    island.mount(ctx, "shop")
    report = placeholders.check(ctx, ["shop-island"])
    assert (report.islands, report.placeholders, report.findings) == (1, 2, ())
    with pytest.raises(NotFoundError) as refused:
        placeholders.check(ctx, ["shop"])
    assert refused.value.code == "unknown-island"


def test_check_names_each_drift_of_production(ctx: Context, folder: Path) -> None:
    island.mount(ctx, "shop")
    db, web = WORLD.vms
    (disk,) = db.disks
    snapshot = replace(disk, path=f"{disk.path}.snap", chain=(disk.path,))  # moves nothing
    WORLD.vms[0] = replace(db, disks=(snapshot,))
    assert [what for who, what in findings(ctx) if who == "p-db" and "was" in what] == []

    added = replace(web.disks[0], name="vdb")
    grown = replace(disk, size_bytes=disk.size_bytes + MIB)
    moved = replace(web.disks[0], path=str(folder / "db.raw"))
    WORLD.vms[:] = [replace(db, name="sql", disks=(grown,)), replace(web, disks=(moved, added))]
    found = findings(ctx)
    assert ("p-db", "VM db is called sql now") in found
    assert ("p-db", "disk vda was 2.0 MiB, it is 3.0 MiB now") in found
    assert ("p-web", "disk vdb of 3.0 MiB was added") in found
    assert ("p-web", f"disk vda was {folder}/web.raw, it is {folder}/db.raw now") in found

    WORLD.vms[:] = [db, replace(web, disks=(added,))]
    assert ("p-web", "disk vda was removed") in findings(ctx)


def test_check_names_vms_that_came_and_went(ctx: Context, folder: Path) -> None:
    island.mount(ctx, "shop")
    WORLD.vms.pop()
    found = findings(ctx)
    assert ("p-web", "VM web is gone from kvm") in found
    WORLD.vms.append(replace(vm(folder, "web"), id="another"))
    assert ("web", "group shop chooses VM web now, which has no placeholder") in findings(ctx)


def test_check_says_what_stands_no_more_and_what_cannot_be_asked(ctx: Context) -> None:
    island.mount(ctx, "shop")
    WORLD.standing.popitem()
    assert ("p-web", "it is not there any more") in findings(ctx)
    WORLD.fails |= {"look": UnavailableError("no answer"), "connect": UnavailableError("down")}
    said = [what for _, what in findings(ctx)]
    assert "backup host island cannot be asked: no answer" in said
    assert "down" in said


def test_refresh_shows_a_new_point_in_time_under_the_same_names(ctx: Context) -> None:
    old = island.mount(ctx, "shop", IslandOptions(vms=("web",), name="mine"))
    (new,) = placeholders.refresh(ctx, ["mine"])
    assert new.island.id != old.island.id
    assert new.island.origin != old.island.origin
    assert new.island.name == "mine"
    assert [p.name for p in new.island.placeholders] == ["p-web"]
    assert [view.name for view in new.views] == [view.name for view in old.views]
    assert ctx.catalog.islands() == [new.island]
    assert left(ctx) == (1, 1, 1, 0)
    assert set(WORLD.standing.values()) == {new.island.id}


def test_refresh_that_cannot_begin_leaves_the_old_one_standing(ctx: Context) -> None:
    old = island.mount(ctx, "shop")
    WORLD.vms.pop()
    with pytest.raises(NotFoundError):
        list(placeholders.refresh(ctx, ["shop-island"]))
    assert ctx.catalog.islands() == [old.island]
    assert served(ctx) == [True, True]
    assert left(ctx) == (1, 2, 1, 0)


def test_refresh_that_fails_later_says_that_the_old_one_is_gone(ctx: Context) -> None:
    island.mount(ctx, "shop")
    WORLD.fails["build web"] = UnavailableError("the host went away")
    with pytest.raises(UnavailableError) as failed:
        list(placeholders.refresh(ctx, ["shop-island"]))
    assert any("--name shop-island" in note for note in failed.value.__notes__)
    assert left(ctx) == (0, 0, 0, 0)
