"""What the target of a restore is, and every reason to refuse it before it is touched."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from offload import device_use
from offload.blockdev import device_identity
from offload.config import Config
from offload.errors import BusyError, NotFoundError, PolicyError, UnavailableError, UsageError
from offload.filesystem import file_identity, space_of
from offload.image import Image
from offload.image_lock import open_for_writing
from offload.model import ExtentKind
from offload.quantity import show_size
from offload.sink import PART, write_error
from offload.sinks.formats import FORMATS

RAW = "raw"
_OTHER_ENDINGS = (".vdi", ".vhd", ".vmdx", ".ova", ".ovf", ".qed", ".gz", ".zst", ".xz")
# How files of the formats begin: writing a raw image into one in place would destroy it.
_MAGIC = {b"QFI\xfb": "qcow2", b"KDMV": "vmdk", b"vhdxfile": "vhdx"}
_NAME_CHARS = 50  # of the target's name in the temporary one: at most 200 of 255 bytes
_SPARE_BYTES = 1 << 20  # for what file systems and formats keep beside the data


class TargetKind(StrEnum):
    """What is written to."""

    FILE = "file"  # a new file
    IN_PLACE = "in-place"  # a file that is there
    DEVICE = "device"
    NBD = "nbd"


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """One target. `identity` names it for good, by whatever path it was given."""

    kind: TargetKind
    to: str
    identity: str
    form: str = RAW

    @property
    def path(self) -> Path:
        """Of a file or device."""
        return Path(self.to)

    def temp(self, key: str) -> str:
        """The temporary file's name; "" where the target itself is written."""
        if self.kind is not TargetKind.FILE:
            return ""
        return str(self.path.with_name(f".{self.path.name[:_NAME_CHARS]}.{key}{PART}"))


def find(volumes: list[str], to: str, form: str | None, *, in_place: bool) -> list[Target]:
    """A target for each volume. Raises UsageError (`bad-target`, `many-volumes`, `bad-format`)."""
    if "://" not in to and stat.S_ISDIR(_mode(Path(to))):
        ending = FORMATS.get(form or RAW, ".raw")
        names = [str(Path(to) / f"{volume}{ending}") for volume in volumes]
        return [_one(name, form, in_place=in_place) for name in names]
    if len(volumes) > 1:
        raise UsageError(
            f"there are {len(volumes)} volumes ({', '.join(volumes)}) and one target {to}",
            code="many-volumes",
            hint="name one volume (ID/VOLUME), or give an existing folder",
        )
    return [_one(to, form, in_place=in_place)]


def _one(to: str, form: str | None, *, in_place: bool) -> Target:
    if to.startswith(("nbd://", "nbds://", "nbd+unix://", "nbds+unix://")):
        _raw_only(form, to)
        return Target(kind=TargetKind.NBD, to=to, identity=to)
    if "://" in to:
        raise UsageError(
            f"cannot restore to '{to}'", code="bad-target", hint="a path, a device or an nbd:// URI"
        )
    path = Path(to).absolute()
    mode = _mode(path)
    if stat.S_ISBLK(mode):
        _raw_only(form, to)
        return Target(kind=TargetKind.DEVICE, to=str(path), identity=_device_identity(path))
    if mode and not stat.S_ISREG(mode):
        raise UsageError(f"{path} is neither a file nor a block device", code="bad-target")
    if in_place and mode:
        _raw_only(form, to)
        identity = _file_identity(path)
        return Target(kind=TargetKind.IN_PLACE, to=str(path), identity=identity)
    place = path.parent.resolve() / path.name
    found = form or _by_ending(path)
    return Target(kind=TargetKind.FILE, to=str(path), identity=f"file:{place}", form=found)


def _raw_only(form: str | None, to: str) -> None:
    if form not in (None, RAW):
        raise UsageError(
            f"{to} takes the bytes of the volume, not a {form} file", code="bad-format",
            hint="leave --format out, or restore to a new file",
        )  # fmt: skip


def _by_ending(path: Path) -> str:
    """The format that an ending stands for: qcow2, vmdk, vhdx; raw for any other, but for those
    that promise a format that is not written."""
    for form, ending in FORMATS.items():
        if path.suffix.lower() == ending:
            return form
    if path.suffix.lower() in _OTHER_ENDINGS:
        raise UsageError(
            f"{path.suffix} is no format that restore writes", code="bad-format",
            hint=f"--format raw, or one of {', '.join(FORMATS)}",
        )  # fmt: skip
    return RAW


def _mode(path: Path) -> int:
    """What is there; 0 where nothing is."""
    try:
        return path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return 0
    except OSError as error:
        raise write_error(str(path), error) from error


