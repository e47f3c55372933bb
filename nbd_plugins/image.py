"""An nbdkit Python plugin (API 2) that serves any Image.

`nbdkit python image.py source=FILE`: FILE holds the source as JSON (offload.sources), so that
nothing about it shows in a process list. One Image is shared by all clients: it is immutable.

nbdkit calls from threads of its own, and Python makes a new thread state for each call: what is
kept in a `threading.local` is gone in the next call.
"""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import nbdkit

from offload import errors
from offload.compose import open_image
from offload.errors import OffloadError, PrivilegeError
from offload.image import Image
from offload.model import ExtentKind
from offload.sources import source_from_dict

API_VERSION = 2

_Answer = TypeVar("_Answer")

_PREFERRED = 256 << 10  # bytes: a chunk of a backup; smaller reads decompress it again and again
_MAXIMUM = 32 << 20  # bytes: what every client may ask for without being told
_EXTENTS_MAX = 1 << 16  # of one reply: the client asks again from where it ended

_TYPES = {
    ExtentKind.DATA: 0,
    ExtentKind.ZERO: nbdkit.EXTENT_ZERO,
    ExtentKind.HOLE: nbdkit.EXTENT_ZERO | nbdkit.EXTENT_HOLE,
}


class _Served:
    """What this process serves: one, so it belongs to the module, as nbdkit's callbacks do."""

    source: Path | None = None
    image: Image | None = None


def thread_model() -> Any:
    """Reads of one client and of several run at the same time."""
    return nbdkit.THREAD_MODEL_PARALLEL


def config(key: str, value: str) -> None:
    """`source=FILE`."""
    if key != "source":
        raise ValueError(f"unknown parameter {key}")
    _Served.source = Path(value)


def config_complete() -> None:
    """`source` is needed."""
    if _Served.source is None:
        raise ValueError("source=FILE is missing")


def after_fork() -> None:
    """Open the image: not before the fork, which neither threads nor connections would survive."""
    assert _Served.source is not None  # noqa: S101 - config_complete has seen to it
    try:
        record = json.loads(_Served.source.read_text())
        _Served.image = open_image(source_from_dict(record))
    except OffloadError as error:
        _give_up(error)


def cleanup() -> None:
    """The last client has gone and the server ends."""
    if _Served.image is not None:
        _Served.image.close()


def open(readonly: bool) -> Image:  # noqa: A001, ARG001 - nbdkit's names
    """The handle of a client: the image itself."""
    assert _Served.image is not None  # noqa: S101 - after_fork opened it or ended the process
    return _Served.image


def get_size(image: Image) -> int:
    """Bytes."""
    return image.size_bytes


def block_size(image: Image) -> tuple[int, int, int]:
    """Minimum (the logical sector size of the volume), preferred and maximum, in bytes."""
    return image.block_size, _PREFERRED, _MAXIMUM


def can_write(image: Image) -> bool:  # noqa: ARG001
    """Never: a writable view has a filter in front."""
    return False


def can_multi_conn(image: Image) -> bool:  # noqa: ARG001
    """All clients read one immutable image."""
    return True


def can_extents(image: Image) -> bool:  # noqa: ARG001
    """Every image knows what it holds."""
    return True


def pread(image: Image, buffer: memoryview, offset: int, flags: int) -> None:  # noqa: ARG001
    """Fill nbdkit's own buffer."""
    _answered(lambda: image.readinto(offset, memoryview(buffer)))


def extents(image: Image, count: int, offset: int, flags: int) -> list[tuple[int, int, int]]:
    """`(offset, length, type)` from `offset` on; one is enough where the client wants one."""
    most = 1 if flags & nbdkit.FLAG_REQ_ONE else _EXTENTS_MAX
    found = _answered(lambda: list(islice(image.extents(offset, count), most)))
    return [(extent.offset, extent.length, _TYPES[extent.kind]) for extent in found]


def _answered(call: Callable[[], _Answer]) -> _Answer:
    try:
        return call()
    except OffloadError as error:
        nbdkit.set_error(errno.EACCES if isinstance(error, PrivilegeError) else errno.EIO)
        raise


def _give_up(error: OffloadError) -> None:
    """Tell the target why, in one line that it can raise again, and end without a traceback."""
    families = (kind.__name__ for kind in type(error).__mro__ if kind.__module__ == errors.__name__)
    words = {
        "family": next(families),
        "code": error.code,
        "message": error.message,
        "hint": error.hint,
    }
    print("offload-error " + json.dumps(words), file=sys.stderr, flush=True)  # noqa: T201
    os._exit(1)
