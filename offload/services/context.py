"""What every use case works with: the instance, its catalog, its journal."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from offload.catalog.store import Catalog
from offload.config import find_config, load_config
from offload.instance import Instance, open_instance
from offload.journal import Journal
from offload.services import undo


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """One instance, opened."""

    instance: Instance
    catalog: Catalog
    journal: Journal


@contextmanager
def open_context(config_path: Path | None) -> Iterator[Context]:
    """Find and read the configuration, open the catalog (and bring its schema up to date)."""
    path = find_config(config_path)
    instance = open_instance(load_config(path), path)
    catalog = Catalog.open(instance.catalog_path)
    try:
        journal = Journal(instance.journal_dir, partial(undo.run_undo, instance, catalog))
        yield Context(instance=instance, catalog=catalog, journal=journal)
    finally:
        catalog.close()
