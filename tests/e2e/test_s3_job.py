"""Backup and restore of a group in a bucket of a real S3 server, by the command line."""

from __future__ import annotations

import json
import random
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbd
import pytest

from offload import procs
from offload.cli.main import run as offload
from offload.testing.fault_proxy import FaultProxy, Trouble, fault_proxy
from offload.testing.rgw import RunningRgw, S3User

MIB = 1 << 20
SIZE = 24 * MIB
DATA = 20 * MIB  # random, so that it is stored as it is

CONFIG = """
state_dir = "{folder}/state"
runtime_dir = "{folder}/run"

[pool]
min_free = "0%"

[volumes.db]
provider = "copy"
path = "{folder}/db.raw"

[groups.shop]
volumes = ["db"]
atomic = "record"

[stores.main]
kind = "s3"
bucket = "{bucket}"
prefix = "site-a"
endpoint = "{endpoint}"
path_style = true
{keys}
"""


@dataclass
class Site:
    """A volume, a bucket, and the proxy between them."""

    folder: Path
    bucket: str
    proxy: FaultProxy
    capsys: pytest.CaptureFixture[str]

    @property
    def volume(self) -> Path:
        return self.folder / "db.raw"

    def run(self, *words: str) -> tuple[int, str, str]:
        """Status, output and errors of `offload`."""
        self.capsys.readouterr()
        status = offload(["--config", str(self.folder / "offload.toml"), *words])
        out, err = self.capsys.readouterr()
        assert "Traceback" not in err
        return status, out, err

    def ok(self, *words: str) -> str:
        status, out, err = self.run(*words)
        assert status == 0, f"{words}: {err}{out}"
        return out

    def ask(self, *words: str) -> Any:
        return json.loads(self.ok("--json", *words))

    def back_up(self) -> str:
        found: str = self.ask("backup", "shop")["id"]
        return found

    def restored(self, backup: str) -> bytes:
        target = self.folder / "restored.raw"
        target.unlink(missing_ok=True)
        self.ok("restore", f"backup:{backup}", "--to", str(target))
        return target.read_bytes()

    def write(self, at: int, data: bytes) -> None:
        with self.volume.open("r+b") as out:
            out.seek(at)
            out.write(data)


@contextmanager
def made(
    rgw: RunningRgw, capsys: pytest.CaptureFixture[str], *, bucket: str, keys: str
) -> Iterator[Site]:
    folder = Path(tempfile.mkdtemp(prefix="ofs-", dir="/tmp"))
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        proxy = stack.enter_context(fault_proxy(rgw.endpoint))
        site = Site(folder, bucket, proxy, capsys)
        text = CONFIG.format(folder=folder, bucket=bucket, endpoint=proxy.endpoint, keys=keys)
        (folder / "offload.toml").write_text(text)
        with site.volume.open("xb") as out:
            out.write(random.Random(7).randbytes(DATA))
            out.truncate(SIZE)
        yield site


@pytest.fixture
def site(rgw: RunningRgw, capsys: pytest.CaptureFixture[str]) -> Iterator[Site]:
    keys = f'credentials_file = "{rgw.credentials_file}"'
    with made(rgw, capsys, bucket=rgw.new_bucket(), keys=keys) as found:
        found.ok("store", "init", "main", "--pack-size", "4MiB")
        found.proxy.forget()
        yield found


@pytest.mark.parametrize(
    "faults",
    [
        [{"trouble": Trouble.ERROR, "status": 500, "methods": ("GET", "PUT"), "times": 6}],
        [{"trouble": Trouble.ERROR, "status": 503, "code": "SlowDown", "part": "packs/",
          "methods": ("GET", "PUT"), "times": 6}],
        [{"trouble": Trouble.CUT_REQUEST, "methods": ("PUT",), "times": 4, "at_least": MIB},
         {"trouble": Trouble.CUT_REPLY, "methods": ("GET",), "times": 4, "at_least": MIB}],
        [{"trouble": Trouble.LOSE_REPLY, "methods": ("PUT", "DELETE"), "times": 8}],
        [{"trouble": Trouble.LATE, "seconds": 0.3, "times": 6},
         {"trouble": Trouble.SLOW, "methods": ("GET",), "part": "packs/", "times": 2,
          "bytes_per_s": 8 * MIB}],
    ],
    ids=["failing", "throttling", "cutting", "losing-replies", "late-and-slow"],
)  # fmt: skip
def test_backup_and_restore_through_trouble(site: Site, faults: list[dict[str, Any]]) -> None:
    for fault in faults:
        site.proxy.inject(**fault)
    first = site.back_up()
    old = site.volume.read_bytes()
    site.write(3 * MIB + 512, b"changed " * 1000)
    second = site.back_up()
    assert site.restored(first) == old
    assert site.restored(second) == site.volume.read_bytes()
    assert [fault.times for fault in site.proxy.faults] == [0] * len(faults)
    site.proxy.forget()
    site.ok("verify", "--all", "--store", "main")
    site.ok("store", "check", "main")


def test_wrong_bytes_are_never_restored(site: Site) -> None:
    ident = site.back_up()
    fault = site.proxy.inject(
        Trouble.WRONG_BYTES, methods=("GET",), part="packs/", at_least=64 << 10, times=1
    )
    target = site.folder / "restored.raw"
    status, _, err = site.run("restore", f"backup:{ident}", "--to", str(target))
    assert fault.times == 0
    assert status in (0, 7), err
    if status == 0:  # it was asked for again, and right
        assert target.read_bytes() == site.volume.read_bytes()
    assert site.restored(ident) == site.volume.read_bytes()


