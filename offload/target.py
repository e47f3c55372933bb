"""The contract of targets: servers that present TimeViews to hosts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from offload.model import Source


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportRequest:
    """What to present, and how. `run_dir` is this view's own folder in the runtime folder."""

    view_id: str
    name: str
    source: Source
    run_dir: Path
    writable: bool = False
    transport: str = "unix"  # unix | tcp
    address: str = "127.0.0.1"
    port: int | None = None  # tcp only; None: any free one


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """Where clients find the view, and the target's record of what serves it (strings only)."""

    uri: str
    server: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Client:
    """One connected client."""

    address: str
    pid: int | None = None


class Target(Protocol):
    """Presents images as block devices.

    Read-only is enforced by the server. `withdraw` is idempotent and needs only `server` and
    `run_dir`, so that it works after `kill -9` and after a reboot.
    """

    name: str

    def check(self, *, transport: str, address: str, port: int | None) -> None:
        """Refuse what `export` would refuse whatever the image: before a TimeMark is taken for it.

        Raises UsageError, UnavailableError (`program-missing`, `port-taken`). Changes nothing.
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
        """Whether the server of this record still runs."""
        ...

    def clients(self, run_dir: Path, server: Mapping[str, str]) -> list[Client]:
        """Who is connected now."""
        ...
