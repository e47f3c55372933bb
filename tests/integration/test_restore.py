"""Restore: into formats, on after an interruption, only what differs, and every refusal."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from offload import procs, qemu_nbd, run
from offload.cli.main import run as offload
from offload.journal import CRASH_ENV, TRACE_ENV
from offload.testing.pools import loop_device
from offload.testing.warm import warm_python

KIB, MIB = 1 << 10, 1 << 20
SIZE = 12 * MIB + 4096  # neither of whole windows nor of whole chunks

# A command line of its own process, with small windows and a checkpoint after each.
SMALL = """
import os, signal, sys
from offload.engine import bulkread
from offload.services import restore_copy
bulkread.window_bytes = restore_copy.window_bytes = lambda chunk: 1 << 20
restore_copy.CHECKPOINT_BYTES = 1 << 20
from offload.services import restore
plain, seen = restore_copy.step, []
def step(name):
    plain(name)
    seen.append(name)
    at, times = os.environ.get("TEST_INTERRUPT_AT"), os.environ.get("TEST_INTERRUPT_TIMES", "1")
    if name == at and seen.count(name) == int(times):
        os.kill(os.getpid(), getattr(signal, os.environ.get("TEST_INTERRUPT_BY", "SIGINT")))
restore_copy.step = restore.step = step
from offload.cli.main import main
main()
"""


@dataclass
class Place:
    """A folder with a volume of random data and holes, a store, and a backup of it."""

    folder: Path
    backup: str
    content: bytes
    capsys: pytest.CaptureFixture[str]

    @property
    def config(self) -> str:
        return str(self.folder / "o.toml")

    def ask(self, *words: str, code: int = 0) -> Any:
        """Run a command in this process: its value, or with `code` its error."""
        self.capsys.readouterr()
        got = offload(["--config", self.config, "--json", *words])
        said = self.capsys.readouterr()
        assert got == code, said.err
        return json.loads(said.err if code else said.out)

    def restore(self, to: Path | str, *words: str, code: int = 0) -> Any:
        """Restore the backup; the one volume's report, or with `code` the error."""
        got = self.ask("restore", self.backup, "--to", str(to), *words, code=code)
        return got if code else got["volumes"][0]

    def apart(self, *words: str, **env: str) -> run.Completed:
        """Run a command in a process of its own, with small windows."""
        return warm_python().run("-c", SMALL, "--config", self.config, *words, env=env)

    def killed(self, step: str, to: Path | str, *words: str) -> None:
        """Restore in a process that dies at a step."""
        argv = ("restore", self.backup, "--to", str(to), *words)
        done = self.apart(*argv, **{CRASH_ENV: step})
        assert done.status == -signal.SIGKILL, done.stderr

    def unfinished(self) -> list[dict[str, Any]]:
        """What `recover` names, after it has taken back what it can."""
        return list(self.ask("recover")["unfinished_restores"])

    def files(self) -> set[str]:
        """What lies in the folder of targets."""
        return {path.name for path in (self.folder / "out").iterdir()}

    @property
    def out(self) -> Path:
        return self.folder / "out"


def content() -> bytearray:
    """Random data, with holes of whole chunks and of blocks."""
    made = bytearray(os.urandom(SIZE))
    made[3 * MIB : 5 * MIB] = bytes(2 * MIB)
    made[6 * MIB + 8192 : 6 * MIB + 16384] = bytes(8192)
    return made


