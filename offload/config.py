"""One TOML file → typed, frozen models. Every error names file, key, value and the way out."""

from __future__ import annotations

import ipaddress
import os
import re
import stat
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)

from offload.ceph import ImageName
from offload.errors import ConfigError, NotFoundError
from offload.iqn import check_iqn
from offload.model import Consistency, Volume
from offload.quantity import Watermark, parse_duration, parse_size

SYSTEM_CONFIG = Path("/etc/offload/offload.toml")
_SECRET_KEYS = ("passphrase", "password", "secret")
CONFIG_ENV = "OFFLOAD_CONFIG"

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
RESERVED_GROUP_NAMES = ("list", "show", "diff", "delete", "create")  # words of `offload backup`


def _seconds(value: object) -> object:
    return parse_duration(value) if isinstance(value, str) else value


Seconds = Annotated[float, BeforeValidator(_seconds), Field(gt=0, le=86400)]


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


def _absolute_path(value: Path | None) -> Path | None:
    if value is not None and not value.is_absolute():
        raise ValueError("must be an absolute path")
    return value


def _check_networks(value: tuple[str, ...]) -> tuple[str, ...]:
    for text in value:
        ipaddress.ip_network(text)  # its ValueError says what is wrong
    return value


class VolumeConfig(_Model):
    """`[volumes.NAME]`."""

    provider: str
    path: Path | None = None  # of a file or a block device
    image: str | None = None  # rbd: pool/image, or pool/namespace/image
    snapshot_dir: Path | None = None  # default: `.offload` beside the volume
    sector_size: Literal[512, 4096] | None = None  # default: found out
    qmp_socket: Path | None = None  # qcow2: the QMP socket of the QEMU that has the image open
    conf: Path | None = None  # rbd: of the cluster; default: /etc/ceph/ceph.conf
    user: str | None = None  # rbd: default: client.admin

    @field_validator("path", "snapshot_dir", "qmp_socket", "conf")
    @classmethod
    def _absolute(cls, value: Path | None) -> Path | None:
        return _absolute_path(value)

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


class LocalQuiesce(_Model):
    """`kind = "local"`: file systems mounted on this machine, and/or commands before and after."""

    kind: Literal["local"]
    mounts: tuple[Path, ...] = ()
    pre: tuple[str, ...] = ()  # an argv list, run before the freeze
    post: tuple[str, ...] = ()  # an argv list, run after the thaw, where pre succeeded
    timeout_s: Seconds = 30.0  # of each command
    volumes: tuple[str, ...] = ()  # whose writers it holds; default: all of the group
    level: Consistency = Consistency.APPLICATION  # what the commands reach, when they succeed

    @model_validator(mode="after")
    def _something(self) -> LocalQuiesce:
        if not self.mounts and not self.pre:
            raise ValueError("needs mounts, or pre and post commands")
        return self


class QmpQuiesce(_Model):
    """`kind = "qmp"`: stops the CPUs of a QEMU for the instant of the snapshot."""

    kind: Literal["qmp"]
    socket: Path
    volumes: tuple[str, ...] = ()


QuiesceConfig = Annotated[LocalQuiesce | QmpQuiesce, Field(discriminator="kind")]


class GroupConfig(_Model):
    """`[groups.NAME]`."""

    volumes: tuple[str, ...] = Field(min_length=1)
    consistency: Consistency = Consistency.CRASH  # the least accepted
    atomic: Literal["require", "record"] = "require"  # where writers can't be held: refuse, or say
    deadline_s: Seconds = 10.0  # from the first freeze to the thaw
    store: str | None = None  # where `offload backup GROUP` goes by default
    quiesce: tuple[QuiesceConfig, ...] = ()


class KeepConfig(_Model):
    """`[stores.NAME.keep]`: which backups `prune` keeps, per group."""

    last: int = Field(default=0, ge=0)
    hourly: int = Field(default=0, ge=0)
    daily: int = Field(default=0, ge=0)
    weekly: int = Field(default=0, ge=0)
    monthly: int = Field(default=0, ge=0)
    yearly: int = Field(default=0, ge=0)
    within: Annotated[float, BeforeValidator(_seconds), Field(ge=0)] = 0.0  # seconds, or "14d"


class StoreConfig(_Model):
    """`[stores.NAME]`."""

    kind: Literal["disk"]
    path: Path
    min_free: str = "1GiB"  # a backup stops cleanly before the store's file system is fuller
    keep: KeepConfig | None = None
    passphrase: SecretStr | None = None  # refused: this version does not encrypt

    @field_validator("passphrase")
    @classmethod
    def _not_yet(cls, value: SecretStr | None) -> None:
        if value is not None:
            raise ValueError("this version does not encrypt stores; remove it, or wait")

    @field_validator("min_free")
    @classmethod
    def _free(cls, value: str) -> str:
        Watermark.parse(value)
        return value


