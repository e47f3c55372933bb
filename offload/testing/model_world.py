"""The world of the model: hosts, actors, clocks, and what must be true of the store they share.

The model is a table: which backups were begun, with which bytes, which of them reported success,
and which somebody has meanwhile decided to forget. The rest is the program itself.
"""
# ruff: noqa: S101, SLF001 - the assertions are for mypy; what it watches are insides

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar

from offload import compose
from offload.engine import pins
from offload.engine.manifests import read_manifest
from offload.engine.pins import HeldPin, Pin, pinned_manifest
from offload.engine.readimage import StoredImage
from offload.engine.repository import Repository
from offload.errors import IntegrityError, OffloadError
from offload.format import layout
from offload.retention import KeepRules
from offload.services.backup import _Run
from offload.services.copy_plan import Copied
from offload.services.copying import Copying
from offload.services.prune import _Prune
from offload.testing import model_patches
from offload.testing.model_holds import Holds
from offload.testing.model_hosts import CHUNK, SIZE, Host, Kind, main_store
from offload.testing.model_patches import replace_in
from offload.testing.model_places import AnyPlace, make_place, make_store
from offload.testing.model_schedule import Actor, Chooser, Fate, current
from offload.testing.versioned_store import VersionedPlace

STORES = ("main", "away")
_BEGAN = datetime(2026, 1, 1, tzinfo=UTC)
_USUAL = (0, 0, 1, -400, 400)  # seconds that the clock of a host is wrong by
_WILD = (0, -400, 7200, -7200, 86400 * 20, -86400 * 20)
_JUMPS = (0, 0, 30, -30, 4000, -4000, 86400 * 90, -86400 * 90)  # of stores: less than a year apart

_Found = TypeVar("_Found")


class ViolationError(Exception):
    """Something that must be true is not."""


@dataclass
class Record:
    """One backup as the model knows it."""

    id: str
    store: str
    data: bytes
    reported: bool = False
    going: bool = False  # somebody has decided to forget it
    held: bool = False  # somebody was told so
    releases: int = 0  # begun and ended

    def told(self) -> str:
        """What somebody was told of it."""
        return "which is held" if self.held else "which was reported"


@dataclass
class Temper:
    """How rough a run is: one in so many operations."""

    kill: float
    lose: float
    stall: float
    grace_s: float
    tick: float  # while somebody stands still, the clock moves by minutes
    quarrel: float  # how likely deletions and holds are chosen over the rest; then they meet often
    jump: float  # how often, when time passes, the clock of a store jumps
    stick: float  # how likely the same actor goes on


