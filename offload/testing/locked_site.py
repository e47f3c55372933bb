"""An instance that backs up into a bucket with object lock, and somebody who wants to destroy that.

Volumes, chunks and packs are small. What each backup must read as is remembered.
"""
# ruff: noqa: S101, S311 - assertions are what a test suite is made of; its data is pseudo-random

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from offload import compose
from offload.engine.manifests import read_manifest
from offload.engine.readimage import StoredImage
from offload.engine.repository import Repository
from offload.services.backup import BackupReport, backup
from offload.services.context import Context, open_context
from offload.services.store_init import InitOptions, init
from offload.testing.rgw import RunningRgw

CHUNK = 4096
SIZES = {"db": 61 * CHUNK + 1024, "web": 20 * CHUNK}

_CONFIG = """
state_dir = "{folder}/state"
runtime_dir = "{folder}/run"

[pool]
min_free = "0%"

[volumes.db]
provider = "copy"
path = "{data}/db.raw"

[volumes.web]
provider = "copy"
path = "{data}/web.raw"

[groups.shop]
volumes = ["db", "web"]
atomic = "record"

[stores.main]
kind = "s3"
bucket = "{bucket}"
prefix = "vault"
endpoint = "{endpoint}"
path_style = true
credentials_file = "{credentials}"
retry_for = "5s"
{more}
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A bucket, and what the store there is opened with."""

    rgw: RunningRgw
    bucket: str
    more: str  # of the store's table: lock, key, as_of

    def text(self, folder: Path, data: Path) -> str:
        """A configuration whose state is in `folder`, and whose volumes are in `data`."""
        return _CONFIG.format(
            folder=folder,
            data=data,
            bucket=self.bucket,
            endpoint=self.rgw.endpoint,
            credentials=self.rgw.credentials_file,
            more=self.more,
        )


@dataclass
class LockedSite:
    """See the module. `taken`: backup → volume → its bytes."""

    folder: Path
    place: Place
    ctx: Context
    random: random.Random = field(default_factory=lambda: random.Random(5))
    taken: dict[str, dict[str, bytes]] = field(default_factory=dict)

    @contextmanager
    def repository(self) -> Iterator[Repository]:
        """The store, opened."""
        store = compose.open_store(self.ctx.instance.config.store("main").spec())
        try:
            repository = Repository.open(store, self.ctx.instance.cache_dir)
        except BaseException:
            store.close()
            raise
        try:
            yield repository
        finally:
            repository.close()

    def volume(self, name: str) -> Path:
        """The file of a volume."""
        return self.folder / f"{name}.raw"

    def scribble(self, count: int = 6) -> None:
        """Small random writes."""
        for name, size in SIZES.items():
            with self.volume(name).open("r+b") as out:
                for _ in range(count):
                    length = self.random.randrange(1, 600)
                    out.seek(self.random.randrange(size - length))
                    out.write(self.random.randbytes(length))

    def back_up(self) -> BackupReport:
        """A backup, remembered."""
        report = backup(self.ctx, "shop", "main")
        self.taken[report.backup.id] = {n: self.volume(n).read_bytes() for n in SIZES}
        return report

    def check(self, ident: str, repository: Repository) -> None:
        """A backup reads as what was taken, bit for bit."""
        found = read_manifest(repository, ident, "main").backup
        assert {image.volume for image in found.images} == set(SIZES)
        for image in found.images:
            stored = StoredImage(repository, bytes.fromhex(image.root), image.size_bytes, 512)
            data = stored.pread(0, image.size_bytes)
            assert data == self.taken[ident][image.volume], (ident, image.volume)

    def check_all(self) -> None:
        """Every backup that was taken."""
        with self.repository() as repository:
            for ident in self.taken:
                self.check(ident, repository)


@contextmanager
def locked_site(folder: Path, place: Place) -> Iterator[LockedSite]:
    """A fresh instance below a folder, its store made. Its recovery key: `folder/recovery`."""
    config = folder / "offload.toml"
    config.write_text(place.text(folder, folder))
    chooser = random.Random(4)
    for name, size in SIZES.items():
        (folder / f"{name}.raw").write_bytes(chooser.randbytes(size))
    with open_context(config) as ctx:
        encrypted = "[stores.main.key]" in place.more
        options = InitOptions(
            chunk_bytes=CHUNK,
            page_entries=4,
            pack_bytes=32 << 10,
            recovery=folder / "recovery" if encrypted else None,
        )
        init(ctx, "main", options)
        yield LockedSite(folder, place, ctx)


class Attacker:
    """Whoever has the backup host's own credentials, and all the time in the world."""

    def __init__(self, place: Place) -> None:
        self.client = place.rgw.client()
        self.bucket = place.bucket
        self.prefix = "vault/"

    def versions(self) -> list[tuple[str, str]]:
        """Keys and versions of all there is, delete markers too."""
        found = []
        for page in self.client.get_paginator("list_object_versions").paginate(Bucket=self.bucket):
            found += [(v["Key"], v["VersionId"]) for v in page.get("Versions", ())]
            found += [(v["Key"], v["VersionId"]) for v in page.get("DeleteMarkers", ())]
        return found

    def names(self) -> list[str]:
        """All keys that have versions."""
        return sorted({key for key, _ in self.versions()})

    def put(self, key: str, body: bytes) -> None:
        """One more version."""
        self.client.put_object(Bucket=self.bucket, Key=key, Body=body)

    def hide(self, key: str) -> None:
        """A delete marker."""
        self.client.delete_object(Bucket=self.bucket, Key=key)

    def destroy(self, *, bypass: bool = False) -> tuple[int, int]:
        """Delete every version of everything; how many went, and how many were refused."""
        from botocore.exceptions import ClientError

        gone = refused = 0
        for key, version in self.versions():
            try:
                self.client.delete_object(
                    Bucket=self.bucket,
                    Key=key,
                    VersionId=version,
                    BypassGovernanceRetention=bypass,
                )
                gone += 1
            except ClientError as error:
                if error.response["Error"]["Code"] != "AccessDenied":
                    raise
                refused += 1
        return gone, refused
