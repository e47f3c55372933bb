"""Is a pack what was written? Its footer alone, or every record of it."""

from __future__ import annotations

from dataclasses import dataclass, field

from offload.engine.chunkindex import Location
from offload.engine.repository import Repository
from offload.engine.room import Room
from offload.errors import IntegrityError, NotFoundError, OffloadError
from offload.format.pack import Entry, read_footer, scan_records
from offload.store import Filling


@dataclass(slots=True, kw_only=True)
class PackCheck:
    """What was found. Sizes in bytes.

    `bad`: records that cannot be read, and why. `notes`: damage that hits no chunk: footer, record
    headers. `gone`: there is no such pack. `unread`: the store gave nothing of it, which says
    nothing of its bytes.
    """

    name: str
    size_bytes: int = 0
    entries: tuple[Entry, ...] = ()
    bad: dict[Entry, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    gone: bool = False
    unread: str = ""

    @property
    def whole(self) -> bool:
        """Whether nothing at all is wrong with it."""
        return not (self.bad or self.notes or self.gone or self.unread)


def check_pack(repository: Repository, name: str, room: Room) -> PackCheck:
    """Read a pack from start to end: footer, record headers, each payload against its id."""
    known = repository.index.entries(name)
    found = PackCheck(name=name)
    raw = _content(repository, name, known, found, room)
    if raw is None:
        return found
    found.size_bytes = len(raw)
    # What readers look for must be there, whatever the pack says of itself.
    found.entries = tuple(dict.fromkeys([*_own_entries(repository, raw, found), *known]))
    for entry in found.entries:
        if not _header_is(repository, entry, raw[entry.offset : entry.payload_offset], name):
            found.notes.append(
                f"{name}: the record header at {entry.offset} is damaged; its chunk is "
                "found through the footer"
            )
        try:
            repository.decode(entry, raw[entry.payload_offset : entry.end], name)
        except IntegrityError as error:
            found.bad[entry] = error.message
    return found


def _header_is(repository: Repository, entry: Entry, header: memoryview, pack: str) -> bool:
    try:
        return header == repository.record_header(entry, pack)
    except IntegrityError:  # the pack's own head is damaged, on which the record's depends
        return False


def _content(
    repository: Repository, name: str, known: list[Entry], found: PackCheck, room: Room
) -> memoryview | None:
    store = repository.store
    try:
        if isinstance(store, Filling):
            return room.read(store, name, 0, store.size(name))
        return memoryview(store.get(name))
    except NotFoundError:
        found.gone = True
        found.entries = tuple(known)
        found.bad = dict.fromkeys(known, f"pack {name} is missing")
    except OffloadError as error:
        found.entries = tuple(known)
        _one_by_one(repository, found, error)
    return None


def _one_by_one(repository: Repository, found: PackCheck, error: OffloadError) -> None:
    """A pack that cannot be read in one go: which of its chunks can? A bad sector hits few."""
    for entry in found.entries:
        try:
            repository.read_place(Location(found.name, entry))
            found.size_bytes += entry.stored_length
        except OffloadError as failure:
            found.bad[entry] = failure.message
    if len(found.bad) == len(found.entries):
        found.unread = error.message
    else:
        found.notes.append(f"{error.message} (what can be read of it is checked all the same)")


def _own_entries(repository: Repository, raw: memoryview, found: PackCheck) -> list[Entry]:
    """What a pack says is in it: by its footer, or by its records where that is damaged."""

    def part(offset: int, length: int) -> bytes:
        return bytes(raw[offset : offset + length])

    try:
        return read_footer(found.name, len(raw), part, repository.keys)
    except IntegrityError as error:
        found.notes.append(f"{error.message} (what can be read without it is checked all the same)")
    try:
        return list(scan_records(found.name, raw))
    except IntegrityError:
        return []


def check_footer(repository: Repository, name: str, size_bytes: int) -> PackCheck:
    """Look at a pack's end only: that it is there, as long as its chunks need, footer whole."""
    known = repository.index.entries(name)
    found = PackCheck(name=name, size_bytes=size_bytes)

    def part(offset: int, length: int) -> bytes:
        return repository.store.get_range(name, offset, length)

    try:
        own = read_footer(name, size_bytes, part, repository.keys)
    except NotFoundError:
        found.gone = True
        found.entries = tuple(known)
        found.bad = dict.fromkeys(known, f"pack {name} is missing")
        return found
    except IntegrityError as error:
        found.notes.append(f"{error.message} (its data was not read)")
        own = []
    except OffloadError as error:
        found.unread = error.message
        return found
    found.entries = tuple(dict.fromkeys([*own, *known]))
    found.bad = {
        entry: f"pack {name} ends at byte {size_bytes}, before the chunk at {entry.offset}"
        for entry in found.entries
        if entry.end > size_bytes
    }
    return found
