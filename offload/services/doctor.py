"""What this machine has and lacks for each capability, and what would give it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path

from offload import compose, host_rules, kernel_module, run
from offload.config import Config
from offload.configs.quiesce import LocalQuiesce
from offload.configs.stores import StoreConfig
from offload.errors import ConfigError, OffloadError, PrivilegeError
from offload.host_rules import RuleState
from offload.procs import has_capability
from offload.quantity import Watermark, show_size
from offload.services.volumes import VolumeReport, look_at_all

_SKEW_S = 60.0  # servers of S3 refuse requests from 15 minutes on

_CAP_SYS_ADMIN = 21  # linux/capability.h; FIFREEZE and mounts need it
_FILTERS = ("blocksize-policy",)
_PLUGINS = {"file": "nbdkit", "nbd": "nbdkit", "python": "nbdkit-plugin-python"}  # → package


class Status(StrEnum):
    """How far a capability is there."""

    OK = "ok"
    LIMITED = "limited"
    MISSING = "missing"


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One capability. `fix` says what would give it; `required`: this configuration needs it."""

    name: str
    status: Status
    detail: str
    fix: str = ""
    required: bool = False


def check_names(config: Config) -> None:
    """ConfigError if a volume names a provider that does not exist."""
    for name, volume in config.volumes.items():
        try:
            compose.snapshot_provider(volume.provider, "check")
        except ConfigError as error:
            raise ConfigError(
                f"volumes.{name}.provider: {error.message}", code=error.code, hint=error.hint
            ) from error


def examine(config: Config | None) -> list[Check]:
    """Look at everything; None: without a configuration nothing is required of the machine."""
    checks = [*_machine(config)]
    if config is not None:
        checks.append(_state_dir(config))
        checks += _nbd_tls(config)
        reports = look_at_all(config)
        checks += [_volume(report) for report in reports]
        checks += _pools(config, reports)
        checks += [_store(name, entry) for name, entry in config.stores.items()]
    return checks


def lacking(checks: list[Check]) -> list[Check]:
    """What this configuration requires and the machine does not have."""
    return [check for check in checks if check.required and check.status is Status.MISSING]


def _machine(config: Config | None) -> Iterator[Check]:
    volumes = config.volumes.values() if config else ()
    qcow2 = any(volume.provider == "qcow2" for volume in volumes)
    thin = any(volume.provider == "lvmthin" for volume in volumes)
    ceph = any(volume.provider == "rbd" for volume in volumes)
    served = bool(config and config.volumes)
    yield _freeze(config)
    yield _reflink()
    yield _program("nbdkit", "nbdkit", "TimeViews", required=served)
    composed = ceph or bool(config and config.stores)
    yield from _nbdkit_modules(served=served, composed=composed, qcow2=qcow2)
    yield _libnbd(required=qcow2)
    yield _librbd(required=ceph)
    yield _program("qemu-nbd", "qemu-utils", "qcow2 volumes", required=qcow2)
    yield _program("qemu-img", "qemu-utils", "qcow2 volumes", required=qcow2)
    yield _program("lvcreate", "lvm2", "thin logical volumes", required=thin)
    yield _program(
        "thin_delta",
        "thin-provisioning-tools",
        "incremental backups of thin logical volumes",
        required=False,
    )
    yield _program(
        "qemu-storage-daemon", "qemu-system-common", "writable TimeViews", required=False
    )
    yield _program("tgtd", "tgt", "TimeViews over iSCSI in user space", required=False)
    yield _lio()
    yield _kernel_nbd()
    yield _program("iscsiadm", "open-iscsi", "views over iSCSI as block devices", required=False)
    yield from _host_rules()
    yield _guestfish()
    yield _loop_devices()


def _program(name: str, package: str, purpose: str, *, required: bool) -> Check:
    found = run.find_program(name)
    return Check(
        name=name,
        status=Status.OK if found else Status.MISSING,
        detail=f"{purpose}: {found}" if found else f"{purpose} need it",
        fix="" if found else f"apt-get install {package}",
        required=required,
    )


def _nbdkit_modules(*, served: bool, composed: bool, qcow2: bool) -> Iterator[Check]:
    program = run.find_program("nbdkit")
    folders = _nbdkit_folders(program) if program else {}
    for name, package in _PLUGINS.items():
        path = Path(folders.get("plugindir", "")) / f"nbdkit-{name}-plugin.so"
        needed = {"file": served, "python": composed, "nbd": qcow2}[name]
        purpose = {
            "file": "snapshots", "nbd": "qcow2 images", "python": "backups and RBD images",
        }[name]  # fmt: skip
        yield _module(
            f"nbdkit plugin {name}", path, f"TimeViews of {purpose}", package, required=needed
        )
    for name in _FILTERS:
        path = Path(folders.get("filterdir", "")) / f"nbdkit-{name}-filter.so"
        purpose = "the sector size of TimeViews"
        yield _module(f"nbdkit filter {name}", path, purpose, "nbdkit", required=served)