@pytest.fixture
def place(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Place:
    made = bytes(content())
    (tmp_path / "db.raw").write_bytes(made)
    (tmp_path / "out").mkdir()
    (tmp_path / "o.toml").write_text(
        f'state_dir = "{tmp_path}/state"\nruntime_dir = "{tmp_path}/r"\n'
        f'[volumes.db]\nprovider = "copy"\npath = "{tmp_path}/db.raw"\n'
        '[groups.shop]\nvolumes = ["db"]\natomic = "record"\nstore = "main"\n'
        f'[stores.main]\nkind = "disk"\npath = "{tmp_path}/store"\nmin_free = "1MiB"\n'
        '[pool]\nmin_free = "1MiB"\n'
    )
    found = Place(folder=tmp_path, backup="", content=made, capsys=capsys)
    found.ask("store", "init", "main")
    found.backup = found.ask("backup", "shop")["id"]
    return found


def raw_of(image: Path, form: str) -> bytes:
    """What a guest would read from an image, without what a format adds at its end."""
    out = image.parent.parent / "converted"
    run.run(["qemu-img", "convert", "-f", form, "-O", "raw", str(image), str(out)])
    return out.read_bytes()


def same(found: bytes, wanted: bytes) -> bool:
    return found[: len(wanted)] == wanted and not any(found[len(wanted) :])


# -- formats -----------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["qcow2", "vmdk", "vhdx"])
def test_restore_into_a_format_by_its_ending_reads_back_the_same(place: Place, form: str) -> None:
    target = place.out / f"db.{form}"
    report = place.restore(target)
    assert report["form"] == form
    assert same(raw_of(target, form), place.content)
    assert place.files() == {target.name}
    assert target.stat().st_mode & 0o777 == 0o600
    assert target.stat().st_blocks * 512 < SIZE + 8 * MIB
    assert procs.find_running("qemu-nbd", f"--socket={place.folder}/r") == []


def test_restore_into_a_folder_with_a_format_names_the_file_by_it(place: Place) -> None:
    place.restore(place.out, "--format", "qcow2")
    assert place.files() == {"db.qcow2"}
    assert same(raw_of(place.out / "db.qcow2", "qcow2"), place.content)


def test_restore_format_given_beats_the_ending(place: Place) -> None:
    place.restore(place.out / "db.qcow2", "--format", "raw")
    assert (place.out / "db.qcow2").read_bytes() == place.content


@pytest.mark.parametrize("ending", ["vdi", "vhd", "gz"])
def test_restore_to_an_ending_of_another_format_is_refused(place: Place, ending: str) -> None:
    error = place.restore(place.out / f"db.{ending}", code=2)
    assert error["code"] == "bad-format"
    assert place.files() == set()


def test_restore_raw_keeps_holes(place: Place) -> None:
    report = place.restore(place.out / "db")
    assert (place.out / "db").read_bytes() == place.content
    assert (place.out / "db").stat().st_blocks * 512 <= SIZE - 2 * MIB + 64 * KIB
    assert report["written_bytes"] <= SIZE - 2 * MIB + 512 * KIB


# -- interrupted -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["db.raw", "db.qcow2", "db.vmdk", "db.vhdx"])
def test_restore_killed_behind_a_checkpoint_goes_on(place: Place, name: str) -> None:
    target = place.out / name
    form = target.suffix[1:]
    place.killed("restore.checkpoint", target)
    (left,) = place.unfinished()
    assert not target.exists()
    assert 0 < left["done_bytes"] < SIZE
    assert left["to"] == str(target)
    done = place.apart("restore", place.backup, "--to", str(target))
    assert done.status == 0, done.stderr
    assert "there already, from the interrupted restore" in done.stdout
    assert same(raw_of(target, form), place.content)
    assert place.files() == {name}
    assert place.unfinished() == []


def test_restore_killed_before_a_checkpoint_leaves_nothing(place: Place) -> None:
    place.killed("restore.synced", place.out / "db.raw")
    assert place.files() != set()
    assert place.unfinished() == []
    assert place.files() == set()
    assert list((place.folder / "state" / "restores").iterdir()) == []


def test_restore_goes_on_without_what_a_torn_record_names(place: Place) -> None:
    place.killed("restore.checkpoint", place.out / "db.raw")
    (record,) = (place.folder / "state" / "restores").iterdir()
    with record.open("ab") as out:
        out.write(b'{"done":[[0,%d]]' % SIZE)
    place.restore(place.out / "db.raw")
    assert (place.out / "db.raw").read_bytes() == place.content


def test_restore_checks_what_was_written_last_before_it_goes_on(place: Place) -> None:
    place.killed("restore.checkpoint", place.out / "db.raw")
    (part,) = place.out.iterdir()
    (left,) = place.unfinished()
    with part.open("r+b") as out:  # as a disk that lost a write
        out.write(bytes(4096))
    report = place.restore(place.out / "db.raw")
    assert report["resumed_bytes"] == left["done_bytes"]
    assert (place.out / "db.raw").read_bytes() == place.content


def test_restore_begins_anew_where_the_part_is_not_as_it_was_left(place: Place) -> None:
    place.killed("restore.copied", place.out / "db.raw")
    (part,) = place.out.iterdir()
    (record,) = (place.folder / "state" / "restores").iterdir()
    with record.open("ab") as out:  # the last line names little: the rest is trusted by a sample
        out.write(b'{"done":[[0,4096]]}\n')
    part.write_bytes(bytes(SIZE))
    report = place.restore(place.out / "db.raw")
    assert report["resumed_bytes"] == 0
    assert (place.out / "db.raw").read_bytes() == place.content


def test_restore_restart_forgets_what_was_done(place: Place) -> None:
    place.killed("restore.checkpoint", place.out / "db.raw")
    report = place.restore(place.out / "db.raw", "--restart")
    assert report["resumed_bytes"] == 0
    assert (place.out / "db.raw").read_bytes() == place.content


def test_restore_abandon_removes_the_part(place: Place) -> None:
    place.killed("restore.checkpoint", place.out / "db.raw")
    (gone,) = place.ask("restore", "--abandon", "--to", str(place.out / "db.raw"))
    assert gone["done_bytes"] > 0
    assert place.files() == set()
    assert place.unfinished() == []
    error = place.ask("restore", "--abandon", "--to", str(place.out / "db.raw"), code=4)
    assert error["code"] == "unknown-restore"


def test_restore_of_another_backup_supersedes_what_was_left(place: Place) -> None:
    place.killed("restore.checkpoint", place.out / "db.raw")
    (place.folder / "db.raw").write_bytes(bytes(SIZE))
    place.backup = place.ask("backup", "shop")["id"]
    report = place.restore(place.out / "db.raw")
    assert report["resumed_bytes"] == 0
    assert not any((place.out / "db.raw").read_bytes())
    assert place.files() == {"db.raw"}
    assert place.unfinished() == []


def test_restore_whose_part_was_removed_by_hand_is_not_unfinished(place: Place) -> None:
    place.killed("restore.checkpoint", place.out / "db.raw")
    assert len(place.unfinished()) == 1
    (part,) = place.out.iterdir()
    part.unlink()
    assert place.unfinished() == []
    place.restore(place.out / "another.raw")
    assert list((place.folder / "state" / "restores").iterdir()) == []


def test_restore_ended_by_sigterm_goes_on(place: Place) -> None:
    words = ("restore", place.backup, "--to", str(place.out / "db.raw"))
    env = {"TEST_INTERRUPT_AT": "restore.checkpoint", "TEST_INTERRUPT_BY": "SIGTERM"}
    done = place.apart(*words, **env)
    assert done.status == 128 + signal.SIGTERM
    (left,) = place.unfinished()
    assert place.restore(place.out / "db.raw")["resumed_bytes"] == left["done_bytes"]
    assert (place.out / "db.raw").read_bytes() == place.content


def test_restore_interrupted_by_ctrl_c_says_what_stays(place: Place) -> None:
    words = ("restore", place.backup, "--to", str(place.out / "db.raw"))
    done = place.apart(*words, TEST_INTERRUPT_AT="restore.checkpoint")
    assert done.status == 130
    assert "the same command goes on from there" in done.stderr
    assert "Traceback" not in done.stderr
    assert len(place.unfinished()) == 1
    place.restore(place.out / "db.raw")
    assert (place.out / "db.raw").read_bytes() == place.content


def test_restore_of_many_volumes_goes_on_with_the_one_that_was_not_whole(place: Place) -> None:
    config = place.folder / "o.toml"
    web = os.urandom(SIZE)
    (place.folder / "web.raw").write_bytes(web)
    config.write_text(
        config.read_text().replace('volumes = ["db"]', 'volumes = ["db", "web"]')
        + f'[volumes.web]\nprovider = "copy"\npath = "{place.folder}/web.raw"\n'
    )
    place.backup = place.ask("backup", "shop")["id"]
    words = ("restore", place.backup, "--to", str(place.out))
    done = place.apart(*words, TEST_INTERRUPT_AT="restore.copied", TEST_INTERRUPT_TIMES="2")
    assert done.status == 130, done.stderr
    assert "db.raw" in place.files()
    assert "web.raw" not in place.files()
    (left,) = place.unfinished()
    report = place.ask(*words)
    assert [entry["volume"] for entry in report["volumes"]] == ["db", "web"]
    assert report["volumes"][0]["resumed_bytes"] == SIZE
    assert report["volumes"][1]["resumed_bytes"] == left["done_bytes"]
    assert (place.out / "db.raw").read_bytes() == place.content
    assert (place.out / "web.raw").read_bytes() == web
    assert place.files() == {"db.raw", "web.raw"}
    assert list((place.folder / "state" / "restores").iterdir()) == []
    error = place.ask(*words, code=5)
    assert error["code"] == "target-exists"


def test_restore_of_a_timemark_reads_storage_itself(place: Place) -> None:
    mark = place.ask("timemark", "create", "shop")["id"]
    target = place.out / "db.qcow2"
    place.ask("restore", f"timemark:{mark}/db", "--to", str(target))
    assert same(raw_of(target, "qcow2"), place.content)


def test_restore_of_a_damaged_chunk_keeps_nothing(place: Place) -> None:
    pack = max((place.folder / "store" / "packs").rglob("*-*"), key=lambda p: p.stat().st_size)
    raw = bytearray(pack.read_bytes())
    raw[len(raw) // 2] ^= 1
    pack.chmod(0o600)
    pack.write_bytes(raw)
    error = place.restore(place.out / "db.raw", code=7)
    assert error["code"] == "chunk-damaged"
    assert place.files() == set()
    assert place.unfinished() == []


def test_restore_running_twice_is_refused(place: Place) -> None:
    place.killed("restore.checkpoint", place.out / "db.raw")
    (record,) = (place.folder / "state" / "restores").iterdir()
    with record.open("rb") as held:
        import fcntl

        fcntl.flock(held, fcntl.LOCK_EX)
        error = place.restore(place.out / "db.raw", code=5)
        assert error["code"] == "restore-running"
        words = ("restore", "--abandon", "--to", str(place.out / "db.raw"))
        assert place.ask(*words, code=5)["code"] == "restore-running"


# -- NBD ---------------------------------------------------------------------------------------


@contextmanager
def nbd_server(place: Place, disk: Path, *options: str) -> Iterator[str]:
    sock, pid = place.folder / f"{disk.stat().st_size}{''.join(options)}.sock", place.folder / "pid"
    run.run(["nbdkit", *options, "-U", str(sock), "-P", str(pid), "file", str(disk)])
    try:
        yield f"nbd+unix:///?socket={sock}"
    finally:
        run.run(["kill", pid.read_text().strip()])


def test_restore_to_nbd_killed_goes_on(place: Place) -> None:
    disk = place.folder / "disk"
    disk.write_bytes(os.urandom(SIZE))
    with nbd_server(place, disk) as uri:
        place.killed("restore.checkpoint", uri)
        (left,) = place.unfinished()
        assert left["to"] == uri
        report = place.restore(uri)
        assert report["resumed_bytes"] == left["done_bytes"]
        assert place.unfinished() == []
    assert disk.read_bytes() == place.content


@pytest.mark.parametrize("words", [(), ("--diff", "--yes")])
def test_restore_to_nbd_killed_at_each_step_goes_on(place: Place, words: tuple[str, ...]) -> None:
    disk, trace = place.folder / "disk", place.folder / "trace"
    disk.write_bytes(os.urandom(SIZE))
    with nbd_server(place, disk) as uri:
        traced = place.apart(
            "restore", place.backup, "--to", uri, *words, **{TRACE_ENV: str(trace)}
        )
        assert traced.status == 0, traced.stderr
        steps = list(dict.fromkeys(trace.read_text().split()))
        assert {"restore.checkpoint", "restore.finished"} <= set(steps)
        for step in steps:
            disk.write_bytes(os.urandom(SIZE))
            place.killed(step, uri, *words)
            begun = steps.index(step) > steps.index("restore.target.done")
            whole = steps.index(step) >= steps.index("restore.finished")
            left = place.unfinished()
            assert len(left) == (begun and not whole and step != "restore.copied"), step
            if whole or step == "restore.copied":
                assert disk.read_bytes() == place.content, step
            report = place.restore(uri, *words)
            assert report["resumed_bytes"] == sum(entry["done_bytes"] for entry in left)
            assert disk.read_bytes() == place.content, step
            assert place.unfinished() == []


def test_restore_to_nbd_overwritten_meanwhile_is_written_from_the_start(place: Place) -> None:
    disk = place.folder / "disk"
    disk.write_bytes(os.urandom(SIZE))
    with nbd_server(place, disk) as uri:
        place.killed("restore.copied", uri)
        (record,) = (place.folder / "state" / "restores").iterdir()
        with record.open("ab") as out:
            out.write(b'{"done":[[0,4096]]}\n')
        disk.write_bytes(os.urandom(SIZE))
        assert place.restore(uri)["resumed_bytes"] == 0
    assert disk.read_bytes() == place.content


def test_restore_diff_to_nbd_writes_only_what_differs(place: Place) -> None:
    disk = place.folder / "disk"
    changed = bytearray(place.content)
    changed[MIB : MIB + 10] = bytes(10)
    changed[4 * MIB : 4 * MIB + 4096] = os.urandom(4096)  # where the image is zero
    disk.write_bytes(changed)
    with nbd_server(place, disk) as uri:
        report = place.restore(uri, "--diff", "--yes")
        assert (report["written_bytes"], report["compared_bytes"]) == (2 * 4096, SIZE)
    assert disk.read_bytes() == place.content


def test_restore_to_nbd_read_only_or_small_is_refused(place: Place) -> None:
    disk = place.folder / "disk"
    disk.write_bytes(bytes(SIZE))
    with nbd_server(place, disk, "-r") as uri:
        assert place.restore(uri, code=9)["code"] == "target-read-only"
    disk.write_bytes(bytes(SIZE - 4096))
    with nbd_server(place, disk) as uri:
        assert place.restore(uri, code=9)["code"] == "target-too-small"
    assert place.unfinished() == []


def test_restore_to_nbd_without_a_server_is_one_clear_line(place: Place) -> None:
    error = place.restore(f"nbd+unix:///?socket={place.folder}/none", code=6)
    assert error["code"] == "nbd-unavailable"
    assert place.unfinished() == []


# -- only what differs -------------------------------------------------------------------------


def test_restore_diff_into_a_file_writes_only_what_differs(place: Place) -> None:
    target = place.out / "db.raw"
    changed = bytearray(place.content) + b"longer"
    changed[:512] = bytes(512)
    changed[-4102:-4096] = b"x" * 6
    target.write_bytes(changed)
    inode = target.stat().st_ino
    report = place.restore(target, "--diff", "--yes")
    assert report["written_bytes"] == 2 * 4096
    assert target.read_bytes() == place.content
    assert target.stat().st_ino == inode


def test_restore_diff_in_place_asks_first(place: Place) -> None:
    target = place.out / "db.raw"
    target.write_bytes(b"mine")
    assert place.restore(target, "--diff", code=2)["code"] == "not-confirmed"
    assert target.read_bytes() == b"mine"


def test_restore_diff_to_a_new_file_writes_it(place: Place) -> None:
    place.restore(place.out / "db.raw", "--diff")
    assert (place.out / "db.raw").read_bytes() == place.content


def test_restore_diff_killed_in_the_middle_goes_on(place: Place) -> None:
    target = place.out / "db.raw"
    target.write_bytes(os.urandom(SIZE))
    place.killed("restore.checkpoint", target, "--diff", "--yes")
    (left,) = place.unfinished()
    report = place.restore(target, "--diff", "--yes")
    assert report["resumed_bytes"] == left["done_bytes"]
    assert target.read_bytes() == place.content
    assert place.files() == {"db.raw"}


def test_restore_diff_into_a_qcow2_in_place_is_refused(place: Place) -> None:
    target = place.out / "db.qcow2"
    run.run(["qemu-img", "create", "-q", "-f", "qcow2", str(target), str(SIZE)])
    before = target.read_bytes()
    assert place.restore(target, "--diff", "--yes", code=2)["code"] == "bad-target"
    assert target.read_bytes() == before


# -- refusals ----------------------------------------------------------------------------------


def test_restore_onto_a_production_volume_needs_its_name(place: Place) -> None:
    volume = place.folder / "db.raw"
    volume.write_bytes(b"in production")
    for words in (("--overwrite",), ("--diff", "--yes"), ("--overwrite", "--onto-production", "x")):
        error = place.restore(volume, *words, code=9)
        assert error["code"] == "target-is-production"
        assert "--onto-production db" in error["hint"]
    link = place.folder / "link"
    link.symlink_to(volume)
    words = ("--diff", "--yes")
    assert place.restore(link, *words, code=9)["code"] == "target-is-production"
    assert volume.read_bytes() == b"in production"
    place.restore(volume, "--overwrite", "--onto-production", "db")
    assert volume.read_bytes() == place.content


def test_restore_onto_production_with_another_target_is_refused(place: Place) -> None:
    error = place.restore(place.out / "db.raw", "--onto-production", "db", code=2)
    assert error["code"] == "not-production"
    assert place.files() == set()


def test_restore_into_the_store_is_refused(place: Place) -> None:
    target = place.folder / "store" / "packs" / "db.raw"
    assert place.restore(target, code=9)["code"] == "target-in-store"
    assert not target.exists()
    link, inside = place.out / "link", place.folder / "store" / "store.json"
    link.symlink_to(inside)
    before = inside.read_bytes()
    assert place.restore(link, "--diff", "--yes", code=9)["code"] == "target-in-store"
    assert inside.read_bytes() == before


@pytest.mark.parametrize(
    ("to", "code", "status"),
    [
        ("{out}/none/db.raw", "no-folder", 4),
        ("{out}/pipe", "bad-target", 2),
        ("ftp://there/db.raw", "bad-target", 2),
        ("{out}/" + "n" * 300, "target-unavailable", 6),
        ("{out}/pipe/db.raw", "no-folder", 4),
        ("/proc/db.raw", "target-unavailable", 6),
    ],
)
def test_restore_to_a_bad_place_is_one_clear_line(
    place: Place, to: str, code: str, status: int
) -> None:
    os.mkfifo(place.out / "pipe")
    error = place.restore(to.format(out=place.out), "--overwrite", code=status)
    assert error["code"] == code
    assert "\n" not in error["message"]
    assert place.files() == {"pipe"}
    assert place.unfinished() == []


def test_restore_to_the_longest_name_there_is(place: Place) -> None:
    target = place.out / ("ü" * 127)
    place.restore(target)
    assert target.read_bytes() == place.content


def test_restore_diff_into_a_folder_with_files_asks_first(place: Place) -> None:
    (place.out / "db.raw").write_bytes(b"mine")
    error = place.restore(place.out, "--diff", code=2)
    assert error["code"] == "not-confirmed"
    assert (place.out / "db.raw").read_bytes() == b"mine"


@pytest.mark.parametrize("words", [("--diff", "--yes"), ("--overwrite",)])
def test_restore_over_a_file_that_qemu_writes_is_refused(
    place: Place, words: tuple[str, ...]
) -> None:
    target, sock = place.out / "db.raw", place.folder / "q.sock"
    target.write_bytes(bytes(SIZE))
    argv = ["qemu-nbd", "-f", "raw", "--persistent", f"--socket={sock}", str(target)]
    server = run.spawn(argv)
    try:
        while not qemu_nbd.greets(sock):
            assert server.poll() is None
        error = place.restore(target, *words, code=5)
        assert error["code"] == "target-in-use"
    finally:
        run.terminate(server)
    assert not any(target.read_bytes())


@pytest.mark.needs_root
def test_restore_over_a_file_under_a_loop_device_is_refused(place: Place) -> None:
    target = place.out / "db.raw"
    target.write_bytes(bytes(SIZE))
    with loop_device(target):
        for words in (("--diff", "--yes"), ("--overwrite",)):
            assert place.restore(target, *words, code=5)["code"] == "target-in-use"


@pytest.mark.needs_root
def test_restore_to_a_device_killed_goes_on_by_whatever_path(place: Place) -> None:
    disk = place.folder / "disk"
    disk.write_bytes(os.urandom(SIZE))
    with loop_device(disk) as device:
        place.killed("restore.checkpoint", device)
        (left,) = place.unfinished()
        link = place.folder / "device"
        link.symlink_to(device)
        report = place.restore(link)
        assert report["resumed_bytes"] == left["done_bytes"]
        assert place.unfinished() == []
        report = place.restore(device, "--diff", "--yes")
        assert (report["written_bytes"], report["compared_bytes"]) == (0, SIZE)
    assert disk.read_bytes() == place.content


@pytest.mark.needs_root
def test_restore_to_a_read_only_device_is_refused(place: Place) -> None:
    disk = place.folder / "disk"
    disk.write_bytes(bytes(SIZE))
    with loop_device(disk, read_only=True) as device:
        assert place.restore(device, code=9)["code"] == "target-read-only"
    assert place.unfinished() == []


@pytest.mark.needs_root
def test_restore_to_a_device_that_a_process_writes_is_refused(place: Place) -> None:
    disk = place.folder / "disk"
    disk.write_bytes(bytes(SIZE))
    script = "import sys; f = open(sys.argv[1], 'r+b'); print(1, flush=True); sys.stdin.read()"
    with loop_device(disk) as device:
        mine, theirs = socket.socketpair()
        argv = [sys.executable, "-c", script, str(device)]
        writer = run.spawn(argv, stdin=theirs.fileno())
        try:
            assert writer.stdout is not None
            assert writer.stdout.readline() == b"1\n"
            error = place.restore(device, code=5)
            assert error["code"] == "device-in-use"
            assert str(writer.pid) in error["message"]
        finally:
            run.terminate(writer)
            mine.close()
            theirs.close()


@pytest.mark.needs_root
def test_restore_without_room_is_refused_before_anything_is_written(
    place: Place, ext4_pool: Path
) -> None:
    with (ext4_pool / "fill").open("wb") as out:
        free = os.statvfs(ext4_pool).f_bavail * os.statvfs(ext4_pool).f_frsize
        os.posix_fallocate(out.fileno(), 0, free - 4 * MIB)
    for name in ("db.raw", "db.qcow2"):
        error = place.restore(ext4_pool / name, code=6)
        assert error["code"] == "no-space"
    assert {path.name for path in ext4_pool.iterdir()} == {"fill", "lost+found"}
    assert place.unfinished() == []


@pytest.mark.needs_root
def test_restore_of_a_sparse_image_needs_room_for_its_data_only(
    place: Place, ext4_pool: Path
) -> None:
    sparse = place.folder / "db.raw"
    sparse.unlink()
    with sparse.open("wb") as out:
        out.truncate(1 << 30)
        out.write(b"x" * 4096)
    place.backup = place.ask("backup", "shop")["id"]
    place.restore(ext4_pool / "db.raw")
    assert (ext4_pool / "db.raw").stat().st_size == 1 << 30
