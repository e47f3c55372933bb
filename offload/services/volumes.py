"""The configured volumes and what they look like right now."""

from __future__ import annotations

from dataclasses import dataclass

from offload import compose
from offload.config import Config
from offload.errors import OffloadError
from offload.model import Volume
from offload.snapshot import VolumeState

_ANY_INSTANCE = "inspect"  # providers take an instance's id only for the names they make


@dataclass(frozen=True, slots=True, kw_only=True)
class VolumeReport:
    """One volume: its state, or what hinders looking at it."""

    volume: Volume
    groups: tuple[str, ...]
    state: VolumeState | None
    error: OffloadError | None


def look(config: Config, name: str) -> VolumeReport:
    """Look at one volume without changing anything; NotFoundError if it is not configured."""
    volume = config.volume(name)
    groups = tuple(group for group, entry in config.groups.items() if name in entry.volumes)
    try:
        state = compose.snapshot_provider(volume.provider, _ANY_INSTANCE).inspect(volume)
    except OffloadError as error:
        return VolumeReport(volume=volume, groups=groups, state=None, error=error)
    return VolumeReport(volume=volume, groups=groups, state=state, error=None)


def look_at_all(config: Config) -> list[VolumeReport]:
    """All volumes by name. One that cannot be looked at does not hide the others."""
    return [look(config, name) for name in sorted(config.volumes)]
