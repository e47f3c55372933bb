"""`[hypervisors.NAME]`: what production VMs run on; `[backup_hosts.NAME]`: where placeholders
stand."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator

from offload.configs.base import Model, Seconds, absolute_path


class LibvirtConfig(Model):
    """`kind = "libvirt"`: a libvirt daemon."""

    kind: Literal["libvirt"]
    uri: str = "qemu:///system"  # of libvirt: https://libvirt.org/uri.html


class VsphereConfig(Model):
    """`kind = "vsphere"`: a vCenter server, or one ESXi host."""

    kind: Literal["vsphere"]
    server: str = Field(min_length=1)  # name or address
    port: int = Field(default=443, ge=1, le=65535)
    user: str = Field(min_length=1)
    password_file: Path  # one line, 0600
    certificates: Path | None = None  # authorities in PEM; none: those of this machine
    thumbprint: str | None = Field(  # SHA-256 of a self-signed certificate, instead of authorities
        default=None, pattern=r"^([0-9A-Fa-f]{2}:){31}[0-9A-Fa-f]{2}$"
    )
    snapshots_at_once: int = Field(default=5, ge=1, le=64)  # of VMs: made, or removed

    @field_validator("password_file", "certificates")
    @classmethod
    def _absolute(cls, value: Path | None) -> Path | None:
        return absolute_path(value)


HypervisorConfig = Annotated[LibvirtConfig | VsphereConfig, Field(discriminator="kind")]


class BackupHostConfig(Model):
    """`[backup_hosts.NAME]`: a host of a hypervisor on which placeholders are registered."""

    hypervisor: str  # a [hypervisors.NAME]
    host: str | None = None  # vSphere: the host's name there; none: the only one
    folder: str = Field(default="offload placeholders", min_length=1)  # vSphere: of the VMs
    prefix: str = Field(default="backup-", min_length=1, max_length=20)  # of placeholders' names
    target: Literal["nbd", "lio", "tgt"] | None = None  # None: libvirt nbd, vSphere lio
    address: str | None = None  # of the portal that the host logs in to; None: [iscsi] address
    adapter: str | None = None  # vSphere: e.g. vmhba64; None: the only software iSCSI adapter
    timeout_s: Seconds = 120.0  # for a LUN or datastore to appear
    disk_dir: Path | None = None  # libvirt: of the overlay files; None: in the state folder

    @field_validator("disk_dir")
    @classmethod
    def _absolute(cls, value: Path | None) -> Path | None:
        return absolute_path(value)

    @field_validator("address")
    @classmethod
    def _address(cls, value: str | None) -> str | None:
        if value is not None:
            ipaddress.ip_address(value)  # its ValueError says what is wrong
        return value
