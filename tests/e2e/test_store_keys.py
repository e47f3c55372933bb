"""Encrypted stores as their admin has them: made, opened in each way, refused, rotated, killed."""

from __future__ import annotations

import json
import os
import pty
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from offload import run
from offload.errors import BusyError, PolicyError
from offload.format.keyfile import Secret, WrapperKind, wrap
from offload.format.keys import KeyRing
from offload.journal import CRASH_ENV, TRACE_ENV
from offload.services import store_keys, stores
from offload.services.context import open_context
from offload.services.keymaker import HandOver, KeyMaker
from offload.stores.disk import DiskStore
from offload.testing.warm import warm_python

ROOT = Path(__file__).resolve().parents[2]
OFFLOAD = ROOT / ".venv" / "bin" / "offload"
KILLED = -9

_CONFIG = """
state_dir = "{folder}/state"
runtime_dir = "{folder}/run"
[volumes.db]
provider = "copy"
path = "{folder}/db.img"
[groups.shop]
volumes = ["db"]
store = "main"
atomic = "record"
[stores.main]
kind = "disk"
path = "{folder}/store"
min_free = "0%"
"""


@dataclass
class Keyed:
    """One volume, one store, and how `offload` is run on them."""

    folder: Path

    @property
    def store(self) -> Path:
        return self.folder / "store"

    @property
    def key_file(self) -> Path:
        return self.folder / "keys" / "main.key"

    @property
    def keys(self) -> set[str]:
        return {path.name for path in (self.store / "keys").glob("*")}

    def configure(self, key: str, folder: Path | None = None) -> None:
        """Write the configuration with this `[stores.main.key]`, or none."""
        text = _CONFIG.format(folder=folder or self.folder)
        path = self.folder / "o.toml"
        path.write_text(text + (f"[stores.main.key]\n{key}\n" if key else ""))
        path.chmod(0o600)

    def run(self, *words: str, **env: str) -> run.Completed:
        argv = ("-m", "offload.cli", "--config", str(self.folder / "o.toml"), *words)
        return warm_python().run(*argv, env=env)

    def ok(self, *words: str, **env: str) -> str:
        done = self.run(*words, **env)
        assert done.status == 0, f"{words}: {done.stderr}\n{done.stdout}"
        return done.stdout

    def ask(self, *words: str) -> Any:
        return json.loads(self.ok("--json", *words))

    def refused(self, *words: str) -> tuple[str, int]:
        """Code and status of a command that must fail with one clear line."""
        done = self.run("--json", *words)
        assert done.status > 0, f"{words} succeeded: {done.stdout}"
        error = json.loads(done.stderr)
        assert "\n" not in error["message"]
        assert "Traceback" not in done.stderr
        return error["code"], done.status

    def readable(self) -> None:
        """All backups of the store restore to what the volume holds."""
        out = self.folder / "out"
        for entry in self.ask("backup", "list"):
            out.unlink(missing_ok=True)
            self.ok("restore", f"backup:{entry['id']}/db", "--to", str(out))
            assert out.read_bytes() == (self.folder / "db.img").read_bytes()

    def secret(self, name: str, text: str, mode: int = 0o600) -> Path:
        path = self.folder / name
        path.write_text(text + "\n")
        path.chmod(mode)
        return path


@pytest.fixture
def bare() -> Iterator[Keyed]:
    """A configuration with a key file, and nothing made yet."""
    with TemporaryDirectory(prefix="ofl-") as folder:
        made = Keyed(Path(folder))
        (made.folder / "db.img").write_bytes(os.urandom(700_000) + bytes(300_000))
        made.configure(f'file = "{made.key_file}"')
        yield made


@pytest.fixture
def site(bare: Keyed) -> Keyed:
    """A store with one backup; its recovery key is in the file `recovery`."""
    bare.ok("store", "init", "main", "--recovery-key-to", str(bare.folder / "recovery"))
    bare.ok("backup", "shop")
    return bare


def test_init_makes_key_file_and_recovery_key_that_only_their_owner_reads(site: Keyed) -> None:
    for path in (site.key_file, site.folder / "recovery"):
        assert path.stat().st_mode & 0o777 == 0o600
    assert site.key_file.parent.stat().st_mode & 0o777 == 0o700
    about = json.loads((site.store / "store.json").read_text().splitlines()[0])
    assert about["encryption"] == {"cipher": "aes-256-gcm"}
    assert "id_key" not in about
    assert sorted(key["kind"] for key in site.ask("key", "list", "main")["keys"]) == [
        "file", "recovery",
    ]  # fmt: skip
    site.readable()


