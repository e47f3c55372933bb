"""The lab guest: commands in it, ports, disks, its network cable, its power.

It boots this host's own root file system (read-only over 9p, under a layer in memory), so it has
every program and the checkout at the same paths. What it needs from the host is QEMU, a stock
kernel and busybox; not root.
"""

from __future__ import annotations

import contextlib
import re
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import offload
from offload.errors import OffloadError
from offload.qmp import Qmp
from offload.testing.lab import initramfs
from offload.testing.lab.channel import Channel, GuestError, RemoteCommand
from offload.testing.lab.machine import NETWORK, NETWORK_CARD, Hardware, Machine

_BOOT_S = 240.0  # emulated, on a machine that may be busy
_MONITOR_S = 60.0
_KILL_S = 20.0  # for the agent to end what is late
_PLUG_S = 60.0
_TAIL = 3000  # characters of a log in an error

_PACKAGES = Path(offload.__file__).parents[1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Completed:
    """A command that has ended in the guest; a status below 0 is a signal's number."""

    argv: tuple[str, ...]
    status: int
    stdout: bytes
    stderr: bytes

    @property
    def text(self) -> str:
        """What it said on its standard output."""
        return self.stdout.decode("utf-8", "replace")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Disk:
    """A file or device of the host that the guest has as a disk."""

    serial: str
    path: Path
    read_only: bool
    sector_size: int


class Guest:
    """A running guest. Its methods may be called from several threads at once."""

    host_address = "10.0.2.2"  # the host's loopback, seen from inside
    address = "10.0.2.15"  # where a server in the guest has to listen for forwarded ports

    def __init__(
        self,
        folder: Path,
        *,
        memory_mib: int = 1536,
        cpus: int = 2,
        visible: Sequence[Path] = (),
    ) -> None:
        """Boot, and wait until commands can run. `folder` takes the logs.

        The guest's /run and /tmp are its own; folders of the host in there that it is to see are
        `visible` (the package and the Python environment always are). GuestError if it does not
        come up, with the end of the console; UnavailableError naming the package that is missing.
        """
        kernel = initramfs.find_kernel()
        self.log = folder / "console.log"
        self._hardware = Hardware(
            kernel=kernel,
            initramfs=folder / "initramfs",
            memory_mib=memory_mib,
            cpus=cpus,
        )
        initramfs.build(
            self._hardware.initramfs,
            kernel,
            settings=agent_settings(),
            visible=initramfs.hidden_folders([*always_visible(), *visible]),
        )
        self._disks: dict[str, _Disk] = {}  # by device
        self._disk_count = 0
        self._forwards: dict[int, int] = {}  # guest port → host port
        self._monitor_lock = threading.Lock()
        self._power_on()

    def _power_on(self) -> None:
        self._machine = Machine(self._hardware, self.log.parent)
        try:
            self._channel = Channel(self._machine.wire)
            wire = self._machine.monitor
            self._qmp = Qmp(Path("the lab guest's monitor"), _MONITOR_S, wire=wire)
            self._wait_booted()
        except BaseException:
            self._machine.cut()
            raise

    def _wait_booted(self) -> None:
        if not self._channel.wait_ready(_BOOT_S):
            how = f"said nothing for {_BOOT_S:.0f} s" if self.alive() else "ended"
            raise GuestError(f"the lab guest did not boot: it {how}{self.tails()}")

    # -- commands --------------------------------------------------------------------------------

    def run(
        self,
        argv: Sequence[str],
        *,
        timeout_s: float = 60,
        check: bool = True,
        stdin: bytes | None = None,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
    ) -> Completed:
        """Run a command to its end; `env` is added to a plain environment.

        GuestError when it cannot start, fails (if `check`), or is late: then it is killed, with
        all processes of its session. A daemon that it leaves behind stays.
        """
        command = self.start(argv, stdin=stdin, env=env, cwd=cwd)
        self._wait_ended(command, timeout_s)
        if command.status is None:
            raise GuestError(_described(argv, command.failure, command) + self._console_if_dead())
        if check and command.status != 0:
            raise GuestError(_described(argv, f"ended with status {command.status}", command))
        return Completed(
            argv=tuple(argv),
            status=command.status,
            stdout=bytes(command.stdout),
            stderr=bytes(command.stderr),
        )

    def _wait_ended(self, command: RemoteCommand, timeout_s: float) -> None:
        """Kill what is late, also where the waiting itself is broken off (Ctrl-C)."""
        ended = False
        try:
            ended = command.wait(timeout_s)
        finally:
            if not ended:
                with contextlib.suppress(GuestError):
                    command.kill()
        if not ended:
            how = f"did not end within {timeout_s:g} s"
            if not command.wait(_KILL_S):
                how += ", and the guest does not answer" + self.tails()
            raise GuestError(_described(command.argv, how, command))

    def shell(
        self,
        script: str,
        *,
        timeout_s: float = 60,
        check: bool = True,
        stdin: bytes | None = None,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
    ) -> Completed:
        """Run a bash script that ends at its first failure. As `run` otherwise."""
        argv = ["bash", "-euc", script]
        return self.run(argv, timeout_s=timeout_s, check=check, stdin=stdin, env=env, cwd=cwd)

    def start(
        self,
        argv: Sequence[str],
        *,
        stdin: bytes | None = None,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
    ) -> RemoteCommand:
        """Start a command and look at it later: it is the caller's to wait for, or to kill."""
        return self._channel.start(argv, stdin=stdin, env=env, cwd=cwd)

    def modprobe(self, *modules: str) -> None:
        """Load kernel modules, with what they need. GuestError naming one that is not there."""
        self.run(["modprobe", "--all", *modules])

    # -- ports and disks -------------------------------------------------------------------------

    def forward(self, guest_port: int) -> int:
        """A port of the host's loopback that leads to this TCP port of the guest.

        The same one each time. The server in the guest has to listen on `address` (or on all).
        """
        if guest_port not in self._forwards:
            self._forwards[guest_port] = self._forward(guest_port, 0)
        return self._forwards[guest_port]

    def _forward(self, guest_port: int, host_port: int) -> int:
        to = f"{self.address}:{guest_port}"
        self._human(f"hostfwd_add {NETWORK} tcp:127.0.0.1:{host_port}-{to}")
        table = self._ask("human-monitor-command", {"command-line": "info usernet"})
        # TCP[HOST_FORWARD]  12  127.0.0.1 40321  10.0.2.15  3260  0  0
        row = rf"HOST_FORWARD\]\s+\d+\s+127\.0\.0\.1\s+(\d+)\s+{re.escape(self.address)}\s+"
        found = re.search(row + rf"{guest_port}\s", table)
        if found is None:
            raise GuestError(f"QEMU forwards no port to {to}: {table}")
        return int(found[1])

    def attach(self, path: Path, *, read_only: bool = False, sector_size: int = 512) -> str:
        """Plug a raw image (or a block device) of the host in; the disk's device in the guest."""
        self._disk_count += 1
        disk = _Disk(
            serial=f"lab{self._disk_count}",
            path=path,
            read_only=read_only,
            sector_size=sector_size,
        )
        device = self._plug(disk)
        self._disks[device] = disk
        return device

    def detach(self, device: str) -> None:
        """Pull a disk out, in use or not. GuestError where the guest does not let go of it."""
        disk = self._disks[device]
        self._unplug(disk.serial)
        del self._disks[device]
        self.shell(f"while [[ -e {device} ]]; do sleep 0.02; done", timeout_s=_PLUG_S)

    def _plug(self, disk: _Disk) -> str:
        driver = "host_device" if disk.path.is_block_device() else "file"
        file = {"driver": driver, "filename": str(disk.path), "discard": "unmap"}
        node = {"driver": "raw", "discard": "unmap", "file": file}
        self._ask("blockdev-add", {**node, "node-name": disk.serial, "read-only": disk.read_only})
        sectors = {
            "logical_block_size": disk.sector_size,
            "physical_block_size": disk.sector_size,
        }
        try:
            return self._plug_node(disk.serial, sectors)
        except BaseException:
            with contextlib.suppress(OffloadError):
                self._ask("blockdev-del", {"node-name": disk.serial})
            raise

    def _plug_node(self, serial: str, properties: Mapping[str, int]) -> str:
        names = {"id": f"disk-{serial}", "drive": serial, "serial": serial}
        self._ask("device_add", {"driver": "virtio-blk-pci", **names, **properties})
        script = (
            "until found=$(grep -lx -- "
            f"{serial} /sys/block/vd*/serial 2>/dev/null) && name=${{found#/sys/block/}} "
            "&& name=${name%/serial} && [[ -b /dev/$name ]]; do sleep 0.02; done; echo /dev/$name"
        )
        return self.shell(script, timeout_s=_PLUG_S).text.strip()

    def _unplug(self, serial: str) -> None:
        with self._monitor_lock:
            self._qmp.execute("device_del", {"id": f"disk-{serial}"})
            until = time.monotonic() + _PLUG_S
            while event := self._qmp.wait_event("DEVICE_DELETED", until - time.monotonic()):
                if event["data"].get("device") == f"disk-{serial}":
                    break
            else:
                raise GuestError(f"the guest did not let go of the disk {serial}")
            self._qmp.execute("blockdev-del", {"node-name": serial})

    # -- cable and power -------------------------------------------------------------------------

    def network(self, up: bool) -> None:
        """Pull the cable out, or plug it in again; the guest has noticed when this returns."""
        self._ask("set_link", {"name": NETWORK_CARD, "up": up})
        wanted = int(up)
        self.shell(f"until [[ $(< /sys/class/net/eth0/carrier) == {wanted} ]]; do sleep 0.02; done")

    def reboot(self) -> None:
        """Cut the power and boot again: disks, their device names and forwarded ports stay.

        All else is gone: the guest's own root file system is in its memory. A guest that is dead
        already (its kernel panicked, say) lives again.
        """
        self._machine.cut()
        self._power_on()
        for guest_port, host_port in self._forwards.items():
            self._forward(guest_port, host_port)
        self._replug()

    def _replug(self) -> None:
        """The disks, each as the device that it was: names are given in order, so gaps are held."""
        held: list[str] = []
        for device in sorted(self._disks, key=lambda name: (len(name), name)):
            while True:
                serial = f"gap{len(held)}"
                if (found := self._plug(self._disks[device])) == device:
                    break
                self._unplug(self._disks[device].serial)
                self._ask("blockdev-add", {"driver": "null-co", "node-name": serial, "size": 512})
                if self._plug_node(serial, {}) != found:
                    raise GuestError(f"the disk {device} did not come back under its name")
                held.append(serial)
        for serial in held:
            self._unplug(serial)

    @property
    def pid(self) -> int:
        """Of its QEMU."""
        return self._machine.pid

    def alive(self) -> bool:
        """Whether the machine is on and its agent has not gone."""
        return self._machine.alive() and not self._channel.hung_up

    def close(self) -> None:
        """End the guest, whatever state it is in. Idempotent; the logs stay."""
        self._machine.cut()
        self._hardware.initramfs.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # -- what it said ----------------------------------------------------------------------------

    def tails(self) -> str:
        """The ends of the console's and of QEMU's own log, for an error."""
        found = ""
        for path in (self._machine.said, self.log):
            text = path.read_text(errors="replace")[-_TAIL:].strip() if path.exists() else ""
            if text:
                found += f"\n--- {path} ends with ---\n{text}"
        return found

    def _console_if_dead(self) -> str:
        return "" if self.alive() else self.tails()

    def _human(self, line: str) -> None:
        said = self._ask("human-monitor-command", {"command-line": line})
        if said.strip():
            raise GuestError(f"QEMU refused `{line}`: {said.strip()}")

    def _ask(self, command: str, arguments: dict[str, Any]) -> Any:
        with self._monitor_lock:
            return self._qmp.execute(command, arguments)


def agent_settings() -> dict[str, str]:
    """What `start` needs to find the agent."""
    here = Path(__file__).parent
    return {"LAB_START": str(here / "start"), "LAB_PACKAGES": str(_PACKAGES)}


def always_visible() -> list[Path]:
    """The package and this Python's environment."""
    return [_PACKAGES, Path(sys.prefix), Path(sys.base_prefix)]


def _described(argv: Sequence[str], how: str, command: RemoteCommand) -> str:
    said = command.stderr.decode("utf-8", "replace").strip()[-_TAIL:] or "(nothing)"
    return f"in the guest, {list(argv)} {how}; it said on stderr: {said}"
