"""A real QEMU without a guest: its disks are written through its own monitor."""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from offload import run
from offload.errors import UnavailableError
from offload.procs import ProcessRef, ref_of
from offload.qmp import Qmp, QmpGoneError

_START_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningQemu:
    """`write` goes through QEMU, as a guest's writes do."""

    socket: Path
    process: ProcessRef

    def write(self, disk: int, offset: int, length: int, byte: int) -> None:
        """Fill `length` bytes of the disk with this number. UnavailableError if QEMU refuses."""
        order = f'qemu-io -d /machine/peripheral/dev{disk}/virtio-backend "write -P {byte} '
        with Qmp(self.socket) as qmp:
            said = qmp.execute(
                "human-monitor-command", {"command-line": f'{order}{offset} {length}"'}
            )
        if said:  # what it did goes to QEMU's own output, what it could not do comes back
            raise UnavailableError(f"QEMU did not write: {said}")

    def status(self) -> str:
        """`running`, `paused` …"""
        with Qmp(self.socket) as qmp:
            return str(qmp.execute("query-status")["status"])


@contextmanager
def running_qemu(socket: Path, disks: Sequence[Path]) -> Iterator[RunningQemu]:
    """A QEMU under software emulation with these qcow2 disks, ended with the block."""
    argv = [run.require_program("qemu-system-x86_64", "qemu-system-x86"), "-accel", "tcg"]
    argv += ["-machine", "pc", "-nodefaults", "-display", "none", "-m", "16"]
    argv += ["-qmp", f"unix:{socket},server=on,wait=off"]
    for number, disk in enumerate(disks):
        node = f"driver=qcow2,node-name=disk{number},file.driver=file,file.filename={disk}"
        argv += ["-blockdev", node]
        argv += ["-device", f"virtio-blk-pci,drive=disk{number},id=dev{number}"]
    process = run.spawn(argv, stdout=subprocess.DEVNULL, stderr=None)
    try:
        _wait_ready(socket)
        ref = ref_of(process.pid)
        if ref is None:
            raise UnavailableError("QEMU ended at once")
        yield RunningQemu(socket=socket, process=ref)
    finally:
        run.terminate(process)


def _wait_ready(socket: Path) -> None:
    until = time.monotonic() + _START_S
    while time.monotonic() < until:
        with contextlib.suppress(QmpGoneError), Qmp(socket):
            return
        time.sleep(0.01)
    raise UnavailableError(f"QEMU does not answer on {socket}")
