"""Pins: who uses a store just now, and which images must stay for them.

A sealed object `pins/ID.N`: {kind, host, machine, process, started_at, lifetime_s, images: [{root,
size_bytes}], tombstones}. A renewal is a new object N+1, which says all of it again; then the older
goes, but for the first, so that a listing that runs meanwhile never shows none. `tombstones` are
those that the holder has read since it put its first pin (null: it has not read them yet): it does
not build on the packs in them. See docs/design/store-protocol.md.
"""

from __future__ import annotations

import logging
import os
import threading
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from types import TracebackType

from offload import procs
from offload.engine.fences import look_for_fences
from offload.engine.manifests import read_manifest
from offload.engine.repository import Repository
from offload.errors import IntegrityError, NotFoundError, OffloadError, UnavailableError
from offload.format import layout
from offload.format.manifest import Manifest
from offload.ids import new_id
from offload.model import Backup
from offload.store import Store
from offload.storespec import StoreSpec

log = logging.getLogger(__name__)

LIFETIME_S = 3600.0
_RENEWALS = 4  # in one lifetime
_ATTEMPTS = 5  # a pin that is renewed while it is read


class PinKind(StrEnum):
    """What the holder does. Readers build nothing: prune need not wait for them."""

    WRITER = "writer"
    READER = "reader"
    PRUNE = "prune"


@dataclass(frozen=True, slots=True, order=True)
class PinImage:
    """A tree that must stay."""

    root: str
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Pin:
    """A pin as its newest renewal says. Times are by the store's clock but for `started_at`."""

    id: str
    number: int
    kind: PinKind
    host: str
    machine: str
    process: Mapping[str, str]
    started_at: datetime
    lifetime_s: float
    images: tuple[PinImage, ...]
    tombstones: frozenset[str] | None
    renewed: datetime

    @property
    def until(self) -> datetime:
        """When it expires unless it is renewed."""
        return self.renewed + timedelta(seconds=self.lifetime_s)

    def expired(self, now: datetime) -> bool:
        """Whether the holder may be given up: it is late, or known to be dead.

        Who is given up wrongly fails and runs again; no data depends on this answer.
        """
        return now >= self.until or self._dead()

    def _dead(self) -> bool:
        if self.machine != _machine():
            return False
        process = procs.ProcessRef.from_strings(dict(self.process))
        return process is not None and not process.alive()

    def holder(self) -> str:
        """For messages: who it is."""
        what = {"writer": "backup", "reader": "reader", "prune": "prune"}[self.kind]
        since = self.started_at.astimezone().strftime("%Y-%m-%d %H:%M")
        return (
            f"{what} {self.id} on {self.host} (pid {self.process.get('pid', '?')}, since {since})"
        )


def _machine() -> str:
    """Where a pid means something: this boot, this pid namespace. Hosts can be clones with one
    machine id, and containers share their host's."""
    return f"{procs.boot_id()}/{os.stat('/proc/self/ns/pid').st_ino}"


def images_of(backup: Backup) -> list[PinImage]:
    """What a pin on a backup names."""
    return [PinImage(image.root, image.size_bytes) for image in backup.images]


def lifetime_of(spec: StoreSpec) -> float:
    """How long a pin in this store stands without a renewal, in seconds."""
    return float(spec.options.get("pin_lifetime", LIFETIME_S))


class HeldPin:
    """A pin of this process, renewed by a thread until `drop` or `stop`.

    Raises UnavailableError (`store-read-only`) where it cannot be put.
    """

    def __init__(
        self,
        repository: Repository,
        kind: PinKind,
        *,
        ident: str | None = None,
        images: Iterable[PinImage] = (),
    ) -> None:
        self.repository = repository
        self.id = ident or new_id()
        self.kind = kind
        self.lifetime_s = lifetime_of(repository.store.spec)
        self._images = set(images)
        self._tombstones: Sequence[str] | None = None
        self._number = 0
        self._started = datetime.now(UTC)
        self._given_up = False
        self._mutex = threading.Lock()
        self._ended = threading.Event()
        self._put()
        self._thread = threading.Thread(target=self._renew_all, name="pin", daemon=True)
        self._thread.start()

    def __enter__(self) -> HeldPin:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        if error is None or self.kind is PinKind.READER:
            self.drop()
        else:
            self.stop()  # what was begun is taken back first, and the pin last

    def pin(self, images: Iterable[PinImage]) -> None:
        """Name more images; once this returns they stay."""
        with self._mutex:
            new = set(images) - self._images
            self._images |= new
            if new:
                self._put()

    def seen(self, tombstones: Sequence[str]) -> None:
        """Say which tombstones were read after the pin was put."""
        with self._mutex:
            self._tombstones = sorted(tombstones)
            self._put()

    def _put(self) -> None:
        ref = procs.ref_of(os.getpid())
        self.repository.put_sealed(
            layout.pin_name(self.id, self._number + 1),
            {
                "format": "offload-pin",
                "version": 1,
                "kind": self.kind.value,
                "host": os.uname().nodename,
                "machine": _machine(),
                "process": ref.to_strings() if ref else {},
                "started_at": self._started.isoformat(),
                "lifetime_s": self.lifetime_s,
                "images": [
                    {"root": i.root, "size_bytes": i.size_bytes} for i in sorted(self._images)
                ],
                "tombstones": self._tombstones,
            },
        )
        self._number += 1
        if self._number > 2:
            self.repository.store.delete(layout.pin_name(self.id, self._number - 1))

    def _renew_all(self) -> None:
        interval = self.lifetime_s / _RENEWALS
        wait = interval
        while not self._ended.wait(wait):
            try:
                with self._mutex:
                    if self._ended.is_set():
                        return
                    self._put()
                self._given_up = look_for_fences(self.repository.store, self.id)
                wait = interval
            except OffloadError as error:
                log.warning("the pin %s was not renewed: %s", self.id, error.message)
                wait = interval / _RENEWALS
            if self._given_up:
                log.warning("pin %s has expired: a prune goes on without it", self.id)
                return

    def check(self) -> None:
        """Raise UnavailableError (`given-up`) if a renewal has found out; asks nobody."""
        if self._given_up:
            raise given_up(self.id)

    def look(self) -> None:
        """Ask the store whether a prune has given this pin up, and raise if so."""
        self._given_up = self._given_up or look_for_fences(self.repository.store, self.id)
        self.check()

    def stop(self) -> None:
        """Renew no more. Idempotent."""
        self._ended.set()
        if self._thread is not threading.current_thread():
            self._thread.join()

    def drop(self) -> None:
        """Let go. Idempotent."""
        self.stop()
        drop_pin(self.repository.store, self.id)


