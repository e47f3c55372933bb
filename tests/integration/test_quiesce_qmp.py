"""The QMP quiescer against a real QEMU."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

import pytest

from offload import image_lock, run
from offload.catalog.store import Catalog
from offload.config import Config
from offload.configs.quiesce import QmpQuiesce
from offload.errors import BusyError, UnavailableError
from offload.images.qcow2 import Qcow2Image
from offload.instance import Instance
from offload.model import Consistency, Qcow2Source, Volume
from offload.qmp import Qmp, QmpBusyError
from offload.quiescers.holder import undo_thaw
from offload.quiescers.qmp import QmpQuiescer
from offload.snapshots.qcow2 import Qcow2Provider
from offload.testing.qemu import RunningQemu, running_qemu
from offload.testing.quiesce import frozen

NO_CATALOG = cast("Catalog", None)


@pytest.fixture
def folder() -> Iterator[Path]:
    """Short: unix sockets lie in it."""
    made = Path(tempfile.mkdtemp(prefix="ol-"))
    yield made
    shutil.rmtree(made)


@pytest.fixture
def qemu(folder: Path) -> Iterator[RunningQemu]:
    disk = folder / "disk.qcow2"
    run.run(["qemu-img", "create", "-q", "-f", "qcow2", str(disk), "16M"])
    with running_qemu(folder / "qmp", [disk]) as running:
        yield running


def instance_of(folder: Path) -> Instance:
    return Instance(
        config=Config.model_validate(
            {
                "state_dir": folder,
                "volumes": {
                    name: {"provider": "qcow2", "path": folder / "disk.qcow2"}
                    for name in ("db", "web")
                },
            }
        ),
        config_path=None,
        state_dir=folder,
        runtime_dir=folder,
        id="test",
    )


@pytest.fixture
def quiescer(folder: Path, qemu: RunningQemu) -> Iterator[QmpQuiescer]:
    made = QmpQuiescer(
        QmpQuiesce(kind="qmp", socket=qemu.socket), ("db", "web"), instance_of(folder)
    )
    yield made
    made.close()


def wait_for(condition: Callable[[], bool], within_s: float = 2.0) -> None:
    until = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_qmp_freeze_stops_the_cpus_until_the_thaw(
    quiescer: QmpQuiescer, qemu: RunningQemu, folder: Path
) -> None:
    quiescer.check()
    assert quiescer.volumes == ("db", "web")
    quiescer.arm(10)
    assert qemu.status() == "running"
    assert frozen(quiescer) is Consistency.CRASH
    assert qemu.status() == "paused"
    assert quiescer.still_frozen()
    quiescer.thaw()
    assert qemu.status() == "running"
    assert not quiescer.still_frozen()
    assert list((folder / "holds").iterdir()) == []


def test_qmp_paused_by_somebody_else_stays_paused(
    quiescer: QmpQuiescer, qemu: RunningQemu, folder: Path
) -> None:
    with Qmp(qemu.socket) as qmp:
        qmp.execute("stop")
    quiescer.arm(10)
    frozen(quiescer)
    assert quiescer.still_frozen()
    quiescer.thaw()
    undo_thaw(instance_of(folder), NO_CATALOG, quiescer.undos()[0][1])
    assert qemu.status() == "paused"


def test_qmp_continued_by_somebody_else_is_noticed(
    quiescer: QmpQuiescer, qemu: RunningQemu
) -> None:
    quiescer.arm(10)
    frozen(quiescer)
    with Qmp(qemu.socket) as qmp:
        qmp.execute("cont")
    assert not quiescer.still_frozen()
    assert "somebody else" in quiescer.output
    quiescer.thaw()
    assert qemu.status() == "running"


def test_qmp_deadline_passed_continues(quiescer: QmpQuiescer, qemu: RunningQemu) -> None:
    quiescer.arm(0.3)
    frozen(quiescer, 0.3)
    assert qemu.status() == "paused"
    wait_for(lambda: qemu.status() == "running")
    assert not quiescer.still_frozen()


def test_qmp_guardian_killed_is_continued_by_the_parent(
    quiescer: QmpQuiescer, qemu: RunningQemu
) -> None:
    quiescer.arm(10)
    frozen(quiescer)
    process = quiescer._holder._process
    assert process is not None
    process.kill()
    process.wait()
    assert not quiescer.still_frozen()
    assert qemu.status() == "running"


def test_qmp_monitor_held_by_another_client_while_thawing_is_waited_for(
    quiescer: QmpQuiescer, qemu: RunningQemu
) -> None:
    quiescer.arm(0.3)
    frozen(quiescer, 0.3)
    with Qmp(qemu.socket):  # hangs over the deadline
        time.sleep(0.6)
    wait_for(lambda: qemu.status() == "running")


PARENT = """
    import sys, time
    from pathlib import Path
    sys.path.insert(0, {root!r})
    from tests.integration.test_quiesce_qmp import frozen, instance_of
    from offload.configs.quiesce import QmpQuiesce
    from offload.quiescers.qmp import QmpQuiescer
    entry = QmpQuiesce(kind="qmp", socket=Path({socket!r}))
    q = QmpQuiescer(entry, ("db",), instance_of(Path({folder!r})))
    q.arm(30)
    frozen(q)
    print(q._holder._process.pid, q._holder.marker, flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("guardian_too", [False, True])
def test_qmp_parent_killed_is_continued_by_guardian_or_undo(
    qemu: RunningQemu, folder: Path, quiescer: QmpQuiescer, guardian_too: bool
) -> None:
    code = textwrap.dedent(PARENT).format(
        root=str(Path(__file__).parents[2]), socket=str(qemu.socket), folder=str(folder)
    )
    parent = run.spawn([sys.executable, "-c", code], stderr=None)
    try:
        assert parent.stdout is not None
        guardian, marker = parent.stdout.readline().decode().split()
        assert qemu.status() == "paused"
        if guardian_too:
            parent.send_signal(signal.SIGSTOP)
            os.kill(int(guardian), signal.SIGKILL)
        parent.kill()
        parent.wait()
        if guardian_too:
            time.sleep(0.2)
            assert qemu.status() == "paused"
            undo_thaw(instance_of(folder), NO_CATALOG, {**quiescer.undos()[0][1], "marker": marker})
            assert qemu.status() == "running"
        wait_for(lambda: qemu.status() == "running", 1.0)
        wait_for(lambda: not Path(marker).exists())
    finally:
        run.terminate(parent)


def test_qmp_fleece_is_taken_over_the_same_socket_while_the_cpus_stand(
    quiescer: QmpQuiescer, qemu: RunningQemu, folder: Path
) -> None:
    volume = Volume(name="db", provider="qcow2", path=folder / "disk.qcow2", qmp_socket=qemu.socket)
    provider = Qcow2Provider("iheld")
    plan = provider.plan("t1", [volume])
    provider.prepare(plan)
    quiescer.arm(10)
    frozen(quiescer)
    provider.snapshot(plan)
    assert quiescer.still_frozen()
    quiescer.thaw()
    provider.delete(dict(plan.refs[0]))


@pytest.fixture
def shut_down(folder: Path) -> QmpQuiescer:
    run.run(["qemu-img", "create", "-q", "-f", "qcow2", str(folder / "disk.qcow2"), "16M"])
    entry = QmpQuiesce(kind="qmp", socket=folder / "qmp")
    return QmpQuiescer(entry, ("db",), instance_of(folder))


def test_qmp_machine_that_is_shut_down_counts_as_held(shut_down: QmpQuiescer) -> None:
    shut_down.check()
    shut_down.arm(10)
    assert frozen(shut_down) is Consistency.CRASH
    assert shut_down.still_frozen()
    shut_down.thaw()
    shut_down.close()
    assert "shut down" in shut_down.output


def test_qmp_machine_started_meanwhile_was_not_held(shut_down: QmpQuiescer, folder: Path) -> None:
    shut_down.check()
    shut_down.arm(10)
    frozen(shut_down)
    with running_qemu(folder / "qmp", [folder / "disk.qcow2"]):
        assert not shut_down.still_frozen()
        with pytest.raises(BusyError):
            frozen(shut_down)
    assert "was started" in shut_down.output


def test_qmp_wrong_socket_of_a_running_machine_is_refused(qemu: RunningQemu, folder: Path) -> None:
    entry = QmpQuiesce(kind="qmp", socket=folder / "typing-error")
    with pytest.raises(BusyError) as caught:
        QmpQuiescer(entry, ("db",), instance_of(folder)).check()
    assert caught.value.code == "volume-in-use"


def test_image_lock_of_a_reader_is_not_for_writing(folder: Path) -> None:
    disk = folder / "disk.qcow2"
    run.run(["qemu-img", "create", "-q", "-f", "qcow2", str(disk), "16M"])
    image = Qcow2Image(Qcow2Source(path=disk, size_bytes=16 << 20))
    assert not image_lock.open_for_writing(disk)
    image.close()
    with pytest.raises(UnavailableError):
        image_lock.open_for_writing(folder / "none")


def test_qmp_client_second_at_once_is_told_that_it_waits(qemu: RunningQemu) -> None:
    with Qmp(qemu.socket), pytest.raises(QmpBusyError) as caught:
        Qmp(qemu.socket, timeout_s=0.2)
    assert caught.value.code == "qmp-timeout"


def test_qmp_client_keeps_events_for_who_waits(qemu: RunningQemu) -> None:
    with Qmp(qemu.socket) as qmp:
        qmp.execute("stop")
        assert qmp.wait_event("STOP", 2) is not None
        assert qmp.wait_event("STOP", 0.1) is None
        qmp.execute("cont")
