"""A small disk that a domain boots from: its guest does nothing but run its guest agent.

Kernel and initramfs are given to QEMU; init, agent and libraries are read from the disk.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from offload import run
from offload.testing import guest_agent
from offload.testing.lab import initramfs
from offload.testing.lab.diskguest import build_initramfs

SIZE_BYTES = 24 << 20
COMMAND_LINE = "console=ttyS0 quiet panic=-1 mitigations=off no_timer_check nowatchdog"

# Process 1. Without udev, the agent's port is found by its name.
_INIT = f"""
export PATH=/bin:/sbin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -o remount,rw /
until file=$(grep -lx {guest_agent.PORT} /sys/class/virtio-ports/*/name); do sleep 0.1; done
qemu-ga -m virtio-serial -p "/dev/$(basename "$(dirname "$file")")" -t /run
poweroff -f
"""
_FOLDERS = ("bin", "sbin", "etc", "dev", "proc", "sys", "run", "lib64")


@dataclass(frozen=True, slots=True, kw_only=True)
class Boot:
    """What QEMU is given beside the disk."""

    kernel: Path
    initramfs: Path


def make_disk(path: Path, work: Path, name: str) -> None:
    """A disk whose guest calls itself `name` in its /etc/os-release."""
    root = work / "root"
    for folder in _FOLDERS:
        (root / folder).mkdir(parents=True)
    _copy(Path(run.require_program("busybox", "busybox-static")), root / "bin/busybox")
    for applet in ("sh", "mount", "grep", "sleep", "basename", "dirname", "poweroff"):
        (root / "bin" / applet).symlink_to("busybox")
    agent = Path(run.require_program("qemu-ga", "qemu-guest-agent"))
    _copy(agent, root / "sbin/qemu-ga")
    for library in re.findall(r"(/\S+) \(0x", run.run(["ldd", str(agent)]).stdout):
        _copy(Path(library), root / library.removeprefix("/"))
    (root / "init").write_text(_INIT)
    (root / "etc/os-release").write_text(f'ID=test\nPRETTY_NAME="{name}"\n')
    with path.open("xb") as out:
        out.truncate(SIZE_BYTES)
    mke2fs = run.require_program("mke2fs", "e2fsprogs")
    run.run([mke2fs, "-q", "-t", "ext4", "-b", "4096", "-d", str(root), str(path)])


def make_boot(folder: Path) -> Boot:
    """The kernel of this machine, and an initramfs that goes on to the disk."""
    boot = Boot(kernel=initramfs.find_kernel(), initramfs=folder / "initramfs")
    build_initramfs(boot.initramfs, boot.kernel, "virtio_console")
    return boot


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(source.read_bytes())
    target.chmod(0o755)
