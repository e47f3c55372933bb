"""Run the model: `python -m offload.testing.model_run --seeds 1-20 --steps 3000`.

Run it with PYTHONHASHSEED=0, so that a seed gives the same run each time: sets have an order then.
"""
# ruff: noqa: T201 - a program of its own

from __future__ import annotations

import argparse
import faulthandler
import hashlib
import multiprocessing
import os
import re
import sys
import tempfile
import traceback
from functools import partial
from pathlib import Path

from offload.format import layout
from offload.retention import KeepRules
from offload.testing.model_attack import check_attacked
from offload.testing.model_damage import rot
from offload.testing.model_hosts import Host
from offload.testing.model_mutants import MUTANTS
from offload.testing.model_places import KINDS
from offload.testing.model_schedule import Actor
from offload.testing.model_world import STORES, ViolationError, World

_MOST = 5  # actors at once
_SELDOM, _HOT = 25, 4  # one operation in so many begins something; while a backup is being deleted
_HOT_STALL = 2  # of so many operations that matter, a deletion stands still before one
_DEEP = 600  # operations between two readings of everything
_PATIENCE = 60_000  # operations of one command
_REST_S = 45 * 86400  # until all pins and locks are over, and no backup is dated in the future
_COMMANDS = (
    ("backup", "prune", "delete", "hold", "copy", "recover", "catch-up", "prune-away", "verify"),
    (35, 35, 6, 4, 4, 10, 6, 3, 2),
)


