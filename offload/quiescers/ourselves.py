"""What is never frozen: the VM that is this machine, or that this program waits for.

A frozen VM that holds the state folder, a store or the vCenter would hold up its own thaw. What a
VM is, is told by its hypervisor and its guest agent; what this machine leans on, by its mounts, its
iSCSI sessions and the configuration. The catalog is a file in the state folder.

Not proof of anything, and so not looked at: addresses of this machine itself (10.0.2.15 and
192.168.122.1 are on many) and its host name (those of a template are all alike).
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import re
import socket
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from offload import mountinfo, procs
from offload.configs.hypervisors import LibvirtConfig
from offload.errors import PolicyError
from offload.instance import Instance
from offload.mountinfo import MountPoint

_SYS = Path("/sys")
_NO_MAC = "00:00:00:00:00:00"
# options of network file systems that carry addresses: nfs(5), mount.cifs(8), the kernel's ceph.rst
_ADDRESS_OPTIONS = ("addr", "mountaddr", "ip", "mon_addr")

Resolve = Callable[[str], frozenset[str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What is known of a VM, by its hypervisor and by itself; what is not known is empty."""

    macs: frozenset[str] = frozenset()
    addresses: frozenset[str] = frozenset()
    uuids: frozenset[str] = frozenset()  # its machine's: SMBIOS, libvirt domain, VMware BIOS
    boot_id: str = ""  # its kernel's
    host_name: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """This machine, by what no other one has."""

    macs: frozenset[str]
    uuid: str  # SMBIOS; empty where it has none, or may not be read
    boot_id: str


def agent_facts(
    interfaces: Any, *, uuids: Sequence[str] = (), boot_id: str = "", host_name: str = ""
) -> Facts:
    """Facts with the answer to the guest agent's `guest-network-get-interfaces`.

    A guest may answer anything: what has not the documented shape is left out.
    """
    entries = [e for e in interfaces if isinstance(e, dict)] if isinstance(interfaces, list) else []
    listed = [e.get("ip-addresses") for e in entries]
    inner = [a for each in listed if isinstance(each, list) for a in each if isinstance(a, dict)]
    return Facts(
        macs=frozenset(_mac(str(e.get("hardware-address", ""))) for e in entries) - {"", _NO_MAC},
        addresses=_addresses(str(a.get("ip-address", "")) for a in inner),
        uuids=frozenset(uuids),
        boot_id=boot_id,
        host_name=host_name,
    )


def with_macs(facts: Facts, macs: Iterable[str]) -> Facts:
    """And these network cards, which the hypervisor knows of."""
    return replace(facts, macs=facts.macs | {_mac(mac) for mac in macs} - {"", _NO_MAC})


def check(
    vm: str,
    facts: Facts,
    instance: Instance,
    *,
    machine: Machine | None = None,
    table: list[MountPoint] | None = None,
    resolve: Resolve | None = None,
) -> None:
    """Raises PolicyError (`would-freeze-ourselves`) if the VM must never be frozen by us."""
    same = _same_machine(facts, machine or this_machine())
    if same:
        raise _refused(vm, instance, f"it is this machine: {same}")
    for what, server in _needed(instance, table if table is not None else mountinfo.mounts()):
        if _is(server, facts, resolve or addresses_of):
            raise _refused(vm, instance, f"{what} is on {server}, which is this VM")


def _refused(vm: str, instance: Instance, why: str) -> PolicyError:
    """A VM without an entry was chosen by its group."""
    named = vm in instance.config.vms
    out = f"take vms.{vm}.freeze out of the configuration" if named else "take it out of the group"
    return PolicyError(
        f"freezing VM {vm} would stop this program, and with it the thaw: {why}",
        code="would-freeze-ourselves",
        hint=f"{out}, or move what it holds elsewhere; back it up from another machine",
    )


# -- this machine ----------------------------------------------------------------------------------


def this_machine(sys: Path = _SYS) -> Machine:
    """By /sys and /proc. Only interfaces with a device count: those of bridges, containers and
    tunnels are made up, and alike on many machines."""
    macs = set()
    for interface in sys.glob("class/net/*/device"):
        with contextlib.suppress(OSError):
            macs.add(_mac((interface.parent / "address").read_text().strip()))
    number = ""
    with contextlib.suppress(OSError):  # root only
        number = (sys / "class/dmi/id/product_uuid").read_text().strip()
    return Machine(macs=frozenset(macs - {"", _NO_MAC}), uuid=number, boot_id=procs.boot_id())


def _same_machine(facts: Facts, machine: Machine) -> str:
    """By what it is the same; empty if it is another."""
    if facts.boot_id and facts.boot_id == machine.boot_id:
        return "the same boot id"
    ours = _both_orders(machine.uuid)
    if any(ours & _both_orders(number) for number in facts.uuids):
        return f"the same UUID {machine.uuid}"
    shared = machine.macs & frozenset(_mac(mac) for mac in facts.macs)
    return f"the same network card {min(shared)}" if shared else ""


def _both_orders(text: str) -> frozenset[uuid.UUID]:
    """A UUID, and what it is where the first three fields are taken for little-endian: SMBIOS 2.6
    changed that, and hypervisors differ. Empty for none and for those that vendors forget to set
    (all digits alike)."""
    try:
        number = uuid.UUID(text)
    except ValueError:
        return frozenset()
    if len(set(number.hex)) == 1:
        return frozenset()
    return frozenset({number, uuid.UUID(bytes_le=number.bytes)})


def _mac(text: str) -> str:
    plain = text.strip().lower().replace("-", ":")
    return plain if re.fullmatch(r"([0-9a-f]{2}:){5}[0-9a-f]{2}", plain) else ""


