"""VMs that `restore --as-vm --instant` made on LUNs: their host lets go of those before the views
go, for a LUN that is pulled hangs a host. Hosts that read views over NBD need none of this."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from offload import compose
from offload.filesystem import fsync_folder
from offload.instance import Instance
from offload.model import View
from offload.services.context import Context

_ON_LUNS = ("vsphere",)  # kinds of hosts


def note(instance: Instance, kind: str, host: str, mark: str, views: Sequence[str]) -> None:
    """That a VM with this mark is about to be made on a host, on views of these names."""
    if kind not in _ON_LUNS:
        return
    folder = _folder(instance)
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    fresh = folder / f".{mark}"
    fresh.write_text(json.dumps({"host": host, "views": list(views)}))
    fresh.rename(folder / mark)
    fsync_folder(folder)


def forget(instance: Instance, mark: str) -> None:
    """There is no such VM any more. Idempotent."""
    (_folder(instance) / mark).unlink(missing_ok=True)


def let_go(ctx: Context, views: Sequence[View]) -> None:
    """Have hosts let go of these views: VMs that are off are taken from their lists, datastores
    are unmounted. A VM that was moved to other storage stays. Raises CleanupError
    (`placeholder-runs`, `datastore-busy` …): then the views must stay."""
    names = {view.name for view in views}
    for mark, host, on in list(_notes(ctx.instance)):
        if names & set(on):
            compose.backup_host(host, ctx.instance).destroy(mark)
            forget(ctx.instance, mark)


def _notes(instance: Instance) -> Iterator[tuple[str, str, list[str]]]:
    folder = _folder(instance)
    for path in sorted(folder.glob("[!.]*")) if folder.is_dir() else []:
        found = json.loads(path.read_text())
        yield path.name, found["host"], found["views"]


def _folder(instance: Instance) -> Path:
    return instance.state_dir / "restored"
