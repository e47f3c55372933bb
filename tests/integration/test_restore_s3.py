"""Restores from a real S3 server: a bare machine, few requests, on after a kill, a server that is
gone for a while."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

import pytest

from offload import instance, run
from offload.cli.main import run as offload
from offload.engine import bulkread
from offload.engine.bulkread import BulkReader
from offload.images.backup import BackupImage
from offload.journal import CRASH_ENV
from offload.model import BackupSource
from offload.services import restore_copy
from offload.services.context import open_context
from offload.services.restore_copy import Copy
from offload.testing.fault_proxy import Trouble, fault_proxy
from offload.testing.rgw import RunningRgw

MIB = 1 << 20
SIZE = 24 * MIB

pytestmark = pytest.mark.needs_root

SMALL = """
from offload.engine import bulkread
from offload.services import restore_copy
bulkread.window_bytes = restore_copy.window_bytes = lambda chunk: 1 << 20
restore_copy.CHECKPOINT_BYTES = 1 << 20
from offload.cli.main import main
main()
"""


@dataclass
class Site:
    """A store on S3, its address, its recovery key, and what the volume held at its one backup."""

    folder: Path
    address: list[str]
    recovery: Path
    content: bytes
    backup: str
    capsys: pytest.CaptureFixture[str]

    @property
    def config(self) -> str:
        return str(self.folder / "new" / "o.toml")

    def ask(self, *words: str, config: str | None = None, code: int = 0) -> Any:
        self.capsys.readouterr()
        got = offload(["--config", config or self.config, "--json", *words])
        said = self.capsys.readouterr()
        assert got == code, said.err
        return json.loads(said.err if code else said.out)

    def init(self, *words: str, code: int = 0) -> Any:
        state = ["--state-dir", str(self.folder / "new" / "state")]
        return self.ask("init", *state, "--from-store", *self.address, *words, code=code)


@pytest.fixture
def site(
    rgw: RunningRgw,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> Site:
    """The machine that made the backup is gone; a folder `new` is there for the next."""
    monkeypatch.setattr(instance, "_runtime_base", lambda _: tmp_path / "run")
    content = os.urandom(SIZE // 2) + bytes(SIZE // 4) + b"offload\n" * (SIZE // 32)
    (tmp_path / "db.raw").write_bytes(content)
    (tmp_path / "new").mkdir()
    bucket = rgw.new_bucket()
    old = tmp_path / "old.toml"
    old.write_text(
        f'state_dir = "{tmp_path}/old"\npool.min_free = "1MiB"\n'
        f'[volumes.db]\nprovider = "copy"\npath = "{tmp_path}/db.raw"\n'
        '[groups.shop]\nvolumes = ["db"]\natomic = "record"\nstore = "vault"\n'
        f'[stores.vault]\nkind = "s3"\nbucket = "{bucket}"\nprefix = "vms/main"\n'
        f'endpoint = "{rgw.endpoint}"\nregion = "default"\npath_style = true\n'
        f'credentials_file = "{rgw.credentials_file}"\n'
        f'[stores.vault.key]\nfile = "{tmp_path}/old.key"\n'
    )
    address = [f"s3://{bucket}/vms/main", "--endpoint", rgw.endpoint, "--region", "default"]
    address += ["--path-style", "--credentials-file", str(rgw.credentials_file)]
    made = Site(tmp_path, address, tmp_path / "paper", content, "", capsys)
    made.ask("store", "init", "vault", "--recovery-key-to", str(made.recovery), config=str(old))
    made.backup = made.ask("backup", "shop", config=str(old))["id"]
    (tmp_path / "old.key").unlink()
    return made


def test_bare_machine_from_s3_and_the_recovery_key(site: Site) -> None:
    began = time.monotonic()
    report = site.init("--recovery-key-file", str(site.recovery))
    assert (report["store"], report["backups"], report["problems"]) == ("vault", 1, [])
    target = site.folder / "restored.raw"
    site.ask("restore", f"{site.backup}/db", "--to", str(target))
    seconds = time.monotonic() - began
    assert target.read_bytes() == site.content
    assert seconds < 60
    again = site.ask("backup", "shop")
    assert again["images"][0]["stored_bytes"] < MIB
    assert site.ask("verify", "--all")["problems"] == []


def test_bare_machine_from_s3_with_a_wrong_place_is_one_clear_line(site: Site) -> None:
    key = ("--recovery-key-file", str(site.recovery))
    whole = site.address
    site.address = [whole[0].rpartition("/")[0], *whole[1:]]
    assert site.init(*key, code=6)["code"] == "store-not-initialised"
    site.address = ["s3://nosuch-bucket", *whole[1:]]
    assert site.init(*key, code=6)["code"] == "no-bucket"
    site.address = [*whole[:-1], str(site.folder / "none")]
    error = site.init(*key, code=3)
    assert error["code"] == "store-credentials"
    assert list((site.folder / "new").iterdir()) == []


def test_restore_from_s3_asks_once_for_many_chunks(site: Site) -> None:
    site.init("--recovery-key-file", str(site.recovery))
    with open_context(Path(site.config)) as ctx:
        source = BackupSource(
            store=ctx.instance.config.store("vault").spec().text(),
            backup=site.backup,
            volume="db",
            size_bytes=SIZE,
            cache_dir=ctx.instance.cache_dir,
        )
    image = BackupImage(source)
    store = image.repository.store
    asked = []
    plain = store.get_range

    def counted(name: str, offset: int, length: int) -> bytes:
        asked.append(length)
        return plain(name, offset, length)

    store.get_range = counted  # type: ignore[method-assign]
    reader = BulkReader(image)
    got = bytearray(SIZE)

    def put(offset: int, content: bytes | bytearray | memoryview) -> None:
        got[offset : offset + len(content)] = content

    try:
        reader.read([(0, SIZE)], put)
    finally:
        reader.close()
        image.close()
    assert got == site.content
    chunks = SIZE // image.shape.chunk_bytes
    assert len(asked) * 4 < chunks


def test_restore_from_s3_killed_goes_on(site: Site) -> None:
    site.init("--recovery-key-file", str(site.recovery))
    target = site.folder / "restored.raw"
    words = ["--config", site.config, "restore", f"{site.backup}/db", "--to", str(target)]
    env = {CRASH_ENV: "restore.checkpoint"}
    done = run.run([sys.executable, "-c", SMALL, *words], check=False, env=env, timeout_s=120)
    assert done.status == -signal.SIGKILL, done.stderr
    (left,) = site.ask("recover")["unfinished_restores"]
    report = site.ask("restore", f"{site.backup}/db", "--to", str(target))
    assert report["volumes"][0]["resumed_bytes"] == left["done_bytes"] > 0
    assert target.read_bytes() == site.content


def test_restore_from_s3_that_stops_answering_keeps_what_it_has(
    site: Site, rgw: RunningRgw, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The right to read is taken away in the middle of the restore, and given back."""
    monkeypatch.setattr(bulkread, "window_bytes", lambda _: MIB)
    monkeypatch.setattr(restore_copy, "CHECKPOINT_BYTES", MIB)
    target = site.folder / "restored.raw"
    refused = Event()
    work = Copy._work

    def one_and_wait(copy: Copy, *args: Any) -> None:
        """No thread takes a second window before the first are noted and the trouble is there."""
        work(copy, *args)
        assert refused.wait(60)

    with fault_proxy(rgw.endpoint) as proxy:

        def step(name: str) -> None:
            if name == "restore.checkpoint" and not refused.is_set():
                proxy.inject(
                    Trouble.ERROR, methods=("GET",), part="packs/", times=1000, status=403,
                    code="AccessDenied",
                )  # fmt: skip
                refused.set()

        site.address[2] = proxy.endpoint
        site.init("--recovery-key-file", str(site.recovery))
        with monkeypatch.context() as patched:
            patched.setattr(restore_copy, "step", step)
            patched.setattr(Copy, "_work", one_and_wait)
            site.ask("restore", f"{site.backup}/db", "--to", str(target), code=10)
        (left,) = site.ask("recover")["unfinished_restores"]
        assert MIB <= left["done_bytes"] < SIZE
        proxy.forget()
        report = site.ask("restore", f"{site.backup}/db", "--to", str(target))
    assert report["volumes"][0]["resumed_bytes"] == left["done_bytes"]
    assert target.read_bytes() == site.content
