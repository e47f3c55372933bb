"""The QEMU process of a lab guest, from power-on to the end."""

from __future__ import annotations

import os
import socket as sockets
import subprocess
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from offload import run
from offload.errors import OffloadError, UnavailableError
from offload.testing.lab import frames

# All but what costs an emulator more than it gives: long `rep movsb` copies, wide vectors, a fifth
# level of page tables, checks of who touches whose page. A third less of this host's time.
_EMULATED_CPU = "max,-erms,-fsrm,-avx,-avx2,-la57,-smap,-smep"
NETWORK_CARD = "nic0"
NETWORK = "n0"


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """What the guest is made of. `ports`: virtio-serial ports by name, each a socket of the host
    on which QEMU listens."""

    kernel: Path
    initramfs: Path
    memory_mib: int = 1536
    cpus: int = 1  # emulated ones wait for each other: two need twice the time of this host
    ports: Mapping[str, Path] = field(default_factory=dict)


def qemu_argv(hardware: Hardware) -> list[str]:
    """QEMU without consoles and monitors; those are the caller's.

    It dies with the thread that starts it: prctl(2), PR_SET_PDEATHSIG.
    Software emulation, for /dev/kvm may be there and not start a kernel; with the environment
    variable OFFLOAD_LAB_ACCEL=kvm, KVM.
    """
    setpriv = run.require_program("setpriv", "util-linux")
    qemu = run.require_program("qemu-system-x86_64", "qemu-system-x86")
    kvm = os.environ.get("OFFLOAD_LAB_ACCEL") == "kvm"
    # No protection against attacks from inside: each costs emulated time. And no doubts about
    # time: a busy host gives the guest none for a while, and then the kernel takes the timer for
    # broken (and panics, unless told not to check) or itself for hung.
    command_line = (
        "console=ttyS0 quiet panic=-1 mitigations=off"
        " no_timer_check nowatchdog rcupdate.rcu_cpu_stall_suppress=1"
    )
    return [
        setpriv, "--pdeathsig", "KILL", qemu,
        "-nodefaults", "-display", "none", "-no-reboot",
        "-machine", "pc", "-accel", "kvm" if kvm else "tcg,thread=multi",
        "-cpu", "max" if kvm else _EMULATED_CPU,
        "-m", str(hardware.memory_mib), "-smp", str(hardware.cpus),
        "-kernel", str(hardware.kernel), "-initrd", str(hardware.initramfs),
        "-append", command_line,
        "-virtfs",
        "local,path=/,mount_tag=root,security_model=none,readonly=on,multidevs=remap",
        "-netdev", f"user,id={NETWORK},ipv6=off",
        "-device", f"virtio-net-pci,id={NETWORK_CARD},netdev={NETWORK},romfile=",
    ]  # fmt: skip


class Machine:
    """A running QEMU. It dies with this process, however that ends."""

    def __init__(self, hardware: Hardware, folder: Path) -> None:
        """Power on. Console and QEMU's own words go to `console.log` and `qemu.log`, appended."""
        self.console = folder / "console.log"
        self.said = folder / "qemu.log"
        self.monitor, monitor = sockets.socketpair()
        self.wire, wire = sockets.socketpair()
        argv = [
            *qemu_argv(hardware),
            "-chardev", f"socket,id=monitor,fd={monitor.fileno()}",
            "-mon", "chardev=monitor,mode=control",
            "-chardev", f"socket,id=wire,fd={wire.fileno()}",
            "-device", "virtio-serial-pci",
            "-device", f"virtserialport,chardev=wire,name={frames.PORT}",
            *_ports(hardware.ports),
            "-chardev", f"file,id=console,path={_escaped(self.console)},append=on",
            "-serial", "chardev:console",
        ]  # fmt: skip
        try:
            with monitor, wire:
                self._process = self._start(argv, (monitor.fileno(), wire.fileno()))
        except BaseException:
            self.monitor.close()
            self.wire.close()
            raise

    def _start(self, argv: Sequence[str], fds: Sequence[int]) -> subprocess.Popen[bytes]:
        """Start QEMU from a thread that lives as long as it does, for it dies with that."""
        outcome: list[subprocess.Popen[bytes] | OffloadError] = []
        started = threading.Event()

        def keep() -> None:
            try:
                with self.said.open("ab") as out:
                    process = run.spawn(
                        argv,
                        stdout=out.fileno(),
                        stderr=out.fileno(),
                        pass_fds=fds,
                        new_session=True,  # Ctrl-C is for the test run, which then ends the guest
                    )
                outcome.append(process)
            except OffloadError as error:
                outcome.append(error)
                return
            finally:
                started.set()
            process.wait()

        threading.Thread(target=keep, name="lab guest", daemon=True).start()
        started.wait()
        if not outcome:
            raise UnavailableError(f"QEMU was not started: {self.said} cannot be written")
        if isinstance(outcome[0], OffloadError):
            raise outcome[0]
        return outcome[0]

    @property
    def pid(self) -> int:
        """Of QEMU."""
        return self._process.pid

    def alive(self) -> bool:
        """Whether QEMU runs (or is stopped by a signal)."""
        return self._process.poll() is None

    def cut(self) -> None:
        """Cut the power. Idempotent; a stopped QEMU ends too."""
        self._process.kill()
        self._process.wait()
        self.monitor.close()
        self.wire.close()


def _ports(ports: Mapping[str, Path]) -> list[str]:
    argv = []
    for number, (name, socket) in enumerate(ports.items()):
        listen = f"socket,id=port{number},path={_escaped(socket)},server=on,wait=off"
        argv += ["-chardev", listen, "-device", f"virtserialport,chardev=port{number},name={name}"]
    return argv


def _escaped(path: Path) -> str:
    return str(path).replace(",", ",,")  # QEMU's option syntax
