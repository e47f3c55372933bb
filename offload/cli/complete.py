"""What the shell offers for an argument: names from the configuration, ids from the catalog.

Completion must never fail or write anything: where something is missing it offers nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path

import click

from offload.config import CONFIG_ENV, Config, find_config, load_config
from offload.errors import OffloadError

Completer = Callable[[click.Context, click.Parameter, str], list[str]]


def _config(ctx: click.Context) -> Config:
    chosen = ctx.find_root().params.get("config_path") or os.environ.get(CONFIG_ENV)
    return load_config(find_config(Path(chosen) if chosen else None))


def _offering(names: Callable[[Config], Iterable[str]]) -> Completer:
    def offer(ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[str]:
        try:
            return sorted(name for name in names(_config(ctx)) if name.startswith(incomplete))
        except (OffloadError, OSError):
            return []

    return offer


def _known(config: Config, kind: str) -> list[str]:
    """Names or ids of one kind from the catalog, if there is one already."""
    from offload.catalog.store import Catalog

    path = config.state_dir / "catalog.db"
    if not path.is_file():
        return []
    catalog = Catalog.open(path)
    try:
        match kind:
            case "view":
                return [view.name for view in catalog.views()]
            case "island":
                return [island.name for island in catalog.islands()]
            case "connection":
                return [connection.name for connection in catalog.connections()]
            case "timemark":
                return [str(mark.id) for mark in catalog.timemarks()]
            case _:
                return [str(backup.id) for backup in catalog.backups()]
    finally:
        catalog.close()


def _origins(config: Config) -> list[str]:
    from offload.catalog.store import Catalog

    path = config.state_dir / "catalog.db"
    if not path.is_file():
        return list(config.groups)
    catalog = Catalog.open(path)
    try:
        marks = [f"timemark:{m.id}/{s.volume}" for m in catalog.timemarks() for s in m.snapshots]
        backups = [f"backup:{b.id}/{i.volume}" for b in catalog.backups() for i in b.images]
        return [*config.groups, *marks, *backups]
    finally:
        catalog.close()


groups = _offering(lambda config: config.groups)
volumes = _offering(lambda config: config.volumes)
vms = _offering(lambda config: config.vms)
stores = _offering(lambda config: config.stores)
hypervisors = _offering(lambda config: config.hypervisors)
views = _offering(lambda config: _known(config, "view"))
islands = _offering(lambda config: _known(config, "island"))
mounted = _offering(lambda config: [*_known(config, "island"), *_known(config, "view")])
backup_hosts = _offering(lambda config: config.backup_hosts)
connections = _offering(lambda config: _known(config, "connection"))
timemarks = _offering(lambda config: _known(config, "timemark"))
backups = _offering(lambda config: _known(config, "backup"))
origins = _offering(_origins)
