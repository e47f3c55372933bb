"""Restore: any image into a file (raw, qcow2, VMDK, VHDX), a block device or an NBD server.

A file appears under its name only when it is whole. What is written in place (a device, an export,
with `--diff` a file that is there) holds neither the old nor the new content until the end. What an
interrupted run has made durable is kept, and the same restore goes on from there.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from offload import compose
from offload.catalog.store import Catalog
from offload.errors import (
    IntegrityError,
    NotFoundError,
    PolicyError,
    UnavailableError,
    UsageError,
)
from offload.holds import hold_timemark
from offload.image import Image
from offload.instance import Instance
from offload.journal import Operation, step
from offload.origin import Origin, OriginKind, parse_origin
from offload.progress import NoProgress, Progress
from offload.quantity import show_size
from offload.services import points, restore_record, restore_target
from offload.services.context import Context
from offload.services.restore_copy import Copy, Tally, trusted
from offload.services.restore_record import Head, Record, Unfinished
from offload.services.restore_target import Target, TargetKind
from offload.sink import Sink
from offload.sinks.device import DeviceSink
from offload.sinks.file import InPlaceFileSink, NewFileSink
from offload.sinks.formats import FormatSink, end_server
from offload.sinks.nbd import NbdSink


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What is asked for. `to`: a path, an existing folder (each volume becomes a file in it), a
    block device or an NBD URI; `form` None: by the ending of the path."""

    what: str
    to: str
    form: str | None = None
    overwrite: bool = False  # replace a file that exists
    diff: bool = False  # write only what differs; a file that exists is written in place
    restart: bool = False  # forget what an interrupted run has done
    production: str | None = None  # the production volume that may be overwritten
    vmdk: str | None = None  # not the volume but a VM's disk on its VMFS


@dataclass(frozen=True, slots=True, kw_only=True)
class Restored:
    """One volume that was restored. Sizes in bytes."""

    volume: str
    to: str
    form: str
    size_bytes: int
    written_bytes: int
    compared_bytes: int  # read from the target to see whether it differs
    resumed_bytes: int  # of the image, there already from an interrupted run


@dataclass(frozen=True, slots=True, kw_only=True)
class RestoreReport:
    """What a restore did."""

    origin: str
    volumes: tuple[Restored, ...]
    seconds: float
    written_bytes: int


def restore(ctx: Context, request: Request, *, progress: Progress | None = None) -> RestoreReport:
    """Restore a backup (ID, ID/VOLUME, backup:ID/VOLUME) or a TimeMark (timemark:ID/VOLUME).

    Raises BusyError (`target-exists`, `target-in-use`, `device-in-use`, `restore-running`),
    PolicyError (`target-too-small`, `target-read-only`, `target-in-store`,
    `target-is-production`), UnavailableError (`no-space`), UsageError.
    """
    began = time.monotonic()
    progress = progress or NoProgress()
    origin = parse_origin(request.what if ":" in request.what else f"backup:{request.what}")
    with ExitStack() as stack:
        images = list(_images(ctx, origin, request.vmdk, stack))
        targets = restore_target.find(
            [name for _, name, _ in images], request.to, request.form, in_place=request.diff
        )
        restore_record.sweep(ctx.instance)
        heads = [
            _head(ctx, full, image, target, request)
            for (full, _, image), target in zip(images, targets, strict=True)
        ]
        there = [
            not request.restart and restore_record.finished(ctx.instance, head) for head in heads
        ]
        for target, whole in zip(targets, there, strict=True):  # all before the first is touched
            restore_target.check(
                target,
                ctx.instance.config,
                overwrite=request.overwrite or whole,
                production=request.production,
            )
        op = stack.enter_context(
            ctx.journal.operation("restore", f"{request.what} to {request.to}")
        )
        done = []
        for (_, volume, image), target, head, whole in zip(
            images, targets, heads, there, strict=True
        ):
            if whole:  # by an interrupted run of this command
                tally = Tally(resumed=image.size_bytes)
                done.append(_restored(volume, image, target, tally))
                continue
            run = _Run(
                ctx=ctx,
                op=op,
                volume=volume,
                image=image,
                target=target,
                request=request,
                progress=progress,
                head=head,
            )
            done.append(_restored(volume, image, target, run.run()))
        for head in heads:
            restore_record.forget(ctx.instance, head)
        step("restore.forgotten")
    return RestoreReport(
        origin=str(origin),
        volumes=tuple(done),
        seconds=time.monotonic() - began,
        written_bytes=sum(r.written_bytes for r in done),
    )


