"""Fleeces of disks of a running QEMU."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from offload import compose, run
from offload.errors import BusyError, OffloadError, PolicyError
from offload.model import Instant, NbdSource, Qcow2Source, Snapshot, Volume
from offload.qmp import Qmp
from offload.snapshot import Plan
from offload.snapshots import qcow2_live
from offload.snapshots.qcow2 import Qcow2Provider
from offload.testing.qemu import RunningQemu, running_qemu

MIB = 1 << 20
SIZE = 64 * MIB


@dataclass
class Lab:
    folder: Path
    qemu: RunningQemu
    volumes: tuple[Volume, ...]
    provider: Qcow2Provider

    def take(self, timemark: str) -> tuple[Plan, tuple[Snapshot, ...]]:
        plan = self.provider.plan(timemark, self.volumes)
        self.provider.prepare(plan)
        made = self.provider.snapshot(plan)
        self.provider.settle(made)
        return plan, made

    def drop(self, plan: Plan) -> None:
        for ref in plan.refs:
            self.provider.delete(dict(ref))

    def read(self, snapshot: Snapshot, offset: int, length: int = 4096) -> set[int]:
        image = compose.open_image(self.provider.source(snapshot))
        try:
            return set(image.pread(offset, length))
        finally:
            image.close()

    def state(self) -> dict[str, Any]:
        """All in QEMU and on disk that a TimeMark could leave; file nodes have random names."""
        with Qmp(self.qemu.socket) as qmp:
            nodes = qmp.execute("query-named-block-nodes", {"flat": True})
            return {
                "jobs": qmp.execute("query-block-jobs"),
                "exports": qmp.execute("query-block-exports"),
                "nodes": sorted(n["node-name"] for n in nodes if n["node-name"][0] != "#"),
                "count": len(nodes),
                "bitmaps": [n["dirty-bitmaps"] for n in nodes if n.get("dirty-bitmaps")],
                "fdsets": qmp.execute("query-fdsets"),
                "files": sorted(str(p) for p in self.folder.rglob("*")),
            }


@pytest.fixture
def folder() -> Iterator[Path]:
    """Short: unix sockets lie in it."""
    made = Path(tempfile.mkdtemp(prefix="ol-"))
    yield made
    shutil.rmtree(made)


@pytest.fixture
def lab(folder: Path) -> Iterator[Lab]:
    socket = folder / "qmp"
    volumes = []
    for name in ("db", "web"):
        path = folder / f"{name}.qcow2"
        run.run(["qemu-img", "create", "-q", "-f", "qcow2", str(path), str(SIZE)])
        volumes.append(Volume(name=name, provider="qcow2", path=path, qmp_socket=socket))
    with running_qemu(socket, [v.path for v in volumes]) as qemu:
        qemu.write(0, 0, 4 * MIB, 1)
        qemu.write(1, 8 * MIB, MIB, 2)
        yield Lab(folder, qemu, tuple(volumes), Qcow2Provider("ilive"))


def test_live_writes_after_the_timemark_do_not_show(lab: Lab) -> None:
    before = lab.state()
    plan, (db, web) = lab.take("t1")
    assert plan.instant_alone is Instant.ONE
    assert all("ends with it" in note for note in plan.notes)
    assert len(plan.notes) == 2
    assert isinstance(lab.provider.source(db), NbdSource)
    lab.qemu.write(0, MIB, MIB, 9)
    lab.qemu.write(1, 8 * MIB, MIB, 9)
    lab.qemu.write(1, 20 * MIB, MIB, 9)
    assert lab.read(db, 0, 4 * MIB) == {1}
    assert lab.read(db, 4 * MIB) == {0}
    assert lab.read(web, 8 * MIB, MIB) == {2}
    assert lab.read(web, 20 * MIB, MIB) == {0}
    assert all(lab.provider.exists(dict(ref)) for ref in plan.refs)
    assert [dict(s.ref) for s in (db, web)] == list(plan.refs)
    lab.drop(plan)
    assert lab.state() == before
    lab.drop(plan)
    assert not any(lab.provider.exists(dict(ref)) for ref in plan.refs)


def test_live_extents_name_all_data(lab: Lab) -> None:
    plan, (db, _) = lab.take("t1")
    lab.qemu.write(0, 30 * MIB, MIB, 9)
    image = compose.open_image(lab.provider.source(db))
    try:
        data = [(e.offset, e.end) for e in image.extents(0, SIZE) if e.kind == "data"]
    finally:
        image.close()
    assert data[0] == (0, 4 * MIB)
    lab.drop(plan)


def test_live_two_timemarks_show_their_own_moment_and_go_in_any_order(lab: Lab) -> None:
    before = lab.state()
    first, (old, _) = lab.take("t1")
    lab.qemu.write(0, 0, MIB, 5)
    second, (new, _) = lab.take("t2")
    lab.qemu.write(0, 0, MIB, 6)
    assert lab.read(old, 0) == {1}
    assert lab.read(new, 0) == {5}
    lab.drop(first)
    assert lab.read(new, 0) == {5}
    lab.drop(second)
    assert lab.state() == before


def test_live_changed_names_what_was_written_since_the_older(lab: Lab) -> None:
    first, (old, old_web) = lab.take("t1")
    lab.qemu.write(0, MIB, MIB, 5)
    between, _ = lab.take("t2")
    lab.qemu.write(0, 10 * MIB, 4096, 5)
    lab.drop(between)  # one in between that went does not break the chain
    last, (new, new_web) = lab.take("t3")
    state = lab.state()
    assert lab.provider.changed(old, new) == [(MIB, 2 * MIB), (10 * MIB, 10 * MIB + 65536)]
    assert lab.provider.changed(old_web, new_web) == []
    assert lab.provider.changed(new, new) == []
    assert lab.state() == state, "reading a bitmap leaves nothing"
    lab.drop(first)
    assert lab.provider.changed(old, new) is None
    lab.drop(last)


def test_live_changed_with_a_bitmap_that_paused_is_unknown(lab: Lab) -> None:
    first, (old, _) = lab.take("t1")
    second, (new, _) = lab.take("t2")
    tag = lab.provider._fleece(dict(old.ref)).tag
    with Qmp(lab.qemu.socket) as qmp:
        qmp.execute("block-dirty-bitmap-disable", {"node": "disk0", "name": tag})
    assert lab.provider.changed(old, new) is None
    lab.drop(first)
    lab.drop(second)


def test_live_delete_of_what_was_only_planned_or_prepared_leaves_nothing(lab: Lab) -> None:
    before = lab.state()
    plan = lab.provider.plan("t1", lab.volumes)
    lab.drop(plan)
    assert lab.state() == before
    lab.provider.prepare(plan)
    lab.provider.prepare(plan)
    assert lab.provider.leftovers(lab.volumes) == list(plan.refs)
    lab.drop(plan)
    assert lab.state() == before


def test_live_killed_at_any_order_to_qemu_is_deleted_by_the_plan(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process dies before its nth order: nothing of its own clean-up runs."""
    before = lab.state()
    real = Qmp.execute
    plan = lab.provider.plan("t1", lab.volumes)
    for last in range(1, 200):
        count = 0

        def mortal(self: Qmp, command: str, *args: Any, last: int = last, **more: Any) -> Any:
            nonlocal count
            count += command != "qmp_capabilities"
            if count > last:
                os._exit(17)
            return real(self, command, *args, **more)

        child = os.fork()
        if child == 0:
            monkeypatch.setattr(Qmp, "execute", mortal)
            try:
                lab.provider.prepare(plan)
                lab.provider.snapshot(plan)
            finally:
                os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        lab.drop(plan)
        assert lab.state() == before, f"died before order {last + 1}"
        if status == 0:
            assert last > 10
            return
        assert status == 17
    pytest.fail("it never came to its end")


