"""Where snapshots that are files lie, and how to know ours.

`<root>/<instance>/<timemark>/<volume><suffix>`; the root is the volume's `snapshot_dir`, by default
the folder `.offload` beside it. The path is the whole ref, so that what stands in the catalog, in
the journal and on the disk can be compared. Beside the snapshots a TimeMark's folder may hold:

| name | is | goes |
| --- | --- | --- |
| `<volume>.copy.part` | a copy that is being made | with the ref of `<volume>.copy` |
| `.subvolume` | the btrfs snapshot that files are cloned out of | with any ref of the TimeMark |
"""

from __future__ import annotations

import contextlib
import errno
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from offload.errors import PolicyError, PrivilegeError, UnavailableError
from offload.filesystem import fsync_folder
from offload.model import Volume

DEFAULT_ROOT = ".offload"
SUBVOLUME = ".subvolume"
_PART = re.compile(r"[a-z0-9][a-z0-9._-]*")
_RACES = 5  # another process may remove an empty folder between our mkdir of it and of its child


def root_of(volume: Volume) -> Path:
    """The folder that holds the snapshots of a volume, of all instances."""
    return volume.snapshot_dir or volume.path.parent / DEFAULT_ROOT


def existing_part(folder: Path) -> Path:
    """The folder itself, or the nearest one above it that exists already."""
    while not folder.is_dir():
        folder = folder.parent
    return folder


def ref_of(volume: Volume, instance: str, timemark: str, suffix: str) -> dict[str, str]:
    """The ref of a snapshot that is, or will be, made."""
    return {"path": str(root_of(volume) / instance / timemark / f"{volume.name}{suffix}")}


def own_path(ref: Mapping[str, str], instance: str, suffix: str) -> Path:
    """The path of a ref, sure to be of our scheme; PolicyError (`foreign-snapshot`) if it is not.

    Guards every delete: a damaged ref never names a file that is not ours.
    """
    path = Path(ref.get("path", ""))
    name = path.name.removesuffix(suffix)
    parts = path.parts
    if (
        not path.is_absolute()
        or ".." in parts
        or len(parts) < 5  # /, root, instance, timemark, file
        or parts[-3] != instance
        or not _PART.fullmatch(parts[-2])
        or not path.name.endswith(suffix)
        or not _PART.fullmatch(name)
    ):
        raise PolicyError(
            f"'{path}' is no snapshot of this instance ({instance}) and is left alone",
            code="foreign-snapshot",
            hint="the record that names it is damaged, or of another state_dir",
        )
    return path


def ensure_folder(path: Path) -> None:
    """Make the TimeMark's folder of a snapshot, durably. Idempotent.

    Raises PrivilegeError, UnavailableError, PolicyError (`unsafe-snapshot-dir`: a link in the place
    of one of our folders).
    """
    folder = path.parent
    instance = folder.parent
    try:
        for made in _make_folders(folder):
            fsync_folder(made.parent)
    except OSError as error:
        raise pool_error(error, folder, "make") from error
    for place in (instance, folder):
        if place.is_symlink():
            raise PolicyError(
                f"{place} is a symbolic link, not a folder of ours",
                code="unsafe-snapshot-dir",
                hint="remove the link; set snapshot_dir to a folder that only its owner may write",
            )


def _make_folders(folder: Path) -> list[Path]:
    """Make a folder and those above it; returns those that were made, the topmost first."""
    made: list[Path] = []
    for attempt in range(_RACES):
        try:
            for place in (*reversed(folder.parents), folder):
                if not place.is_dir():
                    place.mkdir(mode=0o700, exist_ok=True)
                    made.append(place)
        except FileNotFoundError:
            if attempt == _RACES - 1:
                raise
        else:
            break
    return made


def remove_empty_folders(path: Path) -> None:
    """Remove the folders of a deleted snapshot that hold nothing any more. Idempotent."""
    timemark = path.parent
    root = timemark.parent.parent
    places = [timemark, timemark.parent]
    if root.name == DEFAULT_ROOT:  # a configured folder belongs to whoever configured it
        places.append(root)
    for place in places:
        try:
            place.rmdir()
        except FileNotFoundError:
            continue
        except OSError as error:
            if error.errno in {errno.ENOTEMPTY, errno.EEXIST, errno.EACCES, errno.EPERM}:
                return
            raise pool_error(error, place, "remove") from error
        with contextlib.suppress(OSError):
            fsync_folder(place.parent)


def find_refs(volumes: Iterable[Volume], instance: str, suffix: str) -> list[dict[str, str]]:
    """Refs of all that bears this instance's name near the volumes, half made or whole.

    A folder without snapshots gives a ref too: deleting that removes it.
    """
    found: set[str] = set()
    for root, name in sorted({(root_of(v), v.name) for v in volumes}):
        base = root / instance
        try:
            timemarks = [place for place in base.iterdir() if place.is_dir()]
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            raise pool_error(error, base, "read") from error
        for place in timemarks:
            names = {entry.name.removesuffix(".part") for entry in place.iterdir()}
            ours = {entry for entry in names if entry.endswith(suffix)}
            if not names - {SUBVOLUME}:
                ours = {f"{name}{suffix}"}
            found.update(str(place / entry) for entry in ours)
    return [{"path": path} for path in sorted(found)]


def pool_error(error: OSError, path: Path, doing: str) -> PrivilegeError | UnavailableError:
    """An error of the pool's file system as one of ours."""
    if error.errno in {errno.EACCES, errno.EPERM}:
        return PrivilegeError(
            f"no permission to {doing} {path}",
            code="pool-permission",
            hint="run as root or as the volume's owner, or set snapshot_dir to a folder you own",
        )
    if error.errno in {errno.ENOSPC, errno.EDQUOT}:
        return UnavailableError(
            f"no space to {doing} {path}",
            code="no-space",
            hint="make room on the pool; delete TimeMarks that are not needed",
        )
    return UnavailableError(
        f"cannot {doing} {path}: {error.strerror}",
        code="pool-error",
        hint="look at the kernel log of this machine: dmesg",
    )
