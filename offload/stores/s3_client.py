"""The options of an S3 store, and the client that they make.

Credentials are found as AWS's tools find them: environment, profile, credentials file, the role of
the machine. A store that names a file or a profile uses that alone. None of them is ever part of
the spec, of a message or of an argument.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from offload.errors import ConfigError, UsageError
from offload.quantity import parse_size
from offload.stores.s3_traffic import Body, Pace
from offload.storespec import StoreSpec

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

_PARALLEL = 8
_PATIENCE_S = 300.0
_CONNECT_S = 10
_READ_S = 60
_NO_REGION = "us-east-1"  # what servers that have no regions are content with
_FROM_FILES = ("shared-credentials-file", "config-file")


@dataclass(frozen=True, slots=True, kw_only=True)
class S3Place:
    """A store's bucket, and what stands before its objects' names there: empty, or with a slash."""

    bucket: str
    prefix: str

    @classmethod
    def of(cls, spec: StoreSpec) -> S3Place:
        """From `s3://BUCKET[/PREFIX]`; UsageError (`bad-store-spec`)."""
        bucket, _, prefix = spec.url.removeprefix("s3://").partition("/")
        if not bucket:
            raise UsageError(f"{spec.url} names no bucket", code="bad-store-spec")
        return cls(bucket=bucket, prefix=f"{prefix.strip('/')}/" if prefix.strip("/") else "")


def pace_of(spec: StoreSpec) -> Pace:
    """How much traffic the options allow."""
    options = spec.options
    return Pace(
        parallel=int(options.get("parallel", _PARALLEL)),
        bytes_per_s=parse_size(options["bandwidth"]) if "bandwidth" in options else 0,
        patience_s=float(options.get("retry_for", _PATIENCE_S)),
    )


def put_options(spec: StoreSpec) -> dict[str, Any]:
    """What goes with each object that is made: storage class and encryption by the server."""
    names = {
        "storage_class": "StorageClass",
        "server_side_encryption": "ServerSideEncryption",
        "kms_key": "SSEKMSKeyId",
    }
    return {theirs: spec.options[ours] for ours, theirs in names.items() if ours in spec.options}


def open_client(spec: StoreSpec, parallel: int) -> S3Client:
    """A client that tries each request once. ConfigError for files that are not as they must be;
    whether there are credentials shows at the first request."""
    import boto3
    import botocore.session
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError

    from offload.stores.s3_errors import explain

    options = spec.options
    core = botocore.session.Session(profile=_profile(spec))
    if "credentials_file" in options:
        core.set_config_variable("credentials_file", options["credentials_file"])
    config = Config(
        connect_timeout=_CONNECT_S,
        read_timeout=_READ_S,
        max_pool_connections=parallel,
        retries={"total_max_attempts": 1, "mode": "standard"},
        s3={"addressing_style": "path" if "path_style" in options else "auto"},
        request_checksum_calculation="when_required",  # each put carries its Content-MD5
        response_checksum_validation="when_required",
    )
    endpoint = options.get("endpoint")
    try:
        _refuse_open_credentials(core)
        made = boto3.Session(botocore_session=core).client(
            "s3",
            endpoint_url=endpoint,
            region_name=options.get("region") or (_NO_REGION if endpoint else None),
            verify=_ca_file(spec),
            config=config,
        )
    except BotoCoreError as error:
        raise explain(error, spec.url, "") from error
    _pay_for_bodies(made)
    return made


def _profile(spec: StoreSpec) -> str | None:
    """A profile that is named keeps the environment's keys out: the file means its own."""
    profile = spec.options.get("profile")
    if profile is None and "credentials_file" in spec.options:
        _refuse_open_file(Path(spec.options["credentials_file"]))
        return "default"
    return profile


def _refuse_open_credentials(core: Any) -> None:
    """The file that the keys were found in must be its owner's alone."""
    found = core.get_credentials()
    if found is not None and found.method in _FROM_FILES:
        name = "credentials_file" if found.method == _FROM_FILES[0] else "config_file"
        path = Path(os.path.expanduser(core.get_config_variable(name)))  # noqa: PTH111 - botocore's
        if path.exists():
            _refuse_open_file(path)


def _refuse_open_file(path: Path) -> None:
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise ConfigError(
            f"cannot read the credentials file {path}: {error.strerror}",
            code="store-credentials",
            hint="correct credentials_file of the store",
        ) from error
    if stat.S_IMODE(mode) & 0o077:
        raise ConfigError(
            f"others may read the credentials file {path}",
            code="open-credentials",
            hint=f"run: chmod 600 {path}; if others could read it for long, make new keys",
        )


def _ca_file(spec: StoreSpec) -> str | None:
    path = spec.options.get("ca_file")
    if path is not None and not os.access(path, os.R_OK):
        raise ConfigError(
            f"cannot read the authorities' file {path}",
            code="store-tls",
            hint="correct ca_file of the store",
        )
    return path


def _pay_for_bodies(client: S3Client) -> None:
    """Bodies are read to sign a request, too; that is no traffic (see `s3_traffic.Body`)."""

    def resting(request: Any, **_: object) -> None:
        if isinstance(request.body, Body):
            request.body.resting()

    def sending(request: Any, **_: object) -> None:
        if isinstance(request.body, Body):
            request.body.sending()

    client.meta.events.register_first("request-created.s3", resting)
    client.meta.events.register_last("request-created.s3", sending)
