"""What LIO has in configfs for a view: found by names, read without rtslib.

Layout: Documentation/target/tcm_mod_builder.rst and drivers/target of Linux 6.1.

| under /sys/kernel/config/target | |
| --- | --- |
| `core/iblock_N/offload-INSTANCE-VIEW` | the backstore |
| `iscsi/IQN/tpgt_1` | the target's only portal group; the end of the IQN is `:INSTANCE.VIEW.NAME` |
"""

from __future__ import annotations

import contextlib
import os
import re
from dataclasses import dataclass
from pathlib import Path

from offload.iscsi import Identity
from offload.target import Client
from targets import processes
from targets.lio_kernel import CONFIGFS

TARGET = CONFIGFS / "target"
ISCSI = TARGET / "iscsi"
TAG = 1
LUN = 0

_DEVICE = re.compile(r"Major: (\d+) Minor: (\d+)")
_NAME = re.compile(r"^InitiatorName: (\S+)", re.MULTILINE)
_CONNECTION = re.compile(r"Connection State: TARG_CONN_STATE_LOGGED_IN\s+Address (\S+) ")


@dataclass(frozen=True, slots=True, kw_only=True)
class Name:
    """A view, as its objects in the kernel are called."""

    instance: str
    view: str

    @property
    def object(self) -> str:
        """Of the backstore and of the block device under it."""
        return f"offload-{self.instance}-{self.view}"

    def owns_iqn(self, iqn: str) -> bool:
        """Whether a target is this view's, whatever prefix was configured."""
        own, tail = f"{self.instance}.{self.view}", iqn.rpartition(":")[2]
        return tail == own or tail.startswith(own + ".")


def backstores(name: Name) -> list[Path]:
    """Folders of the view's backstores; more than one only if somebody restored an old one."""
    return [
        store
        for hba in _folders(TARGET / "core")
        if hba.name.rpartition("_")[2].isdigit()
        for store in _folders(hba)
        if store.name == name.object
    ]


def iqns(name: Name) -> list[str]:
    """The view's targets."""
    return [folder.name for folder in _folders(ISCSI) if name.owns_iqn(folder.name)]


def database() -> Path:
    """The folder in which the kernel keeps LIO's own files."""
    return Path(_text(TARGET / "dbroot") or "/var/target")


def portals() -> set[str]:
    """`ADDRESS:PORT` of every portal that LIO listens on, whoever made it."""
    return {
        portal.name
        for target in _folders(ISCSI)
        for group in _folders(target)
        for portal in _folders(group / "np")
    }


def device_number(store: Path) -> tuple[int, int] | None:
    """Major and minor number of the block device under a backstore."""
    found = _DEVICE.search(_text(store / "info"))
    return (int(found[1]), int(found[2])) if found else None


def serves(iqn: str, portal: str, store: Path, identity: Identity) -> bool:
    """Whether the target is up, on this portal, and its LUN is this backstore, with its identity.

    A restored backstore has the serial number, but not the vendor: no tool saves that.
    """
    group = ISCSI / iqn / f"tpgt_{TAG}"
    return (
        _text(group / "enable") == "1"
        and (group / "np" / portal).is_dir()
        and _text(store / "enable") == "1"
        and any(link.resolve() == store for link in _links(group / "lun" / f"lun_{LUN}"))
        and _text(store / "wwn" / "vendor_id") == identity.vendor
        and _text(store / "wwn" / "vpd_unit_serial").endswith(f": {identity.serial}")
    )


def clients(iqn: str, address: str, port: int) -> list[Client]:
    """Who is logged in, by its portal.

    The kernel tells name and address of one session of each initiator with an ACL, the names of
    those without, and how many sessions there are. Its sessions end a moment after they were left:
    where nobody is connected to the portal any more, nobody is logged in.
    """
    peers = {
        client.address.rpartition(":")[0].strip("[]")
        for client in processes.tcp_clients(os.getpid(), address, port)
    }
    if not peers:
        return []
    alone = peers.pop() if len(peers) == 1 else ""
    group = ISCSI / iqn / f"tpgt_{TAG}"
    found = [Client(address=alone or "unknown", name=name) for name in _dynamic(group)]
    for acl in _folders(group / "acls"):
        info = _text(acl / "info")
        name, connection = _NAME.search(info), _CONNECTION.search(info)
        if name and connection:
            found.append(Client(address=connection[1], name=name[1]))
    total = _text(ISCSI / iqn / "fabric_statistics" / "iscsi_instance" / "sessions")
    more = int(total or 0) - len(found)
    return found + [Client(address=alone or "unknown")] * more


def _dynamic(group: Path) -> list[str]:
    """Initiators without an ACL: a line a session, each with a zero behind it. They chose their
    names themselves."""
    lines = _text(group / "dynamic_sessions").replace("\0", "").split("\n")
    return ["".join(c if c.isprintable() else "?" for c in line) for line in lines if line]


def _folders(folder: Path) -> list[Path]:
    """Its folders, by name; none where it is gone (others change configfs while we look)."""
    with contextlib.suppress(OSError):
        return sorted(entry for entry in folder.iterdir() if entry.is_dir())
    return []


def _links(folder: Path) -> list[Path]:
    with contextlib.suppress(OSError):
        return [entry for entry in folder.iterdir() if entry.is_symlink()]
    return []


def _text(path: Path) -> str:
    """An attribute, or nothing where it is gone."""
    with contextlib.suppress(OSError):
        return path.read_text(errors="replace").strip()
    return ""