class NbdConfig(_Model):
    """`[nbd]`: views over NBD on TCP. Unix sockets need none of it."""

    address: str = "127.0.0.1"
    tls: Literal["off", "certificates", "psk"] = "off"  # off: loopback only
    certificates: Path | None = None  # folder: ca-cert.pem, server-cert.pem, server-key.pem
    verify_clients: bool = True  # with certificates: clients need one of that authority
    psk: Path | None = None  # pre-shared keys, a line `user:hex` each, 0600
    allow: tuple[str, ...] = ()  # addresses and networks that are served; none: any

    @field_validator("address")
    @classmethod
    def _address(cls, value: str) -> str:
        ipaddress.ip_address(value)  # its ValueError says what is wrong
        return value

    @field_validator("certificates", "psk")
    @classmethod
    def _absolute(cls, value: Path | None) -> Path | None:
        return _absolute_path(value)

    @field_validator("allow")
    @classmethod
    def _networks(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return _check_networks(value)

    @model_validator(mode="after")
    def _complete(self) -> NbdConfig:
        if self.tls == "certificates" and self.certificates is None:
            raise ValueError("tls = 'certificates' needs certificates, a folder")
        if self.tls == "psk" and self.psk is None:
            raise ValueError("tls = 'psk' needs psk, a file")
        return self


class ChapConfig(_Model):
    """`[iscsi.chap]`: CHAP, and mutual CHAP where there is a mutual user. Secrets are files of one
    line that only their owner may read."""

    user: str = Field(min_length=1, max_length=255)
    secret_file: Path
    mutual_user: str | None = Field(default=None, min_length=1, max_length=255)
    mutual_secret_file: Path | None = None

    @field_validator("secret_file", "mutual_secret_file")
    @classmethod
    def _absolute(cls, value: Path | None) -> Path | None:
        return _absolute_path(value)

    @model_validator(mode="after")
    def _both(self) -> ChapConfig:
        if (self.mutual_user is None) != (self.mutual_secret_file is None):
            raise ValueError("mutual CHAP needs mutual_user and mutual_secret_file")
        return self


class IscsiConfig(_Model):
    """`[iscsi]`: views over iSCSI, by LIO or tgt."""

    address: str = "127.0.0.1"
    port: int = Field(default=3260, ge=1, le=65535)
    networks: tuple[str, ...] = ()  # storage networks: portals outside loopback must lie in one
    iqn_prefix: str = "iqn.2026-11.internal.offload"
    initiators: tuple[str, ...] = ()  # IQNs that may log in; needed outside loopback
    chap: ChapConfig | None = None  # needed outside loopback

    @field_validator("networks")
    @classmethod
    def _networks(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return _check_networks(value)

    @field_validator("iqn_prefix", "initiators")
    @classmethod
    def _names(cls, value: str | tuple[str, ...]) -> str | tuple[str, ...]:
        for name in (value,) if isinstance(value, str) else value:
            check_iqn(name)
        return value


class OverlayConfig(_Model):
    """`[overlays]`: what is written to writable views."""

    folder: Path | None = None  # default: `overlays` in the state folder
    limit: str = "20GiB"  # of one view, unless `mount --overlay-limit` says otherwise
    alarm: str = "80%"  # of the limit: from here on `status` and `watch` warn
    min_free: str = "1GiB"  # of the folder's file system: below it no writable view is mounted

    @field_validator("folder")
    @classmethod
    def _absolute(cls, value: Path | None) -> Path | None:
        return _absolute_path(value)

    @field_validator("limit")
    @classmethod
    def _size(cls, value: str) -> str:
        parse_size(value)
        return value

    @field_validator("alarm", "min_free")
    @classmethod
    def _share(cls, value: str) -> str:
        Watermark.parse(value)
        return value


class PoolConfig(_Model):
    """`[pool]`: care of production storage."""

    min_free: str = "10%"  # below it no new TimeMark is made
    reclaim: bool = True  # and the oldest unneeded TimeMarks go first

    @field_validator("min_free")
    @classmethod
    def _free(cls, value: str) -> str:
        Watermark.parse(value)
        return value


class Config(_Model):
    """The whole file."""

    state_dir: Path = Path("/var/lib/offload")
    runtime_dir: Path | None = None
    volumes: dict[str, VolumeConfig] = {}
    groups: dict[str, GroupConfig] = {}
    stores: dict[str, StoreConfig] = {}
    pool: PoolConfig = PoolConfig()
    nbd: NbdConfig = NbdConfig()
    iscsi: IscsiConfig = IscsiConfig()
    overlays: OverlayConfig = OverlayConfig()

    @model_validator(mode="after")
    def _names(self) -> Config:
        for table in ("volumes", "groups", "stores"):
            for name in getattr(self, table):
                if not _NAME.fullmatch(name):
                    raise ValueError(
                        f"{table}.{name}: a name has lower-case letters, digits, '.', '_' and '-'"
                    )
        for name, group in self.groups.items():
            if name in RESERVED_GROUP_NAMES:
                raise ValueError(f"groups.{name}: '{name}' is a word of the command line")
            self._check_group(name, group)
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
        if group.store is not None and group.store not in self.stores:
            raise ValueError(f"groups.{name}.store: there is no [stores.{group.store}]")

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

    def store(self, name: str) -> StoreConfig:
        """A store; NotFoundError if the file has none of that name."""
        if name not in self.stores:
            raise _unknown("store", name, self.stores)
        return self.stores[name]


def _unknown(kind: str, name: str, table: dict[str, Any]) -> NotFoundError:
    known = ", ".join(sorted(table)) or "none"
    return NotFoundError(
        f"no {kind} '{name}' in the configuration",
        code=f"unknown-{kind}",
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
        key = ".".join(str(part) for part in item["loc"] if part not in ("local", "qmp"))
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

    models = (Config, VolumeConfig, GroupConfig, LocalQuiesce, QmpQuiesce, StoreConfig, KeepConfig,
              PoolConfig, NbdConfig, IscsiConfig, ChapConfig, OverlayConfig)  # fmt: skip
    known = {name for model in models for name in model.model_fields}
    near = difflib.get_close_matches(key, known, n=1)
    return f", did you mean '{near[0]}'?" if near else ""


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
