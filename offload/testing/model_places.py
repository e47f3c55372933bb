"""The stores of the model: of which kind, with which keys, made anew for each run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

from offload import compose
from offload.format import layout
from offload.format.keyfile import Secret, WrapperKind, key_file_text, new_ring, wrap
from offload.format.layout import encode_parameters, new_parameters
from offload.ids import new_id
from offload.store import Store
from offload.storespec import StoreSpec
from offload.testing.memory_store import PLACES, Gate, MemoryStore, Place, Torn
from offload.testing.model_disk import DISK_PLACES, DiskPlace, GatedDiskStore
from offload.testing.model_hosts import CHUNK
from offload.testing.model_schedule import Chooser
from offload.testing.versioned_store import VersionedPlace

KINDS = (
    "memory",
    "disk",  # the real one, on a file system in memory
    "locked",  # versions in memory, under the real rules of object lock
)

AnyPlace = Place | DiskPlace


def open_folder(spec: StoreSpec) -> Store:
    """Of the stores that are folders, one is a folder."""
    return GatedDiskStore(spec) if spec.url in DISK_PLACES else MemoryStore(spec)


def make_place(
    kind: str, url: str, clock: Callable[[], datetime], gate: Gate, torn: Torn[Any]
) -> AnyPlace:
    """An empty place."""
    if kind == "disk":
        Path(url).mkdir(parents=True)
        DISK_PLACES[url] = DiskPlace(root=Path(url), clock=clock, gate=gate, torn=torn)
        return DISK_PLACES[url]
    make = VersionedPlace if kind == "locked" else Place
    PLACES[url] = make(clock=clock, gate=gate, torn=torn)
    return PLACES[url]


def make_store(spec: StoreSpec, chooser: Chooser) -> None:
    """The store of a spec, with small chunks, pages and packs; encrypted if it has a key."""
    id_key = chooser.randbytes(32)
    made = replace(
        new_parameters(chunk_bytes=CHUNK, page_entries=4, pack_bytes=12 << 10),
        store_id=new_id(),
        id_key=None if spec.key else id_key,
    )
    store = compose.open_store(spec)
    if spec.key is not None:
        secret = Secret(kind=WrapperKind.FILE, value=chooser.randbytes(32))
        path = Path(spec.key.value[0])
        path.write_text(key_file_text(secret.value))
        path.chmod(0o600)
        ring, ident = new_ring(id_key), new_id()
        raw = wrap(ring, secret, ident=ident, label="of the model", store_id=made.store_id)
        store.put(layout.key_name(ident), [raw])
    store.put(layout.STORE_OBJECT, [encode_parameters(made)])
    store.close()
