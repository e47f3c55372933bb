"""Which disks of VMs lie on the VMFS of a volume, at a point in time."""

from __future__ import annotations

from dataclasses import dataclass

from offload import compose
from offload.errors import UsageError
from offload.holds import hold_timemark
from offload.images.vmfs.filesystem import Vmfs
from offload.images.vmfs.lun import LogicalVolume
from offload.images.vmfs.vmdk import VirtualDisk, disks
from offload.origin import OriginKind, parse_origin
from offload.services import points
from offload.services.context import Context


@dataclass(frozen=True, slots=True, kw_only=True)
class Vmdks:
    """The disks of one VMFS. `version`: 5 or 6."""

    origin: str
    label: str
    version: int
    disks: tuple[VirtualDisk, ...]


def vmdks(ctx: Context, what: str) -> Vmdks:
    """The disks on `timemark:ID/VOLUME` or `backup:ID/VOLUME`.

    Raises UsageError (`bad-origin`, `vmdk-for-several`), NotFoundError, IntegrityError
    (`not-vmfs`, `bad-vmfs`), UnavailableError (`vmfs-spans`, `vmfs-version`).
    """
    origin = parse_origin(what)
    if origin.kind is OriginKind.GROUP:
        raise UsageError(
            f"'{what}' is no point in time",
            code="bad-origin",
            hint="name timemark:ID/VOLUME or backup:ID/VOLUME",
        )
    if origin.kind is OriginKind.BACKUP:
        return _read(points.of_backup(ctx, origin), what)
    with hold_timemark(ctx.instance, ctx.catalog.timemark(origin.id).id):
        return _read(points.of_timemark(ctx, origin), what)


def _read(found: list[points.Point], what: str) -> Vmdks:
    if len(found) != 1:
        raise UsageError(
            f"{what} has {len(found)} volumes",
            code="vmdk-for-several",
            hint=f"name one: {', '.join(point.volume for point in found)}",
        )
    lun = compose.open_image(found[0].source)
    try:
        vmfs = Vmfs(LogicalVolume([lun]))
        return Vmdks(
            origin=found[0].origin,
            label=vmfs.geometry.label,
            version=6 if vmfs.geometry.six else 5,
            disks=tuple(sorted(disks(vmfs), key=lambda disk: disk.path)),
        )
    finally:
        lun.close()
