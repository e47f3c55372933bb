"""`[hypervisors.NAME]`: what production VMs run on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator

from offload.configs.base import Model, absolute_path


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

    @field_validator("password_file", "certificates")
    @classmethod
    def _absolute(cls, value: Path | None) -> Path | None:
        return absolute_path(value)


HypervisorConfig = Annotated[LibvirtConfig | VsphereConfig, Field(discriminator="kind")]
