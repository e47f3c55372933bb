"""The contract of targets: servers that present TimeViews to hosts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from offload.model import Exposure, HomeSource, Source


@dataclass(frozen=True, slots=True, kw_only=True)
class Overlay:
    """Where what is written to a view is kept: a qcow2 file that exists before the export and
    outlives the server. It never grows past `limit_bytes` (of the file)."""

    path: Path
    limit_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportRequest:
    """What to present, and how. `run_dir` is this view's own folder in the runtime folder.

    `exposure` is what `check` made of the one that was asked for. Without an overlay the view is
    read-only, but for one that was migrated: it is written in place.
    """

    view_id: str
    name: str
    source: Source
    run_dir: Path
    exposure: Exposure
    overlay: Overlay | None = None

    @property
    def writable(self) -> bool:
        """Whether clients may write."""
        return self.overlay is not None or isinstance(self.source, HomeSource)


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """Where clients find the view, and the target's record of what serves it (strings only)."""

    uri: str
    server: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Client:
    """One connected client: an NBD connection or an iSCSI session."""

    address: str
    name: str = ""  # iSCSI: the initiator's IQN; NBD on a unix socket: the program
    pid: int | None = None

    @property
    def who(self) -> str:
        """For a person: the name, and where it is."""
        where = self.address if self.pid is None else f"process {self.pid}"
        return f"{self.name} at {where}" if self.name else where


class Target(Protocol):
    """Presents images as block devices.

    A target is constructed with the instance that it works for: its configuration, its folders,
    its id, which is part of every name that it makes outside of them.
    Read-only is enforced by the server. `withdraw` is idempotent and needs only `server` and
    `run_dir` (whose last part is the view's id), so that it works after `kill -9` and after a
    reboot. Where several views share a server, it ends with the last of them.
    """

    name: str

    def check(self, exposure: Exposure) -> Exposure:
        """Fill in from the configuration what was left open, and refuse what `export` would refuse
        whatever the image: before a TimeMark is taken for it.

        Raises UsageError, ConfigError, UnavailableError (`program-missing`, `port-taken`).
        Changes nothing.
        """
        ...

    def export(self, request: ExportRequest) -> Endpoint:
        """Present the image; returns when the server really answers. On an error nothing is left.

        Raises what `check` raises, and UnavailableError (`server-failed`).
        """
        ...

    def withdraw(self, run_dir: Path, server: Mapping[str, str]) -> None:
        """Stop the server if it is ours and still lives, remove its files."""
        ...

    def alive(self, run_dir: Path, server: Mapping[str, str]) -> bool:
        """Whether what serves this record still does."""
        ...

    def clients(self, run_dir: Path, server: Mapping[str, str]) -> list[Client]:
        """Who is connected now."""
        ...


@runtime_checkable
class Movable(Protocol):
    """A target under whose writable views the bytes can be exchanged while they are served."""

    def monitor(self, run_dir: Path) -> Path:
        """The QMP socket of the daemon that has the view's bytes; it need not be there."""
        ...

    def settled(self, server: Mapping[str, str]) -> dict[str, str]:
        """The record of a view that reads nothing of its source any more."""
        ...

    def end_source(self, run_dir: Path) -> None:
        """End what served the source of such a view. Idempotent."""
        ...
