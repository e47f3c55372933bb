"""What the images of a TimeMark hold, read without replaying any journal.

Loop mounts on this machine: only of images that a test has made itself.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from offload.run import run
from offload.testing.pools import mounted
from offload.testing.production import EXT4, XFS, reflink_copy
from offload.testing.production_marks import Taken
from offload.testing.production_writer import (
    BURST,
    PAIR_BYTES,
    ROWS,
    content_of,
    file_path,
    pair_of,
    pair_path,
)

# as the kernel reads them without their journals
_WITHOUT_REPLAY = {EXT4: "ro,noload", XFS: "ro,norecovery,nouuid"}
_SHOWN = 5  # faults of a kind that are named


@dataclass(frozen=True, slots=True, kw_only=True)
class Points:
    """Mount points of the two images of a TimeMark."""

    ext4: Path
    xfs: Path

    @property
    def both(self) -> tuple[Path, Path]:
        """In the order in which the writers use them."""
        return self.ext4, self.xfs


@contextmanager
def as_they_are(taken: Taken, work: Path) -> Iterator[Points]:
    """Mounted read-only, no journal replayed. Raises ProgramError where that cannot be done."""
    with ExitStack() as stack:
        points = {volume: work / volume for volume in _WITHOUT_REPLAY}
        for volume, point in points.items():
            point.mkdir(exist_ok=True)
            stack.enter_context(mounted(taken.image(volume), point, _WITHOUT_REPLAY[volume]))
        yield Points(ext4=points[EXT4], xfs=points[XFS])


@contextmanager
def replayed(taken: Taken, work: Path) -> Iterator[Points]:
    """Writable copies, mounted as a machine that starts mounts them. `work` is in the pool; the
    copies go with the block."""
    with ExitStack() as stack:
        points = {}
        for volume, options in {EXT4: "", XFS: "nouuid"}.items():
            copy = reflink_copy(taken.image(volume), work / f"{volume}.copy")
            stack.callback(copy.unlink)
            points[volume] = work / volume
            points[volume].mkdir(exist_ok=True)
            stack.enter_context(mounted(copy, points[volume], options))
        yield Points(ext4=points[EXT4], xfs=points[XFS])


# -- the file systems themselves -------------------------------------------------------------------


def ext4_faults(image: Path) -> list[str]:
    """What `e2fsck -fn` says of it; nothing where it is clean."""
    done = run(["e2fsck", "-f", "-n", str(image)], check=False, timeout_s=300)
    return [] if done.status == 0 else [f"e2fsck: {(done.stdout + done.stderr).strip()}"]


def xfs_faults_after_a_mount(image: Path, work: Path) -> list[str]:
    """What `xfs_repair -n` says of a copy that was mounted once: a frozen XFS has a dummy record in
    its log, of which xfs_repair complains by design. `work` is in the pool."""
    copy, point = reflink_copy(image, work / "repair.copy"), work / "repair"
    point.mkdir(exist_ok=True)
    try:
        with mounted(copy, point, "nouuid"):
            pass
        done = run(["xfs_repair", "-n", str(copy)], check=False, timeout_s=300)
    finally:
        copy.unlink()
    return [] if done.status == 0 else [f"xfs_repair: {(done.stdout + done.stderr).strip()}"]


# -- what the writers have left --------------------------------------------------------------------


def file_faults(taken: Taken, points: Points, digests: Mapping[int, str]) -> list[str]:
    """Small files: all that were acknowledged, whole; none that was begun after the hold."""
    acknowledged, begun = taken.acknowledged["file"], taken.begun["file"]
    bad = [
        number
        for number in range(1, acknowledged + 1)
        if _digest(file_path(points.both[number % 2], number)) != digests[number]
    ]
    there = {
        int(path.name)
        for point in points.both
        for path in (point / "files").glob("*/*")
        if path.is_file()
    }
    late = sorted(number for number in there if number > begun)
    faults = [f"{len(bad)} synced files missing or damaged: {bad[:_SHOWN]}"] if bad else []
    return faults + ([f"files from after the hold: {late[:_SHOWN]}"] if late else [])


def _digest(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:  # missing, or (without replay) a name that leads nowhere
        return ""


def pair_faults(taken: Taken, points: Points) -> list[str]:
    """The numbers on the two disks: in bounds, and of one instant.

    Each number is written to the first disk, then to the second: at any instant the first is at the
    same number, or one ahead. If the second is ahead, its snapshot is younger; if the first is
    ahead by more, its own is.
    """
    try:
        places = [pair_path(point).read_bytes() for point in points.both]
    except OSError as error:  # without replay, where the journal is not empty
        return [f"the places of pairs cannot be read: {error}"]
    first, second = (int.from_bytes(place[:8], "little") for place in places)
    faults = []
    if places != [pair_of(first), pair_of(second)]:
        faults.append(f"a place of {PAIR_BYTES} bytes is torn")
    if first - second not in {0, 1}:
        faults.append(f"cross-volume tear: {first} on the first disk, {second} on the second")
    if min(first, second) < taken.acknowledged["pair"] * BURST:
        faults.append(f"an acknowledged pair is lost: {first}, {second}")
    if max(first, second) > taken.begun["pair"] * BURST:
        faults.append(f"a pair from after the hold: {first}, {second}")
    return faults


def row_faults(taken: Taken, points: Points, work: Path) -> list[str]:
    """The SQLite database, opened as a copy, with its WAL."""
    try:
        for name in (ROWS, f"{ROWS}-wal"):
            shutil.copyfile(points.ext4 / name, work / name)
        with contextlib.closing(sqlite3.connect(work / ROWS)) as database:
            (said,) = database.execute("PRAGMA integrity_check").fetchone()
            rows = dict(database.execute("SELECT number, digest FROM row"))
    except (OSError, sqlite3.Error) as error:
        return [f"rows cannot be read: {error}"]
    finally:
        for path in work.glob(f"{ROWS}*"):
            path.unlink()
    faults = [] if said == "ok" else [f"integrity_check: {said}"]
    wanted = {n: hashlib.sha256(content_of(n)).hexdigest() for n in rows}
    if rows != wanted:
        faults.append("rows are damaged")
    return faults + number_faults("row", set(rows), taken)


def number_faults(writer: str, there: set[int], taken: Taken) -> list[str]:
    """Numbers of one writer in an image: all that were acknowledged, none from after the hold."""
    acknowledged, begun = taken.acknowledged[writer], taken.begun[writer]
    lost = sorted(set(range(1, acknowledged + 1)) - there)
    late = sorted(number for number in there if number > begun)
    gaps = sorted(set(range(1, max(there, default=0) + 1)) - there - set(lost))
    faults = [f"{writer}: acknowledged and lost: {lost[:_SHOWN]}"] if lost else []
    faults += [f"{writer}: from after the hold: {late[:_SHOWN]}"] if late else []
    return faults + ([f"{writer}: gaps: {gaps[:_SHOWN]}"] if gaps else [])
