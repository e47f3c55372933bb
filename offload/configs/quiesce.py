"""`[[groups.NAME.quiesce]]` and `[vms.NAME]`: who holds whose writers, and how."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from offload.configs.base import Model, Seconds, absolute_path
from offload.model import Consistency

# -- on this machine, for a group ------------------------------------------------------------------


class LocalQuiesce(Model):
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


class QmpQuiesce(Model):
    """`kind = "qmp"`: stops the CPUs of a QEMU for the instant of the snapshot."""

    kind: Literal["qmp"]
    socket: Path
    volumes: tuple[str, ...] = ()


QuiesceConfig = Annotated[LocalQuiesce | QmpQuiesce, Field(discriminator="kind")]

# -- who freezes the file systems of a VM ----------------------------------------------------------


class GuestAgentFreeze(Model):
    """`kind = "qemu-ga"`: the QEMU guest agent, over the socket of its virtio-serial port."""

    kind: Literal["qemu-ga"]
    socket: Path  # on this machine
    mounts: tuple[str, ...] = ()  # mount points in the guest; none: all that can be frozen

    @field_validator("socket")
    @classmethod
    def _absolute(cls, value: Path) -> Path | None:
        return absolute_path(value)


class LibvirtFreeze(Model):
    """`kind = "libvirt"`: the QEMU guest agent, through the libvirt daemon that holds its port."""

    kind: Literal["libvirt"]
    hypervisor: str  # a [hypervisors.NAME] of kind libvirt
    domain: str = Field(min_length=1)  # name or UUID
    mounts: tuple[str, ...] = ()  # mount points in the guest; none: all that can be frozen


class VmwareFreeze(Model):
    """`kind = "vmware"`: a quiesced VM snapshot that lives for the seconds of the TimeMark."""

    kind: Literal["vmware"]
    hypervisor: str  # a [hypervisors.NAME] of kind vsphere
    vm: str = Field(min_length=1)  # name, or instance UUID
    moref: str | None = None  # the server's id of it (vm-42): no search, vm is its name only


class LocalFreeze(Model):
    """`kind = "local"`: the file systems are mounted on this machine itself."""

    kind: Literal["local"]
    mounts: tuple[Path, ...] = Field(min_length=1)


class QmpFreeze(Model):
    """`kind = "qmp"`: the CPUs of its QEMU are stopped. What that reaches is `crash`."""

    kind: Literal["qmp"]
    socket: Path


FreezeConfig = Annotated[
    GuestAgentFreeze | LibvirtFreeze | VmwareFreeze | LocalFreeze | QmpFreeze,
    Field(discriminator="kind"),
]

# -- applications on a VM --------------------------------------------------------------------------


class PostgresqlApplication(Model):
    """`kind = "postgresql"`: a CHECKPOINT right before the freeze."""

    kind: Literal["postgresql"]
    host: str = Field(min_length=1)  # name, address, or the folder of a unix socket
    port: int = Field(default=5432, ge=1, le=65535)
    user: str = Field(min_length=1)
    database: str = "postgres"
    password_file: Path | None = None  # one line, 0600
    sslmode: Literal["verify-full", "verify-ca", "require", "disable"] | None = None
    # ^ default: verify-full; a unix socket and loopback: disable
    sslrootcert: Path | None = None  # authorities in PEM; none: those of this machine
    timeout_s: Seconds = 30.0  # of the CHECKPOINT

    @field_validator("password_file", "sslrootcert")
    @classmethod
    def _absolute(cls, value: Path | None) -> Path | None:
        return absolute_path(value)


class MysqlApplication(Model):
    """`kind = "mysql"`: MariaDB's BACKUP STAGE, or MySQL's FLUSH TABLES WITH READ LOCK, held from
    before the freeze to after the thaw."""

    kind: Literal["mysql"]
    host: str = Field(min_length=1)  # name, address, or the path of a unix socket
    port: int = Field(default=3306, ge=1, le=65535)
    user: str = Field(min_length=1)
    password_file: Path | None = None  # one line, 0600
    tls: Literal["verify", "require", "off"] | None = None
    # ^ default: verify; a unix socket and loopback: off
    ca_file: Path | None = None  # authorities in PEM; none: those of this machine
    timeout_s: Seconds = 10.0  # to get the lock

    @field_validator("password_file", "ca_file")
    @classmethod
    def _absolute(cls, value: Path | None) -> Path | None:
        return absolute_path(value)


class SqliteApplication(Model):
    """`kind = "sqlite"`: a checkpoint of the WAL, and the write lock from before the freeze to
    after the thaw. The database lies on this machine."""

    kind: Literal["sqlite"]
    path: Path
    timeout_s: Seconds = 5.0  # to get the lock

    @field_validator("path")
    @classmethod
    def _absolute(cls, value: Path) -> Path | None:
        return absolute_path(value)


class ScriptApplication(Model):
    """`kind = "script"`: a program of the administrator's: see the page on quiesce scripts."""

    kind: Literal["script"]
    name: str = Field(min_length=1)  # for the report
    command: tuple[str, ...] = Field(min_length=1)  # argv; the phase is added to it
    timeout_s: Seconds = 30.0  # of each phase
    level: Consistency = Consistency.APPLICATION  # what it reaches


class SshApplication(Model):
    """`kind = "ssh"`: the same kind of program, in the guest, over SSH."""

    kind: Literal["ssh"]
    name: str = Field(min_length=1)
    host: str = Field(min_length=1, pattern=r"^[^-]")
    port: int = Field(default=22, ge=1, le=65535)
    user: str = Field(min_length=1, pattern=r"^[^-]")
    identity_file: Path  # a private key without a passphrase, 0600
    known_hosts: Path  # the guest's host key is in it: nothing is trusted at first sight
    command: tuple[str, ...] = Field(min_length=1)
    timeout_s: Seconds = 30.0  # of each phase, with the connection
    level: Consistency = Consistency.APPLICATION

    @field_validator("identity_file", "known_hosts")
    @classmethod
    def _absolute(cls, value: Path) -> Path | None:
        return absolute_path(value)


ApplicationConfig = Annotated[
    PostgresqlApplication
    | MysqlApplication
    | SqliteApplication
    | ScriptApplication
    | SshApplication,
    Field(discriminator="kind"),
]


class VmConfig(Model):
    """`[vms.NAME]`: a production machine, where its disks lie and how it is quiesced."""

    volumes: tuple[str, ...] = Field(min_length=1)  # those that hold its disks
    consistency: Consistency | None = None  # the least accepted of it; default: the group's
    freeze: FreezeConfig | None = None
    applications: tuple[ApplicationConfig, ...] = ()

    @model_validator(mode="after")
    def _something(self) -> VmConfig:
        if self.freeze is None and not self.applications:
            raise ValueError("needs freeze, or applications of kind script or ssh")
        for entry in self.applications:
            if self.freeze is None and entry.kind not in ("script", "ssh"):
                raise ValueError(
                    f"an application of kind {entry.kind} needs freeze: "
                    "what it has flushed must reach the disk"
                )
        return self
