"""The copying of a restore: windows of the image into a sink, with checkpoints on the way."""

from __future__ import annotations

import mmap
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from random import Random

from offload.engine.bulkread import BulkReader, window_bytes
from offload.engine.readimage import StoredImage
from offload.engine.work import run_workers
from offload.errors import OffloadError
from offload.extents import Ranges, clip, complement, data_ranges, normalize, subtract, total
from offload.image import Image
from offload.journal import step
from offload.services.restore_record import Record, Unfinished
from offload.sink import UNIT, Sink
from offload.store import Buffer

CHECKPOINT_BYTES = 256 << 20  # written between two checkpoints: what a kill costs
_SAMPLES = 16  # places of what an interrupted run wrote that are looked at before it is trusted
_SAMPLE_BYTES = 256 << 10


@dataclass(slots=True)
class Tally:
    """What was done, in bytes. Written under a lock."""

    written: int = 0
    compared: int = 0
    resumed: int = 0  # of the image, there already from an interrupted run


@dataclass(frozen=True, slots=True)
class _Window:
    """A piece of the image; whether it is compared with what is there before it is written."""

    start: int
    end: int
    compare: bool


@dataclass(slots=True)
class _Tool:
    """What one thread owns."""

    buffer: memoryview
    there: memoryview
    tally: Tally = field(default_factory=Tally)