# -- what this machine leans on --------------------------------------------------------------------


def _needed(instance: Instance, table: list[MountPoint]) -> Iterator[tuple[str, str]]:
    """What must go on while VMs are frozen, and the server that it is on."""
    config = instance.config
    for name, hypervisor in config.hypervisors.items():
        if isinstance(hypervisor, LibvirtConfig):
            server = urlsplit(hypervisor.uri).hostname or ""
        else:
            server = hypervisor.server
        if server:
            yield f"the hypervisor {name}", server
    for what, path in _paths(instance):
        with contextlib.suppress(LookupError):
            for server in servers_of(path, table):
                yield f"{what} ({path})", server


def _paths(instance: Instance) -> Iterator[tuple[str, Path]]:
    config = instance.config
    yield "the root file system", Path("/")
    yield "this program", Path(__file__)
    yield "the state folder", instance.state_dir
    yield "the runtime folder", instance.runtime_dir
    if instance.config_path is not None:
        yield "the configuration", instance.config_path
    for name, store in config.stores.items():
        if store.folder is not None:
            yield f"the store {name}", store.folder
    for name in config.volumes:
        volume = config.volume(name)
        yield f"the volume {name}", volume.path
        if volume.snapshot_dir is not None:
            yield f"the folder of the snapshots of {name}", volume.snapshot_dir


def servers_of(path: Path, table: list[MountPoint]) -> frozenset[str]:
    """The servers, by name or address, without which a file or block device stands still: those of
    its file system, of the disks under it, of the file systems where its loop devices have their
    files. Raises LookupError where no mount of the table holds it."""
    found: set[str] = set()
    seen: set[frozenset[mountinfo.Device]] = set()
    todo = [path]
    while todo:
        current = todo.pop()
        if current.is_block_device():
            number = current.stat().st_rdev
            devices = frozenset({(os.major(number), os.minor(number))})
        else:
            mount = mountinfo.mount_holding(current, table)
            found |= set(_mount_servers(mount))
            devices = mountinfo.devices_of(mount)
        if devices not in seen:
            seen.add(devices)
            backing = mountinfo.backing_of(devices)
            found |= {portal for device in backing.devices for portal in iscsi_portals(device)}
            todo += backing.paths
    return frozenset(found)


def _mount_servers(mount: MountPoint) -> Iterator[str]:
    """nfs `host:/path`, cifs `//host/share`, ceph `a:6789,b:6789:/path`, sshfs `user@host:/path`,
    gluster `host:/volume`, 9p over TCP: the host alone."""
    options = _options(mount)
    for key in _ADDRESS_OPTIONS:
        for part in re.split(r"[,/]", options.get(key, "")):
            if part:
                yield _host(part)
    source = mount.source
    if mount.kind.startswith(("nfs", "ceph", "fuse.")) and ":/" in source:
        for part in source.rpartition(":/")[0].split(","):
            yield _host(part.rpartition("@")[2])
    elif mount.kind in ("cifs", "smb3") and source.startswith(("//", "\\\\")):
        yield source[2:].replace("\\", "/").partition("/")[0]
    elif mount.kind == "9p" and options.get("trans") in ("tcp", "rdma"):
        yield source


def _options(mount: MountPoint) -> Mapping[str, str]:
    return {key: value for key, _, value in (o.partition("=") for o in mount.options)}


def _host(text: str) -> str:
    """`[fd00::1]:6789`, `10.0.0.1:6789`, `nas:`, `fd00::1` without what follows the host."""
    bracketed = re.match(r"\[([^\]]+)\]", text)
    if bracketed:
        return bracketed.group(1)
    if text.count(":") > 1:
        return text
    return text.partition(":")[0]


def iscsi_portals(device: mountinfo.Device, sys: Path = _SYS) -> Iterator[str]:
    """The portals of the session that a disk came with (sysfs of scsi_transport_iscsi)."""
    with contextlib.suppress(OSError):
        real = (sys / "dev/block" / f"{device[0]}:{device[1]}").resolve(strict=True)
        for folder in real.parents:
            if re.fullmatch(r"session\d+", folder.name):
                for file in folder.glob("connection*/iscsi_connection/*/*address"):
                    yield file.read_text().strip()


# -- is that server this VM? -----------------------------------------------------------------------


def _is(server: str, facts: Facts, resolve: Resolve) -> bool:
    """By address where both are known, else by name."""
    addresses = resolve(server)
    known = _addresses(facts.addresses)
    if addresses and known:
        return bool(addresses & known)
    return not _addresses([server]) and _same_name(server, facts.host_name)


def _same_name(one: str, other: str) -> bool:
    """Without regard to the domain where one of them has none."""
    a, b = one.rstrip(".").lower(), other.rstrip(".").lower()
    if not a or not b:
        return False
    if "." in a and "." in b:
        return a == b
    return a.partition(".")[0] == b.partition(".")[0]


def addresses_of(server: str) -> frozenset[str]:
    """The addresses of a host, but for those of loopback; empty where its name is not known."""
    try:
        found = socket.getaddrinfo(server, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return frozenset()
    return _addresses(str(entry[4][0]) for entry in found)


def _addresses(texts: Iterable[str]) -> frozenset[str]:
    """In one spelling, without zone and loopback; what is no address is left out."""
    found = set()
    for text in texts:
        with contextlib.suppress(ValueError):
            address = ipaddress.ip_address(text.partition("%")[0])
            mapped = getattr(address, "ipv4_mapped", None)
            address = mapped or address
            if not address.is_loopback:
                found.add(str(address))
    return frozenset(found)
