"""Which places of packs are fetched together, and the memory that they are read into."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from offload.engine.chunkindex import Location
from offload.engine.requests import _GAP_BYTES, _REQUEST_BYTES, coalesce
from offload.engine.room import Room
from offload.format.pack import RECORD, Entry, Kind
from offload.stores.disk import DiskStore
from offload.storespec import StoreSpec

_places = st.lists(
    st.tuples(
        st.sampled_from(["packs/aa/a-1", "packs/aa/a-2", "packs/bb/b-1"]),
        st.integers(0, 6 << 20),
        st.integers(1, 600 << 10),
    ),
    max_size=30,
    unique_by=lambda drawn: drawn[:2],
)


@given(drawn=_places)
def test_coalesce_any_places_are_fetched_once_each_in_order(
    drawn: list[tuple[str, int, int]],
) -> None:
    places = [
        Location(pack, Entry(bytes(32), Kind.DATA, 0, length, length, offset))
        for pack, offset, length in drawn
    ]
    requests = list(coalesce(places))
    found = [place for request in requests for place in request.places]
    assert found == sorted(places, key=lambda place: (place.pack, place.entry.offset))
    for request in requests:
        assert {place.pack for place in request.places} == {request.pack}
        assert request.start == request.places[0].entry.offset + RECORD.size
        assert request.end == max(place.entry.end for place in request.places)
        if len(request.places) > 1:
            assert request.end - request.start <= _REQUEST_BYTES
    for one, other in pairwise(requests):
        if one.pack == other.pack:
            far = other.start - one.end > _GAP_BYTES
            last = max(other.places[0].entry.end, one.end)
            assert far or last - one.start > _REQUEST_BYTES


def test_room_reads_any_lengths_one_after_another(tmp_path: Path) -> None:
    store = DiskStore(StoreSpec(url=str(tmp_path)))
    data = bytes(range(256)) * 8192
    store.put("o", [data])
    room = Room()
    for offset, length in ((0, 10), (7, 2 << 20 - 1), (3, 0), (100, 5000), (0, len(data))):
        wanted = data[offset : offset + length]
        assert room.read(store, "o", offset, len(wanted)) == wanted


def test_room_memory_is_used_again() -> None:
    room = Room()
    first = room.take(5000)
    first[:3] = b"abc"
    assert bytes(room.take(100)[:3]) == b"abc"
    assert len(room.take(3 << 20)) == 3 << 20
