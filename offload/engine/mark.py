"""What must stay: the roots of a store, and everything that can be reached from them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from offload.engine.fences import read_voids
from offload.engine.liveset import LiveSet
from offload.engine.manifests import Folds, read_folds
from offload.engine.pins import Pin, PinImage, images_of, read_pins
from offload.engine.repository import Repository
from offload.errors import IntegrityError, NotFoundError, OffloadError
from offload.format import layout
from offload.format.manifest import decode_manifest
from offload.format.tree import Shape, decode_inner_page, decode_leaf_page
from offload.model import Backup

_SAFE = "prune stopped, nothing more was deleted"


@dataclass(frozen=True, slots=True, kw_only=True)
class Roots:
    """All that a prune must keep, but for what it forgets itself.

    `void`: backups that have a manifest, but were given up while they were written. `buried`: whose
    pin is still there though they are void.
    """

    backups: tuple[Backup, ...]  # with the roots that are read now
    pins: tuple[Pin, ...]
    folds: Folds
    void: tuple[str, ...]
    buried: tuple[str, ...] = ()

    @property
    def writers(self) -> frozenset[str]:
        """Who may be writing packs that no index object names yet."""
        return frozenset(pin.id for pin in self.pins)


Manifests = dict[str, Backup]  # by object name, with the roots that stand in them


def find_roots(repository: Repository, store: str, known: Manifests | None = None) -> Roots:
    """Pins, then folds and manifests, then pins again. Manifests that are in `known` are not read
    again (they never change), and the others are put there.

    A writer's manifest is out before its pin goes: who is missing in the first listing of pins has
    a manifest. A reader's pin is there before it looks whether the manifest is: who came before a
    deletion is in the second. IntegrityError (`prune-unsafe`) if anything cannot be read.
    """
    try:
        first = read_pins(repository)
        voids = read_voids(repository)
        folds = read_folds(repository)
        found, void = [], []
        for name in repository.store.list(layout.MANIFESTS):
            if name.removeprefix(layout.MANIFESTS) in voids:
                void.append(name.removeprefix(layout.MANIFESTS))
                continue
            found += [folds.applied(b) for b in _backup(repository, name, store, known)]
        pins = {(pin.id, pin.number): pin for pin in (*first, *read_pins(repository))}
    except OffloadError as error:
        if isinstance(error, IntegrityError) or error.code.endswith("-newer"):
            raise unsafe(f"{error.message}", "see: offload verify --all") from error
        raise
    return Roots(
        backups=tuple(sorted(found, key=lambda b: (b.created_at, b.id))),
        pins=tuple(pin for pin in pins.values() if pin.id not in voids),
        folds=folds,
        void=tuple(void),
        buried=tuple(sorted({pin.id for pin in pins.values() if pin.id in voids})),
    )


def _backup(
    repository: Repository, name: str, store: str, known: Manifests | None
) -> Iterator[Backup]:
    found = known.get(name) if known else None
    if found is None:
        try:
            raw = repository.store.get(name)
        except NotFoundError:
            return  # deleted while they were listed
        found = decode_manifest(name, raw, repository.keys, store).backup
        if known is not None:
            known[name] = found
    yield found


def unsafe(why: str, hint: str) -> IntegrityError:
    """Why a prune stops."""
    return IntegrityError(f"{_SAFE}: {why}", code="prune-unsafe", hint=hint)


class Marker:
    """Puts what can be reached from roots into a live set; each page is read once."""

    def __init__(self, repository: Repository, live: LiveSet) -> None:
        self.repository = repository
        self.live = live

    def mark(self, kept: Iterable[Backup], pins: Iterable[Pin]) -> None:
        """Everything reachable from backups and pins. IntegrityError (`prune-unsafe`)."""
        for backup in kept:
            for image in images_of(backup):
                self._image(image, f"backup {backup.id}")
        for pin in pins:
            for image in pin.images:
                self._image(image, f"what {pin.holder()} uses")

    def _image(self, image: PinImage, whose: str) -> None:
        shape = self.repository.shape(image.size_bytes)
        try:
            self._walk(bytes.fromhex(image.root), shape)
        except IntegrityError as error:
            raise unsafe(
                f"{whose} cannot be read whole: {error.message}",
                "see which ranges it hits: offload verify --all",
            ) from error

    def _walk(self, root: bytes, shape: Shape) -> None:
        """A page that is marked was walked: its id says its level, and all below follows from it.

        What a walk that failed has marked does not matter: the prune ends with it.
        """
        stack = [(shape.levels - 1, 0, root)]
        while stack:
            level, page, ident = stack.pop()
            if ident in self.live:
                continue
            raw = self.repository.read_page(ident)
            count = shape.entries(level, page)
            ids = [ident]
            if level == 0:
                for leaf in decode_leaf_page(raw, count):
                    ids += (leaf.base, *leaf.deltas) if leaf is not None else ()
            else:
                first = page * shape.page_entries
                stack += [
                    (level - 1, first + index, child)
                    for index, child in enumerate(decode_inner_page(raw, level, count))
                    if child is not None
                ]
            self.live.add(ids)
