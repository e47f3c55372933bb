"""A bare machine: everything from the store alone.

Each manifest carries the configuration of its group (no secrets), so that a store is enough to
write a configuration, to rebuild the catalog and to go on.
"""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import tomli_w

from offload import compose
from offload.engine.repository import Repository
from offload.errors import OffloadError, UnavailableError
from offload.format import layout
from offload.format.manifest import Manifest
from offload.services import stores
from offload.store import Exclusive
from offload.storespec import StoreSpec

_HEAD = """\
# Written by `offload init --from-store` out of the newest backup of each group.
# Paths are those of the machine that made the backups: check them before the next backup.

"""


def configuration(store_path: Path, state_dir: Path) -> tuple[str, str]:
    """A configuration for this store: its text, and the name that the store has in it.

    Raises UnavailableError (`store-not-initialised`, `store-newer`) and IntegrityError.
    """
    newest = _newest_of_each_group(store_path)
    groups: dict[str, Any] = {}
    volumes: dict[str, Any] = {}
    for manifest in newest.values():
        groups.update(manifest.group_config.get("groups", {}))
        volumes.update(manifest.group_config.get("volumes", {}))
    name = _store_name(groups)
    for group in groups.values():
        group.pop("store", None)
        group["store"] = name
    value = {
        "state_dir": str(state_dir),
        "volumes": volumes,
        "groups": groups,
        "stores": {name: {"kind": "disk", "path": str(store_path)}},
    }
    return _HEAD + tomli_w.dumps(value), name


def _newest_of_each_group(store_path: Path) -> dict[str, Manifest]:
    newest: dict[str, Manifest] = {}
    with ExitStack() as stack:
        cache = stack.enter_context(tempfile.TemporaryDirectory(prefix="offload-"))
        store = compose.open_store(StoreSpec(url=str(store_path)))
        stack.callback(store.close)
        if not store.exists(layout.STORE_OBJECT):
            raise UnavailableError(
                f"there is no store in {store_path}",
                code="store-not-initialised",
                hint="give the folder that holds store.json",
            )
        if isinstance(store, Exclusive):
            stack.enter_context(store.lock(exclusive=False, wait_s=5))
        repository = Repository.open(store, Path(cache))
        stack.callback(repository.index.close)
        for _, found in stores.manifests(repository, ""):
            if isinstance(found, OffloadError):
                continue  # what is damaged is reported by the check that follows
            known = newest.get(found.backup.group)
            if known is None or known.backup.created_at < found.backup.created_at:
                newest[found.backup.group] = found
    return newest


def _store_name(groups: dict[str, Any]) -> str:
    """The name that the groups know their store by, if they agree on one."""
    names = {group["store"] for group in groups.values() if "store" in group}
    return names.pop() if len(names) == 1 else "main"
