"""What an S3 server really honours, found by trying: what it says of itself is not enough.

Ceph's gateway ignores `If-None-Match` in buckets with versions; others know no versions, or take an
encryption that they are asked for and do not do it. What is put for it is removed again, all its
versions, save where the bucket locks everything by default.
"""

from __future__ import annotations

import base64
import contextlib
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from botocore import exceptions as boto

from offload.errors import BusyError, OffloadError, PolicyError
from offload.format import layout
from offload.ids import new_id
from offload.stores import s3_errors
from offload.stores.s3_upload import checksum

if TYPE_CHECKING:
    from offload.stores.s3 import S3Store

_WRONG_MD5 = base64.b64encode(bytes(16)).decode()
_NOT_TOLD = "not told"


def probe(store: S3Store) -> dict[str, str]:
    """By what was tried, in words for the user.

    PolicyError (`store-inconsistent`) where what was put is not listed, and (`store-option`) where
    the encryption that was asked for is not done: such a place is not fit.
    """
    folder = f"{layout.PROBES}{new_id()}/"
    with _removed(store, folder):
        found = {"list after write": _listing(store, folder)}
        found["conditional put"] = _condition(store, folder)
        found["checksum"] = _checksum(store, folder)
        found["multipart"] = _multipart(store, folder)
        found["encryption by the server"] = _encryption(store, folder)
    found["versions"] = _versioning(store)
    found["object lock"] = _object_lock(store)
    found["clock"] = f"{(store.now() - datetime.now(UTC)).total_seconds():+.0f} s"
    return found


def _listing(store: S3Store, folder: str) -> str:
    name = f"{folder}listed"
    store.put(name, [b"probe"])
    there = list(store.list(folder)) == [name] and store.get(name) == b"probe"
    store.delete(name)
    gone = not list(store.list(folder)) and not store.exists(name)
    if not (there and gone):
        raise PolicyError(
            f"{store.url} does not show at once what was put or deleted: no place for a store",
            code="store-inconsistent",
            hint="use a server that is consistent, or no cache in front of it",
        )
    return "at once"


def _condition(store: S3Store, folder: str) -> str:
    name = f"{folder}twice"
    store.put(name, [b"first"])
    try:
        store.put(name, [b"second"])
    except BusyError:
        return "honoured"
    return "ignored" if store.conditional else "not known"


def _checksum(store: S3Store, folder: str) -> str:
    try:
        store.client.put_object(
            Bucket=store.place.bucket,
            Key=store.place.prefix + f"{folder}damaged",
            Body=b"probe",
            ContentMD5=_WRONG_MD5,
        )
    except boto.ClientError as error:
        return "compared" if s3_errors.status_of(error) == 400 else s3_errors.code_of(error)
    return "ignored"


def _multipart(store: S3Store, folder: str) -> str:
    client, bucket = store.client, store.place.bucket
    key = store.place.prefix + f"{folder}parts"
    try:
        begun = client.create_multipart_upload(Bucket=bucket, Key=key)["UploadId"]
        part = client.upload_part(
            Bucket=bucket,
            Key=key,
            UploadId=begun,
            PartNumber=1,
            Body=b"probe",
            ContentMD5=checksum([b"probe"]),
        )
        client.complete_multipart_upload(
            Bucket=bucket,
            Key=key,
            UploadId=begun,
            MultipartUpload={"Parts": [{"ETag": part["ETag"], "PartNumber": 1}]},
        )
    except boto.ClientError as error:
        return f"fails: {s3_errors.code_of(error)}"
    return "works" if store.get(f"{folder}parts") == b"probe" else "fails: other bytes"


def _encryption(store: S3Store, folder: str) -> str:
    name = f"{folder}sealed"
    store.put(name, [b"probe"])
    answer = store.client.head_object(Bucket=store.place.bucket, Key=store.place.prefix + name)
    done = str(answer.get("ServerSideEncryption", "none"))
    asked = store.spec.options.get("server_side_encryption")
    if asked is not None and not done.startswith(asked):
        raise PolicyError(
            f"{store.url} was asked to encrypt with {asked} and does not: it says {done}",
            code="store-option",
            hint="remove server_side_encryption of the store, or use a server that has it",
        )
    return done


def _versioning(store: S3Store) -> str:
    try:
        answer = store.client.get_bucket_versioning(Bucket=store.place.bucket)
    except boto.ClientError:
        return _NOT_TOLD
    return {"Enabled": "kept", "Suspended": "suspended"}.get(answer.get("Status", ""), "none")


def _object_lock(store: S3Store) -> str:
    try:
        answer: Any = store.client.get_object_lock_configuration(Bucket=store.place.bucket)
    except boto.ClientError as error:
        return _NOT_TOLD if s3_errors.status_of(error) == 403 else "none"
    found = answer.get("ObjectLockConfiguration", {})
    if found.get("ObjectLockEnabled") != "Enabled":
        return "none"
    rule = found.get("Rule", {}).get("DefaultRetention")
    if not rule:
        return "possible, no default"
    span = f"{rule['Days']} days" if "Days" in rule else f"{rule.get('Years')} years"
    return f"possible, by default {rule['Mode'].lower()} for {span}"


@contextmanager
def _removed(store: S3Store, folder: str) -> Iterator[None]:
    """What is below the folder goes afterwards, as far as it may."""
    try:
        yield
    finally:
        with contextlib.suppress(OffloadError, boto.ClientError):
            store.sweep(folder)
            for name in list(store.list(folder)):
                store.delete(name)
            for version in list(store.versions(folder)):
                store.client.delete_object(
                    Bucket=store.place.bucket,
                    Key=store.place.prefix + version.name,
                    VersionId=version.id,
                )
