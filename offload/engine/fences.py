"""Giving up a writer that is late, so that it can do no harm when it wakes up.

A prune puts `fences/WRITER/PRUNE`, then looks whether the writer's commit object (a manifest, or
the folds of another prune) is there; if it is, the fence goes, else `voids/WRITER` says for good
that nothing of this writer exists. A writer puts its commit object first and looks for fences after
that. Whichever comes second sees the other. A fence is taken away by the prune that put it alone:
another one knows nothing of what this one has seen.
"""

from __future__ import annotations

import contextlib
import os
from datetime import UTC, datetime, timedelta

from offload.engine.repository import Repository
from offload.errors import BusyError
from offload.format import layout
from offload.journal import step
from offload.objectlock import Locking
from offload.store import Store

KEPT = timedelta(days=365)  # how long fences and voids stay: nobody stalls for longer


def look_for_fences(store: Store, writer: str) -> bool:
    """Whether any prune has given the writer up, or is about to.

    Fences first: one that has gone before it was looked for has left a void, or meant nothing.
    """
    fences = store.list(f"{layout.FENCES}{writer}/")
    return next(iter(fences), None) is not None or store.exists(layout.void_name(writer))


def was_given_up(store: Store, writer: str) -> bool:
    """The same, asked by who may be the writer, or wants what it made to stay: under object lock a
    void does not count while the manifest is locked, and does from then on."""
    if look_for_fences(store, writer):
        return True
    return isinstance(store, Locking) and bool(store.originals([layout.void_name(writer)]))


def give_up(repository: Repository, writer: str, prune: str) -> bool:
    """Make a writer void unless it has finished; returns whether it is void now."""
    store = repository.store
    fence = layout.fence_name(writer, prune)
    note = {
        "format": "offload-fence",
        "version": 1,
        "writer": writer,
        "prune": prune,
        "host": os.uname().nodename,
        "at": datetime.now(UTC).isoformat(),
    }
    with contextlib.suppress(BusyError):  # from a first try of this very prune
        repository.put_sealed(fence, note)
    step("prune.fence.put")
    if store.exists(layout.manifest_name(writer)) or store.exists(layout.fold_name(writer)):
        store.delete(fence)
        return False
    with contextlib.suppress(BusyError):  # another prune was faster
        repository.put_sealed(layout.void_name(writer), {**note, "format": "offload-void"})
    step("prune.void.put")
    store.delete(fence)
    return True


def read_voids(repository: Repository) -> set[str]:
    """The writers of whom nothing exists. One that is damaged or forged says nothing: then the
    manifest that it names counts, and prune stops if that lacks chunks."""
    named = (name.removeprefix(layout.VOIDS) for name in repository.store.list(layout.VOIDS))
    return {w for w in named if repository.attests(layout.void_name(w), "writer", w)}


def sweep_fences(store: Store, now: datetime) -> None:
    """Remove the fences and voids of which no writer can be left."""
    for folder in (layout.FENCES, layout.VOIDS):
        for info in list(store.infos(folder)):
            writer = info.name.removeprefix(folder).partition("/")[0]
            done = (layout.manifest_name(writer), layout.fold_name(writer))
            if now - info.modified > KEPT and not any(store.exists(name) for name in done):
                store.delete(info.name)