def _module(name: str, path: Path, purpose: str, package: str, *, required: bool) -> Check:
    there = path.is_file()
    return Check(
        name=name,
        status=Status.OK if there else Status.MISSING,
        detail=purpose,
        fix="" if there else f"apt-get install {package}",
        required=required,
    )


def _nbdkit_folders(program: str) -> dict[str, str]:
    try:
        lines = run.run([program, "--dump-config"], timeout_s=10).stdout.splitlines()
    except run.ProgramError:
        return {}
    return dict(line.split("=", 1) for line in lines if "=" in line)


def _freeze(config: Config | None) -> Check:
    groups = config.groups.values() if config else ()
    mounts = any(
        isinstance(entry, LocalQuiesce) and entry.mounts
        for group in groups
        for entry in group.quiesce
    )
    allowed = has_capability(_CAP_SYS_ADMIN)
    return Check(
        name="freeze",
        status=Status.OK if allowed else Status.MISSING,
        detail="freezing mounted file systems (FIFREEZE)"
        + ("" if allowed else " needs root or CAP_SYS_ADMIN"),
        fix="" if allowed else "run as root, or from the systemd units",
        required=mounts,
    )


def _reflink() -> Check:
    """Whether the kernel can mount a file system with reflinks; each volume is looked at alone."""
    known = Path("/proc/filesystems").read_text().split()
    loadable = Path("/lib/modules") / os.uname().release / "kernel" / "fs"
    found = [fs for fs in ("xfs", "btrfs") if fs in known or (loadable / fs).is_dir()]
    return Check(
        name="reflink",
        status=Status.OK if found else Status.MISSING,
        detail=f"instant snapshots of image files: {', '.join(found)}"
        if found
        else "instant snapshots of image files need XFS or btrfs",
        fix="" if found else "load the kernel module xfs or btrfs",
    )


def _libnbd(*, required: bool) -> Check:
    there = find_spec("nbd") is not None
    return Check(
        name="libnbd for Python",
        status=Status.OK if there else Status.MISSING,
        detail="reading images from NBD servers",
        fix=""
        if there
        else "apt-get install python3-libnbd (and a virtual environment with system site packages)",
        required=required,
    )


def _librbd(*, required: bool) -> Check:
    lacking = [name for name in ("rados", "rbd") if find_spec(name) is None]
    return Check(
        name="librbd for Python",
        status=Status.MISSING if lacking else Status.OK,
        detail="images in a Ceph cluster",
        fix=f"apt-get install {' '.join('python3-' + name for name in lacking)} "
        "(and a virtual environment with system site packages)"
        if lacking
        else "",
        required=required,
    )


def _lio() -> Check:
    """What of the kernel's own iSCSI target is there; nothing is loaded for it."""
    from targets import lio_kernel

    status, detail, fix = Status.OK, "", ""
    try:
        lio_kernel.check()
    except PrivilegeError as error:
        status, detail, fix = Status.LIMITED, f": {error.message}", "run as root"
    except OffloadError as error:
        status, detail, fix = Status.MISSING, f": {error.message}", error.hint
    return Check(
        name="LIO", status=status, detail=f"TimeViews over iSCSI by the kernel{detail}", fix=fix
    )


def _kernel_nbd() -> Check:
    there = kernel_module.available("nbd")
    return Check(
        name="kernel NBD client",
        status=Status.OK if there else Status.MISSING,
        detail="views over NBD as block devices of this machine",
        fix="" if there else "a kernel with the module nbd: apt-get install linux-image-amd64",
    )


def _host_rules() -> Iterator[Check]:
    """What keeps this machine from acting on what connected views hold."""
    for rule in host_rules.look():
        if rule.state is not RuleState.NOT_NEEDED:
            fix = "offload host-rules --print" if rule.by_hand else "offload host-rules --install"
            yield Check(
                name=f"host rule for {rule.name}",
                status=Status.OK if rule.in_force else Status.LIMITED,
                detail=f"keeps it off connected views; {rule.state} ({rule.path})",
                fix="" if rule.in_force else fix,
            )


