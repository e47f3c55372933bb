"""Chunks from one store to another: which are wanted, and reading them pack by pack.

What is sent is decrypted and checked against its id on the way, and encrypted anew for the target;
its compression stays as it is.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from offload.engine.chunkindex import Location
from offload.engine.packwriter import Compressor, PackWriter
from offload.engine.repository import Repository
from offload.engine.tree import TreeReader
from offload.engine.work import run_workers
from offload.errors import IntegrityError, NotFoundError
from offload.format.pack import Encoding, Kind, chunk_id
from offload.format.tree import MAX_DELTAS, Leaf, decode_inner_page, decode_leaf_page
from offload.store import Buffer

_REQUEST_BYTES = 4 << 20
_GAP_BYTES = 128 << 10  # what is read in between and thrown away: cheaper than a request


@dataclass(slots=True)
class Request:
    """Records of one pack that are fetched together."""

    pack: str
    start: int
    end: int
    places: list[Location] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Piece:
    """A chunk on its way: decoded and checked; `payload` as it is compressed in the source, None
    where it was found in another place."""

    id: bytes  # in the source
    kind: int
    encoding: int
    payload: Buffer | None
    raw: bytes


def requests(places: Iterable[Location]) -> list[Request]:
    """Places in the order of the packs, neighbours together."""
    found: list[Request] = []
    for place in sorted(places, key=lambda p: (p.pack, p.entry.offset)):
        start, end = place.entry.payload_offset, place.entry.end
        last = found[-1] if found else None
        if (
            last is None
            or last.pack != place.pack
            or start - last.end > _GAP_BYTES
            or end - last.start > _REQUEST_BYTES
        ):
            last = Request(place.pack, start, end)
            found.append(last)
        last.end = max(last.end, end)
        last.places.append(place)
    return found


def fetch(source: Repository, request: Request) -> Iterator[Piece]:
    """The chunks of one request; one that is not where the index says is looked for elsewhere.

    IntegrityError (`chunk-missing`, `chunk-damaged`) if it is nowhere.
    """
    raw: memoryview | None = None
    with contextlib.suppress(NotFoundError, IntegrityError):  # gone or cut: each chunk by itself
        raw = memoryview(
            source.store.get_range(request.pack, request.start, request.end - request.start)
        )
    for place in request.places:
        yield _piece(source, request, place, raw)


def _piece(source: Repository, request: Request, place: Location, raw: memoryview | None) -> Piece:
    entry = place.entry
    if raw is not None:
        at = entry.payload_offset - request.start
        try:
            payload = source.payload(entry, raw[at : at + entry.stored_length], place.pack)
            content = source.decompress(entry, payload, place.pack)
            return Piece(entry.id, entry.kind, entry.encoding, payload, content)
        except IntegrityError:
            pass  # damaged here; there may be another copy
    content = source.read(entry.id)
    return Piece(entry.id, entry.kind, Encoding.RAW, None, content)


def send(
    source: Repository,
    writer: PackWriter,
    places: Iterable[Location],
    advance: Callable[[int], None],
) -> None:
    """Store these chunks under the ids that they have (the stores share the id key)."""
    level = writer.repository.parameters.zstd_level

    @contextmanager
    def codec() -> Iterator[Compressor]:
        yield Compressor(level)

    def job(request: Request, tool: Compressor) -> None:
        for piece in fetch(source, request):
            put_piece(writer, piece, piece.id, tool)
            advance(len(piece.raw))

    run_workers(iter(requests(places)), codec, job)


def put_piece(writer: PackWriter, piece: Piece, ident: bytes, codec: Compressor) -> None:
    """Store a piece under an id of the target, unless that has it."""
    if not writer.claim(ident):
        return
    encoding, payload = piece.encoding, piece.payload
    if payload is None:
        encoding, payload = codec.compress(piece.raw)
    writer.append(ident, piece.kind, encoding, len(piece.raw), payload)


# -- what is wanted ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class WantedPage:
    """A tree page that the target lacks: its bytes, and for a leaf page the chunks to look at."""

    ident: bytes
    level: int
    page: int
    raw: bytes
    chunks: tuple[bytes, ...] = ()


def wanted_pages(source: TreeReader, known: TreeReader | None) -> Iterator[WantedPage]:
    """Pages of a tree that another tree (pinned in the target; of the same shape, with the same id
    key) does not have at the same place, children before parents."""
    yield from _Wanted(source, known).below(
        source.shape.levels - 1, 0, source.root, known.root if known is not None else None
    )


class _Wanted:
    def __init__(self, source: TreeReader, known: TreeReader | None) -> None:
        self.source = source
        self.known = known

    def below(
        self, level: int, page: int, ident: bytes, there: bytes | None
    ) -> Iterator[WantedPage]:
        """What is wanted of a subtree; `there` is the page that the other tree has at its place."""
        if ident == there:
            return
        known = self.known if there is not None else None
        raw = self.source.repository.read_page(ident)
        count = self.source.shape.entries(level, page)
        if level == 0:
            had: list[Leaf | None] = [None] * count
            if known is not None:
                had = known.leaf_page(page)
            yield WantedPage(ident, 0, page, raw, _new_chunks(decode_leaf_page(raw, count), had))
            return
        below: list[bytes | None] = [None] * count
        if known is not None:
            below = known.inner_page(level, page)
        for index, child in enumerate(decode_inner_page(raw, level, count)):
            if child is not None:
                number = page * self.source.shape.page_entries + index
                yield from self.below(level - 1, number, child, below[index])
        yield WantedPage(ident, level, page, raw)


def _new_chunks(leaves: list[Leaf | None], had: list[Leaf | None]) -> tuple[bytes, ...]:
    found: dict[bytes, None] = {}
    for leaf, old in zip(leaves, had, strict=True):
        if leaf is not None and leaf != old:
            before = (old.base, *old.deltas) if old else ()
            found.update((i, None) for i in (leaf.base, *leaf.deltas) if i not in before)
    return tuple(found)


def changed_leaf_pages(new: TreeReader, old: TreeReader | None) -> Iterator[int]:
    """Numbers of the leaf pages that differ between two trees of one shape, those that became all
    zeros too; without an old one all that are not zeros."""
    if old is None:
        yield from new.data_pages()
        return
    yield from _changed(new, old, new.shape.levels - 1, 0)


def _changed(new: TreeReader, old: TreeReader, level: int, page: int) -> Iterator[int]:
    if new.page_id(level, page) == old.page_id(level, page):
        return
    if level == 0:
        yield page
        return
    pairs = zip(new.inner_page(level, page), old.inner_page(level, page), strict=True)
    for index, (a, b) in enumerate(pairs):
        if a != b:
            yield from _changed(new, old, level - 1, page * new.shape.page_entries + index)


# -- into a store with another id key --------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Plan:
    """What a leaf becomes in the target: pieces that are there, then fresh ones (ids here)."""

    kept: tuple[bytes, ...]
    fresh: tuple[bytes, ...]

    def leaf(self, names: Mapping[bytes, bytes]) -> Leaf:
        """The leaf, once the fresh ones have their ids there."""
        base, *deltas = (*self.kept, *(names[ident] for ident in self.fresh))
        return Leaf(base, tuple(deltas))


def _plan(leaf: Leaf | None, before: Leaf | None, known: Leaf | None) -> _Plan | None:
    """`known` has the content of `before`, but perhaps in other pieces: one of the two stores may
    have been folded. So it is built on as a whole or not at all."""
    if leaf is None:
        return None
    pieces = (leaf.base, *leaf.deltas)
    if before is not None and known is not None:
        kept = (known.base, *known.deltas)
        old = (before.base, *before.deltas)
        more = pieces[len(old) :]
        if pieces[: len(old)] == old and len(kept) + len(more) <= MAX_DELTAS + 1:
            return _Plan(kept, more)
    return _Plan((), pieces)


class Rekeyer:
    """Leaf pages of one image, translated into the ids of a store with another id key. The pieces
    stay pieces: a list of deltas is as long there as here."""

    def __init__(
        self, source: TreeReader, source_parent: TreeReader | None, target_parent: TreeReader | None
    ) -> None:
        self.source = source
        self.source_parent = source_parent
        self.target_parent = target_parent

    def leaves(
        self, page: int, writer: PackWriter, codec: Compressor, advance: Callable[[int], None]
    ) -> list[Leaf | None]:
        """The entries of a leaf page for the target; what it lacks is stored on the way."""
        mine = self.source.leaf_page(page)
        count = len(mine)
        old: list[Leaf | None] = [None] * count
        there: list[Leaf | None] = [None] * count
        if self.source_parent is not None and self.target_parent is not None:
            old, there = self.source_parent.leaf_page(page), self.target_parent.leaf_page(page)
        plans = [_plan(*slot) for slot in zip(mine, old, there, strict=True)]
        wanted = {ident for plan in plans if plan is not None for ident in plan.fresh}
        names = self._store(sorted(wanted), writer, codec, advance)
        return [None if plan is None else plan.leaf(names) for plan in plans]

    def _store(
        self,
        wanted: list[bytes],
        writer: PackWriter,
        codec: Compressor,
        advance: Callable[[int], None],
    ) -> dict[bytes, bytes]:
        repository = self.source.repository
        places = repository.index.find_many(wanted)
        for ident in wanted:
            if ident not in places:
                places[ident] = repository.locate(ident)  # or it says what is missing
        names: dict[bytes, bytes] = {}
        for request in requests(places.values()):
            for piece in fetch(repository, request):
                ident = chunk_id(piece.kind, piece.raw, writer.repository.keys)
                put_piece(writer, piece, ident, codec)
                names[piece.id] = ident
                advance(len(piece.raw) if piece.kind == Kind.DATA else 0)
        return names
