"""Names of objects in a store, and the store's own description (`store.json`)."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from offload.errors import IntegrityError, UnavailableError
from offload.format.delta import SECTOR
from offload.format.keys import KEY_BYTES, Keys, derive_keys
from offload.format.sealed import seal, unseal
from offload.ids import new_id

STORE_OBJECT = "store.json"
PACKS = "packs/"
INDEXES = "index/"
MANIFESTS = "manifests/"
KEYS = "keys/"
PINS = "pins/"
FENCES = "fences/"
VOIDS = "voids/"
TOMBSTONES = "tombstones/"
FOLDS = "folds/"
HOLDS = "holds/"
QUARANTINE = "quarantine/"
DELETED = "deleted/"
PROBES = "probes/"
FORMAT_NAME = "offload-store"
FORMAT_VERSION = 1
CIPHER = "aes-256-gcm"  # the one that there is


def pack_name(writer: str, number: int) -> str:
    """`packs/ab/abcdefghjk-000001`: the writer's id (a backup's, a prune's) and a number."""
    return f"{PACKS}{writer[:2]}/{writer}-{number:06d}"


def pack_writer(pack: str) -> str:
    """The writer whose pack this is."""
    return pack.rpartition("/")[2].rpartition("-")[0]


def index_name(writer: str) -> str:
    """The index object of one writer."""
    return f"{INDEXES}{writer}"


def manifest_name(backup: str) -> str:
    """The manifest of one backup."""
    return f"{MANIFESTS}{backup}"


def fold_name(prune: str) -> str:
    """The new roots that one prune has made."""
    return f"{FOLDS}{prune}"


def hold_name(backup: str) -> str:
    """The legal hold on one backup."""
    return f"{HOLDS}{backup}"


def deletions_folder(backup: str) -> str:
    """Where the deletions of one backup say so."""
    return f"{DELETED}{backup}/"


def deletion_name(backup: str, deletion: str) -> str:
    """That a deletion has begun to delete one backup on purpose."""
    return f"{deletions_folder(backup)}{deletion}"


def key_name(wrapper: str) -> str:
    """A wrapper of the key ring."""
    return f"{KEYS}{wrapper}"


def pin_name(pin: str, renewal: int) -> str:
    """A pin; a renewal (from 1) is a new object. Numbers sort as text, so that a listing that runs
    meanwhile shows the older or the newer one."""
    return f"{PINS}{pin}.{renewal:06d}"


def fence_name(writer: str, prune: str) -> str:
    """Put by a prune before it gives up on a writer, and taken away by that prune alone."""
    return f"{FENCES}{writer}/{prune}"


def void_name(writer: str) -> str:
    """From then on nothing of this writer is there."""
    return f"{VOIDS}{writer}"


def tombstone_name(prune: str) -> str:
    """The packs that a prune will delete."""
    return f"{TOMBSTONES}{prune}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameters:
    """What is chosen once, when a store is made. Sizes in bytes.

    `id_key` is None in an encrypted store: there the key ring has it.
    """

    store_id: str
    chunk_bytes: int
    page_entries: int
    pack_bytes: int
    zstd_level: int
    id_key: bytes | None
    created_at: datetime

    def __post_init__(self) -> None:
        """Raises ValueError for a geometry that the format cannot express."""
        if self.chunk_bytes <= 0 or self.chunk_bytes % SECTOR:
            raise ValueError(f"chunk_bytes {self.chunk_bytes} is no multiple of {SECTOR}")
        if self.page_entries < 2:
            raise ValueError(f"page_entries {self.page_entries} is less than 2")
        if self.pack_bytes <= 0:
            raise ValueError(f"pack_bytes {self.pack_bytes} is not positive")
        if self.id_key is not None and len(self.id_key) != KEY_BYTES:
            raise ValueError(f"id_key has {len(self.id_key)} bytes, not {KEY_BYTES}")

    @property
    def encrypted(self) -> bool:
        """Whether a key opens the store."""
        return self.id_key is None

    def keys(self) -> Keys:
        """The keys of a plain store; ValueError for an encrypted one."""
        if self.id_key is None:
            raise ValueError("the store is encrypted")
        return derive_keys(self.id_key)


def new_parameters(
    *,
    chunk_bytes: int = 256 << 10,
    page_entries: int = 256,
    pack_bytes: int = 32 << 20,
    zstd_level: int = 1,
) -> Parameters:
    """Parameters of a new plain store, with a fresh id and id key."""
    return Parameters(
        store_id=new_id(),
        chunk_bytes=chunk_bytes,
        page_entries=page_entries,
        pack_bytes=pack_bytes,
        zstd_level=zstd_level,
        id_key=secrets.token_bytes(KEY_BYTES),
        created_at=datetime.now(UTC),
    )


def encode_parameters(parameters: Parameters) -> bytes:
    """The bytes of `store.json`."""
    value: dict[str, Any] = {
        "format": FORMAT_NAME,
        "version": FORMAT_VERSION,
        "id": parameters.store_id,
        "created_at": parameters.created_at.isoformat(),
        "chunk_bytes": parameters.chunk_bytes,
        "page_entries": parameters.page_entries,
        "pack_bytes": parameters.pack_bytes,
        "zstd_level": parameters.zstd_level,
        "encryption": {"cipher": CIPHER} if parameters.id_key is None else None,
    }
    if parameters.id_key is not None:
        value["id_key"] = parameters.id_key.hex()
    return seal(value)


def decode_parameters(raw: bytes, where: str) -> Parameters:
    """The inverse. IntegrityError if damaged, UnavailableError (`store-newer`) if too new."""
    value = unseal(f"{where}/{STORE_OBJECT}", raw)
    if value.get("format") != FORMAT_NAME:
        raise IntegrityError(f"{where} is no offload store", code="not-a-store")
    if value["version"] > FORMAT_VERSION:
        raise UnavailableError(
            f"the store {where} has format {value['version']}, this version reads {FORMAT_VERSION}",
            code="store-newer",
            hint="use a newer offload",
        )
    if value.get("encryption") not in (None, {"cipher": CIPHER}):
        raise UnavailableError(
            f"the store {where} is encrypted in a way that this version cannot read",
            code="store-newer",
            hint="use a newer offload",
        )
    try:
        return _from_value(value)
    except (KeyError, TypeError, ValueError) as error:
        raise IntegrityError(
            f"{where}/{STORE_OBJECT} describes no store that can be: {error}", code="bad-store"
        ) from error


def _from_value(value: dict[str, Any]) -> Parameters:
    return Parameters(
        store_id=value["id"],
        chunk_bytes=value["chunk_bytes"],
        page_entries=value["page_entries"],
        pack_bytes=value["pack_bytes"],
        zstd_level=value["zstd_level"],
        id_key=None if value["encryption"] else bytes.fromhex(value["id_key"]),
        created_at=datetime.fromisoformat(value["created_at"]),
    )