def given_up(ident: str) -> UnavailableError:
    """What a writer that took too long is told."""
    return UnavailableError(
        f"{ident} took too long and was given up by a prune: it counts as never made",
        code="given-up",
        hint="run it again; if it was not stopped meanwhile, raise pin_lifetime of the store",
    )


def drop_pin(store: Store, ident: str) -> None:
    """Remove all objects of a pin, the first one last. Idempotent."""
    mine = [name for name in store.list(layout.PINS) if _parts(name)[0] == ident]
    for name in reversed(mine):
        store.delete(name)


def _parts(name: str) -> tuple[str, int]:
    ident, _, number = name.removeprefix(layout.PINS).rpartition(".")
    return ident, int(number) if number.isdigit() else 0


def read_pins(repository: Repository) -> list[Pin]:
    """All pins, by id. IntegrityError for one that cannot be read: who knows what it holds."""
    for attempt in range(_ATTEMPTS):
        newest: dict[str, tuple[int, str, datetime]] = defaultdict(
            lambda: (0, "", datetime.min.replace(tzinfo=UTC))
        )
        for info in repository.store.infos(layout.PINS):
            ident, number = _parts(info.name)
            newest[ident] = max(newest[ident], (number, info.name, info.modified))
        pins = []
        renewed = False
        for ident, (number, name, modified) in sorted(newest.items()):
            try:
                pins.append(_decode(ident, number, repository.get_sealed(name), modified))
            except NotFoundError:
                renewed = True
        if not renewed or attempt == _ATTEMPTS - 1:
            break
    return pins  # one that was there five times and never to be read was dropped just now


def _decode(ident: str, number: int, value: Mapping[str, object], renewed: datetime) -> Pin:
    images, tombstones, process = (value.get(k) for k in ("images", "tombstones", "process"))
    if not isinstance(images, list) or not isinstance(process, dict):
        raise IntegrityError(f"the pin {ident} is no pin", code="bad-pin")
    try:
        return Pin(
            id=ident,
            number=number,
            kind=PinKind(str(value["kind"])),
            host=str(value["host"]),
            machine=str(value["machine"]),
            process=process,
            started_at=datetime.fromisoformat(str(value["started_at"])),
            lifetime_s=float(str(value["lifetime_s"])),
            images=tuple(PinImage(i["root"], i["size_bytes"]) for i in images),
            tombstones=frozenset(tombstones) if isinstance(tombstones, list) else None,
            renewed=renewed,
        )
    except (KeyError, ValueError, TypeError) as error:
        raise IntegrityError(f"the pin {ident} is no pin: {error}", code="bad-pin") from error


@contextmanager
def pinned_manifest(
    repository: Repository, backup: str, store: str = ""
) -> Iterator[tuple[Manifest, HeldPin | None]]:
    """A backup to read from, held by a pin: what is pinned was there after the pin was put.

    On a store that cannot be written to it is read without a pin: the second part is None then.
    NotFoundError (`unknown-backup`), IntegrityError, UnavailableError.
    """
    manifest = read_manifest(repository, backup, store)
    try:
        held = HeldPin(repository, PinKind.READER, images=images_of(manifest.backup))
    except UnavailableError as error:
        if error.code != "store-read-only":
            raise
        log.warning("%s; read without a pin: no prune must run meanwhile", error.message)
        yield manifest, None
        return
    with held:
        while True:
            again = read_manifest(repository, backup, store)
            wanted = images_of(again.backup)
            if wanted == images_of(manifest.backup):
                break
            held.pin(wanted)  # folded meanwhile
            manifest = again
        yield again, held
