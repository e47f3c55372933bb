"""Which places of packs are fetched together."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from offload.engine.chunkindex import Location

_REQUEST_BYTES = 4 << 20
_GAP_BYTES = 128 << 10  # what is read in between and thrown away: cheaper than a request


@dataclass(slots=True)
class Request:
    """Records of one pack that are fetched together."""

    pack: str
    start: int
    end: int
    places: list[Location]


def coalesce(places: list[Location]) -> Iterator[Request]:
    """Requests over what lies close together, in the order of the packs."""
    places.sort(key=lambda place: (place.pack, place.entry.offset))
    open_: Request | None = None
    for place in places:
        start, end = place.entry.payload_offset, place.entry.end
        if (
            open_ is not None
            and open_.pack == place.pack
            and start - open_.end <= _GAP_BYTES
            and end - open_.start <= _REQUEST_BYTES
        ):
            open_.end = max(open_.end, end)
            open_.places.append(place)
            continue
        if open_ is not None:
            yield open_
        open_ = Request(place.pack, start, end, [place])
    if open_ is not None:
        yield open_
