"""A libvirt daemon of a test's own, and the lab guest as one of its domains.

The daemon runs as root in a mount and a process namespace: folders that libvirt has built in are
its own there, and when it ends all its QEMUs end with it, however that happens. libvirt, QEMU, the
guest's kernel, file systems and qemu-ga are real. Clients reach the daemon by its socket.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket as sockets
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import libvirt
import libvirt_qemu

from offload import run
from offload.errors import UnavailableError
from offload.libvirtd import Libvirt
from offload.testing import guest_agent, pools
from offload.testing.daemon import Daemon, running
from offload.testing.lab import frames, initramfs
from offload.testing.lab.channel import Channel, GuestError, RemoteCommand
from offload.testing.lab.guest import agent_settings, always_visible
from offload.testing.lab.machine import Hardware, qemu_argv

_BOOT_S = 300.0  # emulated, on a machine that may be busy
_LOOK_S = 0.05
_DISK_BYTES = 32 << 20
_CONF = {
    "qemu.conf": 'security_driver = "none"\nuser = "root"\ngroup = "root"\n'
    'cgroup_controllers = [ ]\nnamespaces = [ ]\nstdio_handler = "file"\n'
    "remember_owner = 0\ndynamic_ownership = 0\n",
    "libvirtd.conf": 'auth_unix_rw = "none"\nauth_unix_ro = "none"\nlog_outputs = "3:stderr"\n',
}
_TCP = (
    'listen_tls = 0\nlisten_tcp = 1\nlisten_addr = "127.0.0.1"\ntcp_port = "{port}"\n'
    'auth_tcp = "none"\n'
)
# libvirt looks its user up before it reads which one it is to be
_USER = {"passwd": "libvirt-qemu:x:64055:64055::/:/bin/false\n", "group": "libvirt-qemu:x:64055:\n"}
# $1: the folder; $2: options; $3: its drivers; the others: mounts of the tests. Process 1 reaps
# QEMUs, which are daemons; a libvirtd that has ended starts again. The namespace begins with a copy
# of all mounts: those of other tests could not be unmounted as long as it lives.
_START = """
findmnt -rno SOURCE,TARGET | while read -r source target; do
    [[ $source == /dev/loop* && " ${*:4} " != *" $target "* ]] || continue
    umount --lazy "$target" || :
done
[ -z "$3" ] || export LIBVIRT_DRIVER_DIR="$3"
mount -t tmpfs run /run
for folder in /var/lib /var/log /var/cache; do mount -t tmpfs libvirt $folder; done
mount --bind "$1/etc" /etc/libvirt
for file in passwd group; do mount --bind "$1/$file" /etc/$file; done
while :; do
    libvirtd --config "$1/etc/libvirtd.conf" --pid-file /run/libvirtd.pid $2 &
    wait $! || :
done
"""
_DOMAIN = """
<domain type='{kind}'>
  <name>{name}</name>
  <uuid>{uuid}</uuid>
  <memory unit='MiB'>{memory_mib}</memory>
  <vcpu>2</vcpu>
  <os>
    <type arch='x86_64' machine='pc'>hvm</type>
    <kernel>{kernel}</kernel><initrd>{initrd}</initrd><cmdline>{cmdline}</cmdline>
  </os>
  <features><acpi/></features>
  <cpu mode='maximum'/>
  <on_poweroff>destroy</on_poweroff><on_reboot>destroy</on_reboot><on_crash>destroy</on_crash>
  <devices>
    <filesystem type='mount' accessmode='squash' multidevs='remap'>
      <source dir='/'/><target dir='root'/><readonly/>
    </filesystem>
    {disks}
    <interface type='user'>
      <mac address='{mac}'/><model type='virtio'/><rom enabled='no'/>
    </interface>
    <channel type='unix'>
      <source mode='bind' path='{wire}'/><target type='virtio' name='{port}'/>
    </channel>
    {agent}
    <serial type='file'><source path='{console}'/></serial>
    <memballoon model='none'/>
  </devices>
</domain>
"""
_DISK = """
<disk type='file' device='disk'>
  <driver name='qemu' type='raw' cache='none'/><source file='{path}'/>
  <target dev='{device}' bus='virtio'/>
</disk>
"""
_AGENT = f"""
<channel type='unix'>
  <source mode='bind'/><target type='virtio' name='{guest_agent.PORT}'/>
