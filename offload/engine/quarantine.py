"""Quarantine: packs that were found bad are noted in the store, for all who use it.

A note is an object `quarantine/PACK.ID` (PACK: the last part of the pack's name), sealed: which
records of the pack cannot be read, or that the pack is gone. Writers take what is noted for absent,
so that the next backup stores it anew; readers try another place first; prune neither copies nor
deletes a noted pack while something in it is needed. A note goes when its pack reads well again or
is no longer there to be read by anybody.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime

from offload.errors import IntegrityError, NotFoundError
from offload.format import layout
from offload.ids import new_id

FORMAT = "offload-quarantine"
VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Note:
    """What is bad in one pack: records by the offsets of their headers; `gone`: all of it."""

    name: str  # of the object
    pack: str
    gone: bool
    offsets: frozenset[int]
    why: str
    found_at: datetime


@dataclass(frozen=True, slots=True)
class Quarantine:
    """All notes of a store, as they were when it was read."""

    notes: tuple[Note, ...] = ()
    _gone: frozenset[str] = field(init=False)
    _places: frozenset[tuple[str, int]] = field(init=False)

    def __post_init__(self) -> None:
        """Make the look-ups."""
        gone = frozenset(note.pack for note in self.notes if note.gone)
        places = frozenset((note.pack, at) for note in self.notes for at in note.offsets)
        object.__setattr__(self, "_gone", gone)
        object.__setattr__(self, "_places", places)

    def has(self, pack: str, offset: int) -> bool:
        """Whether the record at this place cannot be read."""
        return pack in self._gone or (pack, offset) in self._places

    @property
    def places(self) -> frozenset[tuple[str, int]]:
        """The noted records of packs that are there: pack and offset."""
        return self._places

    def packs(self) -> set[str]:
        """The packs that are noted."""
        return {note.pack for note in self.notes}

    def of(self, pack: str) -> list[Note]:
        """The notes of one pack."""
        return [note for note in self.notes if note.pack == pack]


def read_quarantine(
    names: Iterable[str], get_sealed: Callable[[str], Mapping[str, object]], known: Quarantine
) -> Quarantine:
    """The notes of these names; those that `known` has are not read again: names are never reused.

    A note that is itself damaged says nothing: what it named is found again by the next verify.
    """
    before = {note.name: note for note in known.notes}
    notes = []
    for name in names:
        if name in before:
            notes.append(before[name])
            continue
        try:
            notes.append(_from_value(name, get_sealed(name)))
        except (IntegrityError, NotFoundError):
            continue
    return Quarantine(tuple(notes))


def note_of(
    pack: str, offsets: Iterable[int], *, gone: bool, why: str
) -> tuple[str, dict[str, object]]:
    """The name and the value of a new note, to be sealed and put."""
    name = f"{layout.QUARANTINE}{pack.rpartition('/')[2]}.{new_id()}"
    return name, {
        "format": FORMAT,
        "version": VERSION,
        "pack": pack,
        "gone": gone,
        "offsets": sorted(offsets),
        "why": why,
        "found_at": datetime.now(UTC).isoformat(),
        "host": os.uname().nodename,
    }


def _from_value(name: str, value: Mapping[str, object]) -> Note:
    offsets = value.get("offsets")
    if value.get("format") != FORMAT or not isinstance(offsets, list):
        raise IntegrityError(f"{name} is no note of a bad pack", code="bad-quarantine")
    return Note(
        name=name,
        pack=str(value["pack"]),
        gone=bool(value["gone"]),
        offsets=frozenset(offsets),
        why=str(value["why"]),
        found_at=datetime.fromisoformat(str(value["found_at"])),
    )
