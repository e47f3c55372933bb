"""Images that are a plain file or a block device: byte for byte the volume."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator

from offload.blockdev import device_size
from offload.errors import IntegrityError, NotFoundError, PrivilegeError, UnavailableError
from offload.model import Extent, ExtentKind, RawSource


class FileImage:
    """The Image over a `RawSource`; opened read-only.

    A file may be longer than the source says (the rest is not part of the image), never shorter.
    Reads give the descriptor's own bytes or an error, also when the file shrinks while it is open.

    Raises NotFoundError (`image-missing`), PrivilegeError, IntegrityError (`image-short`),
    UnavailableError (`image-unreadable`).
    """

    def __init__(self, source: RawSource) -> None:
        self._source = source
        self._fd = _open(source)
        try:
            self._sparse = self._is_file()
            self._data = (0, 0)  # what was found to be data last
            self._check_length()
        except BaseException:
            self.close()
            raise

    @property
    def size_bytes(self) -> int:
        """The size of the image in bytes."""
        return self._source.size_bytes

    @property
    def block_size(self) -> int:
        """The logical sector size of the volume that it shows, in bytes."""
        return self._source.sector_size

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        """Cover exactly the range, from SEEK_DATA and SEEK_HOLE; a block device is all data."""
        self._check_range(offset, length)
        at, end = offset, offset + length
        while at < end:
            start = self._seek_data(at, end)
            if start > at:
                yield Extent(at, start - at, ExtentKind.HOLE)
            if start >= end:
                return
            at = self._seek_hole(start, end)
            yield Extent(start, at - start, ExtentKind.DATA)

    def readinto(self, offset: int, buffer: memoryview) -> None:
        """Fill the whole of `buffer` from `offset`; a range past the end is a ValueError."""
        view = buffer.cast("B") if buffer.format != "B" or buffer.ndim != 1 else buffer
        self._check_range(offset, len(view))
        done = 0
        while done < len(view):
            try:
                count = os.preadv(self._fd, [view[done:]], offset + done)
            except OSError as error:
                raise self._unreadable(offset + done, error) from error
            if count == 0:
                raise self._short()
            done += count

    def pread(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes from `offset`."""
        self._check_range(offset, length)  # before memory of a wrong size is asked for
        buffer = bytearray(length)
        self.readinto(offset, memoryview(buffer))
        return bytes(buffer)

    def close(self) -> None:
        """Close the descriptor. Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> FileImage:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _is_file(self) -> bool:
        mode = os.fstat(self._fd).st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISBLK(mode):
            raise UnavailableError(
                f"{self._source.path} is neither a file nor a block device",
                code="image-unreadable",
            )
        return stat.S_ISREG(mode)

    def _seek_data(self, at: int, end: int) -> int:
        """Where data begins, at or behind `at`; at most `end`."""
        first, stop = self._data  # one value: other threads may exchange it
        if not self._sparse or first <= at < stop:
            return at
        try:
            return min(os.lseek(self._fd, at, os.SEEK_DATA), end)
        except OSError as error:
            if error.errno == errno.EINVAL:  # a file system that knows no holes
                return at
            if error.errno != errno.ENXIO:
                raise self._unreadable(at, error) from error
            self._check_length()  # a hole up to the end of the file: of the whole file, still?
            return end

    def _seek_hole(self, start: int, end: int) -> int:
        """Where the data that begins at `start` ends; at most `end`.

        The kernel walks to the end of the data, however far that is: with thousands of changed
        blocks in one stretch of it, asking anew for each took minutes.
        """
        if not self._sparse:
            return end
        first, stop = self._data
        if first <= start < stop:
            return min(stop, end)
        try:
            found = os.lseek(self._fd, start, os.SEEK_HOLE)
        except OSError as error:
            if error.errno == errno.EINVAL:
                return end
            if error.errno == errno.ENXIO:
                raise self._short() from error
            raise self._unreadable(start, error) from error
        # nothing is gained by a byte range that a punched hole has overtaken: report it as data
        if found <= start:
            return end
        self._data = (start, found)
        return min(found, end)

    def _check_range(self, offset: int, length: int) -> None:
        if offset < 0 or length < 0 or offset + length > self.size_bytes:
            raise ValueError(
                f"[{offset}, {offset + length}) is outside the image of {self.size_bytes} bytes"
            )

    def _check_length(self) -> None:
        length = os.fstat(self._fd).st_size if self._sparse else device_size(self._fd)
        if length < self.size_bytes:
            raise self._short()

    def _short(self) -> IntegrityError:
        return IntegrityError(
            f"{self._source.path} is shorter than its {self.size_bytes} bytes",
            code="image-short",
            hint="the file was truncated or replaced; it is not the image that was recorded",
        )

    def _unreadable(self, offset: int, error: OSError) -> UnavailableError:
        return UnavailableError(
            f"cannot read {self._source.path} at byte {offset}: {error.strerror}",
            code="image-unreadable",
            hint="look at the kernel log of this machine: dmesg",
        )


def _open(source: RawSource) -> int:
    try:
        return os.open(source.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # never wait: FIFOs
    except FileNotFoundError as error:
        raise NotFoundError(f"{source.path} is not there", code="image-missing") from error
    except PermissionError as error:
        raise PrivilegeError(
            f"no permission to read {source.path}",
            code="image-permission",
            hint="run as its owner or as root",
        ) from error
    except OSError as error:
        raise UnavailableError(
            f"cannot open {source.path}: {error.strerror}", code="image-unreadable"
        ) from error