class World:
    """See the module. `say` gets a line for each thing that happens."""

    def __init__(
        self,
        folder: Path,
        seed: int,
        say: Callable[[str], None],
        *,
        kind: str = "memory",
        encrypted: bool = False,
        clocks: bool = False,
    ) -> None:
        self.chooser = Chooser(seed)
        self.hosts: list[Host] = []
        self.say = say
        self.folder = folder
        self.clock = _BEGAN
        self.store_skew = dict.fromkeys(STORES, timedelta())
        self.records: dict[str, Record] = {}
        self.actors: list[Actor] = []
        self.by_pin: dict[str, Actor] = {}
        self.pins: dict[str, list[HeldPin]] = {}  # by actor
        self.renewed: dict[str, datetime] = {}
        self.count = 0  # of actors
        self.steps = 0
        self.attacks = 0
        self.jumped = False  # the clock of a store, at some time
        self.raw = False  # whether the world itself looks, past all gates
        choose = self.chooser
        self.temper = Temper(
            kill=choose.choice((400, 1500, 5000, 1e9)),
            lose=choose.choice((500, 3000, 1e9)),
            stall=choose.choice((100, 300, 1000)),
            grace_s=choose.choice((0, 0, 3600)),
            tick=choose.choice((12, 100, 1000)),
            stick=choose.choice((0.3, 0.8, 0.95)),
            quarrel=choose.choice((0, 0, 0.9)),
            jump=choose.choice((2, 10, 30)) if clocks else 1e9,
        )
        self._install()
        self.holds = Holds(self)
        self.skews = _WILD if clocks else _USUAL
        self.known = [choose.randbytes(CHUNK) for _ in range(choose.choice((20, 60)))]
        main = f"{folder}/main" if kind == "disk" else f"/model-{seed}/main"
        key = folder / "key" if encrypted else None
        table = main_store(Kind(name=kind, key=key, grace_s=self.temper.grace_s), main)
        away = f"/model-{seed}/away"
        self.hosts += [self._host(n, table, away) for n in range(choose.choice((2, 3, 3)))]
        self.places = {name: self._place(name, kind) for name in STORES}

    # -- making it ---------------------------------------------------------------------------------

    def _install(self) -> None:
        model_patches.install(self.chooser, self._now, self._machine)
        model_patches.pins_of_the_dead(self._known_dead)
        model_patches.on_pin(self._pin_put)
        self._watch_writers()
        self._watch_prunes()

    def _place(self, name: str, kind: str) -> AnyPlace:
        spec = self.hosts[0].spec(name)
        place = make_place(
            kind if name == "main" else "memory",
            spec.url,
            lambda: self.clock + self.store_skew[name],
            self._gate,
            self._torn,
        )
        with self.looking():
            make_store(spec, self.chooser)
        return place

    def _host(self, number: int, main: str, away: str) -> Host:
        skew = timedelta(seconds=self.chooser.choice(self.skews))
        name = f"h{number}"
        host = Host(name=name, folder=self.folder / name, chooser=self.chooser, skew=skew)
        host.make(main, away)
        return host

    @contextmanager
    def looking(self) -> Iterator[None]:
        """The world itself looks: no gate."""
        before, self.raw = self.raw, True
        try:
            yield
        finally:
            self.raw = before

    # -- what the patches ask ----------------------------------------------------------------------

    def _gate(self, verb: str, name: str) -> Callable[[], None]:
        actor = current()
        if self.raw or actor is None:
            return _nothing
        if verb in ("get", "size") and name.startswith(layout.PACKS) and not self.chooser.chance(4):
            return actor.passes()
        return actor.gate(verb, name)

    def _torn(self, before: dict[str, _Found], after: dict[str, _Found]) -> dict[str, _Found]:
        """A listing that is not one instant."""
        both = {n: o for n, o in after.items() if n in before}
        either = {n: o for n, o in {**before, **after}.items() if n not in both}
        return both | {n: o for n, o in sorted(either.items()) if self.chooser.chance(2)}

    def _now(self) -> datetime:
        self.clock += timedelta(milliseconds=1)
        actor = current()
        host = next((h for h in self.hosts if actor and h.name == actor.host), None)
        return self.clock + (host.skew if host else timedelta())

    def _machine(self) -> str:
        actor = current()
        return actor.host if actor else "nobody"

    def _known_dead(self, pin: Pin) -> bool:
        actor, asks = self.by_pin.get(pin.id), current()
        return bool(actor and asks and actor.dead and actor.host == asks.host)

    def _pin_put(self, pin: HeldPin) -> None:
        actor = current()
        if actor is not None:
            self.by_pin[pin.id] = actor
            self.renewed[pin.id] = self.clock
            self.pins.setdefault(actor.name, []).append(pin)

    def _watch_writers(self) -> None:
        begin, run = _ORIGINALS["begin"], _ORIGINALS["copy_run"]

        def begun(this: Any) -> None:
            begin(this)
            actor = current()
            assert actor is not None
            self.records[this.id] = Record(this.id, "main", self.bytes_of[actor.name])

        def copied(this: Any, ident: str) -> Copied:
            self.records[this.id] = Record(this.id, "away", self.records[ident].data)
            done: Copied = run(this, ident)
            self.records[this.id].reported = True
            return done

        self.bytes_of: dict[str, bytes] = {}
        replace_in(_Run, "_begin", begun)
        replace_in(Copying, "run", copied)

    def _watch_prunes(self) -> None:
        judge = _ORIGINALS["judge"]

        def judged(this: Any, roots: Any, rules: Any, *, note: bool) -> Any:
            held = {r.id for r in self.records.values() if r.held}
            verdicts = judge(this, roots, rules, note=note)
            for verdict in verdicts:
                known = self.records.get(verdict.backup.id)
                if verdict.kept or known is None or not note:
                    continue
                if known.id in held and known.held:
                    raise ViolationError(f"a prune forgets {known.id}, on which there is a hold")
                known.going = True
                self.holds.deleting([known.id])
            return verdicts

        replace_in(_Prune, "_judge", judged)

    # -- time --------------------------------------------------------------------------------------

    def tick(self, seconds: float) -> None:
        """Time passes, and the clocks of stores may jump; whose pin has expired is late."""
        self.clock += timedelta(seconds=seconds)
        if self.chooser.chance(self.temper.jump):
            self.jumped = True
            store = self.chooser.choice(STORES)
            self.store_skew[store] = timedelta(seconds=self.chooser.choice(_JUMPS))
            self.say(f"{self.steps}: the clock of {store} is off by {self.store_skew[store]}")
        for place in self.places.values():
            now = place.clock()
            for ident in {n.removeprefix(layout.PINS)[:-7] for n in place.sizes(layout.PINS)}:
                actor, newest = self.by_pin.get(ident), place.newest(f"{layout.PINS}{ident}.")
                if actor and newest and now >= newest + timedelta(seconds=3600):
                    actor.late = True

    def clocks_are_put_right(self) -> None:
        """Those of stores: they agree, and are later than they have ever been."""
        if self.jumped:
            self.store_skew = dict.fromkeys(STORES, timedelta(seconds=max(_JUMPS)))

    def renew(self, actor: Actor) -> None:
        """What the thread of a pin does: its turn is between two operations of its process."""
        for pin in self.pins.get(actor.name, []):
            if pin._ended.is_set() or pin._given_up or pin._mutex.locked():
                continue
            if self.clock < self.renewed[pin.id] + timedelta(seconds=pin.lifetime_s / 4):
                continue
            actor.before_go = None
            try:
                with pin._mutex:
                    pin._put()
                self.renewed[pin.id] = self.clock  # whatever the clock of the store says
                pin._given_up = model_look(pin)
            except OffloadError as error:
                self.say(f"  {actor.name}: pin not renewed: {error.message}")
            finally:
                actor.before_go = self.renew

    # -- what must be true -------------------------------------------------------------------------

    def must_be(self) -> list[Record]:
        """Backups that must be whole now."""
        return [r for r in self.records.values() if r.reported and (r.held or not r.going)]

    def check_listed(self) -> None:
        """Cheap: each has its manifest, and no void; so has what is held, reported or not."""
        for record in self.records.values():
            if not record.held and (record.going or not record.reported):
                continue
            place = self.places[record.store]
            if not place.has(layout.manifest_name(record.id)):
                raise ViolationError(f"the manifest of {record.id} is gone, {record.told()}")
            if place.has(layout.void_name(record.id)) and not self.firm(record.store):
                raise ViolationError(f"{record.id} is void, {record.told()}")

    def check_whole(self, records: list[Record]) -> None:
        """Each can be read by who opens the store now, bit for bit."""
        with self.looking():
            for store in STORES:
                mine = [r for r in records if r.store == store]
                if not mine:
                    continue
                repository = self.open(store, "checker")
                try:
                    for record in mine:
                        self.check_record(repository, record)
                finally:
                    repository.close()

    def check_record(self, repository: Repository, record: Record) -> None:
        """One backup reads as it should."""
        try:
            (image,) = read_manifest(repository, record.id).backup.images
            root = bytes.fromhex(image.root)
            found = StoredImage(repository, root, image.size_bytes, 512).pread(0, SIZE)
        except OffloadError as error:
            raise ViolationError(f"backup {record.id}: {error.code}: {error.message}") from error
        if found != record.data:
            raise ViolationError(f"backup {record.id} reads as something else")

    def open(self, store: str, who: str) -> Repository:
        """The store, with an index of its own."""
        spec = self.hosts[0].spec(store)
        return Repository.open(compose.open_store(spec), self.folder / f"cache-{who}")

    def firm(self, store: str) -> bool:
        """Whether object lock makes voids count for nothing."""
        return isinstance(self.places[store], VersionedPlace)

    # -- actors ------------------------------------------------------------------------------------

    def spawn(self, host: Host, what: str, job: Callable[[Actor], None]) -> Actor:
        """A new process on a host."""
        self.count += 1

        def run(actor: Actor) -> None:
            try:
                job(actor)
            except OffloadError as error:
                self._judge_failure(actor, error)

        actor = Actor(f"{what}-{self.count}", host.name, what, run)
        actor.before_go = self.renew
        self.actors.append(actor)
        self.say(f"{self.steps}: {host.name} begins {actor.name}")
        actor.start()
        return actor

    def _judge_failure(self, actor: Actor, error: OffloadError) -> None:
        self.say(f"{self.steps}: {actor.name} fails: {error.code}: {error.message}")
        if not isinstance(error, IntegrityError) or actor.late:
            return
        if "lacks the manifests" in error.message:  # deleted by another host: it must be told
            return
        raise ViolationError(f"{actor.name}: {error.code}: {error.message}") from error

    def back_up(self, host: Host) -> Actor:
        """A backup of a volume that was written to."""
        data = host.change(self.known)

        def job(actor: Actor) -> None:
            self.bytes_of[actor.name] = data
            ident = host.back_up()
            self.records[ident].reported = True

        return self.spawn(host, "backup", job)

    def fill(self) -> None:
        """Some history, before anything may go wrong."""
        for host in self.hosts * 3:
            with self.looking():
                self.end(self.back_up(host))

    def prune(self, host: Host, store: str) -> Actor:
        """A prune with some rule."""
        last = self.chooser.choice((1, 2, 3))

        def job(_: Actor) -> None:
            report = host.prune(store, KeepRules(last=last))
            waits = f", waits for {[w.holders for w in report.waiting]}" if report.waiting else ""
            self.say(f"{self.steps}: pruned {report.packs_deleted} packs{waits}")

        return self.spawn(host, "prune", job)

    def read(self, host: Host, *, slowly: bool) -> Actor | None:
        """A restore, or a view that is read now and then."""
        there = [r for r in self.records.values() if r.reported]
        if not there:
            return None
        staying = [r for r in there if not r.going] or there
        record = staying[0] if self.chooser.chance(2) else self.chooser.choice(there)

        def job(actor: Actor) -> None:
            repository = self.open(record.store, actor.name)
            try:
                with pinned_manifest(repository, record.id) as (manifest, _):
                    self._read(actor, repository, manifest.backup.images[0], record, slowly=slowly)
            finally:
                repository.index.close()

        return self.spawn(host, "view" if slowly else "restore", job)

    def _read(
        self, actor: Actor, repository: Repository, image: Any, record: Record, *, slowly: bool
    ) -> None:
        root = bytes.fromhex(image.root)
        spans = [(0, SIZE)]
        if slowly:
            starts = [self.chooser.randrange(SIZE - 1) for _ in range(8)]
            spans = [(at, min(CHUNK, SIZE - at)) for at in starts]
        for at, length in spans:
            if slowly:
                for _ in range(self.chooser.choice((0, 20, 150))):
                    actor.gate("idle", "")()
            stored = StoredImage(repository, root, image.size_bytes, 512)  # nothing cached
            if stored.pread(at, length) != record.data[at : at + length]:
                raise ViolationError(f"{actor.name} has read something else from {record.id}")

    def simple(self, host: Host, what: str, job: Callable[[], object]) -> Actor:
        """Any other command."""

        def run(_: Actor) -> None:
            job()

        return self.spawn(host, what, run)

    def end(self, actor: Actor) -> None:
        """Take notice of an actor that has ended."""
        self.actors.remove(actor)
        self.pins.pop(actor.name, None)
        self.holds.ended(actor)
        for host in self.hosts:
            if host.name == actor.host and actor.what not in ("view", "restore"):
                host.busy = False
        if actor.failure is not None and not actor.dead:
            raise actor.failure
        self.say(f"{self.steps}: {actor.name} {'is dead' if actor.dead else 'has ended'}")

    def move(self, actor: Actor) -> None:
        """One operation of one actor."""
        if actor.ended:  # it came to none
            self.end(actor)
            return
        temper, choose = self.temper, self.chooser
        fate = Fate.GO
        if choose.chance(temper.kill):
            fate = choose.choice((Fate.KILL_BEFORE, Fate.KILL_AFTER))
        elif actor.at[0] != "idle" and choose.chance(temper.lose):
            fate = choose.choice((Fate.LOSE_REQUEST, Fate.LOSE_REPLY))
        if fate is not Fate.GO:
            self.say(f"{self.steps}: {actor.name} at {' '.join(actor.at)}: {fate.value}")
        verb, name = actor.at
        self.steps += verb != "idle"
        if actor.go(fate):
            self.end(actor)
        self.check_listed()
        if (
            verb == "delete"
            and name.startswith((layout.PACKS, layout.INDEXES))
            and choose.chance(4)
        ):
            self.check_whole(self.must_be())


def model_look(pin: HeldPin) -> bool:
    """As the thread of a pin looks, by the name that it looks it up by."""
    return pins.look_for_fences(  # type: ignore[attr-defined]
        pin.repository.store, pin.id
    )


def _nothing() -> None:
    pass


_ORIGINALS: dict[str, Any] = {
    "begin": _Run._begin,
    "copy_run": Copying.run,
    "judge": _Prune._judge,
}

logging.getLogger("offload").addHandler(logging.NullHandler())
