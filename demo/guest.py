"""Reading files out of TimeViews with libguestfs: guest file systems are parsed in a VM only."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from demo.screen import Screen
from offload.run import ProgramError, find_program, run

_KVM_PROBE_S = 4.0
_GUEST_S = 480.0
_BOOTED = "Unable to mount root fs"  # panic() in the kernel's init/do_mounts.c: KVM ran it all


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestRun:
    """What one run of guestfish took."""

    seconds: float
    accelerated: bool


class Guest:
    """guestfish on this machine. Whether KVM works is found out while other things happen."""

    def __init__(self) -> None:
        self.missing = _why_missing()
        self._pool = ThreadPoolExecutor(1)
        self._kvm: Future[bool] = self._pool.submit(kvm_works)
        self._pool.shutdown(wait=False)

    def run(
        self, screen: Screen, home: Path, uris: Sequence[str], commands: Sequence[str]
    ) -> GuestRun:
        """Attach views read-only, as /dev/sda and on, and run commands."""
        argv = [str(find_program("guestfish")), "--ro", "--format=raw"]
        for uri in uris:
            argv += ["-a", guest_uri(uri)]
        accelerated = self._kvm.result()
        screen.echo("guestfish --ro --format=raw " + " ".join(f"-a '{guest_uri(u)}'" for u in uris))
        for line in commands:
            screen.say(f"><fs> {line}")
        env = guest_env(screen.env, accelerated=accelerated)
        env["HOME"] = str(home)  # where guestfish keeps its history
        script = "\n".join(commands).encode() + b"\n"
        done = run(argv, stdin=script, env=env, timeout_s=_GUEST_S)
        return GuestRun(seconds=done.seconds, accelerated=accelerated)


def guest_uri(uri: str) -> str:
    """A view's address as guestfish takes it: `nbd+unix` is spelt `nbd` there."""
    return uri.replace("nbd+unix:", "nbd:", 1)


def guest_env(base: Mapping[str, str], *, accelerated: bool) -> dict[str, str]:
    """QEMU started directly, and told not to try KVM where it does not work."""
    env = {**base, "LIBGUESTFS_BACKEND": "direct"}
    if not accelerated:
        env["LIBGUESTFS_BACKEND_SETTINGS"] = "force_tcg"
    return env


def kvm_works() -> bool:
    """Whether KVM boots this machine's kernel up to its search for a root file system.

    /dev/kvm alone says little: inside some virtual machines it is there and fails.
    """
    qemu = find_program("qemu-system-x86_64")
    kernels = _kernels()
    if qemu is None or not kernels or not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return False
    argv = [
        qemu, "-machine", "q35,accel=kvm", "-cpu", "host", "-m", "256", "-nodefaults", "-display",
        "none", "-serial", "stdio", "-no-reboot", "-kernel", str(kernels[-1]), "-append",
        "console=ttyS0 panic=-1",
    ]  # fmt: skip
    with contextlib.suppress(ProgramError):
        return _BOOTED in run(argv, timeout_s=_KVM_PROBE_S, check=False).stdout
    return False


def _kernels() -> list[Path]:
    return [p for p in sorted(Path("/boot").glob("vmlinuz-*")) if os.access(p, os.R_OK)]


def _why_missing() -> str:
    if find_program("guestfish") is None:
        return "guestfish is not installed"
    if not _kernels():
        return "no kernel in /boot may be read by this user, which libguestfs boots"
    return ""
