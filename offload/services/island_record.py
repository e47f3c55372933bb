"""What the record of an island holds beside its host's own: how it was asked for."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from offload.errors import BusyError
from offload.island import Island, Shown
from offload.journal import step
from offload.model import View
from offload.services.context import Context
from offload.services.undo import dump

_ASKED = "asked."  # keys of ours, for `refresh`


@dataclass(frozen=True, slots=True, kw_only=True)
class IslandOptions:
    """How an island is wanted. `host` None: the only one. `vms`: of the point's, by name or UUID;
    none: all. `shows` None: the VMs' own instants where there are any."""

    host: str | None = None
    vms: tuple[str, ...] = ()
    shows: Shown | None = None
    name: str | None = None


def asked_fields(options: IslandOptions) -> dict[str, str]:
    """The options, as strings."""
    return {
        f"{_ASKED}vms": dump(list(options.vms)),
        f"{_ASKED}shows": options.shows.value if options.shows is not None else "",
    }


def asked_of(island: Island) -> IslandOptions:
    """The options that an island was made with."""
    shows = island.record.get(f"{_ASKED}shows", "")
    return IslandOptions(
        host=island.host,
        vms=tuple(json.loads(island.record.get(f"{_ASKED}vms", "[]"))),
        shows=Shown(shows) if shows else None,
        name=island.name,
    )


def record_of(island: Island) -> dict[str, str]:
    """The host's own part of an island's record."""
    return {key: value for key, value in island.record.items() if not key.startswith(_ASKED)}


def undo_args(island: Island) -> dict[str, str]:
    """Of `take-down-island`."""
    return {"id": island.id, "host": island.host, "record": dump(record_of(island))}


def host_step(phase: str, name: str) -> None:
    """A step of the host's driver; `phase`: build or down."""
    step(f"island.{phase}.{name}")


def check_free(ctx: Context, chosen: Sequence[View]) -> None:
    """No view is taken from under placeholders: BusyError (`view-in-island`)."""
    for island in ctx.catalog.islands():
        for view in chosen:
            if view.id in island.views:
                raise BusyError(
                    f"view {view.name} is a disk of placeholders: island {island.name} on "
                    f"{island.host}",
                    code="view-in-island",
                    hint=f"take all of it away: offload unmount {island.name}",
                )
