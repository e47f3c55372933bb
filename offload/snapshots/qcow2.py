"""Snapshots of qcow2 images: of a disk at rest inside its own file, of a running VM through QEMU.

| the image is | a snapshot is | and lives |
| --- | --- | --- |
| at rest | an internal snapshot of the image, made under QEMU's own lock | until it is deleted |
| open in a QEMU that `qmp_socket` leads to | a *fleece*: see `qcow2_live` | while that QEMU runs |
| open in any other QEMU | refused (`volume-in-use`) | |

A VM cannot be started while an internal snapshot of its image is being read, and no second process
can read one while the VM runs: QEMU's locks see to both.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from offload import run
from offload.errors import (
    BusyError,
    NotFoundError,
    OffloadError,
    PolicyError,
)
from offload.extents import Ranges
from offload.filesystem import file_identity, mount_of, space_of
from offload.model import Instant, NbdSource, Qcow2Source, Snapshot, Source, Volume
from offload.snapshot import Plan, VolumeState
from offload.snapshots import naming, qcow2_live, qcow2_rest

_SUFFIX = ".fleece"
_BYTES_PER_S = 20e9  # an internal snapshot raises the reference count of every cluster in use
_REST_S = 0.2
_LIVE_S = 0.1
_NEEDED_BYTES = 2 << 20  # tables of the snapshot, or of an empty fleece
_SECTOR = 512  # QEMU's own unit, unless the configuration says otherwise

Ref = dict[str, str]


class Qcow2Provider:
    """Snapshots named `offload-<instance>-<timemark>` in the image, or fleeces
    `<snapshot_dir>/<instance>/<timemark>/<volume>.fleece` beside it."""

    name = "qcow2"

    def __init__(self, instance: str) -> None:
        self._instance = instance
        self._prefix = f"offload-{instance}-"

    # -- looking -------------------------------------------------------------------------------

    def inspect(self, volume: Volume) -> VolumeState:
        """Look at a volume; a fleece takes space where it lies as the VM goes on writing.

        Raises NotFoundError (`volume-missing`), UnavailableError (`not-qcow2`), BusyError
        (`volume-in-use`), PrivilegeError.
        """
        fd = _open(volume)
        try:
            live = qcow2_live.find(volume)
            info = image_info(volume.path, shared=live is not None)
            identity = file_identity(fd)
            allocated = _allocated(volume.path)
        finally:
            os.close(fd)
        size = live.size_bytes if live is not None else int(info["virtual-size"])
        place = naming.existing_part(naming.root_of(volume)) if live is not None else volume.path
        pool, pool_size, pool_free = _pool_of(place)
        return VolumeState(
            size_bytes=size,
            sector_size=volume.sector_size or _SECTOR,
            identity=identity,
            allocated_bytes=allocated,
            extents=0,
            estimate_s=_LIVE_S if live is not None else _rest_s(allocated),
            pool=pool,
            pool_size_bytes=pool_size,
            pool_free_bytes=pool_free,
            needed_bytes=_NEEDED_BYTES,
        )

    def plan(self, timemark: str, volumes: Sequence[Volume]) -> Plan:
        """One instant by itself: images at rest (all are locked while they are snapshot), or disks
        of one QEMU (one transaction)."""
        refs = tuple(self._ref(timemark, volume) for volume in volumes)
        places = {ref["qmp"] if ref["kind"] == "fleece" else "" for ref in refs}
        return Plan(
            timemark=timemark,
            volumes=tuple(volumes),
            refs=refs,
            instant_alone=Instant.ONE if len(places) == 1 else Instant.NONE,
            estimate_s=sum(
                _LIVE_S if ref["kind"] == "fleece" else _rest_s(_allocated(volume.path))
                for volume, ref in zip(volumes, refs, strict=True)
            ),
            notes=tuple(
                f"the snapshot of {volume.name} is served by its running QEMU and ends with it"
                for volume, ref in zip(volumes, refs, strict=True)
                if ref["kind"] == "fleece"
            ),
        )

    def _ref(self, timemark: str, volume: Volume) -> Ref:
        if qcow2_live.find(volume) is not None:
            return self._fleece_ref(volume, timemark)
        return self._internal_ref(volume, self._prefix + timemark)

    def _internal_ref(self, volume: Volume, name: str) -> Ref:
        ref = {"kind": "internal", "path": str(volume.path), "name": name}
        if volume.qmp_socket is not None:  # of a VM that may run when it is to be deleted
            ref["qmp"] = str(volume.qmp_socket)
        return ref

    def _fleece_ref(self, volume: Volume, timemark: str) -> Ref:
        base = naming.ref_of(volume, self._instance, timemark, _SUFFIX)
        return {**base, "kind": "fleece", "image": str(volume.path), "qmp": str(volume.qmp_socket)}

    # -- making --------------------------------------------------------------------------------

    def prepare(self, plan: Plan) -> None:
        """Make the empty fleeces and give them to QEMU."""
        for ref in plan.refs:
            if ref["kind"] == "fleece":
                naming.ensure_folder(self._fleece(ref).file)
                qcow2_live.prepare(self._fleece(ref))

    def snapshot(self, plan: Plan) -> tuple[Snapshot, ...]:
        """One transaction for all images at rest, and one for each QEMU."""
        pairs = list(zip(plan.volumes, plan.refs, strict=True))
        records = [self._record(volume, ref) for volume, ref in pairs]
        at_rest = [ref for ref in plan.refs if ref["kind"] == "internal"]
        live: dict[str, list[qcow2_live.Fleece]] = {}
        for ref in plan.refs:
            if ref["kind"] == "fleece":
                live.setdefault(ref["qmp"], []).append(self._fleece(ref))
        try:
            if at_rest:
                name = at_rest[0]["name"]
                qcow2_rest.snapshot([Path(ref["path"]) for ref in at_rest], name)
            for socket, fleeces in live.items():
                qcow2_live.begin(Path(socket), fleeces)
        except BaseException as failure:
            self._take_back(plan, failure)
            raise
        return tuple(records)

    def _take_back(self, plan: Plan, failure: BaseException) -> None:
        for ref in plan.refs:
            try:
                self.delete(dict(ref))
            except OffloadError as error:
                failure.add_note(error.message)

    def _record(self, volume: Volume, ref: Ref) -> Snapshot:
        fd = _open(volume)
        try:
            identity = file_identity(fd)
        finally:
            os.close(fd)
        if ref["kind"] == "fleece":
            size = qcow2_live.node_of(self._fleece(ref)).size_bytes
        else:
            size = int(image_info(volume.path, shared=False)["virtual-size"])
        return Snapshot(
            volume=volume.name,
            provider=self.name,
            ref=ref,
            size_bytes=size,
            sector_size=volume.sector_size or _SECTOR,
            identity=identity,
        )

    def settle(self, snapshots: Sequence[Snapshot]) -> None:
        """Flush the images. A fleece ends with its QEMU, so it needs no more than that."""
        for snapshot in snapshots:
            path = Path(snapshot.ref["path"])
            try:
                fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                try:
                    os.fsync(fd)
                finally:
                    os.close(fd)
            except OSError as error:
                raise naming.pool_error(error, path, "flush") from error

    # -- unmaking ------------------------------------------------------------------------------

    def delete(self, ref: Ref) -> None:
        """Delete a snapshot, planned, half made or whole. Idempotent.

        Raises PolicyError (`foreign-snapshot`), BusyError (`volume-in-use`), UnavailableError.
        """
        if ref["kind"] == "fleece":
            fleece = self._fleece(ref)
            qcow2_live.end(fleece)
            try:
                fleece.file.unlink(missing_ok=True)
            except NotADirectoryError:
                return
            except OSError as error:
                raise naming.pool_error(error, fleece.file, "delete") from error
            naming.remove_empty_folders(fleece.file)
            return
        path, name = self._internal(ref)
        socket = Path(ref["qmp"]) if "qmp" in ref else None
        if socket is not None and qcow2_live.delete_internal(socket, path, name):
            return
        try:
            qcow2_rest.delete(path, name)
        except BusyError:
            if name in _snapshot_names(path):
                raise

    def exists(self, ref: Ref) -> bool:
        """Whether it can be read now: a fleece of a QEMU that has ended is gone."""
        if ref["kind"] == "fleece":
            return qcow2_live.serves(self._fleece(ref))
        path, name = self._internal(ref)
        return name in _snapshot_names(path)

    def leftovers(self, volumes: Sequence[Volume]) -> list[Ref]:
        """Internal snapshots and fleeces that bear this instance's name."""
        found = []
        for volume in volumes:
            names = _snapshot_names(volume.path)
            found += [self._internal_ref(volume, n) for n in names if n.startswith(self._prefix)]
            if volume.qmp_socket is None:
                continue
            for ref in naming.find_refs([volume], self._instance, _SUFFIX):
                path = Path(ref["path"])
                if path.name == volume.name + _SUFFIX:
                    found.append(self._fleece_ref(volume, path.parent.name))
        return found

    # -- reading -------------------------------------------------------------------------------

    def source(self, snapshot: Snapshot) -> Source:
        """The internal snapshot, or the export that QEMU itself serves."""
        ref = dict(snapshot.ref)
        if ref["kind"] == "fleece":
            return NbdSource(
                uri=self._fleece(ref).uri,
                size_bytes=snapshot.size_bytes,
                sector_size=snapshot.sector_size,
            )
        path, name = self._internal(ref)
        return Qcow2Source(
            path=path,
            snapshot=name,
            size_bytes=snapshot.size_bytes,
            sector_size=snapshot.sector_size,
        )

    def changed(self, older: Snapshot, newer: Snapshot) -> Ranges | None:
        """Of fleeces, from the dirty bitmap that began with `older`; else unknown."""
        same = older.identity == newer.identity and older.size_bytes == newer.size_bytes
        if not same:
            return None
        if dict(older.ref) == dict(newer.ref):
            return []
        if older.ref["kind"] != "fleece" or newer.ref["kind"] != "fleece":
            return None
        if older.ref["qmp"] != newer.ref["qmp"]:
            return None
        return qcow2_live.changed(self._fleece(dict(older.ref)), self._fleece(dict(newer.ref)))

    def _internal(self, ref: Ref) -> tuple[Path, str]:
        name = ref["name"]
        if not re.fullmatch(re.escape(self._prefix) + r"[a-z0-9][a-z0-9._-]*", name):
            raise _foreign(name, self._instance)
        return Path(ref["path"]), name

    def _fleece(self, ref: Ref) -> qcow2_live.Fleece:
        return qcow2_live.Fleece(
            instance=self._instance,
            file=naming.own_path(ref, self._instance, _SUFFIX),
            image=Path(ref["image"]),
            qmp=Path(ref["qmp"]),
        )


