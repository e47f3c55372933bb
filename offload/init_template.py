"""The commented configuration that `offload init` writes."""

from __future__ import annotations

import os
from datetime import UTC, datetime
from errno import ENOTDIR
from importlib.resources import files
from pathlib import Path

from offload.errors import BusyError, ConfigError, UsageError


def default_state_dir() -> Path:
    """The system's folder for root, else the user's own."""
    if os.geteuid() == 0:
        return Path("/var/lib/offload")
    home = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
    return home / "offload"


def render(state_dir: Path) -> str:
    """The text of a new configuration file. UsageError for a folder that is not absolute."""
    if not state_dir.is_absolute():
        raise UsageError(f"the state folder must be an absolute path, not {state_dir}")
    text = (files("offload.cli") / "offload.toml.example").read_text(encoding="utf-8")
    quoted = str(state_dir).replace("\\", "\\\\").replace('"', '\\"')
    return text.replace("@STATE_DIR@", quoted)


def write(path: Path, text: str, *, force: bool) -> Path | None:
    """Write a new configuration (0600). Never overwrites: `force` moves the old file aside.

    Returns where the old one is now, if there was one. Raises BusyError (`config-exists`),
    ConfigError (`config-unwritable`).
    """
    try:
        _make_folder(path.parent)
        aside = _move_aside(path) if force else None
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(fd, "w", encoding="utf-8") as out:
            out.write(text)
            out.flush()
            os.fsync(out.fileno())
    except FileExistsError as error:
        raise _exists(path) from error
    except OSError as error:
        raise ConfigError(
            f"cannot write {error.filename or path}: {error.strerror}",
            code="config-unwritable",
            hint="choose another place: offload --config PATH init",
        ) from error
    return aside


def check(path: Path, *, force: bool) -> None:
    """Refuse early what `write` would refuse: BusyError (`config-exists`)."""
    if path.exists() and not force:
        raise _exists(path)


def _exists(path: Path) -> BusyError:
    return BusyError(
        f"there is a configuration already: {path}",
        code="config-exists",
        hint="edit it, or say --force to move it aside",
    )


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:  # not the case of a configuration that exists
        raise NotADirectoryError(ENOTDIR, os.strerror(ENOTDIR), str(folder)) from error


def _move_aside(path: Path) -> Path | None:
    if not path.exists():
        return None
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S.%fZ")
    aside = path.with_name(f"{path.name}.{stamp}")
    path.rename(aside)
    return aside