def _device_identity(path: Path) -> str:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return f"device:{device_identity(fd)}"
        finally:
            os.close(fd)
    except OSError as error:
        raise write_error(str(path), error) from error


def _file_identity(path: Path) -> str:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return f"in-place:{file_identity(fd)}"
        finally:
            os.close(fd)
    except OSError as error:
        raise write_error(str(path), error) from error


# -- refusals ----------------------------------------------------------------------------------


def check(target: Target, config: Config, *, overwrite: bool, production: str | None) -> None:
    """Refuse what must not be written to. `production` is the production volume that the user
    named as the one to be overwritten.

    Raises BusyError (`target-exists`, `target-in-use`), NotFoundError (`no-folder`), PolicyError
    (`target-in-store`, `target-is-production`), UsageError (`not-production`, `bad-target`).
    """
    if target.kind is TargetKind.NBD:
        return
    _check_store(target, config)
    _check_production(target, config, production)
    if target.kind is TargetKind.FILE:
        if target.path.exists() and not overwrite:
            raise BusyError(
                f"{target.path} exists already", code="target-exists",
                hint="to replace it: --overwrite; to write only what differs: --diff",
            )  # fmt: skip
        if not target.path.parent.is_dir():
            raise NotFoundError(f"the folder {target.path.parent} does not exist", code="no-folder")
    if target.kind is not TargetKind.DEVICE and target.path.exists():
        _check_users(target.path)  # a VM whose file is replaced would write on into the old one
    if target.kind is TargetKind.IN_PLACE:
        _check_raw(target.path)


def _check_store(target: Target, config: Config) -> None:
    for name, store in config.stores.items():
        folder = getattr(store, "path", None)
        if folder is None or target.kind is TargetKind.DEVICE:
            continue
        inside = target.path if target.kind is TargetKind.IN_PLACE else target.path.parent
        if inside.resolve().is_relative_to(Path(folder).resolve()):
            raise PolicyError(
                f"{target.path} lies inside the store {name}", code="target-in-store",
                hint="choose a place outside of it",
            )  # fmt: skip


def _check_production(target: Target, config: Config, production: str | None) -> None:
    hit = next(
        (name for name, volume in config.volumes.items() if _same(target.path, volume.place)), None
    )
    if hit is None and production is not None:
        raise UsageError(
            f"{target.to} is not the volume {production}", code="not-production",
            hint="leave --onto-production out, or give the volume's own path",
        )  # fmt: skip
    if hit is not None and production != hit:
        raise PolicyError(
            f"{target.to} is the production volume {hit}",
            code="target-is-production",
            hint=f"shut down what uses it; then, to overwrite it: --onto-production {hit}",
        )


def _same(a: Path, b: Path) -> bool:
    """Whether two paths are one file, or one block device."""
    try:
        one, other = a.stat(), b.stat()
    except OSError:
        return a.absolute() == b.absolute()
    if stat.S_ISBLK(one.st_mode) and stat.S_ISBLK(other.st_mode):
        return one.st_rdev == other.st_rdev
    return os.path.samestat(one, other)


def _check_users(path: Path) -> None:
    if open_for_writing(path):
        raise BusyError(
            f"{path} is in use by a running QEMU", code="target-in-use", hint="shut the VM down"
        )
    users = device_use.loops_of(path)
    if users:
        raise BusyError(
            f"{path} is in use: under {users[0]}", code="target-in-use",
            hint=f"see: losetup {users[0]}; detach it first",
        )  # fmt: skip


def _check_raw(path: Path) -> None:
    with path.open("rb") as opened:
        start = opened.read(8)
    for magic, form in _MAGIC.items():
        if start.startswith(magic):
            raise UsageError(
                f"{path} is a {form} image: it cannot be restored into in place",
                code="bad-target",
                hint="restore to a new file, or serve it with qemu-nbd and restore to that",
            )


def check_room(target: Target, image: Image, there: int) -> None:
    """Whether the data fits; `there` bytes of it are in the target already.

    Raises UnavailableError (`no-space`).
    """
    if target.kind is not TargetKind.FILE:
        return
    fd = os.open(target.path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        _, free = space_of(fd)
    finally:
        os.close(fd)
    if free >= image.size_bytes:
        return  # what is there is enough whatever the image holds
    needed = _data_bytes(image) + _SPARE_BYTES - there
    if free < needed:
        raise UnavailableError(
            f"{target.path.parent} has {show_size(free)} left, the image needs {show_size(needed)}",
            code="no-space",
            hint="make room there, or choose another place",
        )


def _data_bytes(image: Image) -> int:
    unit = 1 << 30
    return sum(
        extent.length
        for at in range(0, image.size_bytes, unit)
        for extent in image.extents(at, min(unit, image.size_bytes - at))
        if extent.kind is ExtentKind.DATA
    )
