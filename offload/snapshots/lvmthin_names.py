"""What logical volumes are called: those of production by their paths, our snapshots by our scheme.

A snapshot is `offload.INSTANCE.TIMEMARK.VOLUME` in the volume group of its origin, and bears the
tag `offload.INSTANCE`: only what has both is ever deleted. A ref is `{vg, lv}`.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path

from offload.errors import ConfigError, PolicyError, UnavailableError
from offload.model import Volume

PREFIX = "offload."
_SYS_BLOCK = Path("/sys/dev/block")
_MAPPER = Path("/dev/mapper")
_NAME_MAX = 127  # bytes of a device-mapper name: both names, their hyphens doubled, one between
_DIGEST = 12  # characters of a hash that stands for a volume's name
_PART = r"[a-z0-9][a-z0-9._-]*"
_CHARACTERS = re.compile(r"[a-zA-Z0-9+_.-]+")


def tag_of(instance: str) -> str:
    """The tag of all snapshots of an instance."""
    return f"{PREFIX}{instance}"


def ref_of(volume: Volume, instance: str, timemark: str) -> dict[str, str]:
    """The ref of a snapshot that is, or will be, made.

    Raises ConfigError (`name-too-long`), and what `place_of` raises.
    """
    vg, _ = place_of(volume)
    start = f"{PREFIX}{instance}.{timemark}."
    # LVM keeps names with "_tmeta" and the like for itself
    name = start + volume.name
    if "_" in volume.name or len(mapper_name(vg, name)) > _NAME_MAX:
        name = start + hashlib.sha256(volume.name.encode()).hexdigest()[:_DIGEST]
    if len(mapper_name(vg, name)) > _NAME_MAX:
        raise ConfigError(
            f"volume {volume.name}: the name of the volume group {vg} leaves no room for names of "
            f"snapshots ({_NAME_MAX} bytes in all)",
            code="name-too-long",
            hint="rename the volume group: vgrename",
        )
    return {"vg": vg, "lv": name}


def own(ref: Mapping[str, str], instance: str) -> tuple[str, str]:
    """Volume group and name of a ref, sure to be of our scheme; PolicyError (`foreign-snapshot`).

    Guards every delete, together with the tag: a damaged ref never names what is not ours.
    """
    vg, name = ref.get("vg", ""), ref.get("lv", "")
    scheme = re.escape(f"{PREFIX}{instance}.") + rf"{_PART}\.{_PART}"
    if not _CHARACTERS.fullmatch(vg) or vg[0] in "-." or not re.fullmatch(scheme, name):
        raise foreign(f"{vg}/{name}", instance)
    return vg, name


def foreign(what: str, instance: str) -> PolicyError:
    """The refusal to touch what is not ours."""
    return PolicyError(
        f"'{what}' is no snapshot of this instance ({instance}) and is left alone",
        code="foreign-snapshot",
        hint="the record that names it is damaged, or of another state_dir",
    )


def mapper_name(vg: str, name: str) -> str:
    """The device-mapper name: hyphens are doubled, one stands between."""
    return f"{vg.replace('-', '--')}-{name.replace('-', '--')}"


def device_of(vg: str, name: str) -> Path:
    """The device of an active logical volume."""
    return _MAPPER / mapper_name(vg, name)


def place_of(volume: Volume) -> tuple[str, str]:
    """Volume group and logical volume that a path stands for, active or not.

    Raises UnavailableError (`not-a-thin-volume`) for a path that can be no logical volume.
    """
    path = volume.path
    name = _mapped_name(path)
    if name is None and path.parent == _MAPPER:
        name = path.name
    if name is None and len(path.parts) == 4 and path.parts[1] == "dev":
        return path.parts[2], path.parts[3]
    parts = _split(name) if name else []  # a third one names a layer of LVM's own
    if len(parts) != 2:
        raise not_thin(volume)
    return parts[0], parts[1]


def not_thin(volume: Volume) -> UnavailableError:
    """What is there is something else."""
    return UnavailableError(
        f"volume {volume.name}: {volume.path} is no thin logical volume",
        code="not-a-thin-volume",
        hint="lvmthin is for logical volumes in a thin pool, as /dev/VG/LV; see: lvs -o +segtype",
    )


def _mapped_name(path: Path) -> str | None:
    """The device-mapper name of an existing block device, or None."""
    try:
        number = os.stat(path).st_rdev
        place = _SYS_BLOCK / f"{os.major(number)}:{os.minor(number)}" / "dm/name"
        return place.read_text().strip()
    except OSError:
        return None


def _split(name: str) -> list[str]:
    """The parts of a device-mapper name of LVM, hyphens single again."""
    parts = re.findall(r"(?:[^-]|--)+", name)
    return [part.replace("--", "-") for part in parts]
