"""The disk of a placeholder: an empty qcow2 overlay file over a TimeView's address.

Backup software for libvirt reads disks that are files (virtnbdbackup refuses network disks); of
this one it reads what the view holds, and only its data. What a backup host writes (a resignature,
a boot by mistake) stays in the overlay and goes with it.

A file names what it lies upon as QEMU does: an NBD URI, or `json:` with the name that QEMU's own
iSCSI initiator has to use. Neither may hold a secret: no TLS, no CHAP.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from offload import endpoint, run
from offload.endpoint import IscsiEndpoint
from offload.errors import ConfigError
from offload.run import ProgramError

INITIATOR = "iqn.2026-11.internal.offload:placeholders"


def backing_of(uri: str) -> str:
    """A view's address as QEMU takes it. Raises ConfigError (`tls-in-overlay`), UsageError."""
    found = endpoint.parse(uri)
    if isinstance(found, IscsiEndpoint):
        place = {
            "driver": "iscsi",
            "transport": "tcp",
            "portal": found.portal,
            "target": found.iqn,
            "lun": found.lun,
            "initiator-name": INITIATOR,
        }
        return "json:" + json.dumps({"driver": "raw", "file": place}, separators=(",", ":"))
    if found.tls is not None:
        raise ConfigError(
            "an overlay cannot say how to reach a view over TLS",
            code="tls-in-overlay",
            hint="leave the view on a unix socket, or on loopback without TLS",
        )
    return uri


def look_inside(uri: str) -> tuple[int, str]:
    """Of a view that shows a qcow2 file as it lies: the size of the disk in it, and the other file
    that it needs (a parent, or one with its data), "" for none: QEMU would open that by its path,
    as production has it now."""
    program = run.require_program("qemu-img", "qemu-utils")
    argv = [program, "info", "--output=json", "-f", "qcow2", backing_of(uri)]
    found = json.loads(run.run(argv).stdout)
    other = found.get("full-backing-filename") or found.get("backing-filename")
    inner = found.get("format-specific", {}).get("data", {})
    return int(found["virtual-size"]), str(other or inner.get("data-file") or "")


def content(uri: str, form: str, size_bytes: int) -> bytes:
    """An empty overlay over a view whose bytes are of the format `form`."""
    program = run.require_program("qemu-img", "qemu-utils")
    with tempfile.TemporaryDirectory(prefix="offload-") as folder:
        path = Path(folder) / "overlay"
        create = [program, "create", "-q", "-f", "qcow2", "-u", "-F", form, "-b", backing_of(uri)]
        run.run([*create, str(path), str(size_bytes)])
        return path.read_bytes()


def check(path: str) -> str:
    """What is wrong with an overlay of this machine, "" if nothing is: it is opened, and with it
    the view."""
    program = run.require_program("qemu-img", "qemu-utils")
    try:
        run.run([program, "info", "-U", "--backing-chain", "-f", "qcow2", path])
    except ProgramError as error:
        return error.message
    return ""