</channel>
"""
# prints a word where the file system is frozen
_LOOK = "if fsfreeze -f {mount} 2>/dev/null; then fsfreeze -u {mount}; else echo frozen; fi"
# without udev: find the port of the agent
_RUN_AGENT = f"""
file=$(grep -lx {guest_agent.PORT} /sys/class/virtio-ports/*/name)
mkdir -p /run/qemu-ga
exec qemu-ga -m virtio-serial -p "/dev/$(basename "$(dirname "$file")")" -t /run/qemu-ga "$@"
"""


class LibvirtHost:
    """A running daemon. `folder` is short, root's, and its own. With `tcp_port` it is reached at
    `tcp_uri`, too, as one of another machine is. `drivers`: the only ones that it has."""

    def __init__(
        self, folder: Path, *, tcp_port: int | None = None, drivers: Sequence[str] = ()
    ) -> None:
        self.folder = folder
        self.uri = f"qemu:///system?socket={folder}/libvirt-sock"
        self.tcp_uri = f"qemu+tcp://127.0.0.1:{tcp_port}/system"
        self._options = "--listen" if tcp_port is not None else ""
        (folder / "etc").mkdir(exist_ok=True)
        self._drivers = _chosen_drivers(folder / "drivers", drivers) if drivers else ""
        for name, text in _CONF.items():
            more = f'unix_sock_dir = "{folder}"\n' if name == "libvirtd.conf" else ""
            if more and tcp_port is not None:
                more += _TCP.format(port=tcp_port)
            (folder / "etc" / name).write_text(text + more)
        for name, line in _USER.items():
            (folder / name).write_text(Path("/etc", name).read_text() + line)

    @contextmanager
    def running(self) -> Iterator[Self]:
        """Started, answering, and ended with all its domains."""
        unshare = run.require_program("unshare", "util-linux")
        run.require_program("libvirtd", "libvirt-daemon")
        argv = [unshare, "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        daemon = Daemon(
            argv=[
                *argv,
                "bash",
                "-euc",
                _START,
                "bash",
                str(self.folder),
                self._options,
                str(self._drivers),
                *sorted(pools.mounts_of_ours),
            ],
            log=self.folder / "libvirtd.log",
            end_with=signal.SIGKILL,  # --kill-child: process 1 of the namespace, and all with it
        )
        with running(daemon, self._answers):
            yield self

    def restart(self) -> None:
        """End the daemon with SIGKILL; another one takes over its domains. Returns when it has."""
        pattern = f"^libvirtd --config {self.folder}/"
        (before,) = run.run(["pgrep", "-f", pattern]).stdout.split()
        os.kill(int(before), signal.SIGKILL)
        until = time.monotonic() + _BOOT_S
        while not self._answers():
            if time.monotonic() > until:
                raise UnavailableError("the libvirt daemon does not come back")
            time.sleep(_LOOK_S)

    def _answers(self) -> bool:
        with contextlib.suppress(UnavailableError), Libvirt(self.uri):
            return True
        return False


def _chosen_drivers(folder: Path, names: Sequence[str]) -> str:
    folder.mkdir()
    for name in names:
        file = f"libvirt_driver_{name}.so"
        (found,) = Path("/usr/lib").glob(f"*/libvirt/connection-driver/{file}")
        (folder / file).symlink_to(found)
    return str(folder)


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainPlan:
    """A domain that boots the lab guest. `agent`: whether it has a channel for one; `disks`: the
    folder of its disks, `one.raw` and `two.raw`."""

    name: str
    uuid: str
    mac: str = "52:54:00:6c:76:01"
    agent: bool = True
    memory_mib: int = 768
    disks: Path


class LibvirtGuest:
    """The lab guest as a domain, defined. `start` boots it, `agent` starts its qemu-ga.

    `handle` is libvirt's own domain: what an administrator does to it, tests do with that.
    """

    mounts = ("/srv/one", "/srv/two")  # ext4, each on a disk of its own

    def __init__(self, host: LibvirtHost, plan: DomainPlan) -> None:
        self.plan = plan
        self._folder = host.folder / plan.name
        self._folder.mkdir()
        self._wire_path = host.folder / f"{plan.name}.wire"
        self.console = self._folder / "console.log"
        self._disks = [plan.disks / "one.raw", plan.disks / "two.raw"]
        for disk in self._disks:
            with disk.open("wb") as out:
                out.truncate(_DISK_BYTES)
            run.run(["mkfs.ext4", "-q", str(disk)])
        self._wire: sockets.socket | None = None
        self._channel: Channel | None = None
        self._agent: RemoteCommand | None = None
        self._uri = host.uri
        self._connection = libvirt.open(host.uri)
        self._connection.defineXML(self._definition())

    def _definition(self) -> str:
        kernel = initramfs.find_kernel()
        hardware = Hardware(kernel=kernel, initramfs=self._folder / "initramfs")
        initramfs.build(
            hardware.initramfs,
            kernel,
            settings=agent_settings(),
            visible=initramfs.hidden_folders(always_visible()),
        )
        argv = qemu_argv(hardware)
        disks = [
            _DISK.format(path=path, device=f"vd{letter}")
            for path, letter in zip(self._disks, "ab", strict=True)
        ]
        return _DOMAIN.format(
            kind="kvm" if "kvm" in argv else "qemu",
            name=self.plan.name,
            uuid=self.plan.uuid,
            memory_mib=self.plan.memory_mib,
            kernel=kernel,
            initrd=hardware.initramfs,
            cmdline=argv[argv.index("-append") + 1],
            disks="".join(disks),
            mac=self.plan.mac,
            wire=self._wire_path,
            port=frames.PORT,
            agent=_AGENT if self.plan.agent else "",
            console=self.console,
        )

    @property
    def handle(self) -> libvirt.virDomain:
        """By a connection that is made again where the daemon was restarted."""
        if not self._connection.isAlive():
            self._connection = libvirt.open(self._uri)
        return self._connection.lookupByName(self.plan.name)

    def start(self) -> None:
        """Boot, wait until commands can run, mount the disks. GuestError if it does not come up."""
        self._hang_up()
        self.handle.create()
        self._wire = sockets.socket(sockets.AF_UNIX)
        self._wire.connect(str(self._wire_path))
        self._channel = Channel(self._wire)
        if not self._channel.wait_ready(_BOOT_S):
            tail = self.console.read_text(errors="replace")[-2000:]
            raise GuestError(f"the domain {self.plan.name} did not boot: {tail}")
        for device, mount in zip(("vda", "vdb"), self.mounts, strict=True):
            self.shell(f"mkdir -p {mount}; mount /dev/{device} {mount}")

    def shell(self, script: str, timeout_s: float = 60.0) -> str:
        """The output of a bash script in the guest. GuestError if it fails, or is late."""
        command = self.begin(["bash", "-euc", script])
        if not command.wait(timeout_s) or command.status != 0:
            said = command.stderr.decode("utf-8", "replace")
            raise GuestError(f"in the guest, {script!r} ended with {command.status}: {said}")
        return command.stdout.decode()

    def begin(self, argv: Sequence[str]) -> RemoteCommand:
        """Start a command in the guest."""
        if self._channel is None:
            raise GuestError(f"the domain {self.plan.name} was not started")
        return self._channel.start(argv)

    def start_agent(self, *options: str) -> None:
        """qemu-ga with these options, in place of one that runs; libvirt reaches it then."""
        self.stop_agent()
        self._agent = self.begin(["bash", "-euc", _RUN_AGENT, "bash", *options])
        until = time.monotonic() + _BOOT_S
        while not self._agent_answers():
            if self._agent.ended or time.monotonic() > until:
                said = self._agent.stderr.decode("utf-8", "replace")
                raise GuestError(f"qemu-ga does not answer: {said}")
            time.sleep(_LOOK_S)

    def _agent_answers(self) -> bool:
        try:
            libvirt_qemu.qemuAgentCommand(self.handle, '{"execute": "guest-ping"}', 2, 0)
        except libvirt.libvirtError:
            return False
        return True

    def stop_agent(self) -> None:
        """SIGKILL: what it has frozen stays so. Idempotent."""
        if self._agent is not None:
            self._agent.kill()
            self._agent.wait(_BOOT_S)
        self._agent = None

    def signal_agent(self, name: str) -> None:
        """STOP, CONT …"""
        self.shell(f"pkill -{name} -x qemu-ga")

    def frozen(self) -> tuple[str, ...]:
        """Which of `mounts` are frozen now, whatever anybody says: a frozen file system refuses a
        second freeze, one that is not is thawed again."""
        found = [mount for mount in self.mounts if self.shell(_LOOK.format(mount=mount)).strip()]
        return tuple(found)

    def destroy(self) -> None:
        """Cut its power. Idempotent."""
        if self.handle.isActive():
            self.handle.destroy()

    def close(self) -> None:
        """End it and forget it."""
        self._hang_up()
        self.destroy()
        self.handle.undefine()
        self._connection.close()

    def _hang_up(self) -> None:
        if self._wire is not None:
            self._wire.close()
        self._wire = None


@contextmanager
def libvirt_guest(host: LibvirtHost, plan: DomainPlan) -> Iterator[LibvirtGuest]:
    """Booted, with a qemu-ga where it has a channel for one; gone with the block."""
    guest = LibvirtGuest(host, plan)
    try:
        guest.start()
        if plan.agent:
            guest.start_agent()
        yield guest
    finally:
        guest.close()
