"""`[stores.NAME]`: where backups live."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AwareDatetime, BeforeValidator, Field, field_validator, model_validator

from offload.configs.base import Model, absolute_path, seconds, tag_name
from offload.configs.locks import LockConfig
from offload.quantity import Watermark, parse_size
from offload.storespec import KeySource, StoreSpec

Span = Annotated[float, BeforeValidator(seconds), Field(ge=0)]  # seconds, or "14d"


_ARCHIVES = ("GLACIER", "DEEP_ARCHIVE")  # of storage classes: hours before a read


class KeepConfig(Model):
    """`[stores.NAME.keep]`: which backups `prune` keeps, per group."""

    last: int = Field(default=0, ge=0)
    hourly: int = Field(default=0, ge=0)
    daily: int = Field(default=0, ge=0)
    weekly: int = Field(default=0, ge=0)
    monthly: int = Field(default=0, ge=0)
    yearly: int = Field(default=0, ge=0)
    within: Span = 0.0
    tags: tuple[str, ...] = ()  # backups that have one of them stay
    # Under the counting rules: by count alone nothing younger goes. Whoever can make backups can
    # push out all that was counted; a week is longer than the weekend in which nobody looks.
    min_age: Span = 7 * 86400.0

    @field_validator("tags")
    @classmethod
    def _tags(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(tag_name(tag) for tag in value)


class KeyConfig(Model):
    """`[stores.NAME.key]`: what opens an encrypted store. Exactly one of them.

    Without this table the store is not encrypted.
    """

    file: Path | None = None  # a key file, 0600, made by `store init` where it is missing
    passphrase_file: Path | None = None  # its first line, 0600
    recovery_file: Path | None = None  # a recovery key, 0600: for a machine made anew
    command: tuple[str, ...] | None = None  # prints a passphrase, e.g. systemd-creds decrypt …

    @field_validator("file", "passphrase_file", "recovery_file")
    @classmethod
    def _absolute(cls, value: Path | None) -> Path | None:
        return absolute_path(value)

    @model_validator(mode="after")
    def _one(self) -> KeyConfig:
        ways = (self.file, self.passphrase_file, self.recovery_file, self.command)
        if len([way for way in ways if way]) != 1:
            raise ValueError("needs exactly one of file, passphrase_file, recovery_file, command")
        return self

    def source(self) -> KeySource:
        """What the engine takes."""
        if self.file is not None:
            return KeySource(kind="file", value=(str(self.file),))
        if self.passphrase_file is not None:
            return KeySource(kind="passphrase-file", value=(str(self.passphrase_file),))
        if self.recovery_file is not None:
            return KeySource(kind="recovery-file", value=(str(self.recovery_file),))
        return KeySource(kind="command", value=self.command or ())


class _StoreBase(Model):
    keep: KeepConfig | None = None
    key: KeyConfig | None = None  # none: not encrypted
    # A backup, mount or prune that gives no sign of life for so long is given up by a prune. It is
    # renewed four times in that span: minutes at least, or a network that hangs costs backups.
    pin_lifetime: Span = Field(default=3600.0, ge=1)
    grace: Span | None = None  # between saying that a pack goes and deleting it; see reference

    def _spec(self, url: str, options: dict[str, str]) -> StoreSpec:
        if self.pin_lifetime != type(self).model_fields["pin_lifetime"].default:
            options = {**options, "pin_lifetime": f"{self.pin_lifetime:g}"}
        return StoreSpec(url=url, options=options, key=self.key.source() if self.key else None)


class DiskStoreConfig(_StoreBase):
    """A folder of a file system."""

    kind: Literal["disk"]
    path: Path
    min_free: str = "1GiB"  # a backup stops cleanly before the store's file system is fuller
    shared: bool = False  # other hosts use the folder too: its lock says nothing of them

    @field_validator("min_free")
    @classmethod
    def _free(cls, value: str) -> str:
        Watermark.parse(value)
        return value

    @property
    def folder(self) -> Path | None:
        """What it fills on this machine."""
        return self.path

    def spec(self) -> StoreSpec:
        """How it is opened."""
        return self._spec(str(self.path), {"shared": "yes"} if self.shared else {})


class S3StoreConfig(_StoreBase):
    """A bucket, or a part of one. Credentials come from where AWS's tools look for them:
    environment, `profile`, `credentials_file`, the machine's role; never from this file."""

    kind: Literal["s3"]
    bucket: str
    prefix: str = ""  # e.g. "offload/main"; several stores can share a bucket
    endpoint: str | None = None  # None: AWS
    region: str | None = None
    path_style: bool = False  # bucket in the path, not in the host name: most servers but AWS
    profile: str | None = None
    credentials_file: Path | None = None  # in the format of ~/.aws/credentials, 0600
    ca_file: Path | None = None  # of an authority of one's own
    storage_class: str | None = None
    server_side_encryption: Literal["AES256", "aws:kms"] | None = None
    kms_key: str | None = None
    bandwidth: str | None = None  # bytes a second, e.g. "50MiB"; each way
    parallel: int = Field(default=8, ge=1, le=64)  # requests at once
    retry_for: Span = 300.0  # a server that fails or throttles is asked again for so long
    lock: LockConfig | None = None  # none: whoever may write may destroy
    as_of: AwareDatetime | None = None  # show the store as it was then, read-only

    @field_validator("credentials_file", "ca_file")
    @classmethod
    def _absolute(cls, value: Path | None) -> Path | None:
        return absolute_path(value)

    @field_validator("prefix")
    @classmethod
    def _prefix(cls, value: str) -> str:
        value = value.strip("/")
        if value and not re.fullmatch(r"[A-Za-z0-9._-]+(/[A-Za-z0-9._-]+)*", value):
            raise ValueError("must be letters, digits, '.', '_', '-', and '/' between them")
        return value

    @field_validator("endpoint")
    @classmethod
    def _endpoint(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"https?://[^/\s]+/?", value):
            raise ValueError("must be http://HOST[:PORT] or https://HOST[:PORT]")
        return value and value.rstrip("/")

    @field_validator("bandwidth")
    @classmethod
    def _bandwidth(cls, value: str | None) -> str | None:
        if value is not None and parse_size(value) < 1:
            raise ValueError("must be at least one byte a second; without a limit, leave it out")
        return value

    @field_validator("storage_class")
    @classmethod
    def _storage_class(cls, value: str | None) -> str | None:
        if value in _ARCHIVES:
            raise ValueError(f"{value} cannot be read at once; a store must be readable")
        return value

    @model_validator(mode="after")
    def _together(self) -> S3StoreConfig:
        if self.kms_key is not None and self.server_side_encryption != "aws:kms":
            raise ValueError('kms_key goes with server_side_encryption = "aws:kms"')
        if self.ca_file is not None and not (self.endpoint or "https://").startswith("https://"):
            raise ValueError("ca_file goes with an https:// endpoint")
        return self

    @property
    def min_free(self) -> str:
        """Nothing to watch: a bucket has no end."""
        return "0"

    @property
    def folder(self) -> Path | None:
        """Nothing of this machine."""
        return None

    def spec(self) -> StoreSpec:
        """How it is opened."""
        names = (
            "endpoint", "region", "profile", "credentials_file", "ca_file", "storage_class",
            "server_side_encryption", "kms_key", "bandwidth",
        )  # fmt: skip
        options = {n: str(getattr(self, n)) for n in names if getattr(self, n) is not None}
        options["parallel"] = str(self.parallel)
        options["retry_for"] = f"{self.retry_for:g}"
        if self.path_style:
            options["path_style"] = "yes"
        if self.lock is not None:
            options |= self.lock.options()
        if self.as_of is not None:
            options["as_of"] = self.as_of.isoformat()
        place = f"{self.bucket}/{self.prefix}" if self.prefix else self.bucket
        return self._spec(f"s3://{place}", options)


StoreConfig = Annotated[DiskStoreConfig | S3StoreConfig, Field(discriminator="kind")]