def test_init_where_nobody_sees_the_recovery_key_is_refused_and_leaves_nothing(
    bare: Keyed,
) -> None:
    assert bare.refused("store", "init", "main") == ("recovery-key-undecided", 2)
    assert not bare.key_file.exists()
    taken = bare.secret("taken", "mine")
    words = ("store", "init", "main", "--recovery-key-to", str(taken))
    assert bare.refused(*words) == ("secret-exists", 5)
    assert taken.read_text() == "mine\n"
    assert not bare.key_file.exists()
    assert bare.keys == set()
    assert not (bare.store / "store.json").exists()


@pytest.mark.parametrize("right", [True, False], ids=["typed-back", "never-right"])
def test_init_on_a_terminal_shows_the_recovery_key_once_and_asks_it_back(
    bare: Keyed, right: bool
) -> None:
    ours, theirs = pty.openpty()
    argv = [str(OFFLOAD), "--config", str(bare.folder / "o.toml"), "store", "init", "main"]
    process = run.spawn(argv, stdin=theirs, stdout=theirs, stderr=theirs, new_session=True)
    os.close(theirs)
    said = b""
    try:
        for _ in range(3):
            said = _until(ours, said, b"groups: ")
            shown = re.findall(rb"offload(?:-[A-Z2-7]{7}){8}", said)
            assert len(shown) == 1
            answer = b" ".join(shown[0].split(b"-")[-2:]) if right else b"nothing"
            os.write(ours, answer + b"\n")
            if right:
                break
        _until(ours, b"", b"encryption" if right else b"not confirmed")
        assert process.wait(timeout=60) == (0 if right else 2)
    finally:
        run.terminate(process)
        os.close(ours)
    if right:
        bare.configure(f'recovery_file = "{bare.secret("r", shown[0].decode())}"')
        assert bare.ask("store", "show", "main")["state"] == "ok"
    else:
        assert not (bare.store / "store.json").exists()
        assert not bare.key_file.exists()


def _until(fd: int, said: bytes, wanted: bytes) -> bytes:
    """Read from a terminal until it shows `wanted` after what it had `said`."""
    start = len(said)
    while wanted not in said[start:]:
        said += os.read(fd, 4096)
    return said


def test_init_plain_says_so_and_takes_no_recovery_key(bare: Keyed) -> None:
    bare.configure("")
    words = ("store", "init", "main", "--recovery-key-to", str(bare.folder / "r"))
    assert bare.refused(*words) == ("store-not-encrypted", 2)
    done = bare.run("store", "init", "main")
    assert done.status == 0
    assert "NOT encrypted" in done.stderr


def test_init_killed_at_each_step_leaves_a_store_or_nothing(bare: Keyed) -> None:
    recovery = bare.folder / "recovery"
    words = ("store", "init", "main", "--recovery-key-to", str(recovery))
    trace = bare.folder / "trace"
    bare.ok(*words, **{TRACE_ENV: str(trace)})
    steps = list(dict.fromkeys(trace.read_text().split()))
    assert {"key.file.written", "key.wrapper.written", "store-init.keys.written"} <= set(steps)
    for step in steps:
        shutil.rmtree(bare.store)
        shutil.rmtree(bare.key_file.parent)
        recovery.unlink()
        assert bare.run(*words, **{CRASH_ENV: step}).status == KILLED
        bare.ok("recover")
        if not (bare.store / "store.json").exists():
            assert bare.keys == set()
            assert not recovery.exists()
            assert not bare.key_file.exists()
            bare.ok(*words)
        assert len(bare.keys) == 2
        assert bare.ask("key", "list", "main")["trouble"] == ""


def test_store_opens_in_each_way_that_was_added(site: Keyed) -> None:
    phrase = site.secret("phrase", "Straße 17, hinten links")
    site.ok("key", "add", "main", "--passphrase-file", str(phrase), "--label", "safe")
    second = site.folder / "second.key"
    site.ok("key", "add", "main", "--file", str(second))
    assert site.refused("key", "add", "main", "--file", str(second)) == ("key-exists", 5)
    ways = (
        f'passphrase_file = "{phrase}"',
        f'command = ["cat", "{phrase}"]',
        f'file = "{second}"',
        f'recovery_file = "{site.folder / "recovery"}"',
    )
    for way in ways:
        site.configure(way)
        site.readable()
        found = site.ask("key", "list", "main")
        assert sum(key["configured"] for key in found["keys"]) == 1
    site.ok("backup", "shop")
    site.readable()


