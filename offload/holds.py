"""Holds on TimeMarks: whoever reads one keeps it from being deleted. And claims on views.

A hold is a shared flock on a file in the state folder; it goes with the process that has it, so a
crash leaves none behind. Deleting takes the same lock exclusively. What lasts longer than a
process (a mounted view) is a row of the catalog instead.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from offload.errors import BusyError
from offload.instance import Instance


@contextmanager
def hold_timemark(instance: Instance, timemark: str) -> Iterator[None]:
    """Keep a TimeMark while the block runs. BusyError (`timemark-going`) if it is being deleted."""
    with _locked(instance, timemark, fcntl.LOCK_SH | fcntl.LOCK_NB) as got:
        if not got:
            raise BusyError(f"timemark {timemark} is being deleted", code="timemark-going")
        yield


@contextmanager
def claim_timemark(instance: Instance, timemark: str) -> Iterator[None]:
    """Have a TimeMark alone, to delete it. BusyError (`timemark-in-use`) while it is held."""
    with _locked(instance, timemark, fcntl.LOCK_EX | fcntl.LOCK_NB) as got:
        if not got:
            raise BusyError(
                f"timemark {timemark} is being read by a running backup, mount or restore",
                code="timemark-in-use",
                hint="wait until it has ended; see: offload status",
            )
        yield


@contextmanager
def claim_view(instance: Instance, view: str, *, wait: bool) -> Iterator[bool]:
    """Have a view alone, to take it away or to serve it again. Without `wait`, False at once where
    another process has it."""
    flags = fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB
    with _locked(instance, f"view-{view}", flags) as got:
        yield got


@contextmanager
def claim_island(instance: Instance, island: str) -> Iterator[None]:
    """Have an island alone, to take it down. BusyError (`island-busy`) while others have it."""
    with _locked(instance, f"island-{island}", fcntl.LOCK_EX | fcntl.LOCK_NB) as got:
        if not got:
            raise BusyError(
                f"another process takes the island {island} down, or builds it anew",
                code="island-busy",
                hint="wait until it has ended; see: offload placeholder list",
            )
        yield


@contextmanager
def naming_islands(instance: Instance) -> Iterator[None]:
    """While a free name is chosen and taken: waits for others who do so."""
    with _locked(instance, "island-names", fcntl.LOCK_EX):
        yield


def _folder(instance: Instance) -> Path:
    return instance.state_dir / "holds"


def _lock_file(path: Path, how: int) -> int | None:
    """A locked descriptor of the file that has this name now, or None while others hold it."""
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, how)
            if os.fstat(fd).st_nlink:
                return fd
        except BlockingIOError:
            os.close(fd)
            return None
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)  # a claim removed it between open and lock: nobody else would see this lock


@contextmanager
def _locked(instance: Instance, name: str, how: int) -> Iterator[bool]:
    folder = _folder(instance)
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    path = folder / name
    fd = _lock_file(path, how)
    if fd is None:
        yield False
        return
    try:
        yield True
        if how & fcntl.LOCK_EX:
            with contextlib.suppress(FileNotFoundError):
                path.unlink()
    finally:
        os.close(fd)