def test_live_failed_snapshot_takes_all_back(lab: Lab) -> None:
    before = lab.state()
    plan = lab.provider.plan("t1", lab.volumes)
    lab.provider.prepare(plan)
    tag = lab.provider._fleece(dict(plan.refs[1])).tag
    with Qmp(lab.qemu.socket) as qmp:  # one of the two cannot begin
        qmp.execute("blockdev-del", {"node-name": tag})
    with pytest.raises(OffloadError):
        lab.provider.snapshot(plan)
    assert lab.state() == before


def test_live_qemu_gone_leaves_files_only_and_delete_removes_them(lab: Lab) -> None:
    files = sorted(p.name for p in lab.folder.iterdir())
    plan, (db, _) = lab.take("t1")
    os.kill(lab.qemu.process.pid, signal.SIGKILL)
    lab.qemu.process._wait_gone(5)
    assert not lab.provider.exists(dict(db.ref))
    lab.drop(plan)
    assert sorted(p.name for p in lab.folder.iterdir()) == files
    ref = lab.provider.plan("t2", lab.volumes).refs[0]
    assert ref["kind"] == "internal", "an image at rest again"


def test_live_image_without_qmp_socket_is_in_use(lab: Lab) -> None:
    volume = replace(lab.volumes[0], qmp_socket=None)
    plan = lab.provider.plan("t1", [volume])
    for attempt in (
        lambda: lab.provider.inspect(volume),
        lambda: lab.provider.snapshot(plan),
    ):
        with pytest.raises(BusyError) as caught:
            attempt()
        assert caught.value.code == "volume-in-use"