def test_key_that_does_not_open_the_store_is_one_clear_line(site: Keyed) -> None:
    good = site.key_file.read_text().strip()
    other = good.replace(good[20], "0" if good[20] != "0" else "1", 1)
    recovery = (site.folder / "recovery").read_text().strip()
    open_file = site.secret("open", good, 0o640)
    cases = {
        f'passphrase_file = "{site.secret("wrong", "no")}"': ("key-wrong", 3),
        f'file = "{site.secret("damaged", other)}"': ("key-invalid", 3),
        f'file = "{site.folder / "missing"}"': ("secret-missing", 3),
        f'file = "{open_file}"': ("secret-unsafe", 3),
        f'recovery_file = "{site.secret("typo", recovery[:-1])}"': ("key-invalid", 3),
        'command = ["false"]': ("key-command-failed", 3),
        'command = ["/no/such/program"]': ("key-command-failed", 3),
        'command = ["true"]': ("key-command-failed", 3),
        "": ("key-missing", 3),
    }
    for key, expected in cases.items():
        site.configure(key)
        assert site.refused("store", "show", "main") == expected, key
        assert site.refused("backup", "shop")[1] == 3
        done = site.run("--debug", "store", "show", "main")
        assert good not in done.stderr + done.stdout
    site.configure('file = "/no/such/key"')
    assert len(site.ask("key", "list", "main")["keys"]) == 2  # it needs no key
    assert list((site.folder / "state" / "journal").glob("*")) == []


def test_key_of_another_store_and_a_store_under_another_id_are_refused(site: Keyed) -> None:
    mine = site.folder / "mine"
    site.store.rename(mine)
    other = site.folder / "other.key"
    site.configure(f'file = "{other}"')
    site.ok("store", "init", "main", "--no-recovery-key")
    site.configure(f'file = "{site.key_file}"')
    assert site.refused("store", "show", "main") == ("key-wrong", 3)
    for wrapper in (mine / "keys").iterdir():  # the ways into the one, put beside the other
        shutil.copy(wrapper, site.store / "keys" / wrapper.name)
    assert site.refused("store", "show", "main") == ("key-wrong", 3)


def test_encrypted_store_replaced_by_a_plain_one_is_refused(site: Keyed) -> None:
    shutil.rmtree(site.store)
    site.configure("")
    site.ok("store", "init", "main")
    site.configure(f'file = "{site.key_file}"')
    assert site.refused("backup", "shop") == ("store-not-encrypted", 3)


def test_last_way_in_is_never_removed(site: Keyed) -> None:
    found = {key["kind"]: key["id"] for key in site.ask("key", "list", "main")["keys"]}
    site.ok("key", "remove", "main", found["recovery"], "--dry-run")
    assert len(site.keys) == 2
    assert site.refused("key", "remove", "main", found["recovery"]) == ("not-confirmed", 2)
    site.ok("key", "remove", "main", found["recovery"], "--yes")
    assert site.keys == {found["file"]}
    assert site.refused("key", "remove", "main", found["file"], "--yes") == ("last-key", 9)
    assert site.refused("key", "remove", "main", "zzz", "--yes") == ("unknown-key", 4)
    site.readable()


def test_newest_backup_that_is_hidden_is_found_out_by_catalog_and_noted_head(site: Keyed) -> None:
    first = site.ask("store", "check", "main")["head"]
    newest = site.ask("backup", "shop")["backup"]["id"]
    head = site.ask("store", "check", "main", "--expect-head", first)["head"]
    assert head != first
    site.ok("store", "check", "main", "--expect-head", head[:16])
    assert site.refused("store", "check", "main", "--expect-head", head[:15]) == ("bad-head", 2)
    (site.store / "manifests" / newest).unlink()
    hidden = site.run("store", "check", "main")
    assert hidden.status == 7
    assert f"backup {newest} is known to the catalog" in hidden.stdout
    site.ok("store", "check", "main", "--rebuild-catalog")
    site.ok("store", "check", "main")  # who knows nothing else is shown nothing wrong
    noted = site.run("store", "check", "main", "--expect-head", head)
    assert noted.status == 7
    assert "lacks the head" in noted.stdout
    site.ok("backup", "shop")  # and it does not come back by what is written afterwards
    assert site.run("store", "check", "main", "--expect-head", head).status == 7
    site.ok("store", "check", "main", "--expect-head", first)


