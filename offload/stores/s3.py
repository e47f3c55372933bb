"""A store in a bucket of S3, or in a part of one.

An object is one PUT, or a multipart upload when it is large: it is there with all its bytes or not
at all. Each put carries a checksum that the server compares, and a mark of its own: where the reply
was lost, the mark tells that the object that is there is this one. A name that is taken is refused
where the server honours `If-None-Match` (Ceph's gateway does not in a bucket with versions).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from botocore import exceptions as boto

from offload.errors import IntegrityError, NotFoundError, UnavailableError
from offload.format import layout
from offload.ids import new_id
from offload.store import Buffer, ObjectInfo, Version
from offload.stores import s3_errors
from offload.stores.s3_client import S3Place, open_client, pace_of, put_options
from offload.stores.s3_traffic import Body, Traffic
from offload.stores.s3_upload import Upload, Uploader, checksum
from offload.storespec import StoreSpec

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

_NAME = re.compile(r"[a-z0-9][a-z0-9.-]*(/[a-z0-9][a-z0-9.-]*)*")
_READ_BYTES = 256 << 10
_LOCK_MODES = {"compliance": "COMPLIANCE", "governance": "GOVERNANCE"}
_NEVER_LOCKED = {
    "NoSuchObjectLockConfiguration", "ObjectLockConfigurationNotFoundError", "InvalidRequest",
}  # fmt: skip
# what a page of a listing says of the next one, and where that goes in the next request
_NEXT = {
    "list_objects_v2": {"NextContinuationToken": "ContinuationToken"},
    "list_object_versions": {
        "NextKeyMarker": "KeyMarker",
        "NextVersionIdMarker": "VersionIdMarker",
    },
    "list_multipart_uploads": {
        "NextKeyMarker": "KeyMarker",
        "NextUploadIdMarker": "UploadIdMarker",
    },
}


class S3Store:
    """Objects of a bucket. See `offload.store` for the contracts: Store, Versioned, Lockable."""

    multipart_above = 64 << 20  # bytes: a pack is one request
    part_bytes = 16 << 20
    page_names = 1000  # of a listing; S3 gives no more

    def __init__(self, spec: StoreSpec) -> None:
        self.spec = spec
        self.url = spec.url
        self.place = S3Place.of(spec)
        pace = pace_of(spec)
        self.traffic = Traffic(pace)
        self.client: S3Client = open_client(spec, pace.parallel)
        self.conditional = True  # until the server says that it does not know the condition
        self._uploader = Uploader(self.client, self.place.bucket, self.traffic)

    def put(
        self, name: str, parts: Sequence[Buffer], *, retain_until: datetime | None = None
    ) -> int:
        """Write under a new name; see the contract."""
        upload = Upload(
            key=self._key(name),
            mark=new_id(),
            parts=tuple(parts),
            options={**put_options(self.spec), **self._lock_options(retain_until)},
        )
        try:
            with self._translated(name):
                if upload.size_bytes > self.multipart_above:
                    stored = self._uploader.put(upload, self.part_bytes)
                    if retain_until is not None:  # Ceph's gateway forgets the date of such one
                        self.retain(next(self.versions(name)), retain_until)
                    return stored
                return self._put_whole(upload)
        except UnavailableError as error:
            if retain_until is not None and s3_errors.code_of(error.__cause__) == "InvalidRequest":
                raise s3_errors.no_object_lock(self.url) from error
            raise

    def _put_whole(self, upload: Upload) -> int:
        digest = checksum(upload.parts)

        def request(tried: int) -> int:
            if tried and self._uploader.is_there(upload):
                return upload.size_bytes
            self._put_once(upload, digest)
            return upload.size_bytes

        try:
            return self.traffic.call(request)
        except boto.ClientError as error:
            if self.conditional and s3_errors.code_of(error) == "NotImplemented":
                self.conditional = False
                return self.traffic.call(request)
            raise

    def _put_once(self, upload: Upload, digest: str) -> None:
        condition: dict[str, Any] = {"IfNoneMatch": "*"} if self.conditional else {}
        self.client.put_object(
            Bucket=self.place.bucket,
            Key=upload.key,
            Body=Body(upload.parts, self.traffic.up),  # type: ignore[arg-type] # a file
            ContentLength=upload.size_bytes,
            ContentMD5=digest,
            Metadata=upload.metadata,
            **condition,
            **upload.options,
        )

    def get(self, name: str) -> bytes:
        """The whole object."""
        return self._read(name, {}, 0, None)

    def get_range(self, name: str, offset: int, length: int) -> bytes:
        """Exactly `length` bytes; see the contract."""
        if length:
            return self._read(name, {}, offset, length)
        if self.size(name) < offset:
            raise self._short(name)
        return b""

    def _read(self, name: str, which: dict[str, Any], offset: int, length: int | None) -> bytes:
        """What was cut off is asked for again from where it was cut."""
        key, got = self._key(name), bytearray()

        def request(_tried: int) -> bytes:
            nonlocal length
            start = offset + len(got)
            end = "" if length is None else str(offset + length - 1)
            asked = {"Range": f"bytes={start}-{end}", **which} if start or end else which
            answer = self.client.get_object(Bucket=self.place.bucket, Key=key, **asked)
            if length is None:
                length = int(answer["ContentLength"])
            elif int(answer["ContentLength"]) < length - len(got):
                raise self._short(name)
            with answer["Body"] as body:
                while len(got) < length:
                    piece = body.read(min(_READ_BYTES, length - len(got)))
                    if not piece:
                        raise boto.IncompleteReadError(actual_bytes=len(got), expected_bytes=length)
                    self.traffic.down.take(len(piece))
                    got.extend(piece)
            return bytes(got)

        with self._translated(name):
            return self.traffic.call(request)

    def _short(self, name: str) -> IntegrityError:
        return IntegrityError(f"object {name} of {self.url} ends too early", code="object-short")

    def size(self, name: str) -> int:
        """The object's size in bytes."""
        return int(self._head(name)["ContentLength"])

    def exists(self, name: str) -> bool:
        """Whether the object is there."""
        try:
            self._head(name)
        except NotFoundError:
            return False
        return True

    def _head(self, name: str) -> Any:
        """An answer to HEAD has no body, so none of S3's words: a failed one is asked for again."""
        key = self._key(name)

        def request(_tried: int) -> Any:
            try:
                return self.client.head_object(Bucket=self.place.bucket, Key=key)
            except boto.ClientError as error:
                missing = self.traffic.answered and s3_errors.is_missing(error)  # not its bucket
                if missing or s3_errors.is_transient(error):
                    raise
            return self.client.get_object(Bucket=self.place.bucket, Key=key, Range="bytes=0-0")

        with self._translated(name):
            return self.traffic.call(request)

    def list(self, prefix: str) -> Iterator[str]:
        """Names below a folder, in name order."""
        return (info.name for info in self.infos(prefix))

    def infos(self, prefix: str) -> Iterator[ObjectInfo]:
        """The same, with size and time; a thousand a request."""
        if not prefix.endswith("/"):
            raise ValueError(f"'{prefix}' is no object name with its slash")
        key = self._key(prefix[:-1]) + "/"
        for page in self._pages("list_objects_v2", prefix, key):
            for entry in page.get("Contents", ()):
                yield ObjectInfo(
                    name=self._name(entry["Key"]),
                    size_bytes=int(entry["Size"]),
                    modified=entry["LastModified"].astimezone(UTC),
                )

    def _pages(self, operation: str, name: str, prefix: str) -> Iterator[dict[str, Any]]:
        """Each page is a request of its own, and tried again by itself."""
        ask = getattr(self.client, operation)
        words: dict[str, Any] = {"Bucket": self.place.bucket, "Prefix": prefix}
        if "uploads" not in operation:
            words["MaxKeys"] = self.page_names
        while True:
            page = self._page(ask, name, words)
            yield page
            if not page.get("IsTruncated"):
                return
            follow = _NEXT[operation].items()
            words.update({theirs: page[said] for said, theirs in follow if said in page})

    def _page(self, ask: Any, name: str, words: Mapping[str, Any]) -> dict[str, Any]:
        with self._translated(name):
            page: dict[str, Any] = self.traffic.call(lambda _tried: ask(**words))
        return page

    def now(self) -> datetime:
        """The server's clock, to the second."""
        with self._translated(""):
            answer = self.traffic.call(
                lambda _tried: self.client.list_objects_v2(
                    Bucket=self.place.bucket, Prefix=self.place.prefix, MaxKeys=1
                )
            )
        found = s3_errors.server_time(answer["ResponseMetadata"])
        if found is None:
            raise UnavailableError(f"the store {self.url} does not say the time")
        return found

    def delete(self, name: str) -> None:
        """Remove an object. Idempotent; in a bucket with versions it is hidden."""
        key = self._key(name)
        with self._translated(name):
            self.traffic.call(
                lambda _tried: self.client.delete_object(Bucket=self.place.bucket, Key=key)
            )

    def sweep(self, part: str, *, min_age_s: float = 0.0) -> int:
        """Abort multipart uploads whose object's name holds `part`, at least that old by the
        server's clock; returns how many."""
        now = self.now() if min_age_s else None
        aborted = 0
        for page in self._pages("list_multipart_uploads", "", self.place.prefix):
            for entry in page.get("Uploads", ()):
                old = now is None or (now - entry["Initiated"]).total_seconds() >= min_age_s
                if old and part in entry["Key"].removeprefix(self.place.prefix):
                    with self._translated(entry["Key"]):
                        self._uploader.abort(entry["Key"], entry["UploadId"])
                    aborted += 1
        return aborted

    def probe(self) -> dict[str, str]:
        """What the server really honours; see `s3_probe`."""
        from offload.stores.s3_probe import probe

        with self._translated(layout.PROBES):
            return probe(self)

    def space_bytes(self) -> tuple[int, int] | None:
        """A bucket has no end."""
        return None

    def close(self) -> None:
        """Close the connections. Idempotent."""
        self._uploader.close()
        self.client.close()

    def versions(self, prefix: str) -> Iterator[Version]:
        """All versions and delete markers, in name order, newest first."""
        key = self.place.prefix + prefix
        for page in self._pages("list_object_versions", prefix, key):
            found = [self._version(entry, deleted=False) for entry in page.get("Versions", ())]
            found += [self._version(entry, deleted=True) for entry in page.get("DeleteMarkers", ())]
            found.sort(key=lambda v: (v.name, not v.latest, -v.modified.timestamp()))
            yield from found

    def _version(self, entry: dict[str, Any], *, deleted: bool) -> Version:
        return Version(
            name=self._name(entry["Key"]),
            id=entry["VersionId"],
            size_bytes=int(entry.get("Size", 0)),
            modified=entry["LastModified"].astimezone(UTC),
            latest=bool(entry["IsLatest"]),
            deleted=deleted,
        )

    def get_version(self, version: Version, offset: int, length: int | None) -> bytes:
        """`length` bytes (None: all from there) of one version."""
        if length == 0:
            return b""
        return self._read(version.name, {"VersionId": version.id}, offset, length)

    def retained_until(self, version: Version) -> datetime | None:
        """Until when a version is locked; None if it is not."""
        with self._translated(version.name):
            try:
                answer = self.traffic.call(
                    lambda _tried: self.client.get_object_retention(
                        Bucket=self.place.bucket,
                        Key=self._key(version.name),
                        VersionId=version.id,
                    )
                )
            except boto.ClientError as error:
                if s3_errors.code_of(error) in _NEVER_LOCKED:
                    return None
                raise
        return answer["Retention"]["RetainUntilDate"].astimezone(UTC)

    def retain(self, version: Version, until: datetime) -> None:
        """Extend the lock of a version; an earlier date than it has changes nothing."""
        known = self.retained_until(version)
        if known is not None and known >= until:
            return
        with self._translated(version.name):
            self.traffic.call(
                lambda _tried: self.client.put_object_retention(
                    Bucket=self.place.bucket,
                    Key=self._key(version.name),
                    VersionId=version.id,
                    Retention={"Mode": self._lock_mode(), "RetainUntilDate": until},
                )
            )

    def _lock_options(self, until: datetime | None) -> dict[str, Any]:
        if until is None:
            return {}
        return {"ObjectLockMode": self._lock_mode(), "ObjectLockRetainUntilDate": until}

    def _lock_mode(self) -> Any:
        return _LOCK_MODES[self.spec.options.get("lock_mode", "compliance")]

    def _key(self, name: str) -> str:
        if not _NAME.fullmatch(name):
            raise ValueError(f"'{name}' is no object name")
        return self.place.prefix + name

    def _name(self, key: str) -> str:
        return key.removeprefix(self.place.prefix)

    def _translated(self, name: str) -> _Translated:
        return _Translated(self.url, name)


class _Translated:
    """Errors of S3 and its library leave the block as the project's own."""

    def __init__(self, url: str, name: str) -> None:
        self._url = url
        self._name = name

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, s3_errors.ERRORS):
            raise s3_errors.explain(error, self._url, self._name) from error
