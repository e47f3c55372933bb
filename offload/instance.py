"""One instance of offload on this machine: its configuration, its folders, its identity."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path

from offload.config import Config
from offload.errors import ConfigError, UnavailableError
from offload.filesystem import fsync_folder
from offload.ids import new_id

_SUN_PATH_MAX = 107  # bytes of a unix socket address, sys/un.h


@dataclass(frozen=True, slots=True, kw_only=True)
class Instance:
    """Where this instance keeps what. Several live side by side, each with its own state folder."""

    config: Config
    config_path: Path | None
    state_dir: Path
    runtime_dir: Path
    id: str  # short and random, part of the name of every snapshot, so that owners are known

    @property
    def catalog_path(self) -> Path:
        """The SQLite database of the catalog."""
        return self.state_dir / "catalog.db"

    @property
    def journal_dir(self) -> Path:
        """Intents of running operations."""
        return self.state_dir / "journal"

    @property
    def cache_dir(self) -> Path:
        """What can be made again: the local index of chunks."""
        return self.state_dir / "cache"

    @property
    def overlays_dir(self) -> Path:
        """What was written to writable views: it outlives servers and reboots."""
        return self.config.overlays.folder or self.state_dir / "overlays"

    @property
    def servers_dir(self) -> Path:
        """Servers that several views share, in the runtime folder."""
        return self.runtime_dir / "servers"

    @property
    def views_dir(self) -> Path:
        """One folder a view, in the runtime folder: sockets and pid files."""
        return self.runtime_dir / "views"


def open_instance(config: Config, config_path: Path | None) -> Instance:
    """Make the folders if they are missing and read the instance's id.

    Raises ConfigError where a folder cannot be made.
    """
    state = config.state_dir
    try:
        state.mkdir(parents=True, exist_ok=True, mode=0o700)
        instance_id = _instance_id(state)
        runtime = _runtime_base(config) / instance_id
        runtime.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise ConfigError(
            f"cannot use {error.filename or state}: {error.strerror}",
            code="state-unusable",
            hint="choose folders that you may write: state_dir and runtime_dir",
        ) from error
    if len(os.fsencode(runtime / "views" / new_id() / "nbd.sock")) > _SUN_PATH_MAX:
        raise ConfigError(
            f"the runtime folder {runtime} is too long a path for unix sockets",
            code="runtime-path-too-long",
            hint="set runtime_dir to a shorter path",
        )
    return Instance(
        config=config,
        config_path=config_path,
        state_dir=state,
        runtime_dir=runtime,
        id=instance_id,
    )


def _runtime_base(config: Config) -> Path:
    if config.runtime_dir is not None:
        return config.runtime_dir
    if os.geteuid() == 0:
        return Path("/run/offload")
    user = os.environ.get("XDG_RUNTIME_DIR")
    return Path(user) / "offload" if user else config.state_dir / "run"


def _instance_id(state: Path) -> str:
    path = state / "instance"
    with contextlib.suppress(FileNotFoundError):
        text = path.read_text().strip()
        if text:
            return text
        raise UnavailableError(
            f"{path} is empty", hint="restore it; remove it only if nothing is mounted"
        )
    fresh = new_id()
    temp = state / f".instance.{fresh}"
    with temp.open("x") as out:
        out.write(fresh + "\n")
        out.flush()
        os.fsync(out.fileno())  # empty after a power cut, it would name no owner of anything
    try:
        os.link(temp, path)  # the first of two racing processes wins
        fsync_folder(state)
    except FileExistsError:
        fresh = path.read_text().strip()
    finally:
        temp.unlink()
    return fresh
