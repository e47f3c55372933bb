"""Objects that are too large for one request: uploaded in parts, several at once.

The object appears when the upload is completed. An upload that fails is aborted; what a killed
process leaves is no object but costs space until `S3Store.sweep` aborts it.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from botocore import exceptions as boto

from offload.store import Buffer
from offload.stores import s3_errors
from offload.stores.s3_traffic import Body, Traffic

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

MARK = "offload-put"
_MOST_PARTS = 10_000  # S3's limit


@dataclass(frozen=True, slots=True, kw_only=True)
class Upload:
    """One put. `mark` tells its object from another one of the same name."""

    key: str
    mark: str
    parts: tuple[Buffer, ...]
    options: Mapping[str, Any]

    @property
    def size_bytes(self) -> int:
        """Of the object."""
        return sum(memoryview(part).nbytes for part in self.parts)

    @property
    def metadata(self) -> dict[str, str]:
        """What is kept with the object."""
        return {MARK: self.mark}


def checksum(parts: Sequence[Buffer]) -> str:
    """As the header Content-MD5 has it: the one that all servers compare."""
    digest = hashlib.md5(usedforsecurity=False)
    for part in parts:
        digest.update(part)
    return base64.b64encode(digest.digest()).decode()


class Uploader:
    """Multipart uploads into one bucket. Safe from any thread."""

    def __init__(self, client: S3Client, bucket: str, traffic: Traffic) -> None:
        self._client = client
        self._bucket = bucket
        self._traffic = traffic
        self._crew: ThreadPoolExecutor | None = None
        self._mutex = threading.Lock()

    def is_there(self, upload: Upload) -> bool:
        """Whether this very put has succeeded, though nothing was heard of it."""
        try:
            found = self._client.head_object(Bucket=self._bucket, Key=upload.key)
        except boto.ClientError as error:
            if s3_errors.is_missing(error):
                return False
            raise
        return (
            found["Metadata"].get(MARK) == upload.mark
            and found["ContentLength"] == upload.size_bytes
        )

    def put(self, upload: Upload, part_bytes: int) -> int:
        """The whole object; returns its bytes."""
        part_bytes = max(part_bytes, -(-upload.size_bytes // _MOST_PARTS))
        begun = self._traffic.call(
            lambda _tried: self._client.create_multipart_upload(
                Bucket=self._bucket, Key=upload.key, Metadata=upload.metadata, **upload.options
            )
        )
        try:
            pieces = enumerate(_cut(upload.parts, part_bytes), 1)
            crew = self._workers()
            waiting = [
                crew.submit(self._part, upload.key, begun["UploadId"], number, piece)
                for number, piece in pieces
            ]
            try:
                done = [future.result() for future in waiting]
            finally:
                for future in waiting:  # those that have begun end before the upload is aborted
                    if not future.cancel():
                        future.exception()
            self._complete(upload, begun["UploadId"], done)
        except BaseException:
            with contextlib.suppress(*s3_errors.ERRORS):  # the first error is the one to tell
                self.abort(upload.key, begun["UploadId"])
            raise
        return upload.size_bytes

    def _part(self, key: str, ident: str, number: int, piece: Sequence[Buffer]) -> Any:
        digest = checksum(piece)
        answer = self._traffic.call(
            lambda _tried: self._client.upload_part(
                Bucket=self._bucket,
                Key=key,
                UploadId=ident,
                PartNumber=number,
                Body=Body(piece, self._traffic.up),  # type: ignore[arg-type] # a file
                ContentMD5=digest,
            )
        )
        return {"ETag": answer["ETag"], "PartNumber": number}

    def _complete(self, upload: Upload, ident: str, parts: Sequence[Any]) -> None:
        def request(tried: int) -> None:
            if tried and self.is_there(upload):
                return
            self._client.complete_multipart_upload(
                Bucket=self._bucket,
                Key=upload.key,
                UploadId=ident,
                MultipartUpload={"Parts": list(parts)},
            )

        self._traffic.call(request)

    def abort(self, key: str, ident: str) -> None:
        """Forget an upload. Idempotent."""
        try:
            self._traffic.call(
                lambda _tried: self._client.abort_multipart_upload(
                    Bucket=self._bucket, Key=key, UploadId=ident
                )
            )
        except boto.ClientError as error:
            if s3_errors.code_of(error) != "NoSuchUpload":
                raise

    def close(self) -> None:
        """End the threads. Idempotent."""
        with self._mutex:
            crew, self._crew = self._crew, None
        if crew is not None:
            crew.shutdown()

    def _workers(self) -> ThreadPoolExecutor:
        with self._mutex:
            if self._crew is None:
                self._crew = ThreadPoolExecutor(self._traffic.pace.parallel, "s3-part")
            return self._crew


def _cut(parts: Sequence[Buffer], part_bytes: int) -> Iterator[list[memoryview]]:
    """Views of the same bytes, `part_bytes` at a time."""
    piece: list[memoryview] = []
    room = part_bytes
    for part in parts:
        rest = memoryview(part).cast("B")
        while len(rest):
            piece.append(rest[:room])
            room -= len(piece[-1])
            rest = rest[len(piece[-1]) :]
            if not room:
                yield piece
                piece, room = [], part_bytes
    if piece:
        yield piece