class Game:
    """One run."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.last: Actor | None = None

    def play(self, steps: int) -> None:
        """So many operations, then everything comes to rest."""
        world = self.world
        deep = _DEEP
        world.fill()
        while world.steps < steps:
            self._begin_something()
            actor = self._next()
            if actor is None:
                world.tick(60)
                world.steps += 1
                continue
            before = actor.what
            world.move(actor)
            if (actor.ended and before == "prune") or world.steps > deep:
                deep = world.steps + _DEEP
                world.check_whole(world.must_be())
                check_attacked(world)
        self.settle()
        rot(world, world.hosts[0], self._alone)

    def _begin_something(self) -> None:
        world, choose = self.world, self.world.chooser
        hot = world.temper.quarrel > 0 and next(world.holds.contested(), None) is not None
        often = _HOT if hot else _SELDOM
        if len(world.actors) >= _MOST or (world.actors and not choose.chance(often)):
            return
        host = choose.choice(world.hosts)
        if hot and not host.busy and choose.chance(2):
            begin = world.holds.delete if choose.chance(4) else world.holds.hold
            host.busy = begin(host) is not None
        elif choose.chance(4):
            world.read(host, slowly=choose.chance(2))
        elif not host.busy:
            host.busy = self._command(host) is not None

    def _command(self, host: Host) -> Actor | None:
        world = self.world
        choose = world.chooser
        what = choose.choices(*_COMMANDS)[0]
        if choose.random() < world.temper.quarrel:
            what = choose.choice(("delete", "delete", "hold", "hold", "backup"))
        match what:
            case "backup":
                return world.back_up(host)
            case "prune":
                return world.prune(host, "main")
            case "prune-away":
                return world.prune(host, "away")
            case "delete":
                return world.holds.delete(host)
            case "hold":
                return world.holds.hold(host)
            case "copy":
                return world.simple(host, "copy", host.copy)
            case "recover":
                return world.simple(host, "recover", host.recover)
            case "verify":
                return world.simple(host, "verify", lambda: self._verify(host))
        return world.simple(host, "check", lambda: host.catch_up("main"))

    def _verify(self, host: Host) -> None:
        """Nothing was damaged: it may find nothing that hits a backup which must be whole."""
        found = host.verify("main").problems
        must = {r.id for r in self.world.must_be()}
        bad = [p for p in found if p.backup in must]
        if bad:
            raise ViolationError(f"verify: {bad[0]}")

    def _next(self) -> Actor | None:
        """Who goes on. Some stand still for long, and meanwhile time passes."""
        world, choose = self.world, self.world.chooser
        awake = [a for a in world.actors if a.stalled_until <= world.steps]
        if len(awake) < len(world.actors):
            if choose.chance(world.temper.tick):
                world.tick(choose.choice((5, 300, 700)))
        elif choose.chance(100):
            world.tick(choose.choice((1, 60, 400)))
        if not awake:
            return None
        actor = self.last
        if actor not in awake or choose.random() > world.temper.stick:
            actor = choose.choice(awake)
        assert actor is not None  # noqa: S101 - for mypy
        hot = world.temper.quarrel > 0 and world.holds.is_about_to_delete(actor)
        hot = hot and choose.chance(_HOT_STALL)
        if hot or choose.chance(world.temper.stall):
            actor.stalled_until = world.steps + choose.choice((60,) if hot else (30, 300, 1500))
            world.say(f"{world.steps}: {actor.name} stands still at {' '.join(actor.at)}")
        self.last = actor
        return actor

    # -- the end -----------------------------------------------------------------------------------

    def settle(self) -> None:
        """All wake up and end; recovery; then prunes free all that nobody needs."""
        world = self.world
        calm = world.temper
        calm.kill = calm.lose = calm.stall = calm.jump = 1e12
        world.clocks_are_put_right()
        world.say(f"{world.steps}: everybody comes to an end")
        while world.actors:
            world.move(world.chooser.choice(world.actors))
        world.check_whole(world.must_be())
        for host in world.hosts:
            self._alone(world.simple(host, "recover", host.recover))
        world.tick(_REST_S)
        for store in STORES * 3:
            host = world.chooser.choice(world.hosts)
            self._alone(world.simple(host, "check", partial(host.catch_up, store)))
            self._alone(world.simple(host, "prune", partial(host.prune, store, KeepRules(last=2))))
            world.tick(2 * 3600)
        self._check_end()

    def _alone(self, actor: Actor) -> None:
        began = self.world.steps
        while not actor.ended:
            self.world.move(actor)
            if self.world.steps - began > _PATIENCE:
                raise ViolationError(f"{actor.name} does not end")

    def _check_end(self) -> None:
        world = self.world
        listed = []
        for store, place in world.places.items():
            names = [n.removeprefix(layout.MANIFESTS) for n in place.sizes(layout.MANIFESTS)]
            listed += [world.records[n] for n in names]
            for folder in (layout.PINS, layout.TOMBSTONES):
                left = list(place.sizes(folder))
                if left:
                    raise ViolationError(f"{store}: left behind: {left}")
            swept = partial(self._check_swept, store)
            self._alone(world.simple(world.hosts[0], "check", swept))
        world.check_whole(listed)
        world.check_whole(world.must_be())

    def _check_swept(self, store: str) -> None:
        host = self.world.hosts[0]
        found = host.catch_up(store)
        if found.problems or found.orphan_packs:
            raise ViolationError(f"{store}: {found.problems} {found.orphan_packs}")
        would = host.rehearse(store)
        if would.freed_bytes or would.waiting:
            raise ViolationError(f"{store}: {would.freed_bytes} bytes are still to be freed")


def play(chosen: argparse.Namespace, seed: int, log: list[str]) -> str:
    """One seed; the digest of its log. ViolationError, or whatever the program raises."""
    base = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # noqa: S108 - nobody reads it
    with tempfile.TemporaryDirectory(dir=base, prefix="model-") as folder:
        world = World(
            Path(folder), seed, log.append,
            kind=chosen.store, encrypted=chosen.encrypted, clocks=chosen.clocks,
        )  # fmt: skip
        Game(world).play(chosen.steps)
    told = re.sub(r"pid \d+", "pid", "\n".join(log))
    return hashlib.sha256(told.encode()).hexdigest()[:12]


def _seeds(text: str) -> list[int]:
    first, _, last = text.partition("-")
    return list(range(int(first), int(last or first) + 1))


def main() -> int:
    """Play; 1 if anything was violated."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", default="1")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--store", choices=KINDS, default="memory")
    parser.add_argument("--encrypted", action="store_true")
    parser.add_argument("--clocks", action="store_true", help="wrong by weeks, and they jump")
    parser.add_argument("--patience", type=float, default=120.0)
    parser.add_argument("--mutant", choices=sorted(MUTANTS), help="with a rule taken out")
    parser.add_argument("--first", action="store_true", help="end with the first that fails")
    parser.add_argument("--tail", type=int, default=40)
    chosen = parser.parse_args()
    if chosen.mutant:
        MUTANTS[chosen.mutant]()
    context = multiprocessing.get_context("fork")  # what a world patches goes with its process
    status = 0
    for seed in _seeds(chosen.seeds):
        child = context.Process(target=_one, args=(seed, chosen))
        child.start()
        child.join()
        status = status or int(child.exitcode != 0)
        if status and chosen.first:
            break
    return status


def _one(seed: int, chosen: argparse.Namespace) -> None:
    """One seed in a process of its own, which ends with 1 if anything was violated."""
    log: list[str] = []
    failed = False
    faulthandler.dump_traceback_later(chosen.patience, exit=True, file=sys.stdout)
    try:
        digest = play(chosen, seed, log)
        print(f"seed {seed}: {len(log)} events, {digest}")
    except Exception:  # noqa: BLE001 - shown with the log that led to it
        failed = True
        print("\n".join(log[-chosen.tail :]))
        traceback.print_exc(file=sys.stdout)
        print(f"seed {seed}: FAILED after {len(log)} events")
    sys.stdout.flush()
    os._exit(failed)  # actors that stand still hold nothing up


if __name__ == "__main__":
    sys.exit(main())
