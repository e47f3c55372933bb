"""Restore: any image into a file, a block device or an NBD server.

A file appears under its name only when it is whole (temporary name, fsync, rename). A device or an
NBD export is written in place: until the end it holds neither the old nor the new content.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from offload import compose
from offload.blockdev import device_size
from offload.catalog.store import Catalog
from offload.engine.work import run_workers
from offload.errors import BusyError, NotFoundError, PolicyError, UnavailableError, UsageError
from offload.filesystem import fsync_folder
from offload.holds import hold_timemark
from offload.ids import new_id
from offload.image import Image
from offload.instance import Instance
from offload.journal import Operation, step
from offload.model import ExtentKind
from offload.origin import Origin, OriginKind, parse_origin
from offload.progress import NoProgress, Progress
from offload.services import stores
from offload.services.context import Context

if TYPE_CHECKING:
    import nbd

_UNIT = 4 << 20  # bytes read and written at once
_BLKZEROOUT = 0x127F  # linux/fs.h: _IO(0x12, 127), two u64: start, length
_PART = ".offload-part"


@dataclass(frozen=True, slots=True, kw_only=True)
class Restored:
    """One volume that was restored. Sizes in bytes."""

    volume: str
    to: str
    size_bytes: int
    written_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RestoreReport:
    """What a restore did."""

    origin: str
    volumes: tuple[Restored, ...]
    seconds: float
    written_bytes: int


class Sink(Protocol):
    """Where an image goes. `write` and `zero` are safe from any thread."""

    def write(self, offset: int, data: memoryview) -> None:
        """Write bytes."""
        ...

    def zero(self, offset: int, length: int) -> None:
        """Make a range read as zeros."""
        ...

    def finish(self) -> None:
        """Make everything durable and final."""
        ...

    def close(self) -> None:
        """Release; without `finish`, a file is removed."""
        ...


def restore(
    ctx: Context,
    what: str,
    to: str,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> RestoreReport:
    """Restore a backup (ID, ID/VOLUME, backup:ID/VOLUME) or a TimeMark (timemark:ID/VOLUME).

    `to` is a path, an existing folder (each volume becomes NAME.raw in it), a block device or an
    NBD URI. Raises BusyError (`target-exists`, `device-in-use`), PolicyError (`target-too-small`).
    """
    began = time.monotonic()
    progress = progress or NoProgress()
    origin = parse_origin(what if ":" in what else f"backup:{what}")
    with ExitStack() as stack:
        images = list(_images(ctx, origin, stack))
        targets = _targets([name for name, _ in images], to)
        op = stack.enter_context(ctx.journal.operation("restore", f"{what} to {to}"))
        done = []
        for (volume, image), target in zip(images, targets, strict=True):
            progress.start(volume, image.size_bytes)
            with _sink(op, image, target, overwrite) as sink:
                written = _copy(image, sink, volume, progress)
                step("restore.copied")
                sink.finish()
            progress.finish(volume)
            step("restore.finished")
            done.append(
                Restored(
                    volume=volume, to=target, size_bytes=image.size_bytes, written_bytes=written
                )
            )
    return RestoreReport(
        origin=str(origin),
        volumes=tuple(done),
        seconds=time.monotonic() - began,
        written_bytes=sum(r.written_bytes for r in done),
    )


def _images(ctx: Context, origin: Origin, stack: ExitStack) -> Iterator[tuple[str, Image]]:
    found = 0
    if origin.kind is OriginKind.BACKUP:
        known = ctx.catalog.backup(origin.id)
        for record in known.images:
            if origin.volume in (None, record.volume):
                found += 1
                image = compose.open_image(stores.backup_source(ctx, known, record))
                stack.callback(image.close)
                yield record.volume, image
    elif origin.kind is OriginKind.TIMEMARK:
        mark = ctx.catalog.timemark(origin.id)
        stack.enter_context(hold_timemark(ctx.instance, mark.id))
        for snapshot in mark.snapshots:
            if origin.volume in (None, snapshot.volume):
                found += 1
                provider = compose.snapshot_provider(snapshot.provider, ctx.instance.id)
                image = compose.open_image(provider.source(snapshot))
                stack.callback(image.close)
                yield snapshot.volume, image
    else:
        raise UsageError(
            "restore takes a backup or a TimeMark, not a group", code="bad-origin",
            hint="see: offload backup list",
        )  # fmt: skip
    if not found:
        raise NotFoundError(
            f"{origin.kind.value} {origin.id} has no volume '{origin.volume}'",
            code="unknown-volume",
        )


def _targets(volumes: list[str], to: str) -> list[str]:
    if "://" not in to and Path(to).is_dir():
        return [str(Path(to) / f"{volume}.raw") for volume in volumes]
    if len(volumes) > 1:
        raise UsageError(
            f"there are {len(volumes)} volumes ({', '.join(volumes)}) and one target {to}",
            code="many-volumes",
            hint="name one volume (ID/VOLUME), or give an existing folder",
        )
    return [to]


@contextmanager
def _sink(op: Operation, image: Image, to: str, overwrite: bool) -> Iterator[Sink]:
    made: Sink
    if to.startswith("nbd"):
        made = _NbdSink(to, image.size_bytes)
    elif "://" in to:
        raise UsageError(
            f"cannot restore to '{to}'", code="bad-target", hint="a path, a device or an nbd:// URI"
        )
    elif _is_block_device(to):
        made = _DeviceSink(Path(to), image.size_bytes)
    else:
        made = _FileSink(op, Path(to), image.size_bytes, overwrite)
    try:
        yield made
    finally:
        made.close()


def _copy(image: Image, sink: Sink, task: str, progress: Progress) -> int:
    """Everything that is data is written, everything else made zero. Returns bytes written."""
    written: list[int] = []

    def units() -> Iterator[tuple[int, int, bool]]:
        for extent in image.extents(0, image.size_bytes):
            data = extent.kind is ExtentKind.DATA
            most = _UNIT if data else 1 << 30
            at = extent.offset
            while at < extent.end:
                length = min(most - at % most, extent.end - at)
                yield at, length, data
                at += length

    @contextmanager
    def buffer() -> Iterator[memoryview]:
        yield memoryview(bytearray(_UNIT))

    def job(unit: tuple[int, int, bool], tool: memoryview) -> None:
        offset, length, data = unit
        if data:
            part = tool[:length]
            image.readinto(offset, part)
            sink.write(offset, part)
            written.append(length)
        else:
            sink.zero(offset, length)
        progress.advance(task, length)

    run_workers(units(), buffer, job)
    return sum(written)


# -- a file ------------------------------------------------------------------------------------


class _FileSink:
    """A sparse file that gets its name at the end."""

    def __init__(self, op: Operation, path: Path, size: int, overwrite: bool) -> None:
        self.path = path
        if path.exists() and not overwrite:
            raise BusyError(
                f"{path} exists already", code="target-exists", hint="to replace it: --overwrite"
            )
        if not path.parent.is_dir():
            raise NotFoundError(f"the folder {path.parent} does not exist", code="no-folder")
        self.temp = path.with_name(f".{path.name}.{new_id()}{_PART}")
        op.intend("file", "remove-path", {"path": str(self.temp)})
        try:
            self._fd = os.open(self.temp, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            os.ftruncate(self._fd, size)
        except OSError as error:
            raise _write_error(str(path), error) from error

    def write(self, offset: int, data: memoryview) -> None:
        """Write bytes."""
        _pwrite_all(self._fd, str(self.path), offset, data)

    def zero(self, offset: int, length: int) -> None:
        """Nothing to do: the file is new, and so a hole."""

    def finish(self) -> None:
        """fsync, rename over the name, fsync the folder."""
        try:
            os.fsync(self._fd)
            self.temp.rename(self.path)
            fsync_folder(self.path.parent)
        except OSError as error:
            raise _write_error(str(self.path), error) from error

    def close(self) -> None:
        """Close; what was not finished goes."""
        os.close(self._fd)
        self.temp.unlink(missing_ok=True)


# -- a block device ----------------------------------------------------------------------------


class _DeviceSink:
    """A block device that nobody else uses."""

    def __init__(self, path: Path, size: int) -> None:
        self.path = path
        try:
            # O_EXCL on a block device: the kernel refuses one that is mounted or claimed.
            self._fd = os.open(path, os.O_RDWR | os.O_EXCL | os.O_CLOEXEC)
        except OSError as error:
            if error.errno == errno.EBUSY:
                raise BusyError(
                    f"{path} is mounted or in use",
                    code="device-in-use",
                    hint=f"see: lsblk {path}; unmount it first",
                ) from error
            raise _write_error(str(path), error) from error
        try:
            self._check(size)
        except BaseException:
            os.close(self._fd)
            raise

    def _check(self, size: int) -> None:
        users = _users_of_device(self._fd)
        if users:
            raise BusyError(
                f"{self.path} is in use: {users[0]}",
                code="device-in-use",
                hint=f"see: lsblk {self.path}; unmount it first",
            )
        have = device_size(self._fd)
        if have < size:
            raise PolicyError(
                f"{self.path} has {have} bytes, the image needs {size}",
                code="target-too-small",
                hint="choose a device that is at least as large",
            )

    def write(self, offset: int, data: memoryview) -> None:
        """Write bytes."""
        _pwrite_all(self._fd, str(self.path), offset, data)

    def zero(self, offset: int, length: int) -> None:
        """BLKZEROOUT, which the device may do without writing; else zeros."""
        whole = offset % 512 == 0 and length % 512 == 0
        try:
            if whole:
                fcntl.ioctl(self._fd, _BLKZEROOUT, struct.pack("QQ", offset, length))
                return
        except OSError:
            pass  # not supported by this device: write them
        zeros = memoryview(bytes(min(length, _UNIT)))
        for at in range(offset, offset + length, _UNIT):
            part = zeros[: min(_UNIT, offset + length - at)]
            _pwrite_all(self._fd, str(self.path), at, part)

    def finish(self) -> None:
        """fsync."""
        try:
            os.fsync(self._fd)
        except OSError as error:
            raise _write_error(str(self.path), error) from error

    def close(self) -> None:
        """Close."""
        os.close(self._fd)


def _is_block_device(to: str) -> bool:
    try:
        return stat.S_ISBLK(os.stat(to).st_mode)
    except OSError:
        return False


def _users_of_device(fd: int) -> list[str]:
    """Mounts, swap, holders (md, dm) of a device or of its partitions."""
    number = os.fstat(fd).st_rdev
    sys = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}").resolve()
    family = [sys, *(p.parent for p in sys.glob("*/partition"))]
    numbers = {(p / "dev").read_text().strip() for p in family if (p / "dev").exists()}
    users = []
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields = line.split()
        if fields[2] in numbers:
            users.append(f"mounted on {fields[4]}")
    names = {f"/dev/{p.name}" for p in family}
    swaps = {line.split()[0] for line in Path("/proc/swaps").read_text().splitlines()[1:]}
    users += ["it is swap space" for _ in swaps & names]
    users += [f"held by {h.name}" for p in family for h in (p / "holders").glob("*")]
    return users


# -- an NBD server -----------------------------------------------------------------------------


class _NbdSink:
    """An export of an NBD server, over one connection a thread."""

    def __init__(self, uri: str, size: int) -> None:

        self.uri = uri
        self._idle: list[nbd.NBD] = []
        self._all: list[nbd.NBD] = []
        first = self._connect()
        have = first.get_size()
        if first.is_read_only():
            self.close()
            raise PolicyError(f"{uri} is read-only", code="target-read-only")
        if have < size:
            self.close()
            raise PolicyError(
                f"{uri} has {have} bytes, the image needs {size}", code="target-too-small"
            )
        self._zeroes = bool(first.can_zero())
        self._idle.append(first)

    def _connect(self) -> nbd.NBD:
        import nbd

        handle = nbd.NBD()
        try:
            handle.connect_uri(self.uri)
        except nbd.Error as error:
            raise UnavailableError(
                f"cannot connect to {self.uri}: {error.string}", code="nbd-unavailable"
            ) from error
        self._all.append(handle)
        return handle

    @contextmanager
    def _handle(self) -> Iterator[nbd.NBD]:
        import nbd

        handle = self._idle.pop() if self._idle else self._connect()
        try:
            yield handle
        except nbd.Error as error:
            raise UnavailableError(
                f"writing to {self.uri} failed: {error.string}", code="nbd-unavailable"
            ) from error
        self._idle.append(handle)

    def write(self, offset: int, data: memoryview) -> None:
        """Write bytes."""
        with self._handle() as handle:
            handle.pwrite(bytearray(data), offset)

    def zero(self, offset: int, length: int) -> None:
        """NBD_CMD_WRITE_ZEROES where the server has it."""
        with self._handle() as handle:
            for at in range(offset, offset + length, _UNIT):
                part = min(_UNIT, offset + length - at)
                if self._zeroes:
                    handle.zero(part, at)
                else:
                    handle.pwrite(bytearray(part), at)

    def finish(self) -> None:
        """Flush through every connection: not every server has multi-conn."""
        import nbd

        try:
            for handle in self._all:
                if handle.can_flush():
                    handle.flush()
        except nbd.Error as error:
            raise UnavailableError(
                f"flushing {self.uri} failed: {error.string}", code="nbd-unavailable"
            ) from error

    def close(self) -> None:
        """Disconnect."""
        import nbd

        for handle in self._all:
            try:
                handle.shutdown()
            except nbd.Error:
                continue  # the server has gone: there is nothing to tell it
        self._all.clear()


def _pwrite_all(fd: int, name: str, offset: int, data: memoryview) -> None:
    try:
        while data:
            count = os.pwrite(fd, data, offset)
            offset += count
            data = data[count:]
    except OSError as error:
        raise _write_error(name, error) from error


def _write_error(name: str, error: OSError) -> UnavailableError:
    code = "no-space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "target-unavailable"
    return UnavailableError(f"cannot write {name}: {error.strerror}", code=code)


def undo_path(instance: Instance, catalog: Catalog, args: Mapping[str, str]) -> None:  # noqa: ARG001
    """Remove a temporary file of an unfinished restore."""
    path = Path(args["path"])
    if path.name.endswith(_PART):
        path.unlink(missing_ok=True)
