"""Who is a process: pid, start time and boot, so that a reused pid is never taken for ours."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path


@cache
def boot_id() -> str:
    """The kernel's id of this boot."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


@cache
def machine_id() -> str:
    """The id of this installation of the operating system, or the host name where it has none."""
    with contextlib.suppress(OSError):
        text = Path("/etc/machine-id").read_text().strip()
        if text:
            return text
    return os.uname().nodename


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessRef:
    """A process that can be told from a later one with the same pid."""

    pid: int
    start: str  # field 22 of /proc/PID/stat: clock ticks after boot
    boot: str

    def to_strings(self) -> dict[str, str]:
        """For the journal and the catalog."""
        return {"pid": str(self.pid), "start": self.start, "boot": self.boot}

    @classmethod
    def from_strings(cls, fields: dict[str, str]) -> ProcessRef | None:
        """The inverse of `to_strings`; None where the fields name no process."""
        if not fields.get("pid"):
            return None
        return cls(pid=int(fields["pid"]), start=fields["start"], boot=fields["boot"])

    def alive(self) -> bool:
        """Whether this very process still runs (a zombie does not)."""
        return self.boot == boot_id() and start_time(self.pid) == self.start

    def end(self, grace_s: float = 5.0) -> None:
        """SIGTERM, wait, SIGKILL, wait. Idempotent; does nothing to another process."""
        for number, patience in ((signal.SIGTERM, grace_s), (signal.SIGKILL, 5.0)):
            if not self.alive():
                return
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)
            self._wait_gone(patience)

    def _wait_gone(self, patience: float) -> None:
        until = time.monotonic() + patience
        delay = 0.001
        while self.alive() and time.monotonic() < until:
            with contextlib.suppress(ChildProcessError):  # reap it, if it is our own child
                os.waitpid(self.pid, os.WNOHANG)
            time.sleep(delay)
            delay = min(delay * 2, 0.05)


def start_time(pid: int) -> str | None:
    """Start time of a live process in clock ticks after boot, or None (gone, or a zombie).

    One whose first thread has ended lives as long as another one: what it had open is still open.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = stat.rpartition(")")[2].split()  # the name may hold spaces and brackets
    threads = int(fields[17])  # proc(5): field 20, num_threads; the state is field 3
    return None if fields[0] in "ZX" and threads <= 1 else fields[19]


def ref_of(pid: int) -> ProcessRef | None:
    """The reference of a live process."""
    start = start_time(pid)
    return None if start is None else ProcessRef(pid=pid, start=start, boot=boot_id())


def has_capability(number: int) -> bool:
    """Whether this process has a capability; numbers: linux/capability.h."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapEff:"):
            return bool(int(line.split()[1], 16) >> number & 1)
    return False


def find_running(program: str, argument: str) -> list[ProcessRef]:
    """Live processes of a program (by the end of its path) that were given exactly this argument.

    Looks at command lines: a start that was cut off by `kill -9` before a pid file was written is
    found too, and a program that merely mentions the argument in another one is not.
    """
    wanted = os.fsencode(argument)
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        with contextlib.suppress(OSError):
            argv = (entry / "cmdline").read_bytes().split(b"\0")
            if argv[0].endswith(os.fsencode(program)) and wanted in argv:
                ref = ref_of(int(entry.name))
                if ref is not None:
                    found.append(ref)
    return found
