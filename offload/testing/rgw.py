"""A real S3 server: Ceph's object gateway on a cluster of one monitor and one OSD, on loopback.

Its data is in memory. It serves plain HTTP and HTTPS, knows versions, object lock and bucket
policies. Users are made with keys of the server's own making, which are never an argument.
"""

from __future__ import annotations

import base64
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from offload.errors import UnavailableError
from offload.ids import new_id
from offload.procs import ProcessRef
from offload.run import require_program, run
from offload.testing.ceph import RunningCeph, free_port, running_cluster, start_daemon
from offload.testing.certificates import make_authority, write_server

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

REGION = "default"
KMS_KEY = "offload-test"
_START_S = 120.0
# the key of the testing KMS guards nothing: it stands here so that SSE-KMS has one
_KMS = f"{KMS_KEY}={base64.b64encode(bytes(range(32))).decode()}"
_CONF = """\
[client.rgw]
rgw frontends = {frontends}
rgw data = {folder}/rgw
rgw enable usage log = false
rgw rados pool pg num min = 1
rgw gc obj min wait = 5
rgw gc processor period = 5
rgw crypt require ssl = false
rgw crypt s3 kms backend = testing
rgw crypt s3 kms encryption keys = {kms}
rgw thread pool size = 128
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class S3User:
    """Somebody who may sign requests."""

    name: str
    access_key: str
    secret_key: str

    def write_credentials(self, path: Path, profile: str = "default") -> Path:
        """A credentials file as AWS's tools have it, for its owner alone."""
        text = (
            f"[{profile}]\naws_access_key_id = {self.access_key}\n"
            f"aws_secret_access_key = {self.secret_key}\n"
        )
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with os.fdopen(fd, "w", encoding="utf-8") as out:
            out.write(text)
        return path

    def environment(self) -> dict[str, str]:
        """The same as environment variables."""
        return {
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningRgw:
    """`endpoint` speaks HTTP, `tls_endpoint` HTTPS with a certificate by `ca_file`.

    `owner` owns the buckets that `new_bucket` makes.
    """

    folder: Path
    cluster: RunningCeph
    port: int
    tls_port: int
    ca_file: Path
    owner: S3User

    @property
    def endpoint(self) -> str:
        """Plain HTTP."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def tls_endpoint(self) -> str:
        """HTTPS."""
        return f"https://127.0.0.1:{self.tls_port}"

    @property
    def credentials_file(self) -> Path:
        """The owner's."""
        return self.folder / "credentials"

    def client(self, user: S3User | None = None, endpoint: str | None = None) -> S3Client:
        """boto3's client with a user's keys, one try a request."""
        import boto3
        from botocore.config import Config

        user = user or self.owner
        session = boto3.Session(user.access_key, user.secret_key, region_name=REGION)
        return session.client(
            "s3",
            endpoint_url=endpoint or self.endpoint,
            config=Config(s3={"addressing_style": "path"}, retries={"total_max_attempts": 1}),
        )

    def new_bucket(self, *, versioned: bool = False, locked: bool = False) -> str:
        """An empty bucket of the owner's; `locked` has versions and object lock."""
        name = f"b{new_id()}"
        client = self.client()
        client.create_bucket(Bucket=name, ObjectLockEnabledForBucket=locked)
        if versioned and not locked:
            client.put_bucket_versioning(Bucket=name, VersioningConfiguration={"Status": "Enabled"})
        return name

    def new_user(self) -> S3User:
        """Somebody who owns nothing; a bucket's policy names him `arn:aws:iam:::user/NAME`."""
        return _new_user(self.cluster.conf, f"u{new_id()}")

    def admin(self, *words: str) -> Any:
        """What `radosgw-admin` answers, as the cluster's administrator."""
        return _admin(self.cluster.conf, *words)


@contextmanager
def running_rgw(folder: Path, memory_bytes: int = 3 << 30) -> Iterator[RunningRgw]:
    """A server for the block. `folder` is made; what is stored takes real memory."""
    folder.mkdir(parents=True, mode=0o700)
    port, tls_port = free_port(), free_port()
    tls = write_server(folder / "tls", make_authority())
    frontends = (
        f"beast endpoint=127.0.0.1:{port} ssl_endpoint=127.0.0.1:{tls_port} "
        "tcp_nodelay=1 "  # else each GET waits 40 ms for an acknowledgement
        f"ssl_certificate={tls}/server-cert.pem ssl_private_key={tls}/server-key.pem"
    )
    more = _CONF.format(frontends=frontends, folder=folder, kms=_KMS)
    with ExitStack() as stack:
        cluster = stack.enter_context(
            running_cluster(
                folder / "cluster",
                memory_bytes=memory_bytes,
                classes="*",
                more_conf=more,
            )
        )
        ref = start_daemon(stack, folder, cluster.conf, "radosgw", "client.rgw")
        _wait_until_answering(port, ref, folder / "radosgw.log")
        owner = _new_user(cluster.conf, "owner")
        owner.write_credentials(folder / "credentials")
        yield RunningRgw(
            folder=folder,
            cluster=cluster,
            port=port,
            tls_port=tls_port,
            ca_file=tls / "ca-cert.pem",
            owner=owner,
        )


def _new_user(conf: Path, name: str) -> S3User:
    made = _admin(conf, "user", "create", f"--uid={name}", f"--display-name={name}")
    keys = made["keys"][0]
    return S3User(name=name, access_key=keys["access_key"], secret_key=keys["secret_key"])


def _admin(conf: Path, *words: str) -> Any:
    program = require_program("radosgw-admin", "radosgw")
    argv = [program, "-c", str(conf), "-n", "client.admin", *words]
    return json.loads(run(argv, timeout_s=_START_S).stdout or "null")


def _wait_until_answering(port: int, server: ProcessRef, log: Path) -> None:
    until = time.monotonic() + _START_S
    while time.monotonic() < until and server.alive():
        try:
            socket.create_connection(("127.0.0.1", port), timeout=5).close()
            return
        except OSError:
            time.sleep(0.05)
    raise UnavailableError(f"radosgw does not answer; see {log}")