def test_way_in_that_object_lock_keeps_is_not_said_to_be_removed(
    site: Keyed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a bucket that lists what is locked though it was deleted."""
    found = {key["kind"]: key["id"] for key in site.ask("key", "list", "main")["keys"]}
    monkeypatch.setattr(DiskStore, "delete", lambda *_: None)
    with open_context(site.folder / "o.toml") as ctx:
        with pytest.raises(PolicyError) as caught:
            store_keys.remove(ctx, "main", found["recovery"])
        assert caught.value.code == "key-locked"
        plan = store_keys.rotate(ctx, "main", None)
        assert set(found.values()) <= set(plan.locked)
    assert site.ask("store", "show", "main")["key_version"] == 2


def test_rotation_beside_another_change_of_keys_gives_way(
    site: Keyed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other one has put its first wrapper before this one looks."""
    before = site.keys
    first = store_keys._first

    def and_another(maker: KeyMaker, ring: KeyRing, to: HandOver | None, ident: str) -> None:
        first(maker, ring, to, ident)
        other = Secret(kind=WrapperKind.RECOVERY, value=bytes(32))
        raw = wrap(ring, other, ident="other00000", label="", store_id=maker.parameters.store_id)
        maker.store.put("keys/other00000", [raw])

    monkeypatch.setattr(store_keys, "_first", and_another)
    with open_context(site.folder / "o.toml") as ctx:
        with pytest.raises(BusyError) as caught:
            store_keys.rotate(ctx, "main", None)
        assert caught.value.code == "keys-changing"
    assert site.keys == before | {"other00000"}
    assert site.ask("store", "show", "main")["key_version"] == 1


def test_damaged_way_in_is_shown_stops_a_rotation_and_can_be_removed(site: Keyed) -> None:
    found = {key["kind"]: key["id"] for key in site.ask("key", "list", "main")["keys"]}
    path = site.store / "keys" / found["recovery"]
    path.chmod(0o600)
    path.write_bytes(path.read_bytes()[:-9])
    listing = site.ask("key", "list", "main")
    assert len(listing["keys"]) == len(listing["damaged"]) == 1
    assert "PROBLEM" in site.ok("key", "list", "main")
    assert site.refused("key", "rotate", "main", "--dry-run") == ("bad-key", 7)
    assert site.refused("key", "remove", "main", found["file"], "--yes") == ("last-key", 9)
    site.ok("key", "remove", "main", found["recovery"], "--yes")
    site.ok("key", "rotate", "main", "--yes", "--no-recovery-key")
    site.readable()


def test_geometry_is_chosen_when_the_store_is_made_and_checked(bare: Keyed) -> None:
    words = ("store", "init", "main", "--no-recovery-key")
    assert bare.refused(*words, "--chunk-size", "1000") == ("bad-geometry", 2)
    assert bare.refused(*words, "--zstd-level", "40")[1] == 2
    assert not bare.key_file.exists()
    bare.ok(
        *words, "--chunk-size", "64KiB", "--page-entries", "16", "--pack-size", "128KiB",
        "--zstd-level", "3",
    )  # fmt: skip
    about = json.loads((bare.store / "store.json").read_text().splitlines()[0])
    names = ("chunk_bytes", "page_entries", "pack_bytes", "zstd_level")
    assert [about[name] for name in names] == [65536, 16, 131072, 3]
    bare.ok("backup", "shop")
    bare.readable()
    assert len(list((bare.store / "packs").rglob("*-*"))) > 3


def test_store_like_another_has_its_ids_and_not_its_keys(site: Keyed) -> None:
    second = site.folder / "second"
    text = (site.folder / "o.toml").read_text()
    more = f'[stores.second]\nkind = "disk"\npath = "{second}"\nmin_free = "0%"\n'
    (site.folder / "o.toml").write_text(text + more)
    assert site.refused("store", "init", "second", "--like", "main") == ("like-encrypted", 2)
    key = f'[stores.second.key]\nfile = "{site.folder / "second.key"}"\n'
    (site.folder / "o.toml").write_text(text + more + key)
    site.ok("store", "init", "second", "--like", "main", "--no-recovery-key")
    with open_context(site.folder / "o.toml") as ctx:
        keys = []
        for name in ("main", "second"):
            with stores.opened(ctx, name, exclusive=False) as repository:
                keys.append(repository.keys)
    one, two = keys
    assert (one.data, one.delta, one.page) == (two.data, two.delta, two.page)
    assert one.mac != two.mac
    assert one.current.pack != two.current.pack


def test_rotation_drops_what_is_not_proven_and_all_stays_readable(site: Keyed) -> None:
    phrase = site.secret("phrase", "kept")
    site.ok("key", "add", "main", "--passphrase-file", str(phrase))
    site.ok("key", "add", "main", "--file", str(site.folder / "lost.key"))
    plan = site.ask("key", "rotate", "main", "--dry-run", "--passphrase-file", str(phrase))
    assert len(plan["dropped"]) == 2
    fresh = site.folder / "fresh"
    done = site.run(
        "key", "rotate", "main", "--yes", "--passphrase-file", str(phrase),
        "--recovery-key-to", str(fresh),
    )  # fmt: skip
    assert done.status == 0
    assert "can still read" in done.stderr
    assert len(site.keys) == 3
    assert site.ask("store", "show", "main")["key_version"] == 2
    image = bytearray((site.folder / "db.img").read_bytes())
    site.readable()
    image[:4096] = os.urandom(4096)
    (site.folder / "db.img").write_bytes(image)
    newest = site.ask("backup", "shop")["backup"]["id"]
    pack = next(p for p in (site.store / "packs").rglob(f"{newest}-*"))
    assert pack.read_bytes()[12:16] == b"\x02\0\0\0"
    for way, opens in (
        (f'passphrase_file = "{phrase}"', True),
        (f'recovery_file = "{fresh}"', True),
        (f'recovery_file = "{site.folder / "recovery"}"', False),
        (f'file = "{site.folder / "lost.key"}"', False),
    ):
        site.configure(way)
        if opens:
            assert len(site.ask("backup", "list")) == 2
            assert site.ask("store", "show", "main")["key_version"] == 2
        else:
            assert site.refused("store", "show", "main") == ("key-wrong", 3)


def test_key_brought_back_from_before_a_rotation_is_refused(site: Keyed) -> None:
    old = {path.name: path.read_bytes() for path in (site.store / "keys").iterdir()}
    site.ok("key", "rotate", "main", "--yes", "--no-recovery-key")
    assert len(site.keys) == 1
    site.ok("store", "show", "main")
    for path in (site.store / "keys").iterdir():
        path.unlink()
    for name, raw in old.items():
        (site.store / "keys" / name).write_bytes(raw)
    assert site.refused("backup", "shop") == ("key-rollback", 7)


@pytest.mark.parametrize("recovery", [True, False], ids=["recovery-key", "none"])
def test_rotation_killed_at_each_step_is_taken_back_or_finished(
    site: Keyed, recovery: bool
) -> None:
    fresh = site.folder / "fresh"
    how = ("--recovery-key-to", str(fresh)) if recovery else ("--no-recovery-key",)
    words = ("key", "rotate", "main", "--yes", *how)
    trace = site.folder / "trace"
    site.ok(*words, **{TRACE_ENV: str(trace)})
    steps = list(dict.fromkeys(trace.read_text().split()))
    assert {"key.wrapper.written", "key-rotate.committed", "key-rotate.old.deleted"} <= set(steps)
    for step in steps:
        fresh.unlink(missing_ok=True)
        before = site.keys
        version = site.ask("store", "show", "main")["key_version"]
        assert site.run(*words, **{CRASH_ENV: step}).status == KILLED
        site.ok("store", "show", "main")  # it opens, whatever was left
        site.ok("recover")
        now = site.ask("store", "show", "main")["key_version"]
        if now == version:
            assert site.keys == before
            assert not fresh.exists()
        else:
            assert now == version + 1
            assert site.keys.isdisjoint(before)
            assert len(site.keys) == (2 if recovery else 1)
            if recovery:
                site.configure(f'recovery_file = "{fresh}"')
                assert site.ask("store", "show", "main")["key_version"] == now
                site.configure(f'file = "{site.key_file}"')
    site.readable()


def test_add_killed_at_each_step_adds_or_leaves_nothing(site: Keyed) -> None:
    trace, new = site.folder / "trace", site.folder / "new.key"
    words = ("key", "add", "main", "--file", str(new))
    site.ok(*words, **{TRACE_ENV: str(trace)})
    for step in dict.fromkeys(trace.read_text().split()):
        new.unlink(missing_ok=True)
        before = site.keys
        assert site.run(*words, **{CRASH_ENV: step}).status == KILLED
        site.ok("recover")
        assert len(site.keys - before) == int(new.exists())
        assert before <= site.keys
    site.readable()