def test_live_internal_snapshot_that_was_never_made_is_deleted_though_the_image_is_in_use(
    folder: Path,
) -> None:
    path = folder / "d.qcow2"
    run.run(["qemu-img", "create", "-q", "-f", "qcow2", str(path), str(SIZE)])
    volume = Volume(name="d", provider="qcow2", path=path)
    provider = Qcow2Provider("ilive")
    made, never = provider.plan("t1", [volume]), provider.plan("t2", [volume])
    provider.snapshot(made)
    with running_qemu(folder / "qmp", [path]):
        provider.delete(dict(never.refs[0]))
        with pytest.raises(BusyError):
            provider.delete(dict(made.refs[0]))
    provider.delete(dict(made.refs[0]))


def test_live_nbd_server_of_somebody_else_is_refused_and_left_alone(lab: Lab) -> None:
    theirs = lab.folder / "theirs"
    with Qmp(lab.qemu.socket) as qmp:
        address = {"type": "unix", "data": {"path": str(theirs)}}
        qmp.execute("nbd-server-start", {"addr": address})
    before = lab.state()
    plan = lab.provider.plan("t1", lab.volumes)
    with pytest.raises(BusyError) as caught:
        lab.provider.prepare(plan)
    assert caught.value.code == "nbd-server-busy"
    lab.drop(plan)
    assert lab.state() == before
    with Qmp(lab.qemu.socket) as qmp:
        qmp.execute("nbd-server-stop")  # it still ran: else this is refused


def test_live_backing_layer_of_a_disk_is_refused(lab: Lab) -> None:
    overlay = lab.folder / "overlay.qcow2"
    run.run(["qemu-img", "create", "-q", "-f", "qcow2", str(overlay), str(SIZE)])
    with Qmp(lab.qemu.socket) as qmp:
        file = {"driver": "file", "filename": str(overlay)}
        over = {"driver": "qcow2", "node-name": "over", "file": file, "backing": None}
        qmp.execute("blockdev-add", over)
        qmp.execute("blockdev-snapshot", {"node": "disk0", "overlay": "over"})
    with pytest.raises(PolicyError) as caught:
        lab.provider.plan("t1", lab.volumes)
    assert caught.value.code == "not-the-active-layer"
    top = replace(lab.volumes[0], path=overlay)
    assert lab.provider.plan("t1", [top]).refs[0]["kind"] == "fleece"


def test_live_internal_snapshot_from_before_the_start_is_deleted_through_qemu(
    folder: Path,
) -> None:
    path, socket = folder / "d.qcow2", folder / "qmp"
    run.run(["qemu-img", "create", "-q", "-f", "qcow2", str(path), str(SIZE)])
    volume = Volume(name="d", provider="qcow2", path=path, qmp_socket=socket)
    provider = Qcow2Provider("ilive")
    plan = provider.plan("t1", [volume])
    (made,) = provider.snapshot(plan)
    assert isinstance(provider.source(made), Qcow2Source)
    with running_qemu(socket, [path]):
        assert provider.leftovers([volume]) == list(plan.refs)
        provider.delete(dict(made.ref))
        provider.delete(dict(made.ref))
    assert not provider.exists(dict(made.ref))
    assert provider.leftovers([volume]) == []


def test_live_inspect_tells_the_size_that_qemu_sees(lab: Lab) -> None:
    with Qmp(lab.qemu.socket) as qmp:
        qmp.execute("block_resize", {"node-name": "disk0", "size": 2 * SIZE})
    state = lab.provider.inspect(lab.volumes[0])
    assert state.size_bytes == 2 * SIZE
    plan, (db, _) = lab.take("t1")
    assert db.size_bytes == 2 * SIZE
    assert lab.read(db, 2 * SIZE - 4096) == {0}
    lab.drop(plan)


def test_live_names_fit_qemu(folder: Path) -> None:
    fleece = qcow2_live.Fleece(
        instance="x" * 40,
        file=folder / ("t" * 20) / f"{'v' * 60}.fleece",
        image=folder,
        qmp=folder,
    )
    assert len(fleece.tag) <= 31