def _restored(volume: str, image: Image, target: Target, tally: Tally) -> Restored:
    return Restored(
        volume=volume,
        to=target.to,
        form=target.form,
        size_bytes=image.size_bytes,
        written_bytes=tally.written,
        compared_bytes=tally.compared,
        resumed_bytes=tally.resumed,
    )


def _head(ctx: Context, origin: str, image: Image, target: Target, request: Request) -> Head:
    head = Head(
        origin=origin,
        to=target.to,
        identity=target.identity,
        size_bytes=image.size_bytes,
        form=target.form,
        run=f"{origin.partition('/')[0]} {Path(request.to).absolute()} {request.form}",
    )
    return replace(head, temp=target.temp(head.key(ctx.instance)))


def in_place(request: Request) -> bool:
    """Whether something that is there would be written over: worth a question."""
    if not request.diff or "://" in request.to:
        return request.diff
    target = Path(request.to)
    try:
        return any(target.iterdir()) if target.is_dir() else target.exists()
    except OSError:
        return True  # the restore itself will say what is wrong with it


def _images(
    ctx: Context, origin: Origin, vmdk: str | None, stack: ExitStack
) -> Iterator[tuple[str, str, Image]]:
    """Origin in full, volume and image of each."""
    if origin.kind is OriginKind.BACKUP:
        found = points.of_backup(ctx, origin)
    elif origin.kind is OriginKind.TIMEMARK:
        mark = ctx.catalog.timemark(origin.id)
        stack.enter_context(hold_timemark(ctx.instance, mark.id))
        found = points.of_timemark(ctx, origin)
    else:
        raise UsageError(
            "restore takes a backup or a TimeMark, not a group", code="bad-origin",
            hint="see: offload backup list",
        )  # fmt: skip
    if vmdk is not None:
        if len(found) != 1:
            raise UsageError(
                f"{vmdk} is looked for on one volume, and {origin} has {len(found)}",
                code="vmdk-for-several",
                hint="name it: ID/VOLUME",
            )
        disk = points.of_vmdk(found[0], vmdk)
        found = [replace(disk, origin=f"{disk.origin}:{vmdk}")]
    for point in found:
        image = compose.open_image(point.source)
        stack.callback(image.close)
        yield point.origin, point.volume, image


