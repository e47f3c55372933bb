"""The contract of stores: named immutable objects, nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

Buffer = bytes | bytearray | memoryview


class Store(Protocol):
    """Objects under unique names, never overwritten.

    Names are relative paths of lower-case letters, digits, `-`, `.` and `/`.
    Atomicity: an object is there with all its bytes, durable, or it is not there.
    Read after write: once `put` has returned, every process sees the object.
    Thread safety: all methods, from any thread. Buffers are not kept after return.
    Errors: NotFoundError (`no-object`), BusyError (`object-exists`), UnavailableError (`no-space`,
    `store-unavailable`).
    """

    url: str

    def put(self, name: str, parts: Sequence[Buffer]) -> int:
        """Store the concatenation of `parts` under a new name; returns the bytes written."""
        ...

    def get(self, name: str) -> bytes:
        """The whole object."""
        ...

    def get_range(self, name: str, offset: int, length: int) -> bytes:
        """Exactly `length` bytes from `offset`; a shorter object is an IntegrityError."""
        ...

    def size(self, name: str) -> int:
        """The object's size in bytes."""
        ...

    def exists(self, name: str) -> bool:
        """Whether the object is there."""
        ...

    def list(self, prefix: str) -> Iterator[str]:
        """Names that start with `prefix` (a folder with its slash), in name order."""
        ...

    def delete(self, name: str) -> None:
        """Remove an object. Idempotent."""
        ...

    def lock(self, *, exclusive: bool, wait_s: float = 0.0) -> AbstractContextManager[None]:
        """Hold the store with others (shared) or alone (exclusive); BusyError when held otherwise.

        The lock goes with the process that holds it.
        """
        ...

    def space_bytes(self) -> tuple[int, int] | None:
        """Space left and the whole, or None where there is no such limit."""
        ...

    def close(self) -> None:
        """Release what is held. Idempotent."""
        ...