def test_requests_are_few(site: Site) -> None:
    site.back_up()
    packs = site.proxy.count("PUT", "/packs/")
    assert packs in (5, 6)  # 20 MiB in packs of 4 MiB
    assert site.proxy.count() <= packs + 25
    assert site.proxy.count("PUT") <= packs + 5
    site.proxy.forget()
    site.back_up()  # nothing has changed
    assert site.proxy.count("PUT", "/packs/") == 0
    assert site.proxy.count() <= 35


def test_local_index_is_made_anew_in_few_requests(site: Site) -> None:
    for turn in range(4):
        site.write(turn * MIB, random.Random(turn).randbytes(5000))
        ident = site.back_up()
    shutil.rmtree(site.folder / "state" / "cache", ignore_errors=True)
    for index in site.folder.rglob("*.index.db*"):
        index.unlink()
    site.proxy.forget()
    site.ok("store", "show", "main")
    assert site.proxy.count("GET", "/index") <= 8  # one an index object, and the listing
    assert site.proxy.count("GET", "/packs/") == 0
    assert site.proxy.count() <= 20
    assert site.restored(ident) == site.volume.read_bytes()


def test_second_store_at_one_place_is_refused(site: Site) -> None:
    status, _, err = site.run("store", "init", "main")
    assert status == 5
    assert "is a store already" in err


def test_view_of_a_backup_with_keys_of_the_environment(
    rgw: RunningRgw, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in rgw.owner.environment().items():
        monkeypatch.setenv(name, value)
    with made(rgw, capsys, bucket=rgw.new_bucket(), keys="") as site:
        site.ok("store", "init", "main", "--pack-size", "4MiB")
        ident = site.back_up()
        view = site.ask("mount", f"backup:{ident}")
        try:
            found = json.dumps(view)
            uri = next(word for word in found.split('"') if word.startswith("nbd"))
            handle: Any = nbd.NBD()
            handle.connect_uri(uri)
            assert handle.get_size() == SIZE
            assert handle.pread(MIB, 5 * MIB) == site.volume.read_bytes()[5 * MIB : 6 * MIB]
            handle.shutdown()
            _no_secret_is_kept(site.folder, rgw.owner)
        finally:
            site.ok("unmount", "--all", "--force")


def _no_secret_is_kept(folder: Path, user: S3User) -> None:
    """Neither in a file below the folder nor in the arguments of any process."""
    secret = user.secret_key.encode()
    for path in folder.rglob("*"):
        if path.is_file() and path.suffix != ".raw":
            assert secret not in path.read_bytes(), path
    arguments = [p.read_bytes() for p in _command_lines()]
    assert any(b"nbdkit" in words for words in arguments)
    assert not any(secret in words for words in arguments)


def _command_lines() -> Iterator[Path]:
    for process in Path("/proc").glob("[0-9]*"):
        if procs.start_time(int(process.name)) and (process / "cmdline").exists():
            yield process / "cmdline"


# -- credentials that can add and not destroy ------------------------------------------------------


def policy(bucket: str, user: str) -> str:
    """That of docs/howto/s3.md, for one user of the gateway."""
    text = (Path(__file__).resolve().parents[2] / "docs/howto/s3.md").read_text()
    found = text.partition("```json\n")[2].partition("```")[0]
    return found.replace("example-backups", bucket).replace(
        "arn:aws:iam::111122223333:user/backup", f"arn:aws:iam:::user/{user}"
    )


def test_backup_works_and_destruction_does_not_under_the_documented_policy(
    rgw: RunningRgw, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    bucket, user = rgw.new_bucket(versioned=True), rgw.new_user()
    keys = user.write_credentials(tmp_path / "keys")
    owner = f'credentials_file = "{rgw.credentials_file}"'
    with made(rgw, capsys, bucket=bucket, keys=owner) as site:
        site.ok("store", "init", "main", "--pack-size", "4MiB")
        config = site.folder / "offload.toml"
        config.write_text(config.read_text().replace(str(rgw.credentials_file), str(keys)))
        assert site.run("store", "show", "main")[0] == 10  # not allowed yet
        rgw.client().put_bucket_policy(Bucket=bucket, Policy=policy(bucket, user.name))
        first = site.back_up()
        site.write(MIB, b"more")
        site.back_up()
        assert len(site.restored(first)) == SIZE
        site.ok("verify", "--all", "--store", "main")
        client = rgw.client(user)
        listed = client.list_objects_v2(Bucket=bucket)["Contents"]
        names = [entry["Key"].removeprefix("site-a/") for entry in listed]
        assert not [n for n in names if n.startswith("pins/")], "its pins it may delete"
        for name in names:
            with pytest.raises(Exception, match="AccessDenied"):
                client.delete_object(Bucket=bucket, Key=f"site-a/{name}")
        for version in client.list_object_versions(Bucket=bucket)["Versions"]:
            with pytest.raises(Exception, match="AccessDenied"):
                client.delete_object(
                    Bucket=bucket, Key=version["Key"], VersionId=version["VersionId"]
                )
        with pytest.raises(Exception, match="AccessDenied"):
            client.put_bucket_versioning(
                Bucket=bucket, VersioningConfiguration={"Status": "Suspended"}
            )
        with pytest.raises(Exception, match="AccessDenied"):
            client.put_bucket_policy(Bucket=bucket, Policy=policy(bucket, "anybody"))
        status, _, err = site.run("backup", "delete", first, "--yes")
        assert status == 10, err
        assert "denies" in err
        assert site.restored(first)
        site.write(2 * MIB, b"never backed up")
        site.proxy.inject(
            Trouble.ERROR, status=403, code="AccessDenied", methods=("PUT",), part="/manifests/"
        )
        assert site.run("backup", "shop")[0] == 10
        site.back_up()  # what the one that failed has left is a prune's, and no more a matter here