def _guestfish() -> Check:
    """libguestfs boots a kernel of the distribution: without one it is there but of no use."""
    program = run.find_program("guestfish")
    kernels = list(Path("/boot").glob("vmlinuz-*"))
    detail = "files out of TimeViews, parsed in a virtual machine"
    fix = ""
    if not program:
        fix = "apt-get install libguestfs-tools"
    elif not kernels:
        detail, fix = f"{detail}; no kernel in /boot", "apt-get install linux-image-amd64"
    elif not os.access("/dev/kvm", os.R_OK | os.W_OK):
        detail += "; emulated, so slow: no /dev/kvm here"
    return Check(
        name="guestfish",
        status=(Status.MISSING if not program else Status.LIMITED if fix else Status.OK),
        detail=detail,
        fix=fix,
    )


def _loop_devices() -> Check:
    there = Path("/dev/loop-control").exists()
    allowed = there and os.access("/dev/loop-control", os.R_OK | os.W_OK)
    return Check(
        name="loop devices",
        status=Status.OK if allowed else Status.LIMITED if there else Status.MISSING,
        detail="a reflink pool inside a file" + (" needs root" if there and not allowed else ""),
        fix="" if allowed else "run as root" if there else "load the kernel module loop",
    )


def _state_dir(config: Config) -> Check:
    place = config.state_dir
    while not place.exists() and place != place.parent:
        place = place.parent
    fine = place.is_dir() and os.access(place, os.R_OK | os.W_OK | os.X_OK)
    made = "" if place == config.state_dir else " (will be made)"
    return Check(
        name="state folder",
        status=Status.OK if fine else Status.MISSING,
        detail=f"{config.state_dir}{made}" if fine else f"{place} may not be written",
        fix="" if fine else "choose another state_dir, or run as its owner",
        required=True,
    )


def _nbd_tls(config: Config) -> Iterator[Check]:
    """What views over TLS will need, before a mount or a client finds it missing."""
    from offload import nbd_tls

    for kind, place in (("certificates", config.nbd.certificates), ("psk", config.nbd.psk)):
        if place is None:
            continue
        name, required = f"NBD over TLS, {kind}", config.nbd.tls == kind
        try:
            found = nbd_tls.load(config.nbd, kind)
        except ConfigError as error:
            yield Check(
                name=name,
                status=Status.MISSING,
                detail=error.message,
                fix=error.hint,
                required=required,
            )
            continue
        fix = nbd_tls.advice(found, config.nbd.address, datetime.now(UTC))
        yield Check(
            name=name,
            status=Status.LIMITED if fix else Status.OK,
            detail=nbd_tls.describe(found),
            fix=fix,
            required=required,
        )


def _volume(report: VolumeReport) -> Check:
    name = f"volume {report.volume.name}"
    if report.state is None:
        error = report.error
        return Check(
            name=name,
            status=Status.MISSING,
            detail=error.message if error else "",
            fix=error.hint if error else "",
            required=True,
        )
    detail = f"{report.volume.provider}, {show_size(report.state.size_bytes)}"
    return Check(name=name, status=Status.OK, detail=detail, required=True)


def _pools(config: Config, reports: list[VolumeReport]) -> list[Check]:
    watermark = Watermark.parse(config.pool.min_free)
    pools = {r.state.pool: r.state for r in reports if r.state is not None and r.state.pool}
    checks = []
    for name, state in pools.items():
        left = f"{show_size(state.pool_free_bytes)} of {show_size(state.pool_size_bytes)} free"
        low = state.pool_free_bytes < watermark.of(state.pool_size_bytes)
        checks.append(
            Check(
                name=f"pool {name}",
                status=Status.LIMITED if low else Status.OK,
                detail=left + (f", under the watermark of {config.pool.min_free}" if low else ""),
                fix="delete TimeMarks, or grow the pool" if low else "",
                required=True,
            )
        )
    return checks


def _store(name: str, entry: StoreConfig) -> Check:
    from offload.format import layout

    label = f"store {name}"
    try:
        with closing(compose.open_store(entry.spec())) as store:
            if not store.exists(layout.STORE_OBJECT):
                return Check(
                    name=label,
                    status=Status.LIMITED,
                    detail=f"{store.url} is not initialised",
                    fix=f"offload store init {name}",
                    required=True,
                )
            layout.decode_parameters(store.get(layout.STORE_OBJECT), store.url)
            space = store.space_bytes()
            skew_s = (store.now() - datetime.now(UTC)).total_seconds()
    except OffloadError as error:
        return Check(
            name=label, status=Status.MISSING, detail=error.message, fix=error.hint, required=True
        )
    left = "" if space is None else f", {show_size(space[0])} free"
    if abs(skew_s) > _SKEW_S:
        return Check(
            name=label,
            status=Status.LIMITED,
            detail=f"{store.url}{left}; its clock and this machine's are {abs(skew_s):.0f} s apart",
            fix="set the clocks, e.g. with timedatectl set-ntp true",
            required=True,
        )
    return Check(name=label, status=Status.OK, detail=f"{store.url}{left}", required=True)
