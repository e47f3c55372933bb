"""VM snapshots that a TimeMark made and nobody removed: found by their names, removed.

The journal removes what a dead process left. This is for what the journal does not know: a state
folder that was lost, a removal that failed and was given up. A VM snapshot of ours is meant to live
for seconds; its delta grows with each write of its VM.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass

from offload import compose
from offload.errors import OffloadError
from offload.hypervisor import TakesVmSnapshots, VmSnapshot
from offload.instance import Instance
from offload.journal import Intent, Journal

_UNDO = "remove-vm-snapshot"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """What was found (and, by `sweep`, removed); what could not be looked at or removed."""

    found: tuple[VmSnapshot, ...] = ()
    warnings: tuple[str, ...] = ()


def find(instance: Instance, journal: Journal) -> Sweep:
    """Look at all hypervisors that have such snapshots. Changes nothing."""
    return _look(instance, journal, removing=False)


def sweep(instance: Instance, journal: Journal) -> Sweep:
    """Remove what `find` finds. A hypervisor that does not answer is a warning."""
    return _look(instance, journal, removing=True)


def _look(instance: Instance, journal: Journal, *, removing: bool) -> Sweep:
    found: list[VmSnapshot] = []
    warnings: list[str] = []
    for name in instance.config.hypervisors:
        try:
            with ExitStack() as stack:
                hypervisor = compose.hypervisor(name, instance)
                if not isinstance(hypervisor, TakesVmSnapshots):
                    continue
                stack.enter_context(hypervisor)
                # first what is there, then who works: an intent is older than its snapshot
                there = hypervisor.vm_snapshots(f"offload.{instance.id}.")
                for snapshot in _nobodys(there, journal):
                    if removing:
                        hypervisor.remove_vm_snapshot(snapshot)
                    found.append(snapshot)
        except OffloadError as error:
            what = "removed" if removing else "looked for"
            warnings.append(f"VM snapshots of {name} could not be {what}: {error.message}")
    return Sweep(found=tuple(found), warnings=tuple(warnings))


def _nobodys(there: Iterable[VmSnapshot], journal: Journal) -> list[VmSnapshot]:
    """Those that no operation, living or dead, has announced."""
    there = list(there)
    if not there:
        return []
    left = (intent for entry in journal.leftovers() for intent in entry.intents)
    intents: list[Intent] = [*journal.running_intents(), *left]
    known = {intent.args.get("snapshot") for intent in intents if intent.undo == _UNDO}
    return [snapshot for snapshot in there if snapshot.name not in known]
