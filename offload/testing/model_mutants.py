"""The program with one rule of its protocol taken out: each must be found by the model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from offload.engine import pins, sweep, writing
from offload.engine.mark import Marker
from offload.engine.tombstones import Sight
from offload.format import layout
from offload.ids import new_id
from offload.services import prune_wait
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


def _readers_ignored() -> None:
    """What pins name is not marked."""
    whole = Marker.mark
    replace_in(Marker, "mark", lambda this, kept, _pins: whole(this, kept, ()))


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


MUTANTS: dict[str, Callable[[], None]] = {
    "no-rescue": _no_rescue,
    "no-look-for-fences": _no_look_for_fences,
    "tombstones-ignored": _tombstones_ignored,
    "readers-ignored": _readers_ignored,
    "void-without-looking": _void_without_looking,
    "index-before-content": _index_before_content,
}
