"""A rule for udev: an activated snapshot is a device to read, and nothing for the host to act on.

Without it the snapshot takes over the links of its origin: it has the same file system UUID, so
that /dev/disk/by-uuid would lead to it as long as it is active.

Flags: lib/udev/rules.d/55-dm.rules of dmsetup. The rule stands behind LVM's own (56-lvm.rules),
which finds out the logical volume's name, and before what acts on it.
"""

from __future__ import annotations

import os
from pathlib import Path

from offload import run
from offload.errors import UnavailableError
from offload.snapshots.lvmthin_names import PREFIX

NAME = "57-offload-lvmthin.rules"
RULE = f"""\
# Snapshots that offload made: no links by UUID or label, no mounts, no volume groups inside.
ACTION=="add|change", SUBSYSTEM=="block", ENV{{DM_UUID}}=="LVM-?*", \\
  ENV{{DM_LV_NAME}}=="{PREFIX}?*", \\
  ENV{{DM_UDEV_DISABLE_DISK_RULES_FLAG}}="1", ENV{{DM_UDEV_DISABLE_OTHER_RULES_FLAG}}="1", \\
  ENV{{UDISKS_IGNORE}}="1", ENV{{SYSTEMD_READY}}="0", OPTIONS:="nowatch"
"""
_CONTROL = Path("/run/udev/control")
# An administrator's own file of this name comes first, and an empty one switches the rule off.
_PLACES = (Path("/etc/udev/rules.d"), Path("/lib/udev/rules.d"), Path("/run/udev/rules.d"))


def ensure_rule() -> None:
    """Put the rule in force until the next boot, unless a file of its name is there. Idempotent.

    Does nothing where no udev runs. Raises UnavailableError (`udev-rule`).
    """
    if not _CONTROL.exists() or any((place / NAME).exists() for place in _PLACES):
        return
    path = _PLACES[-1] / NAME
    fresh = path.with_suffix(f".{os.getpid()}")  # udev reads only files that end in .rules
    try:
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        fresh.write_text(RULE, encoding="ascii")
        fresh.chmod(0o644)
        fresh.rename(path)
    except OSError as error:
        raise UnavailableError(
            f"cannot write the udev rule {path}: {error.strerror}",
            code="udev-rule",
            hint=f"without it a snapshot takes over /dev/disk/by-uuid; put it in {_PLACES[0]}",
        ) from error
    udevadm = run.require_program("udevadm", "udev")
    run.run([udevadm, "control", "--reload"])
