"""The program with one rule of its protocol taken out: each must be found by the model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from offload.engine import pins, sweep, writing
from offload.engine.lockledger import LockLedger
from offload.engine.mark import Marker
from offload.engine.retention_lock import _Lock
from offload.engine.tombstones import Sight
from offload.format import layout
from offload.ids import new_id
from offload.services import backups, legalholds, prune, prune_wait, repair
from offload.services.prune import _Prune
from offload.testing.model_patches import replace_in


def _no_rescue() -> None:
    """What turns out to be needed of dead packs is not copied out."""
    replace_in(_Prune, "_rescue", lambda *_: None)


def _no_look_for_fences() -> None:
    """A writer does not ask whether it was given up."""
    replace_in(writing, "look_for_fences", lambda *_: False)
    replace_in(writing, "was_given_up", lambda *_: False)
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


def _hold_before_note() -> None:
    """A deletion looks for a hold, and says only then that it has begun."""

    def taken(repository: Any, backup: str, deletion: str) -> bool:
        store = repository.store
        if store.exists(layout.hold_name(backup)):
            return False
        repository.put_sealed(layout.deletion_name(backup, deletion), {"backup": backup})
        store.delete(layout.manifest_name(backup))
        return True

    replace_in(backups, "take_away", taken)


def _hold_without_waiting() -> None:
    """Who places a hold sees that the manifest is there, and asks for nothing else."""
    replace_in(legalholds, "deletions_of", lambda *_: [])


def _one_note_for_all() -> None:
    """Two deletions of one backup share a note, and one takes away the other's."""
    replace_in(layout, "deletion_name", lambda backup, _: f"{layout.deletions_folder(backup)}d")


def _notes_of_others_withdrawn() -> None:
    """A prune takes away the notes of deletions that seem to have been left."""

    def sweep(store: Any, _now: object) -> None:
        for name in list(store.list(layout.DELETED)):
            backup = name.removeprefix(layout.DELETED).partition("/")[0]
            if store.exists(layout.manifest_name(backup)):
                store.delete(name)

    replace_in(prune, "sweep_deletions", sweep)


def _locks_not_extended() -> None:
    """What a backup takes over from its parent keeps its date."""
    extend = _Lock._one  # noqa: SLF001

    def one(this: Any, version: Any) -> None:
        if not version.name.startswith(layout.PACKS):
            extend(this, version)

    replace_in(_Lock, "_one", one)


def _repair_not_locked() -> None:
    """What is read instead of damaged records stays as it was, and is not looked for."""
    replace_in(LockLedger, "trees_under", lambda *_: None)
    replace_in(repair, "lock_mended", lambda *_: None)


MUTANTS: dict[str, Callable[[], None]] = {
    "no-rescue": _no_rescue,
    "no-look-for-fences": _no_look_for_fences,
    "tombstones-ignored": _tombstones_ignored,
    "readers-ignored": _readers_ignored,
    "void-without-looking": _void_without_looking,
    "index-before-content": _index_before_content,
    "hold-before-note": _hold_before_note,
    "hold-without-waiting": _hold_without_waiting,
    "one-note-for-all": _one_note_for_all,
    "notes-of-others-withdrawn": _notes_of_others_withdrawn,
    "locks-not-extended": _locks_not_extended,
    "repair-not-locked": _repair_not_locked,
}
