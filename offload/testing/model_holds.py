"""Deletions and legal holds of the model, many of them on the same backups at the same time.

A hold that was reported is good: from then on, until somebody begins to release it, the manifest of
its backup is there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from offload.format import layout
from offload.testing.model_hosts import Host
from offload.testing.model_schedule import Actor, current

if TYPE_CHECKING:
    from offload.testing.model_world import Record, World


_MATTERS = (layout.DELETED, layout.HOLDS, layout.MANIFESTS)


class Holds:
    """Who deletes what, and what is held."""

    def __init__(self, world: World) -> None:
        self.world = world
        self._deleting: dict[str, set[str]] = {}  # actor → backups

    def deleting(self, backups: Iterable[str]) -> None:
        """The actor whose turn it is has begun to delete these."""
        actor = current()
        if actor is not None:
            self._deleting.setdefault(actor.name, set()).update(backups)

    def ended(self, actor: Actor) -> None:
        """An actor has come to its end."""
        self._deleting.pop(actor.name, None)

    def contested(self) -> Iterator[Record]:
        """Backups that somebody is deleting just now, in the first store."""
        for ident in sorted(set().union(*self._deleting.values())):
            if self._is_there(ident):
                yield self.world.records[ident]

    def is_about_to_delete(self, actor: Actor) -> bool:
        """Whether the actor stands before an operation that a hold may be beside of."""
        return actor.at[1].startswith(_MATTERS) and any(
            map(self._is_there, self._deleting.get(actor.name, ()))
        )

    def _is_there(self, ident: str) -> bool:
        record, place = self.world.records[ident], self.world.places["main"]
        return record.store == "main" and place.has(layout.manifest_name(ident))

    def _known(self, host: Host) -> Record | None:
        """A backup that the host knows, rather one that somebody deletes."""
        world = self.world
        with world.looking():
            if world.temper.quarrel:  # over backups that all know
                host.catch_up("main")
            here = {i: world.records[i] for i in host.known("main") if i in world.records}
        hot = [r for r in self.contested() if r.id in here]
        if hot and not world.chooser.chance(4):
            return world.chooser.choice(hot)
        return world.chooser.choice(list(here.values())) if here else None

    def delete(self, host: Host) -> Actor | None:
        """Delete a backup that the host knows."""
        known = self._known(host)
        if known is None:
            return None

        def job(_: Actor) -> None:
            known.going = True  # what counts is whether it is held in the end
            self.deleting([known.id])
            host.delete(known.id)

        return self.world.spawn(host, "delete", job)

    def hold(self, host: Host) -> Actor | None:
        """Place a hold, or end it."""
        known = self._known(host)
        if known is None:
            return None
        release = self.world.chooser.chance(3)
        run = self._release if release else self._place
        return self.world.spawn(host, "release" if release else "hold", lambda _: run(host, known))

    def _place(self, host: Host, known: Record) -> None:
        before = known.releases
        host.hold(known.id)
        if known.releases == before:  # nobody has begun to release it since
            known.held = True
            self.world.say(f"{self.world.steps}: {known.id} is held")

    def _release(self, host: Host, known: Record) -> None:
        known.releases += 1
        known.held = False
        try:
            host.release(known.id)
        finally:
            known.releases += 1  # whoever has placed one meanwhile may have lost it
