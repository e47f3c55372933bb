"""`[nbd]`, `[iscsi]`, `[overlays]` and `[cache]`: where and to whom views are exposed, and how."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator, model_validator

from offload.configs.base import Model, absolute_path, check_networks
from offload.iqn import check_iqn
from offload.quantity import Watermark, parse_size


class NbdConfig(Model):
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
        return absolute_path(value)

    @field_validator("allow")
    @classmethod
    def _networks(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return check_networks(value)

    @model_validator(mode="after")
    def _complete(self) -> NbdConfig:
        if self.tls == "certificates" and self.certificates is None:
            raise ValueError("tls = 'certificates' needs certificates, a folder")
        if self.tls == "psk" and self.psk is None:
            raise ValueError("tls = 'psk' needs psk, a file")
        return self


class ChapConfig(Model):
    """`[iscsi.chap]`: CHAP, and mutual CHAP where there is a mutual user. Secrets are files of one
    line that only their owner may read."""

    user: str = Field(min_length=1, max_length=255)
    secret_file: Path
    mutual_user: str | None = Field(default=None, min_length=1, max_length=255)
    mutual_secret_file: Path | None = None

    @field_validator("secret_file", "mutual_secret_file")
    @classmethod
    def _absolute(cls, value: Path | None) -> Path | None:
        return absolute_path(value)

    @model_validator(mode="after")
    def _both(self) -> ChapConfig:
        if (self.mutual_user is None) != (self.mutual_secret_file is None):
            raise ValueError("mutual CHAP needs mutual_user and mutual_secret_file")
        return self


class IscsiConfig(Model):
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
        return check_networks(value)

    @field_validator("iqn_prefix", "initiators")
    @classmethod
    def _names(cls, value: str | tuple[str, ...]) -> str | tuple[str, ...]:
        for name in (value,) if isinstance(value, str) else value:
            check_iqn(name)
        return value


class OverlayConfig(Model):
    """`[overlays]`: what is written to writable views."""

    folder: Path | None = None  # default: `overlays` in the state folder
    limit: str = "20GiB"  # of one view, unless `mount --overlay-limit` says otherwise
    alarm: str = "80%"  # of the limit: from here on `status` and `watch` warn
    min_free: str = "1GiB"  # of the folder's file system: below it no writable view is mounted

    @field_validator("folder")
    @classmethod
    def _absolute(cls, value: Path | None) -> Path | None:
        return absolute_path(value)

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


class CacheConfig(Model):
    """`[cache]`: what is kept of backups that are read as views, from stores that are far (S3)."""

    folder: Path | None = None  # default: `cache/blocks` in the state folder
    disk: str = "4GiB"  # of all views together; "0" keeps nothing
    memory: str = "16MiB"  # decoded chunks, of each view
    read_ahead: str = "8MiB"  # how far a stream is read ahead; at most half of memory; "0": not

    @field_validator("folder")
    @classmethod
    def _absolute(cls, value: Path | None) -> Path | None:
        return absolute_path(value)

    @field_validator("disk", "memory", "read_ahead")
    @classmethod
    def _size(cls, value: str) -> str:
        parse_size(value)
        return value