class Copy:
    """One image on its way into one sink. `compare`: write only what differs."""

    def __init__(
        self,
        image: Image,
        sink: Sink,
        record: Record,
        *,
        compare: bool,
        advance: Callable[[int], None],
    ) -> None:
        self.image = image
        self.sink = sink
        self.record = record
        self.tally = Tally()
        self._compare = compare
        self._advance = advance
        self._mutex = threading.Lock()
        self._bulk = BulkReader(image) if isinstance(image, StoredImage) else None
        self._window = self._bulk.window_bytes if self._bulk else window_bytes(_SAMPLE_BYTES)

    def run(self, done: Ranges, doubtful: Ranges) -> None:
        """Bring the sink to the image's content, but for `done`; `doubtful` is compared first.

        Whatever ends it early, all that was finished is noted in the record, if the sink lets it.
        """
        size = self.image.size_bytes
        trusted = subtract(done, doubtful)
        self.tally.resumed = total(done)
        self._advance(total(trusted))
        checkpoints = _Checkpoints(self.sink, self.record)
        try:
            run_workers(
                self._windows(complement(trusted, size), doubtful),
                self._tool,
                lambda window, tool: self._work(window, tool, checkpoints),
            )
        except BaseException as failure:
            try:
                checkpoints.finish()
            except OffloadError as error:  # the first error is the one to tell
                failure.add_note(error.message)
            raise
        finally:
            if self._bulk is not None:
                self._bulk.close()
        checkpoints.finish()

    def _windows(self, todo: Ranges, doubtful: Ranges) -> Iterator[_Window]:
        for start, end in todo:
            at = start
            while at < end:
                upto = min(end, (at // self._window + 1) * self._window)
                again = bool(clip(doubtful, at, upto))
                yield _Window(at, upto, self._compare or again)
                at = upto

    @contextmanager
    def _tool(self) -> Iterator[_Tool]:
        tool = _Tool(_buffer(UNIT), _buffer(UNIT))
        try:
            yield tool
        finally:
            with self._mutex:
                self.tally.written += tool.tally.written
                self.tally.compared += tool.tally.compared

    def _work(self, window: _Window, tool: _Tool, checkpoints: _Checkpoints) -> None:
        data = data_ranges(self.image.extents(window.start, window.end - window.start))
        before = tool.tally.written
        put = partial(self._write_changed if window.compare else self._write, tool)
        if self._bulk is not None:
            self._bulk.read(data, put)
        else:
            self._read(data, put, tool)
        for start, end in subtract([(window.start, window.end)], data):
            self._zero(start, end, window, tool)
        checkpoints.note(window.start, window.end, tool.tally.written - before)
        self._advance(window.end - window.start)

    def _read(self, data: Ranges, put: Callable[[int, memoryview], None], tool: _Tool) -> None:
        for start, end in data:
            for at in range(start, end, UNIT):
                part = tool.buffer[: min(UNIT, end - at)]
                self.image.readinto(at, part)
                put(at, part)

    def _write(self, tool: _Tool, offset: int, wanted: Buffer) -> None:
        self.sink.write(offset, memoryview(wanted))
        tool.tally.written += len(wanted)

    def _write_changed(self, tool: _Tool, offset: int, wanted: Buffer) -> None:
        from offload.services.restore_compare import differing  # NumPy: a new file needs it not

        for at in range(0, len(wanted), UNIT):
            part = memoryview(wanted)[at : at + UNIT]
            there = tool.there[: len(part)]
            self.sink.readinto(offset + at, there)
            tool.tally.compared += len(part)
            for first, end in differing(part, there):
                self.sink.write(offset + at + first, part[first:end])
                tool.tally.written += end - first

    def _zero(self, start: int, end: int, window: _Window, tool: _Tool) -> None:
        """A new sink has holes there, unless an interrupted run is in doubt."""
        if not window.compare:
            if not self.sink.fresh:
                self.sink.zero(start, end - start)
            return
        from offload.services.restore_compare import not_zero

        for first, stop in self.sink.data(start, end - start):
            for at in range(first, stop, UNIT):
                there = tool.there[: min(UNIT, stop - at)]
                self.sink.readinto(at, there)
                tool.tally.compared += len(there)
                for low, high in not_zero(there):
                    self.sink.zero(at + low, high - low)
                    tool.tally.written += high - low


def trusted(image: Image, sink: Sink, left: Unfinished) -> bool:
    """Whether a sample of what an interrupted run wrote is still there. (What it wrote last is
    compared as a whole.)"""
    pick = Random(left.path.stem)  # noqa: S311 - a sample, no secret
    old = subtract(left.done, left.last)
    for _ in range(_SAMPLES if old else 0):
        start, end = pick.choice(old)
        at = pick.randrange(start, end) // _SAMPLE_BYTES * _SAMPLE_BYTES
        length = min(_SAMPLE_BYTES, image.size_bytes - at)
        there = bytearray(length)
        sink.readinto(at, memoryview(there))
        if image.pread(at, length) != there:
            return False
    return True


class _Checkpoints:
    """Makes what was copied durable from time to time, in a thread of its own, and notes it."""

    def __init__(self, sink: Sink, record: Record) -> None:
        self._sink = sink
        self._record = record
        self._wake = threading.Condition()
        self._pending: list[tuple[int, int]] = []
        self._bytes = 0
        self._ended = False
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._loop, name="checkpoint", daemon=True)
        self._thread.start()

    def note(self, start: int, end: int, written: int) -> None:
        """A window is in the sink, not yet durable. Raises what a checkpoint did."""
        with self._wake:
            if self._failure is not None:
                raise self._failure
            self._pending.append((start, end))
            self._bytes += written
            if self._bytes >= CHECKPOINT_BYTES:
                self._wake.notify()

    def finish(self) -> None:
        """The last one: all that was noted is durable and recorded."""
        with self._wake:
            self._ended = True
            self._wake.notify()
        self._thread.join()
        if self._failure is not None:
            raise self._failure
        self._checkpoint(self._pending)

    def _loop(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._ended or self._bytes >= CHECKPOINT_BYTES)
                if self._ended:
                    return
                ranges, self._pending, self._bytes = self._pending, [], 0
            try:
                self._checkpoint(ranges)
            except Exception as error:  # noqa: BLE001 - raised again by note or finish
                self._failure = error
                return

    def _checkpoint(self, ranges: list[tuple[int, int]]) -> None:
        if ranges:
            self._sink.sync()
            step("restore.synced")
            self._record.add(normalize(ranges))
            step("restore.checkpoint")


def _buffer(length: int) -> memoryview:
    """Memory that costs nothing until it is used."""
    return memoryview(mmap.mmap(-1, length))
