"""Somebody who has what a host has destroys all that he can in a store under object lock: what
is locked must be restorable from the rest, whatever was at work at that moment."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from offload import compose
from offload.engine.repository import Repository
from offload.format import layout
from offload.testing.memory_store import PLACES, StoredObject
from offload.testing.versioned_store import VersionedPlace

if TYPE_CHECKING:
    from offload.testing.model_world import Record, World


def check_attacked(world: World) -> None:
    """Each backup that is locked now reads from what is left after an attack, bit for bit."""
    place = world.places["main"]
    if not isinstance(place, VersionedPlace):
        return
    locked = [r for r in world.records.values() if r.reported and _is_locked(place, r)]
    if not locked:
        return
    spec = replace(world.hosts[0].spec("main"), url="s3://attacked")
    PLACES[spec.url] = _attacked(world, place)
    with world.looking():
        world.attacks += 1
        repository = Repository.open(
            compose.open_store(spec), world.folder / f"cache-attack-{world.attacks}"
        )
        try:
            for record in locked:
                world.check_record(repository, record)
        finally:
            repository.close()


def _is_locked(place: VersionedPlace, record: Record) -> bool:
    if record.store != "main":
        return False
    kept = place.past.get(layout.manifest_name(record.id), [])
    return any(v.until and v.until > place.clock() for v in kept)


def _attacked(world: World, place: VersionedPlace) -> VersionedPlace:
    """What is not locked is gone, all else is hidden, or has a newer version over it."""
    copy = VersionedPlace(clock=place.clock)
    now = place.clock()
    for name, versions in sorted(place.past.items()):
        for kept in versions:
            if kept.known and kept.until and kept.until > now:
                copy.past.setdefault(name, []).append(replace(kept))
        if name not in copy.past:
            continue  # it is gone
        if world.chooser.chance(2):
            copy.add(name, None, None)
        else:
            copy.add(name, StoredObject(b"your files are encrypted", copy.stamp()), None)
    return copy