def image_info(path: Path, *, shared: bool) -> dict[str, Any]:
    """What qemu-img tells of a qcow2 image; `shared`: even while a QEMU writes to it."""
    program = run.require_program("qemu-img", "qemu-utils")
    argv = [program, "info", "--output=json", "-f", "qcow2", *(["-U"] if shared else [])]
    try:
        done = run.run([*argv, str(path)])
    except run.ProgramError as error:
        raise qcow2_rest.explain(error, path) from error
    info: dict[str, Any] = json.loads(done.stdout)
    return info


def _snapshot_names(path: Path) -> list[str]:
    """Names of the internal snapshots of an image; none of one that is gone."""
    try:
        return [entry["name"] for entry in image_info(path, shared=True).get("snapshots", ())]
    except NotFoundError:
        return []


def _open(volume: Volume) -> int:
    try:
        fd = os.open(volume.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise NotFoundError(
            f"volume {volume.name}: {volume.path} is not there",
            code="volume-missing",
            hint="is its file system mounted?",
        ) from error
    except OSError as error:
        raise naming.pool_error(error, volume.path, "read") from error
    return fd


def _allocated(path: Path) -> int:
    """Bytes that the file takes; 0 where it is not there (`inspect` reports that)."""
    try:
        return path.stat().st_blocks * 512  # stat(2): units of 512 bytes, always
    except OSError:
        return 0


def _rest_s(allocated_bytes: int) -> float:
    return _REST_S + allocated_bytes / _BYTES_PER_S


def _pool_of(path: Path) -> tuple[str, int, int]:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return (mount_of(fd).point, *space_of(fd))
        finally:
            os.close(fd)
    except OSError as error:
        raise naming.pool_error(error, path, "look at") from error


def _foreign(name: str, instance: str) -> PolicyError:
    return PolicyError(
        f"'{name}' is no snapshot of this instance ({instance}) and is left alone",
        code="foreign-snapshot",
        hint="the record that names it is damaged, or of another state_dir",
    )
