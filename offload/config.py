"""One TOML file → typed, frozen models. Every error names file, key, value and the way out."""

from __future__ import annotations

import os
import re
import stat
import tomllib
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import (
    BaseModel,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from offload.ceph import ImageName
from offload.configs.base import Model, Seconds, absolute_path
from offload.configs.hypervisors import BackupHostConfig, HypervisorConfig
from offload.configs.quiesce import LibvirtFreeze, QuiesceConfig, VmConfig, VmwareFreeze
from offload.configs.stores import StoreConfig
from offload.configs.targets import CacheConfig, IscsiConfig, NbdConfig, OverlayConfig
from offload.errors import ConfigError, NotFoundError
from offload.model import Consistency, Volume
from offload.quantity import Watermark

SYSTEM_CONFIG = Path("/etc/offload/offload.toml")
_SECRET_KEYS = ("passphrase", "password", "secret")
# pydantic puts the kind of a table that comes in several into the place of an error
_KINDS = (
    "local", "qmp", "qemu-ga", "libvirt", "vmware", "vsphere",
    "postgresql", "mysql", "sqlite", "script", "ssh", "disk", "s3",
)  # fmt: skip
_LUN = r"^(naa|eui|t10)\.[0-9A-Za-z_.\-]{8,}$"  # a vSphere canonical name
CONFIG_ENV = "OFFLOAD_CONFIG"

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
RESERVED_GROUP_NAMES = (  # words of `offload backup`
    "list", "show", "diff", "delete", "create", "hold", "release",
)  # fmt: skip


class VolumeConfig(Model):
    """`[volumes.NAME]`."""

    provider: str
    path: Path | None = None  # of a file or a block device
    image: str | None = None  # rbd: pool/image, or pool/namespace/image
    snapshot_dir: Path | None = None  # default: `.offload` beside the volume
    sector_size: Literal[512, 4096] | None = None  # default: found out
    qmp_socket: Path | None = None  # qcow2: the QMP socket of the QEMU that has the image open
    conf: Path | None = None  # rbd: of the cluster; default: /etc/ceph/ceph.conf
    user: str | None = None  # rbd: default: client.admin
    lun: str | None = Field(default=None, pattern=_LUN)  # as hypervisors know it: naa.…

    @field_validator("path", "snapshot_dir", "qmp_socket", "conf")
    @classmethod
    def _absolute(cls, value: Path | None) -> Path | None:
        return absolute_path(value)

    @field_validator("image")
    @classmethod
    def _image(cls, value: str | None) -> str | None:
        return None if value is None else str(ImageName.parse(value))

    @field_validator("user")
    @classmethod
    def _user(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"client\.\S+", value):
            raise ValueError("must be client.NAME")
        return value

    @model_validator(mode="after")
    def _place(self) -> VolumeConfig:
        if self.provider == "rbd":
            if self.image is None or self.path is not None:
                raise ValueError("provider 'rbd' needs image = 'pool/image', and no path")
            return self
        if self.path is None:
            raise ValueError("needs path, a file or block device")
        for key in ("image", "conf", "user"):
            if getattr(self, key) is not None:
                raise ValueError(f"{key} goes with provider 'rbd' only")
        return self

    @property
    def place(self) -> Path:
        """The path, or where the kernel shows the image if it is mapped."""
        if self.image is not None:
            return ImageName.parse(self.image).device
        assert self.path is not None  # noqa: S101 - _place has seen to it
        return self.path


class GroupConfig(Model):
    """`[groups.NAME]`: volumes by name, or chosen by what a hypervisor has at run time."""

    volumes: tuple[str, ...] = ()
    hypervisor: str | None = None  # a [hypervisors.NAME], where the following are looked up
    vms: tuple[str, ...] = ()  # names, or instance UUIDs
    tags: tuple[str, ...] = ()  # `category:tag`
    folders: tuple[str, ...] = ()  # `/DC0/vm/web`, with all below
    datastores: tuple[str, ...] = ()  # names
    luns: tuple[str, ...] = ()  # naa.…
    consistency: Consistency = Consistency.CRASH  # the least accepted
    atomic: Literal["require", "record"] = "require"  # where writers can't be held: refuse, or say
    deadline_s: Seconds = 10.0  # from the first freeze to the thaw
    store: str | None = None  # where `offload backup GROUP` goes by default
    quiesce: tuple[QuiesceConfig, ...] = ()

    @property
    def chooses(self) -> bool:
        """Whether its volumes and VMs are looked up at run time."""
        return bool(self.vms or self.tags or self.folders or self.datastores or self.luns)

    @model_validator(mode="after")
    def _something(self) -> GroupConfig:
        if not (self.volumes or self.chooses):
            raise ValueError("needs volumes, or vms, tags, folders, datastores or luns")
        if self.chooses and self.hypervisor is None:
            raise ValueError("vms, tags, folders, datastores and luns need hypervisor")
        if self.hypervisor is not None and not self.chooses:
            raise ValueError("hypervisor needs vms, tags, folders, datastores or luns")
        return self


class PoolConfig(Model):
    """`[pool]`: care of production storage."""

    min_free: str = "10%"  # below it no new TimeMark is made
    reclaim: bool = True  # and the oldest unneeded TimeMarks go first

    @field_validator("min_free")
    @classmethod
    def _free(cls, value: str) -> str:
        Watermark.parse(value)
        return value


class Config(Model):
    """The whole file."""

    state_dir: Path = Path("/var/lib/offload")
    runtime_dir: Path | None = None
    volumes: dict[str, VolumeConfig] = Field(default_factory=dict)
    groups: dict[str, GroupConfig] = Field(default_factory=dict)
    vms: dict[str, VmConfig] = Field(default_factory=dict)
    hypervisors: dict[str, HypervisorConfig] = Field(default_factory=dict)
    backup_hosts: dict[str, BackupHostConfig] = Field(default_factory=dict)
    stores: dict[str, StoreConfig] = Field(default_factory=dict)
    pool: PoolConfig = PoolConfig()
    nbd: NbdConfig = NbdConfig()
    iscsi: IscsiConfig = IscsiConfig()
    overlays: OverlayConfig = OverlayConfig()
    cache: CacheConfig = CacheConfig()

    @model_validator(mode="after")
    def _names(self) -> Config:
        for table in ("volumes", "groups", "stores", "vms", "hypervisors", "backup_hosts"):
            for name in getattr(self, table):
                if not _NAME.fullmatch(name):
                    raise ValueError(
                        f"{table}.{name}: a name has lower-case letters, digits, '.', '_' and '-'"
                    )
        for name, group in self.groups.items():
            if name in RESERVED_GROUP_NAMES:
                raise ValueError(f"groups.{name}: '{name}' is a word of the command line")
            self._check_group(name, group)
        for name, vm in self.vms.items():
            self._check_vm(name, vm)
        for name, host in self.backup_hosts.items():
            if host.hypervisor not in self.hypervisors:
                raise ValueError(
                    f"backup_hosts.{name}: there is no [hypervisors.{host.hypervisor}]"
                )
        return self

    def _check_group(self, name: str, group: GroupConfig) -> None:
        if len(set(group.volumes)) != len(group.volumes):
            raise ValueError(f"groups.{name}.volumes names a volume twice")
        for volume in group.volumes:
            if volume not in self.volumes:
                raise ValueError(f"groups.{name}.volumes: there is no [volumes.{volume}]")
        for entry in group.quiesce:
            for volume in entry.volumes:
                if volume not in group.volumes:
                    raise ValueError(f"groups.{name}.quiesce: '{volume}' is not in the group")
        if group.hypervisor is not None and group.hypervisor not in self.hypervisors:
            raise ValueError(f"groups.{name}: there is no [hypervisors.{group.hypervisor}]")
        if group.store is not None and group.store not in self.stores:
            raise ValueError(f"groups.{name}.store: there is no [stores.{group.store}]")

    def _check_vm(self, name: str, vm: VmConfig) -> None:
        for volume in vm.volumes:
            if volume not in self.volumes:
                raise ValueError(f"vms.{name}.volumes: there is no [volumes.{volume}]")
        freeze = vm.freeze
        if not isinstance(freeze, LibvirtFreeze | VmwareFreeze):
            return
        wanted = "libvirt" if freeze.kind == "libvirt" else "vsphere"
        known = self.hypervisors.get(freeze.hypervisor)
        if known is None or known.kind != wanted:
            raise ValueError(
                f"vms.{name}.freeze: there is no [hypervisors.{freeze.hypervisor}] of kind {wanted}"
            )

    def vms_of(self, group: str) -> dict[str, VmConfig]:
        """The VMs with a disk on a volume of the group, and no others."""
        volumes = set(self.group(group).volumes)
        return {name: vm for name, vm in self.vms.items() if volumes & set(vm.volumes)}

    def volume(self, name: str) -> Volume:
        """A volume as the providers want it; NotFoundError if the file has none of that name."""
        entry = self.volumes.get(name)
        if entry is None:
            raise _unknown("volume", name, self.volumes)
        return Volume(
            name=name,
            provider=entry.provider,
            path=entry.place,
            snapshot_dir=entry.snapshot_dir,
            sector_size=entry.sector_size,
            qmp_socket=entry.qmp_socket,
            conf=entry.conf,
            user=entry.user,
        )

    def group(self, name: str) -> GroupConfig:
        """A group; NotFoundError if the file has none of that name."""
        if name not in self.groups:
            raise _unknown("group", name, self.groups)
        return self.groups[name]

    def hypervisor(self, name: str) -> HypervisorConfig:
        """A hypervisor; NotFoundError if the file has none of that name."""
        if name not in self.hypervisors:
            raise _unknown("hypervisor", name, self.hypervisors)
        return self.hypervisors[name]

    def backup_host(self, name: str) -> BackupHostConfig:
        """A backup host; NotFoundError if the file has none of that name."""
        if name not in self.backup_hosts:
            raise _unknown("backup host", name, self.backup_hosts)
        return self.backup_hosts[name]

    def store(self, name: str) -> StoreConfig:
        """A store; NotFoundError if the file has none of that name."""
        if name not in self.stores:
            raise _unknown("store", name, self.stores)
        return self.stores[name]


def _unknown(kind: str, name: str, table: dict[str, Any]) -> NotFoundError:
    known = ", ".join(sorted(table)) or "none"
    return NotFoundError(
        f"no {kind} '{name}' in the configuration",
        code=f"unknown-{kind.replace(' ', '-')}",
        hint=f"configured: {known}",
    )


def find_config(explicit: Path | None) -> Path:
    """`--config`, `OFFLOAD_CONFIG`, the user's file, the system's file: the first that exists.

    An explicit choice must exist. Raises ConfigError (`config-missing`).
    """
    chosen = explicit or (Path(os.environ[CONFIG_ENV]) if os.environ.get(CONFIG_ENV) else None)
    if chosen is not None:
        if not chosen.is_file():
            raise ConfigError(
                f"no configuration file {chosen}",
                code="config-missing",
                hint=f"write one with: offload --config {chosen} init",
            )
        return chosen
    for path in usual_places():
        if path.is_file():
            return path
    raise ConfigError(
        "no configuration found in " + " or ".join(str(p) for p in usual_places()),
        code="config-missing",
        hint="write one with: offload init",
    )


def usual_places() -> tuple[Path, ...]:
    """Where the file is looked for: the user's own place, then the system's. Root: system only."""
    if os.geteuid() == 0:
        return (SYSTEM_CONFIG,)
    home = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    return (home / "offload" / "offload.toml", SYSTEM_CONFIG)


def load_config(path: Path) -> Config:
    """Read and check one file. Raises ConfigError."""
    try:
        raw = path.read_bytes()
        data = tomllib.loads(raw.decode("utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is no valid TOML: {error}", code="config-syntax") from error
    _check_mode(path, data)
    try:
        return Config.model_validate(data)
    except ValidationError as error:
        raise ConfigError(
            _explain(path, error),
            code="config-invalid",
            hint="all keys and values, explained: offload --config NEWFILE init",
        ) from error


def _explain(path: Path, error: ValidationError) -> str:
    lines = []
    for item in error.errors():
        # the second part is a name that the file gives, and may be such a word
        parts = (p for at, p in enumerate(item["loc"]) if at == 1 or p not in _KINDS)
        key = ".".join(str(part) for part in parts)
        if item["type"] == "extra_forbidden":
            lines.append(f"unknown key '{key}'" + _suggest(str(item["loc"][-1])))
        else:
            message = item["msg"].removeprefix("Value error, ")
            shown = "" if item["type"] == "missing" or not key else f" (found {item['input']!r})"
            if "passphrase" in key or isinstance(item["input"], dict):
                shown = ""
            lines.append(f"{key}: {message}{shown}" if key else message)
    return f"{path}: " + "; ".join(lines)


def _suggest(key: str) -> str:
    import difflib

    known = {name for model in all_models() for name in model.model_fields}
    near = difflib.get_close_matches(key, sorted(known), n=1)
    return f", did you mean '{near[0]}'?" if near else ""


def all_models(root: type[BaseModel] = Config) -> set[type[BaseModel]]:
    """The file's model and those of all its tables."""
    found = {root}
    for field in root.model_fields.values():
        for inner in _models_in(field.annotation):
            found |= all_models(inner)
    return found


def _models_in(annotation: Any) -> set[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return {annotation}
    return {model for part in get_args(annotation) for model in _models_in(part)}


def _check_mode(path: Path, data: dict[str, Any]) -> None:
    """A file that others may write decides over production data; one with secrets is private."""
    mode = path.stat().st_mode
    if mode & stat.S_IWOTH:
        raise ConfigError(
            f"{path} is writable by everyone", code="config-unsafe", hint=f"chmod o-w {path}"
        )
    if mode & (stat.S_IRWXG | stat.S_IRWXO) and _has_secret(data):
        raise ConfigError(
            f"{path} holds a secret and others may read it",
            code="config-unsafe",
            hint=f"chmod 600 {path}",
        )


def _has_secret(data: object) -> bool:
    """Whether any key is one that holds a secret, before it is known to be a valid one."""
    if isinstance(data, dict):
        return any(key in _SECRET_KEYS or _has_secret(value) for key, value in data.items())
    return isinstance(data, list) and any(_has_secret(entry) for entry in data)
