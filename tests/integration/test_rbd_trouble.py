"""A Ceph cluster that does not answer, refuses, or is another one: an error in time, no harm."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import rbd

from offload import ceph as clusters
from offload import run
from offload.errors import (
    ConfigError,
    NotFoundError,
    OffloadError,
    PrivilegeError,
    UnavailableError,
)
from offload.images.rbd import RbdImage
from offload.model import Snapshot, Volume
from offload.procs import ProcessRef, ref_of
from offload.snapshots import rbd_link
from offload.snapshots.rbd import RbdProvider
from offload.testing.ceph import RunningCeph
from offload.testing.rbd_site import INSTANCE, SIZE, RbdSite

_PATIENCE_S = 40.0  # for what asks a dead cluster several times, on a busy machine


@pytest.fixture
def site(ceph: RunningCeph) -> Iterator[RbdSite]:
    made = RbdSite(ceph)
    yield made
    made.clear()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rbd_link, "SILENCE_S", 2.0)
    monkeypatch.setattr(clusters, "ANSWER_S", 1)
    monkeypatch.setattr(clusters, "CONNECT_S", 2)


@contextmanager
def stopped(server: ProcessRef) -> Iterator[None]:
    """It is there, and answers nothing."""
    os.kill(server.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(server.pid, signal.SIGCONT)


Calls = dict[str, Callable[[], object]]


def calls(site: RbdSite, volume: Volume, made: Snapshot) -> Calls:
    """Everything that can be asked of the provider."""
    provider, plan = site.provider, site.provider.plan("tdead", [volume])
    return {
        "inspect": lambda: provider.inspect(volume),
        "plan": lambda: provider.plan("tdead", [volume]),
        "snapshot": lambda: provider.snapshot(plan),
        "exists": lambda: provider.exists(dict(made.ref)),
        "delete": lambda: provider.delete(dict(made.ref)),
        "leftovers": lambda: provider.leftovers([volume]),
        "changed": lambda: provider.changed(made, replace(made, sector_size=4096)),
        "open": lambda: RbdImage(provider.source(made)),
    }


# -- no answer --------------------------------------------------------------------------------


@pytest.mark.usefixtures("impatient")
def test_storage_that_does_not_answer_is_an_error_in_time(site: RbdSite) -> None:
    volume = site.image("db", features=rbd.RBD_FEATURE_LAYERING)  # an object map needs no OSD
    site.write(volume, 0, b"x" * 4096)
    (made,) = site.take("t0", volume)
    image = RbdImage(site.provider.source(made))
    todo: Calls = {
        **calls(site, volume, made),
        "read": lambda: image.pread(0, 512),
        "extents": lambda: list(image.extents(0, SIZE)),
    }
    with stopped(site.ceph.osd):
        for name, call in todo.items():
            began = time.monotonic()
            with pytest.raises(UnavailableError) as caught:
                call()
            assert caught.value.code == "ceph-timeout", name
            assert time.monotonic() - began < _PATIENCE_S, name
        image.close()
    assert site.provider.exists(dict(made.ref))
    assert site.read(made, 0, 1) == b"x"


@pytest.mark.usefixtures("impatient")
def test_monitor_that_does_not_answer_is_an_error_in_time(site: RbdSite) -> None:
    volume = site.image("db")
    (made,) = site.take("t0", volume)
    todo = calls(site, volume, made)
    with stopped(site.ceph.mon):
        for name, call in todo.items():
            with pytest.raises(UnavailableError) as caught:
                call()
            assert caught.value.code == "ceph-timeout", name
    assert site.provider.exists(dict(made.ref))


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("several", [False, True])
def test_snapshot_that_gets_no_answer_is_deleted_once_the_cluster_answers(
    site: RbdSite, several: bool
) -> None:
    """What could not be taken back at once can be later, whatever has come of it by then."""
    volumes = [site.image("db"), site.image("web")][: 2 if several else 1]
    plan = site.provider.plan("t0", volumes)
    site.provider.prepare(plan)
    with stopped(site.ceph.osd):
        with pytest.raises(UnavailableError) as caught:
            site.provider.snapshot(plan)
        assert caught.value.code == "ceph-timeout"
        assert caught.value.__notes__ == [caught.value.message]  # of the taking back
    for ref in plan.refs:
        site.provider.delete(dict(ref))
        assert not site.provider.exists(dict(ref))
    assert site.is_clean(*volumes)


@pytest.mark.parametrize("several", [False, True])
def test_worker_killed_at_any_time_leaves_nothing(site: RbdSite, several: bool) -> None:
    """A snapshot is there, or it is taken back by the next worker."""
    volumes = [site.image("db"), site.image("web")][: 2 if several else 1]
    outcomes = []
    for turn, delay_s in enumerate([0.0, 0.01, 0.02, 0.03, 0.05, 0.08, 0.3]):
        plan = site.provider.plan(f"t{turn}", volumes)
        site.provider.prepare(plan)
        with ThreadPoolExecutor(1) as crew:
            pending = crew.submit(site.provider.snapshot, plan)
            time.sleep(delay_s)  # not for something to happen: any moment will do
            killed = _kill_worker(site)
            failure = pending.exception(_PATIENCE_S)
        killed.wait()  # or a next question may still go to it
        outcomes.append(failure is None)
        if failure is None:
            site.provider.settle(pending.result())
            for ref in plan.refs:
                assert site.provider.exists(dict(ref))
                site.provider.delete(dict(ref))
        else:
            assert isinstance(failure, UnavailableError)
            assert failure.code == "ceph-failed"
        assert site.is_clean(*volumes)
    assert not all(outcomes)


def _kill_worker(site: RbdSite) -> subprocess.Popen[bytes]:
    worker = site.provider._link._worker
    assert worker is not None
    worker.process.kill()
    return worker.process


def test_worker_ends_with_its_provider(site: RbdSite) -> None:
    provider = RbdProvider(INSTANCE)
    provider.inspect(site.image("db"))
    worker = provider._link._worker
    assert worker is not None
    process = ref_of(worker.process.pid)
    assert process is not None
    del provider
    assert not process.alive()


def test_worker_of_a_killed_process_ends_at_once(site: RbdSite) -> None:
    """Nobody may be at work when the next process recovers."""
    script = """
