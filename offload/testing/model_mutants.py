"""The program with one rule of its protocol taken out: each must be found by the model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from offload.engine import mark, pins, sweep, writing
from offload.engine.mark import Marker, Roots
from offload.engine.tombstones import Sight
from offload.format import layout
from offload.ids import new_id
from offload.services import prune, prune_wait
from offload.services.prune import _Prune
from offload.testing.model_patches import replace_in


def _no_rescue() -> None:
    """What turns out to be needed of dead packs is not copied out."""
    replace_in(_Prune, "_rescue", lambda *_: None)


def _no_look_for_fences() -> None:
    """A writer does not ask whether it was given up."""
    replace_in(writing, "look_for_fences", lambda *_: False)
    replace_in(pins, "look_for_fences", lambda *_: False)


def _tombstones_ignored() -> None:
    """Writers build on packs that will go."""
    replace_in(Sight, "reliable", property(lambda sight: frozenset(sight.packs)))


def _no_waiting() -> None:
    """A prune sweeps, whoever is still at work without having seen the tombstone."""
    due = prune_wait.due_tombstones

    def at_once(tombstones: Any, _pins: Any, now: Any, _grace: Any) -> Any:
        return due(tombstones, (), now, 0.0)

    replace_in(prune, "due_tombstones", at_once)


def _readers_ignored() -> None:
    """What pins name is not marked."""
    whole = Marker.mark
    replace_in(Marker, "mark", lambda this, kept, _pins: whole(this, kept, ()))


def _writers_packs_taken() -> None:
    """Packs that no index object names yet count as unneeded."""
    replace_in(Roots, "writers", property(lambda _: frozenset()))


def _void_without_looking() -> None:
    """Who is late is void, though the manifest may be out."""

    def void(repository: Any, writer: str, prune_id: str) -> bool:
        del prune_id
        repository.put_sealed(f"voids/{writer}", {"writer": writer})
        return True

    replace_in(prune_wait, "give_up", void)


def _index_before_content() -> None:
    """The old index objects go before the new one is there."""

    def replaced(repository: Any, packs: Any, old: Any) -> None:
        for name in old:
            repository.store.delete(name)
        if packs:
            repository.put_index(layout.index_name(new_id()), packs)

    replace_in(sweep, "_replace", replaced)


def _voids_ignored() -> None:
    """A void does not make a manifest void."""
    replace_in(mark, "read_voids", lambda _: set())


def _pins_listed_once() -> None:
    """A prune takes no heed of pins that it finds in the second listing only."""
    kept: dict[int, list[Any]] = {}
    read = pins.read_pins

    def once(repository: Any) -> Any:
        found = kept.pop(id(repository), None)
        if found is None:
            found = kept[id(repository)] = read(repository)
        return found

    replace_in(mark, "read_pins", once)


MUTANTS: dict[str, Callable[[], None]] = {
    "no-rescue": _no_rescue,
    "no-look-for-fences": _no_look_for_fences,
    "tombstones-ignored": _tombstones_ignored,
    "no-waiting": _no_waiting,
    "readers-ignored": _readers_ignored,
    "writers-packs-taken": _writers_packs_taken,
    "void-without-looking": _void_without_looking,
    "index-before-content": _index_before_content,
    "voids-ignored": _voids_ignored,
    "pins-listed-once": _pins_listed_once,
}
