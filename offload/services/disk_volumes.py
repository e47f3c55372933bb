"""On which volumes of the configuration a VM's disk lies."""

from __future__ import annotations

from pathlib import Path

from offload.config import Config
from offload.machine import MachineDisk


def volume_of(config: Config, disk: MachineDisk) -> str:
    """The volume of the configuration that holds a VM's disk, or "".

    By its LUN (`volumes.NAME.lun`; a disk that is spread over several is on the volume of the
    first, which holds the VMFS's header), or, where the hypervisor names a file or block device of
    this machine, or an RBD image, by that.
    """
    if disk.luns:
        return by_lun(config).get(disk.luns[0].lower(), "")
    for name, volume in config.volumes.items():
        if volume.image is not None:
            if disk.path == f"rbd:{volume.image}":
                return name
        elif disk.path.startswith("/") and _same(Path(disk.path), volume.place):
            return name
    return ""


def _same(one: Path, two: Path) -> bool:
    """Whether two paths lead to one thing. Both may be absent: their names decide then."""
    return one == two or one.resolve() == two.resolve()


def volumes_of(config: Config, disk: MachineDisk) -> tuple[str, ...]:
    """The volumes that hold a disk: of all LUNs that it lies on. Empty where one is missing."""
    if not disk.luns:
        one = volume_of(config, disk)
        return (one,) if one else ()
    known = by_lun(config)
    found = [known.get(lun.lower(), "") for lun in disk.luns]
    return tuple(dict.fromkeys(found)) if all(found) else ()


def by_lun(config: Config) -> dict[str, str]:
    """Names of volumes, by their LUN in small letters."""
    return {v.lun.lower(): name for name, v in config.volumes.items() if v.lun is not None}
