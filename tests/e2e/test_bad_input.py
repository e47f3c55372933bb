"""Bad input: one clear line, the documented exit code, nothing changed."""

from __future__ import annotations

import json
import os
import pwd
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from e2e_site import MIB, OFFLOAD, Site

from offload import run
from offload.testing.pools import loop_device

pytestmark = pytest.mark.needs_root


@pytest.fixture
def connected(site: Site) -> Iterator[str]:
    """A view with a client on it; gives its name."""
    made = site.ask("timemark", "create", "solo")["id"]
    site.ok("mount", f"timemark:{made}/web", "--name", "busy")
    uri = site.ask("views")[0]["uri"]
    script = (
        "import nbd, sys, time; h = nbd.NBD(); h.connect_uri(sys.stdin.readline().strip()); "
        "print(1, flush=True); time.sleep(60)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as client:
        assert client.stdin is not None
        assert client.stdout is not None
        client.stdin.write(uri.encode() + b"\n")
        client.stdin.flush()
        client.stdout.readline()
        yield "busy"
        client.kill()


@pytest.mark.parametrize(
    ("words", "code", "status"),
    [
        (("timemark", "create", "nosuch"), "unknown-group", 4),
        (("timemark", "show", "zzzz"), "unknown-timemark", 4),
        (("backup", "nosuch", "--store", "main"), "unknown-group", 4),
        (("backup", "shop", "--store", "nosuch"), "unknown-store", 4),
        (("backup", "show", "zzzz"), "unknown-backup", 4),
        (("restore", "zzzz", "--to", "/tmp/x"), "unknown-backup", 4),
        (("mount", "timemark:zzzz/db"), "unknown-timemark", 4),
        (("mount", "nonsense:1/2"), "bad-origin", 2),
        (("mount", "nosuch"), "unknown-group", 4),
        (("unmount", "nosuch"), "unknown-view", 4),
        (("unmount",), "usage", 2),
        (("store", "init", "main"), "store-exists", 5),
        (("mount", "shop", "--target", "nosuch"), "unknown-target", 3),
        (("verify", "--all", "--sample", "0%"), "usage", 2),
        (("timemark", "create", "loose"), "not-atomic", 9),
        (
            ("timemark", "create", "solo", "--consistency", "application"),
            "consistency-not-reached",
            9,
        ),
    ],
)  # fmt: skip
def test_bad_request_is_one_line_with_its_code(
    site: Site, words: tuple[str, ...], code: str, status: int
) -> None:
    error = site.refused(*words)
    assert (error["code"], error["status"]) == (code, status)
    assert error["hint"] or error["message"]
    assert site.snapshots() == []
    assert site.servers() == []
    assert site.journal_files() == []


def test_ambiguous_prefix_is_refused(site: Site) -> None:
    firsts: set[str] = set()
    while True:
        made = str(site.ask("timemark", "create", "solo")["id"])
        if made[0] in firsts:
            break
        firsts.add(made[0])
    error = site.refused("timemark", "show", made[0])
    assert error["code"] == "ambiguous-timemark"
    assert made in error["message"]


@pytest.mark.parametrize(
    ("text", "code", "names"),
    [
        ("[volumes.x]\nprovider = 'reflink'\npth = '/x'", "config-invalid", "volumes.x.pth"),
        ("state_dir = [", "config-syntax", "offload.toml"),
        ("[groups.g]\nvolumes = ['none']", "config-invalid", "none"),
    ],
)
def test_bad_configuration_names_file_and_key(site: Site, text: str, code: str, names: str) -> None:
    site.config.write_text(text)
    error = site.refused("status")
    assert (error["code"], error["status"]) == (code, 3)
    assert str(site.config) in error["message"]
    assert names in error["message"]


def test_world_writable_configuration_is_refused(site: Site) -> None:
    site.config.chmod(0o666)
    assert site.refused("status")["code"] == "config-unsafe"


def test_configuration_with_a_secret_that_others_read_is_refused(site: Site) -> None:
    site.config.write_text(site.config.read_text() + 'passphrase = "hush-hush"\n')
    site.config.chmod(0o644)
    error = site.refused("status")
    assert error["code"] == "config-unsafe"
    assert "hush" not in json.dumps(error)


def test_missing_volume_is_named(site: Site) -> None:
    run.run(["umount", str(site.mounts.pop("web"))])
    site.volume("web").rename(site.pool / "gone")
    error = site.refused("timemark", "create", "solo")
    assert error["code"] == "volume-missing"
    assert "web" in error["message"]
    (site.pool / "gone").rename(site.volume("web"))


def test_store_that_is_not_initialised_is_refused(site: Site) -> None:
    (site.store / "store.json").rename(site.folder / "aside")
    error = site.refused("backup", "shop")
    assert (error["code"], error["status"]) == ("store-not-initialised", 6)
    assert site.snapshots() == []


def test_store_of_a_newer_format_is_refused(site: Site) -> None:
    from offload.format.sealed import seal, unseal

    path = site.store / "store.json"
    value = unseal("store.json", path.read_bytes())
    path.chmod(0o600)
    path.write_bytes(seal({**value, "version": 99}))
    error = site.refused("backup", "shop")
    assert (error["code"], error["status"]) == ("store-newer", 6)


def test_full_store_is_refused_and_left_clean(site: Site) -> None:
    site.config.write_text(
        site.config.read_text().replace('min_free = "16MiB"', 'min_free = "99%"')
    )
    error = site.refused("backup", "shop")
    assert error["code"] == "no-space"
    assert site.store_files("packs", "index", "manifests", "tmp") == []
    assert site.snapshots() == []


def test_full_pool_is_refused(site: Site) -> None:
    site.config.write_text(
        site.config.read_text().replace('min_free = "10MiB"', 'min_free = "99%"')
    )
    error = site.refused("timemark", "create", "shop")
    assert (error["code"], error["status"]) == ("pool-full", 9)
    assert site.snapshots() == []


def test_freeze_without_root_is_refused(site: Site) -> None:
    nobody = pwd.getpwnam("nobody")
    for path in (site.folder, site.config):
        os.chown(path, nobody.pw_uid, nobody.pw_gid)
    for path in (site.state, site.folder / "run", site.store):
        run.run(["chown", "-R", "nobody", str(path)])
    # nobody, but able to read a checkout that is in somebody's home
    caps = ["--inh-caps=-all,+dac_read_search", "--ambient-caps=-all,+dac_read_search"]
    argv = ["setpriv", "--reuid", "nobody", "--regid", "nogroup", "--clear-groups", *caps]
    words = ["--config", str(site.config), "--json", "timemark", "create", "shop"]
    done = run.run([*argv, str(OFFLOAD), *words], check=False)
    error = json.loads(done.stderr)
    assert done.status == 10, error
    assert site.snapshots() == []


def test_taken_port_is_refused(site: Site) -> None:
    made = site.ask("timemark", "create", "solo")["id"]
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        error = site.refused("mount", f"timemark:{made}/web", "--tcp", "--port", port)
    assert (error["code"], error["status"]) == ("port-taken", 6)
    assert site.servers() == []
    assert site.ask("views") == []


def test_unmount_with_a_client_needs_force(site: Site, connected: str) -> None:
    error = site.refused("unmount", connected)
    assert (error["code"], error["status"]) == ("view-busy", 5)
    assert len(site.servers()) == 1
    site.ok("unmount", connected, "--force")
    assert site.servers() == []


def test_timemark_with_a_view_is_not_deleted(site: Site, connected: str) -> None:
    mark = site.ask("timemark", "list")[0]["id"]
    error = site.refused("timemark", "delete", mark, "--yes")
    assert (error["code"], error["status"]) == ("timemark-in-use", 5)
    assert connected in error["message"]
    assert len(site.snapshots()) == 1


def test_restore_over_a_file_needs_overwrite(site: Site) -> None:
    made = site.ask("backup", "solo")["id"]
    target = site.folder / "there"
    target.write_bytes(b"mine")
    error = site.refused("restore", f"{made}/web", "--to", str(target))
    assert (error["code"], error["status"]) == ("target-exists", 5)
    assert target.read_bytes() == b"mine"
    site.ok("restore", f"{made}/web", "--to", str(target), "--overwrite")
    assert target.stat().st_size == 320 * MIB


def test_restore_onto_a_mounted_device_is_refused(site: Site) -> None:
    made = site.ask("backup", "solo")["id"]
    device = run.run(["findmnt", "-no", "SOURCE", str(site.mounts["web"])]).stdout.strip()
    error = site.refused("restore", f"{made}/web", "--to", device, "--overwrite")
    assert (error["code"], error["status"]) == ("device-in-use", 5)
    assert site.writable()


def test_restore_onto_a_small_device_is_refused(site: Site, tmp_path: Path) -> None:
    made = site.ask("backup", "solo")["id"]
    small = tmp_path / "small"
    small.write_bytes(bytes(8 * MIB))
    with loop_device(small) as device:
        error = site.refused("restore", f"{made}/web", "--to", str(device), "--overwrite")
    assert (error["code"], error["status"]) == ("target-too-small", 9)
    assert small.read_bytes() == bytes(8 * MIB)


def test_restore_onto_a_device_is_byte_for_byte(site: Site, tmp_path: Path) -> None:
    made = site.ask("backup", "solo")
    large = tmp_path / "large"
    large.write_bytes(os.urandom(321 * MIB))
    with loop_device(large) as device:
        site.ok("restore", f"{made['id']}/web", "--to", str(device), "--overwrite")
    with site.context() as ctx:
        snapshot = ctx.catalog.timemark(made["timemark"]).snapshots[0]
    assert large.read_bytes()[: 320 * MIB] == Path(snapshot.ref["path"]).read_bytes()


def test_restore_to_an_nbd_server_is_byte_for_byte(site: Site, tmp_path: Path) -> None:
    made = site.ask("backup", "solo")
    disk, sock, pid = tmp_path / "disk", site.folder / "d.sock", tmp_path / "pid"
    disk.write_bytes(os.urandom(320 * MIB))
    run.run(["nbdkit", "-U", str(sock), "-P", str(pid), "file", str(disk)])
    try:
        uri = f"nbd+unix:///?socket={sock}"
        site.ok("restore", f"{made['id']}/web", "--to", uri, "--overwrite")
    finally:
        run.run(["kill", pid.read_text().strip()])
    with site.context() as ctx:
        snapshot = ctx.catalog.timemark(made["timemark"]).snapshots[0]
    assert disk.read_bytes() == Path(snapshot.ref["path"]).read_bytes()


def test_flipped_bit_is_found_with_backup_volume_and_range(site: Site) -> None:
    made = site.ask("backup", "shop")["id"]
    pack = max((site.store / "packs").rglob("*-*"), key=lambda p: p.stat().st_size)
    raw = bytearray(pack.read_bytes())
    raw[len(raw) // 2] ^= 4
    pack.chmod(0o600)
    pack.write_bytes(raw)
    done = site.run("--json", "verify", "--all")
    assert done.status == 7
    problems = json.loads(done.stdout)["problems"]
    assert problems
    assert problems[0]["backup"] == made
    assert problems[0]["volume"] in ("db", "web")
    assert problems[0]["length_bytes" if "length_bytes" in problems[0] else "length"] > 0
    refused = site.run("restore", f"{made}/{problems[0]['volume']}", "--to", str(site.folder / "r"))
    assert refused.status == 7
    assert not (site.folder / "r").exists()
