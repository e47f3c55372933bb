"""The undo actions of the journal, by name. Each is idempotent: already gone is success."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib import import_module

from offload.catalog.store import Catalog
from offload.errors import CleanupError
from offload.instance import Instance
from offload.journal import Args

UndoAction = Callable[[Instance, Catalog, Args], None]

# action → "module:function", loaded when one is needed
ACTIONS = {
    "delete-snapshot": "offload.services.timemark:undo_snapshot",  # provider, ref (JSON)
    "forget-timemark": "offload.services.timemark:undo_timemark",  # id
    "delete-timemark": "offload.services.timemark:undo_delete",  # id
    "delete-unused": "offload.services.timemark:undo_unused",  # ids (JSON)
    "thaw-local": "offload.quiescers.holder:undo_thaw",  # marker, boot, mounts, qmp (JSON)
    "thaw-qmp": "offload.quiescers.holder:undo_thaw",  # marker, boot, mounts, qmp (JSON)
    "thaw-libvirt": "offload.quiescers.holder:undo_thaw",  # marker, boot, libvirt (JSON)
    "remove-vm-snapshot": "offload.quiescers.vmware:undo_remove",  # hypervisor, vm, moref, snapshot
    "thaw-agent": "offload.quiescers.holder:undo_thaw",  # marker, boot, agents (JSON)
    "thaw-script": "offload.quiescers.holder:undo_thaw",  # marker, boot, programs (JSON)
    "thaw-ssh": "offload.quiescers.holder:undo_thaw",  # marker, boot, programs (JSON)
    "thaw-sqlite": "offload.quiescers.holder:undo_thaw",  # marker, boot
    "run-post": "offload.quiescers.local:undo_post",  # marker, argv (JSON), timeout_s, volumes
    "withdraw-view": "offload.services.mount:undo_view",  # id, target, run_dir, server (JSON)
    "take-down-island": "offload.services.island_away:undo_island",  # id, host, record (JSON)
    "remove-overlay": "offload.services.mount:undo_overlay",  # id, path
    "settle-migration": "offload.services.migrate:undo_migration",  # id, place, opened, node …
    "stop-server": "offload.services.mount:undo_server",  # id, target, run_dir
    "detach-device": "offload.services.connect:undo_device",  # id, name, device, uri …
    "detach-again": "offload.services.connect:undo_again",  # the same; the connection stays
    "remove-device-link": "offload.services.connect:undo_link",  # name, device
    "release-changed": "offload.services.backup:undo_changed",  # provider, held (JSON)
    "abort-backup": "offload.services.backup:undo_backup",  # store, backup
    "abort-copy": "offload.services.copy:undo_copy",  # store, name, backup
    "drop-pin": "offload.services.repair:undo_pin",  # store, pin
    "abort-packs": "offload.services.batches:undo_packs",  # store, writer
    "delete-backup": "offload.services.backups:undo_delete",  # store, backup, timemark, deletion
    "release-hold": "offload.services.legalholds:undo_hold",  # store, name, backup
    "abort-key": "offload.services.keymaker:undo_key",  # store, commit, object, file, print
    "finish-rotation": "offload.services.store_keys:undo_rotation",  # store, commit, old (JSON)
    "abort-prune": "offload.services.prune:undo_prune",  # store, backup
    "settle-restore": "offload.services.restore:undo_restore",  # record, temp
    "end-restore-server": "offload.services.restore:undo_server",  # socket
    "unmount-named": "offload.services.restore_vm:undo_views",  # names (JSON)
    "destroy-vm": "offload.services.restore_vm:undo_create",  # host, mark
    "remove-path": "offload.services.restore:undo_path",  # path of a temporary file of ours
}


def run_undo(instance: Instance, catalog: Catalog, action: str, args: Args) -> None:
    """Run one action; CleanupError for a name that this version does not know."""
    place = ACTIONS.get(action)
    if place is None:
        raise CleanupError(
            f"unknown undo action '{action}': the journal is of another version",
            hint="run recover with the version that wrote it",
        )
    module, _, name = place.partition(":")
    function: UndoAction = getattr(import_module(module), name)
    function(instance, catalog, args)


def dump(fields: object) -> str:
    """A value as one string, for journal arguments."""
    return json.dumps(fields, separators=(",", ":"), sort_keys=True)