@dataclass(frozen=True, slots=True, kw_only=True)
class _Run:
    """One volume on its way to one target."""

    ctx: Context
    op: Operation
    volume: str
    image: Image
    target: Target
    request: Request
    progress: Progress
    head: Head

    def run(self) -> Tally:
        """Copy it all, or keep what the same restore can go on from."""
        path = restore_record.record_path(self.ctx.instance, self.head)
        self._supersede(path)
        self.op.intend("target", "settle-restore", {"record": str(path), "temp": self.head.temp})
        record, left = restore_record.open_record(self.ctx.instance, self.head)
        try:
            tally = self._with_record(record, left)
            record.finish(restore_record.identity_of(self.target.to))
            return tally
        except (IntegrityError, PolicyError):
            if self.head.temp:
                record.remove()  # to go on from it would end the same way
            raise
        except BaseException as failure:
            self._say_what_stays(path, failure)
            raise
        finally:
            record.close()

    def _supersede(self, mine: Path) -> None:
        """Another backup that was on its way to this target can no longer get there."""
        for other in restore_record.of_target(self.ctx.instance, self.target.identity):
            if other.path != mine:
                self.progress.message(
                    f"gave up the unfinished restore of {other.head.origin} to {other.head.to}"
                )
                restore_record.drop(other)

    def _with_record(self, record: Record, left: Unfinished | None) -> Tally:
        if left is not None and (self.request.restart or not left.resumable):
            record.restart()
            left = None
        sink, left = self._open_or_anew(record, left)
        try:
            self.op.done("target")
            if left is not None and not trusted(self.image, sink, left):
                sink.close()
                sink, left = self._anew(record)
            there = left.done_bytes if left is not None else 0
            restore_target.check_room(self.target, self.image, there)
            tally = self._copy(sink, record, left)
            sink.finish()
        finally:
            sink.close()
        step("restore.finished")
        return tally

    def _open_or_anew(
        self, record: Record, left: Unfinished | None
    ) -> tuple[Sink, Unfinished | None]:
        try:
            return self._open(left), left
        except UnavailableError as error:
            if left is None or error.code != "server-failed":
                raise
            return self._anew(record)  # QEMU cannot open what a crash has left

    def _anew(self, record: Record) -> tuple[Sink, None]:
        self.progress.message(f"{self.target.to} is not as it was left: the restore begins anew")
        record.restart()
        return self._open(None), None

    def _copy(self, sink: Sink, record: Record, left: Unfinished | None) -> Tally:
        self.progress.start(self.volume, self.image.size_bytes)
        if left is not None:
            self.progress.message(
                f"going on with the restore of {left.head.began_at}: {show_size(left.done_bytes)} "
                f"of {show_size(self.image.size_bytes)} are there"
            )
        if not self.head.temp:
            record.touch()
        copy = Copy(
            self.image,
            sink,
            record,
            compare=self.request.diff and not sink.fresh,
            advance=lambda count: self.progress.advance(self.volume, count),
        )
        copy.run(left.done if left else [], left.last if left else [])
        step("restore.copied")
        self.progress.finish(self.volume)
        return copy.tally

    def _open(self, left: Unfinished | None) -> Sink:
        target, size = self.target, self.image.size_bytes
        match target.kind:
            case TargetKind.NBD:
                return NbdSink(target.to, size)
            case TargetKind.DEVICE:
                return DeviceSink(target.path, size)
            case TargetKind.IN_PLACE:
                return InPlaceFileSink(target.path, size)
            case TargetKind.FILE:
                return self._open_file(left)

    def _open_file(self, left: Unfinished | None) -> Sink:
        target, size, temp = self.target, self.image.size_bytes, Path(self.head.temp)
        if target.form == restore_target.RAW:
            return NewFileSink(target.path, temp, size, resume=left is not None)
        socket = (
            self.ctx.instance.runtime_dir / "restores" / f"{self.head.key(self.ctx.instance)}.sock"
        )
        self.op.intend("server", "end-restore-server", {"socket": str(socket)})
        sink = FormatSink(target.form, target.path, temp, size, socket, resume=left is not None)
        self.op.done("server")
        return sink

    def _say_what_stays(self, path: Path, failure: BaseException) -> None:
        left = restore_record.look(path)
        if left is None or not left.resumable:
            if self.head.temp:
                failure.add_note("nothing was kept of it")
            return
        where = "are in place" if self.head.temp else f"are on {self.target.to}, a mixture now"
        failure.add_note(
            f"{show_size(left.done_bytes)} of {show_size(self.image.size_bytes)} {where}: the same "
            f"command goes on from there; to give it up: "
            f"offload restore --abandon --to {self.target.to}"
        )


def abandon(ctx: Context, to: str) -> list[Unfinished]:
    """Give up the unfinished restores to a target (a folder: to any file in it).

    What a device or an export holds stays as it is. Raises NotFoundError (`unknown-restore`),
    BusyError (`restore-running`).
    """
    wanted = to if "://" in to else str(Path(to).absolute())
    found = [
        entry
        for entry in restore_record.unfinished(ctx.instance)
        if entry.head.to == wanted or str(Path(entry.head.to).parent) == wanted
    ]
    if not found:
        raise NotFoundError(
            f"there is no unfinished restore to {to}", code="unknown-restore",
            hint="see: offload recover --dry-run",
        )  # fmt: skip
    for entry in found:
        restore_record.drop(entry)
    return found


def undo_restore(instance: Instance, catalog: Catalog, args: Mapping[str, str]) -> None:  # noqa: ARG001
    """Keep what the same restore can go on from, remove what it cannot."""
    restore_record.settle(Path(args["record"]), args["temp"])


def undo_server(instance: Instance, catalog: Catalog, args: Mapping[str, str]) -> None:  # noqa: ARG001
    """End the server that wrote an image of another format."""
    end_server(Path(args["socket"]))


def undo_path(instance: Instance, catalog: Catalog, args: Mapping[str, str]) -> None:  # noqa: ARG001
    """Remove a temporary file of an unfinished restore, as older versions left it."""
    restore_record.remove_temporary(args["path"])
