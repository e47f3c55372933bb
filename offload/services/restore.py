"""Restore: any image into a file, a block device or an NBD server.

A file appears under its name only when it is whole (temporary name, fsync, rename). A device or an
NBD export is written in place: until the end it holds neither the old nor the new content.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from offload import compose
from offload.catalog.store import Catalog
from offload.engine.work import run_workers
from offload.errors import UsageError
from offload.holds import hold_timemark
from offload.image import Image
from offload.instance import Instance
from offload.journal import step
from offload.model import ExtentKind
from offload.origin import Origin, OriginKind, parse_origin
from offload.progress import NoProgress, Progress
from offload.services import points
from offload.services.context import Context
from offload.services.sinks import PART, UNIT, Sink, open_sink


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
            with open_sink(op, image, target, overwrite) as sink:
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
    for point in found:
        image = compose.open_image(point.source)
        stack.callback(image.close)
        yield point.volume, image


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


def _copy(image: Image, sink: Sink, task: str, progress: Progress) -> int:
    """Everything that is data is written, everything else made zero. Returns bytes written."""
    written: list[int] = []

    def units() -> Iterator[tuple[int, int, bool]]:
        for extent in image.extents(0, image.size_bytes):
            data = extent.kind is ExtentKind.DATA
            most = UNIT if data else 1 << 30
            at = extent.offset
            while at < extent.end:
                length = min(most - at % most, extent.end - at)
                yield at, length, data
                at += length

    @contextmanager
    def buffer() -> Iterator[memoryview]:
        yield memoryview(bytearray(UNIT))

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


def undo_path(instance: Instance, catalog: Catalog, args: Mapping[str, str]) -> None:  # noqa: ARG001
    """Remove a temporary file of an unfinished restore."""
    path = Path(args["path"])
    if path.name.endswith(PART):
        path.unlink(missing_ok=True)
