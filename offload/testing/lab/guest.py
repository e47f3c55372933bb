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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import offload
from offload.errors import UnavailableError
from offload.testing.lab import initramfs
from offload.testing.lab.channel import Channel, GuestError, RemoteCommand
from offload.testing.lab.disks import Disks
from offload.testing.lab.machine import NETWORK, NETWORK_CARD, Hardware, Machine
from offload.testing.lab.monitor import Monitor

_BOOT_S = 240.0  # emulated, on a machine that may be busy
_KILL_S = 20.0  # for the agent to end what is late
_PLUG_S = 60.0
_TAIL = 6000  # characters of a log in an error: a kernel's last words are long

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


class Guest:
    """A running guest. Its methods may be called from several threads at once."""

    host_address = "10.0.2.2"  # the host's loopback, seen from inside
    address = "10.0.2.15"  # where a server in the guest has to listen for forwarded ports

    def __init__(
        self,
        folder: Path,
        *,
        memory_mib: int = 1536,
        cpus: int = 1,
        visible: Sequence[Path] = (),
        systemd: bool = False,
        ports: Mapping[str, Path] | None = None,
    ) -> None:
        """Boot, and wait until commands can run. `folder` takes the logs.

        With `systemd` that is process 1, with udev, and no more of a host's services than units
        need (commands run beside it, in no unit's sandbox); it takes half a minute longer.
        The guest's /run and /tmp are its own; folders of the host in there that it is to see are
        `visible` (the package and the Python environment always are). `ports` are virtio-serial
        ports by name: sockets of the host on which QEMU listens, also after a reboot. GuestError
        if it does not come up, with the end of the console; UnavailableError naming the package
        that is missing.
        """
        kernel = initramfs.find_kernel()
        self.log = folder / "console.log"
        self._hardware = Hardware(
            kernel=kernel,
            initramfs=folder / "initramfs",
            memory_mib=memory_mib,
            cpus=cpus,
            ports=dict(ports or {}),
        )
        initramfs.build(
            self._hardware.initramfs,
            kernel,
            settings=agent_settings(systemd=systemd),
            visible=initramfs.hidden_folders([*always_visible(), *visible]),
        )
        self._disks = Disks(self._shell_with)
        self._plugging = threading.Lock()
        self._forwards: dict[int, int] = {}  # guest port → host port
        self._power_on()

    def _power_on(self) -> None:
        self._machine = Machine(self._hardware, self.log.parent)
        try:
            self._channel = Channel(self._machine.wire)
            self._wait_booted()
        except BaseException:
            self._machine.cut()
            raise

    def _wait_booted(self) -> None:
        try:
            self._monitor = Monitor(self._machine.monitor)
        except UnavailableError as error:
            raise GuestError(f"QEMU does not run: {error}{self.tails()}") from error
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
                how += f", nor die within {_KILL_S:g} s of SIGKILL (the guest may hang)"
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
        feed: bool = False,
    ) -> RemoteCommand:
        """Start a command and look at it later: it is the caller's to wait for, or to kill.

        With `feed` its standard input stays open, for its method `feed`.
        """
        return self._channel.start(argv, stdin=stdin, env=env, cwd=cwd, feed=feed)

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
        said = self._monitor.human(f"hostfwd_add {NETWORK} tcp:127.0.0.1:{host_port}-{to}")
        table = self._monitor.human("info usernet")
        # TCP[HOST_FORWARD]  12  127.0.0.1 40321  10.0.2.15  3260  0  0
        row = rf"HOST_FORWARD\]\s+\d+\s+127\.0\.0\.1\s+(\d+)\s+{re.escape(self.address)}\s+"
        found = re.search(row + rf"{guest_port}\s", table)
        if said or found is None:
            raise GuestError(f"QEMU forwards no port to {to}: {said or table}")
        return int(found[1])

    def attach(self, path: Path, *, read_only: bool = False, sector_size: int = 512) -> str:
        """Plug a raw image (or a block device) of the host in; the disk's device in the guest.

        OffloadError where QEMU or the guest does not take it.
        """
        with self._plugging:
            return self._disks.attach(
                self._monitor, path, read_only=read_only, sector_size=sector_size
            )

    def detach(self, device: str) -> None:
        """Pull a disk out, in use or not. GuestError where the guest does not let go of it."""
        with self._plugging:
            self._disks.detach(self._monitor, device)

    def _shell_with(self, script: str, argument: str) -> str:
        return self.run(["bash", "-euc", script, "bash", argument], timeout_s=_PLUG_S).text

    def ask_qemu(self, command: str, arguments: dict[str, Any]) -> Any:
        """A command of QEMU's own monitor (QMP); its result. A disk's node is called as its serial
        is: `lab1` the first. Raises what `Qmp` raises."""
        return self._monitor.ask(command, arguments)

    # -- cable and power -------------------------------------------------------------------------

    def network(self, up: bool) -> None:
        """Pull the cable out, or plug it in again; the guest has noticed when this returns."""
        self._monitor.ask("set_link", {"name": NETWORK_CARD, "up": up})
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
        self._disks.attach_again(self._monitor)

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


def agent_settings(*, systemd: bool = False) -> dict[str, str]:
    """Which process 1 it is, and what that needs to find the agent."""
    start = Path(__file__).with_name("start-systemd" if systemd else "start")
    return {"LAB_START": str(start), "LAB_PACKAGES": str(_PACKAGES)}


def always_visible() -> list[Path]:
    """The package and this Python's environment."""
    return [_PACKAGES, Path(sys.prefix), Path(sys.base_prefix)]


def _described(argv: Sequence[str], how: str, command: RemoteCommand) -> str:
    said = command.stderr.decode("utf-8", "replace").strip()[-_TAIL:] or "(nothing)"
    return f"in the guest, {list(argv)} {how}; it said on stderr: {said}"
