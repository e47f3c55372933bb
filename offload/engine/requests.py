"""Which places of packs are fetched together."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from offload.engine.chunkindex import Location
from offload.format.pack import RECORD

_REQUEST_BYTES = 4 << 20
_GAP_BYTES = 128 << 10  # what is read in between and thrown away: cheaper than a request


@dataclass(slots=True)
class Request:
    """Records of one pack that are fetched together."""

    pack: str
    start: int
    end: int
    places: list[Location]


def coalesce(places: Iterable[Location]) -> Iterator[Request]:
    """Requests over what lies close together, in the order of the packs."""
    packs: dict[str, list[Location]] = defaultdict(list)
    for place in places:
        packs[place.pack].append(place)
    for pack in sorted(packs):
        yield from _of_pack(pack, packs[pack])


def _of_pack(pack: str, places: list[Location]) -> Iterator[Request]:
    places.sort(key=_offset)
    start = end = places[0].entry.payload_offset
    together: list[Location] = []
    for place in places:
        entry = place.entry
        first = entry.offset + RECORD.size
        stop = first + entry.stored_length
        if together and (first - end > _GAP_BYTES or stop - start > _REQUEST_BYTES):
            yield Request(pack, start, end, together)
            start, together = first, []
        end = max(end, stop)
        together.append(place)
    yield Request(pack, start, end, together)


def _offset(place: Location) -> int:
    return place.entry.offset
