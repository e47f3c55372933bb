"""Making a store: its place, its parameters, and for an encrypted one the first ways into it.

The commit point is `store.json`, written last. What a crash leaves before it (wrappers of a key
that nothing was written with, a key file, a file with the recovery key) is removed by recovery.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from offload import compose
from offload.configs.stores import DiskStoreConfig
from offload.engine.unlock import describe, open_ring, read_source
from offload.errors import BusyError, ConfigError, UnavailableError, UsageError
from offload.format import layout
from offload.format.keyfile import new_ring
from offload.format.layout import Parameters, decode_parameters, encode_parameters, new_parameters
from offload.journal import step
from offload.services import locks, stores
from offload.services.context import Context
from offload.services.keymaker import HandOver, KeyMaker
from offload.store import Store

_FOLDERS = (layout.PACKS, layout.INDEXES, layout.MANIFESTS, layout.KEYS)
# what may be in an empty store's folder; our own folders are looked into
_NOT_TAKEN = ("lost+found", "tmp", "lock", *(folder.rstrip("/") for folder in _FOLDERS))


@dataclass(frozen=True, slots=True, kw_only=True)
class InitOptions:
    """What is chosen when a store is made; None: the usual. Sizes in bytes."""

    chunk_bytes: int | None = None
    page_entries: int | None = None
    pack_bytes: int | None = None
    zstd_level: int | None = None
    like: str | None = None  # a configured store whose ids (and geometry) this one shares
    recovery: HandOver | None = None  # None: there shall be no recovery key


def init(ctx: Context, name: str, options: InitOptions | None = None) -> stores.StoreSummary:
    """Make a configured store.

    BusyError if there is one already, or its place is not empty; UsageError (`bad-geometry`,
    `like-encrypted`); ConfigError of what is wrong with the key.
    """
    chosen = options or InitOptions()
    config = ctx.instance.config.store(name)
    if isinstance(config, DiskStoreConfig):
        _make_folder(config.path)
    store = compose.open_store(config.spec())
    try:
        _refuse_taken(store)
        found = compose.probe_store(config.spec())
        locks.prove(store)
        parameters, id_key = _parameters(ctx, chosen, encrypted=config.key is not None)
        if parameters.encrypted:
            _encrypted(ctx, store, parameters, id_key, chosen.recovery)
        else:
            store.put(layout.STORE_OBJECT, [encode_parameters(parameters)])
    finally:
        store.close()
    if found:
        with stores.opened(ctx, name, exclusive=False) as repository:
            stores.note_probe(repository, found)
    return stores.show(ctx, name)


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
        taken = [p.name for p in path.iterdir() if p.name not in _NOT_TAKEN]
    except OSError as error:
        raise UnavailableError(
            f"cannot make the store folder {path}: {error.strerror}", code="store-unavailable"
        ) from error
    if taken and layout.STORE_OBJECT not in taken:
        raise BusyError(
            f"{path} is not empty: it holds {taken[0]}",
            code="store-not-empty",
            hint="choose an empty folder",
        )


def _refuse_taken(store: Store) -> None:
    if store.exists(layout.STORE_OBJECT):
        raise BusyError(
            f"{store.url} is a store already", code="store-exists", hint="offload store show"
        )
    for folder in _FOLDERS:
        for name in store.list(folder):
            raise BusyError(
                f"{store.url} is not empty: it holds {name}",
                code="store-not-empty",
                hint="choose an empty place; if this was a store, its store.json is lost",
            )


def _parameters(
    ctx: Context, options: InitOptions, *, encrypted: bool
) -> tuple[Parameters, bytes | None]:
    """The parameters, and the id key if it is another store's."""
    base, shared = new_parameters(), None
    if options.like is not None:
        other, shared = _like(ctx, options.like, encrypted=encrypted)
        base = replace(
            base,
            chunk_bytes=other.chunk_bytes,
            page_entries=other.page_entries,
            pack_bytes=other.pack_bytes,
            zstd_level=other.zstd_level,
            id_key=shared,
        )
    names = ("chunk_bytes", "page_entries", "pack_bytes", "zstd_level")
    given = {n: getattr(options, n) for n in names if getattr(options, n) is not None}
    try:
        made = replace(base, **given)
    except ValueError as error:
        raise UsageError(f"no such store can be made: {error}", code="bad-geometry") from error
    return (replace(made, id_key=None) if encrypted else made), shared


def _like(ctx: Context, name: str, *, encrypted: bool) -> tuple[Parameters, bytes]:
    """The parameters and the id key of a configured store."""
    store = compose.open_store(stores.spec_of(ctx, name))
    try:
        other = decode_parameters(store.get(layout.STORE_OBJECT), store.url)
        if other.id_key is not None:
            return other, other.id_key
        if not encrypted:
            raise UsageError(
                f"a plain store cannot share the ids of {name}, which is encrypted: its id key "
                "would lie in the open",
                code="like-encrypted",
                hint="give the new store a [key] too",
            )
        source = store.spec.key
        if source is None:
            raise ConfigError(f"no key is configured for the store {name}", code="key-missing")
        ring, _ = open_ring(store, other, read_source(source), describe(source))
        return other, ring.id_key
    finally:
        store.close()


def _encrypted(
    ctx: Context,
    store: Store,
    parameters: Parameters,
    id_key: bytes | None,
    recovery: HandOver | None,
) -> None:
    source = store.spec.key
    if source is None:
        raise ConfigError(f"no key is configured for {store.url}", code="key-missing")
    ring = new_ring(id_key)
    with ctx.journal.operation("store-init", store.url) as op:
        maker = KeyMaker(op, store, parameters, commit=layout.STORE_OBJECT)
        if source.kind == "file" and not Path(source.value[0]).exists():
            made = [(maker.key_file(Path(source.value[0])), "key file")]
        else:
            made = [(read_source(source), source.kind)]
        if recovery is not None:
            made.append((maker.recovery_key(recovery), "recovery key of store init"))
        for secret, label in reversed(made):
            maker.wrap(ring, secret, label)
        step("store-init.keys.written")
        store.put(layout.STORE_OBJECT, [encode_parameters(parameters)])
