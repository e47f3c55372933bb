"""The end of a run of the model: objects rot, verification must say exactly what that hits, and
repair must mend it, or say exactly what is lost."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from offload.format import layout
from offload.services.verify import Problem
from offload.testing.model_attack import check_attacked
from offload.testing.model_hosts import Host
from offload.testing.model_schedule import Actor
from offload.testing.model_world import Record, ViolationError, World

Alone = Callable[[Actor], None]
"""Have an actor come to its end, and nobody else."""


def rot(world: World, host: Host, alone: Alone) -> None:
    """Damage packs of the first store, verify, repair from what there is in the second, verify
    again."""

    def do(what: str, job: Callable[[], object]) -> None:
        alone(world.simple(host, what, job))

    place, choose = world.places["main"], world.chooser
    if choose.chance(2):
        do("copy", host.copy)  # else there may be older copies, or none
    packs = list(place.sizes(layout.PACKS))
    for name in choose.sample(packs, min(len(packs), choose.choice((1, 3)))):
        at = choose.randrange(place.sizes(layout.PACKS)[name])
        place.flip(name, at)
        world.say(f"{world.steps}: byte {at} of {name} is damaged")
    unreadable = _unreadable(world)
    world.say(f"{world.steps}: unreadable are {sorted(unreadable)}")
    do("verify", lambda: _same(unreadable, host.verify("main").problems, "verify says"))
    lost: list[Problem] = []
    do("repair", lambda: lost.extend(host.repair("main").lost))
    left = _unreadable(world)
    _same(left, lost, "repair calls lost")
    do("verify", lambda: _same(left, host.verify("main").problems, "verify says after a repair"))
    if world.firm("main"):
        for ident in left:
            world.records[ident].reported = False
        _go_on(world, alone)


def _go_on(world: World, alone: Alone) -> None:
    """Backups take over what was mended until its own lock is over: it must be extended."""
    for _ in range(5):
        for each in world.hosts:
            alone(world.back_up(each))
        world.tick(15 * 60)
        check_attacked(world)


def _unreadable(world: World) -> set[str]:
    """Backups of the first store that cannot be read whole."""
    found = set()
    for name in world.places["main"].sizes(layout.MANIFESTS):
        record: Record = world.records[name.removeprefix(layout.MANIFESTS)]
        try:
            world.check_whole([record])
        except ViolationError:
            found.add(record.id)
    return found


def _same(wanted: set[str], problems: Iterable[Problem], who: str) -> None:
    told = {p.backup for p in problems if p.backup}
    if told != wanted:
        raise ViolationError(f"{who} {sorted(told)}, unreadable are {sorted(wanted)}")