import sys, time
from offload.snapshots.rbd import RbdProvider
provider = RbdProvider("irbdtests0")
try:
    provider.delete({})
except Exception:
    print(provider._link._worker.process.pid, flush=True)
time.sleep(600)
"""
    process = run.spawn([sys.executable, "-c", script])
    try:
        assert process.stdout is not None
        worker = ref_of(int(process.stdout.readline()))
        assert worker is not None
        assert worker.alive()
    finally:
        process.kill()
        process.wait()
    until = time.monotonic() + _PATIENCE_S
    while worker.alive() and time.monotonic() < until:
        time.sleep(0.01)
    assert not worker.alive()


# What librbd leaves when it is killed on its way: the monitor does not let the snapshot go.
HALF_DELETED = """
import os, signal, sys
import rados, rbd
conf, image, snapshot, mon = sys.argv[1:]
handle = rados.Rados(name="client.admin", conffile=conf)
handle.connect()
with handle.open_ioctx("vms") as pool, rbd.Image(pool, image) as opened:
    os.kill(int(mon), signal.SIGSTOP)
    print("now", flush=True)
    opened.remove_snap_by_id(int(snapshot))
"""


@pytest.mark.parametrize("several", [False, True])
def test_delete_cut_short_is_finished_by_the_next(site: RbdSite, several: bool) -> None:
    """librbd takes a snapshot to the trash before the monitors let it go."""
    volumes = [site.image("db"), site.image("web")][: 2 if several else 1]
    made = site.take("t0", *volumes)
    with site.open(volumes[0]) as image:
        number = max(entry["id"] for entry in image.list_snaps())
        words = [str(site.ceph.conf), "db", str(number), str(site.ceph.mon.pid)]
        process = run.spawn([sys.executable, "-c", HALF_DELETED, *words])
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"now\n"
            until = time.monotonic() + _PATIENCE_S
            while not any("trash" in entry for entry in image.list_snaps()):
                assert time.monotonic() < until
                time.sleep(0.01)
        finally:
            process.kill()
            process.wait()
            os.kill(site.ceph.mon.pid, signal.SIGCONT)
    assert not site.provider.exists(dict(made[0].ref))
    assert dict(made[0].ref) in site.provider.leftovers(volumes)
    for snapshot in made:
        site.provider.delete(dict(snapshot.ref))
    assert site.is_clean(*volumes)


# -- refusals ---------------------------------------------------------------------------------


def test_user_without_a_key_is_told_what_is_needed(site: RbdSite) -> None:
    volume = replace(site.image("db"), user="client.nobody")
    with pytest.raises(PrivilegeError) as caught:
        site.provider.inspect(volume)
    assert caught.value.code == "ceph-permission"
    assert "client.nobody" in caught.value.message
    assert "profile rbd" in caught.value.hint


def test_user_without_capabilities_is_told_what_is_needed(site: RbdSite) -> None:
    """`client.lookout` may connect and read nothing."""
    volume = replace(site.image("db"), user="client.lookout")
    with pytest.raises(PrivilegeError) as caught:
        site.provider.inspect(volume)
    assert caught.value.code == "ceph-permission"


def test_configuration_that_is_missing_is_named(site: RbdSite, tmp_path: Path) -> None:
    volume = replace(site.image("db"), conf=tmp_path / "ceph.conf")
    with pytest.raises(ConfigError) as caught:
        site.provider.inspect(volume)
    assert caught.value.code == "conf-missing"


def test_keyring_that_is_missing_is_a_clear_error(site: RbdSite, tmp_path: Path) -> None:
    conf = tmp_path / "ceph.conf"
    text = site.ceph.conf.read_text()
    conf.write_text(text.replace(str(site.ceph.conf.parent / "keyring"), str(tmp_path / "keyring")))
    with pytest.raises(OffloadError) as caught:
        site.provider.inspect(replace(site.image("db"), conf=conf))
    assert caught.value.code == "ceph-permission"
    assert "no keyring" in caught.value.message


def test_image_of_another_cluster_is_never_answered_for(site: RbdSite) -> None:
    """`conf` now leads somewhere else: nothing there is ours, and nothing of ours is gone."""
    (made,) = site.take("t0", site.image("db"))
    elsewhere = {**made.ref, "cluster": "00000000-0000-4000-8000-000000000000"}
    for call in (site.provider.exists, site.provider.delete):
        with pytest.raises(ConfigError) as caught:
            call(dict(elsewhere))
        assert caught.value.code == "other-cluster"
    with pytest.raises(ConfigError):
        RbdImage(replace(site.provider.source(made), cluster=elsewhere["cluster"]))


def test_limit_of_snapshots_is_no_space_and_leaves_nothing(site: RbdSite) -> None:
    volume = site.image("db")
    with site.open(volume) as image:
        image.create_snap("daily")
        image.set_snap_limit(1)
    with pytest.raises(UnavailableError) as caught:
        site.take("t0", volume)
    assert caught.value.code == "no-space"
    assert [entry["name"] for entry in site.snapshots(volume)] == ["daily"]


def test_pool_that_is_missing_is_a_missing_volume(site: RbdSite) -> None:
    volume = replace(site.image("db"), path=Path("/dev/rbd/nopool/db"))
    with pytest.raises(NotFoundError) as caught:
        site.provider.inspect(volume)
    assert caught.value.code == "volume-missing"
    assert "nopool/db" in caught.value.message


def test_library_that_is_missing_names_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rbd", None)
    with pytest.raises(UnavailableError) as caught, clusters.translated("look at the image x"):
        pass
    assert caught.value.code == "library-missing"
    assert "python3-rbd" in caught.value.hint


def test_errors_hold_no_key(site: RbdSite) -> None:
    keyring = (site.ceph.conf.parent / "keyring").read_text()
    keys = [line.split()[-1] for line in keyring.splitlines() if line.strip().startswith("key")]
    assert len(keys) >= 5
    with pytest.raises(PrivilegeError) as caught:
        site.provider.inspect(replace(site.image("db"), user="client.lookout"))
    said = f"{caught.value!r} {caught.value.message} {caught.value.hint} {caught.value.__cause__!r}"
    assert not any(key in said for key in keys)
