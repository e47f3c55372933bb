"""The ways into an encrypted store: listing, adding and removing them, rotating the key.

| killed | left | recovery |
| --- | --- | --- |
| add: before the new wrapper is in the store | a key file that opens nothing | removed |
| add: after it | one way in more | stays |
| remove | the wrapper, or not | nothing to do |
| rotate: before the configured key's new wrapper | wrappers of an unused version | removed |
| rotate: after it | old wrappers, which open all but what is new | removed |
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

from offload import compose
from offload.catalog.store import Catalog
from offload.engine.unlock import describe, open_ring, read_source, wrappers
from offload.errors import (
    BusyError,
    ConfigError,
    IntegrityError,
    NotFoundError,
    OffloadError,
    PolicyError,
    UnavailableError,
    UsageError,
)
from offload.format import layout
from offload.format.keyfile import Secret, Wrapper, WrapperKind, next_ring, unwrap
from offload.format.keys import KEY_BYTES, KeyRing
from offload.format.layout import Parameters, decode_parameters
from offload.ids import match_prefix, new_id
from offload.instance import Instance
from offload.journal import step
from offload.services import stores
from offload.services.context import Context
from offload.services.keymaker import HandOver, KeyMaker
from offload.services.undo import dump
from offload.store import Store
from offload.storespec import KeySource

NOT_UNDONE = (
    "Whoever had the old key can still read all that was written up to now, if he can read the "
    "store, and can tell by its id whether data that he knows is in it."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyView:
    """One way in, as it is listed. `version`: the newest of the ring in it, where it was opened.

    `kind` and `created_at` are None for one that is damaged.
    """

    id: str
    kind: WrapperKind | None
    label: str
    created_at: datetime | None
    configured: bool
    version: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyListing:
    """All ways into a store. `trouble`: why the configured key opens none of them."""

    store: str
    keys: tuple[KeyView, ...]
    trouble: str
    damaged: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RotatePlan:
    """What a rotation keeps and drops, and the version that it makes."""

    store: str
    version: int
    kept: tuple[KeyView, ...]  # proven: made anew
    dropped: tuple[KeyView, ...]
    locked: tuple[str, ...] = ()  # old wrappers that object lock keeps


@dataclass(slots=True)
class _Opened:
    store: Store
    parameters: Parameters
    wrappers: list[Wrapper]
    damaged: list[str]

    def ring(self) -> tuple[KeyRing, Wrapper, Secret]:
        """By the configured key."""
        source = self.store.spec.key
        if source is None:
            raise ConfigError(
                f"no key is configured for the store {self.store.url}",
                code="key-missing",
                hint="add [stores.NAME.key] to the configuration",
            )
        secret = read_source(source)
        ring, wrapper = open_ring(self.store, self.parameters, secret, describe(source))
        return ring, wrapper, secret

    def ids(self) -> list[str]:
        """Of all wrappers, damaged ones too."""
        return [name.removeprefix(layout.KEYS) for name in self.store.list(layout.KEYS)]

    def find(self, secret: Secret) -> Wrapper | None:
        """The wrapper that a secret opens."""
        store_id = self.parameters.store_id
        return next((w for w in self.wrappers if unwrap(w, secret, store_id) is not None), None)


@contextmanager
def _opened(ctx: Context, name: str) -> Iterator[_Opened]:
    """An encrypted store, not unlocked. UsageError (`store-not-encrypted`)."""
    store = compose.open_store(stores.spec_of(ctx, name))
    try:
        store.space_bytes()
        parameters = decode_parameters(_store_object(store, name), store.url)
        if not parameters.encrypted:
            raise UsageError(
                f"the store {name} is not encrypted: it has no keys",
                code="store-not-encrypted",
                hint="a store is encrypted from its beginning, or never: make another one",
            )
        found = list(wrappers(store))
        yield _Opened(
            store,
            parameters,
            [w for w in found if isinstance(w, Wrapper)],
            [w.message for w in found if isinstance(w, OffloadError)],
        )
    finally:
        store.close()


def _store_object(store: Store, name: str) -> bytes:
    try:
        return store.get(layout.STORE_OBJECT)
    except NotFoundError as error:
        raise UnavailableError(
            f"the store {name} ({store.url}) is not initialised",
            code="store-not-initialised",
            hint=f"make it with: offload store init {name}",
        ) from error


def _view(wrapper: Wrapper, configured: str, version: int | None) -> KeyView:
    mine = wrapper.id == configured
    return KeyView(
        id=wrapper.id,
        kind=wrapper.kind,
        label=wrapper.label,
        created_at=wrapper.created_at,
        configured=mine,
        version=version if mine else None,
    )


def listing(ctx: Context, name: str) -> KeyListing:
    """All ways in; no key is needed for it, but which one is configured is only seen with it."""
    with _opened(ctx, name) as opened:
        mine, version, trouble = "", None, ""
        try:
            ring, wrapper, _ = opened.ring()
            mine, version = wrapper.id, ring.newest
        except ConfigError as error:
            trouble = error.message
        wrappers_by_age = sorted(opened.wrappers, key=lambda w: (w.created_at, w.id))
        views = [_view(w, mine, version) for w in wrappers_by_age]
        return KeyListing(
            store=name, keys=tuple(views), trouble=trouble, damaged=tuple(opened.damaged)
        )


def add(ctx: Context, name: str, what: KeySource | HandOver, label: str) -> KeyView:
    """Add a way in: a key file (made where it is missing), a passphrase, or a fresh recovery key.

    BusyError (`key-exists`) if it is one already.
    """
    with _opened(ctx, name) as opened, ctx.journal.operation("key-add", name) as op:
        ring, _, _ = opened.ring()
        ident = new_id()
        maker = KeyMaker(op, opened.store, opened.parameters, commit=layout.key_name(ident))
        if not isinstance(what, KeySource):
            secret = maker.recovery_key(what)
        elif what.kind == "file" and not Path(what.value[0]).exists():
            secret = maker.key_file(Path(what.value[0]))
        else:
            secret = read_source(what)
        known = opened.find(secret)
        if known is not None:
            raise BusyError(
                f"this is a way into the store {name} already: {known.id} {known.label}".rstrip(),
                code="key-exists",
                hint=f"see: offload key list {name}",
            )
        maker.wrap(ring, secret, label, ident)
        if opened.ring()[0].newest != ring.newest:
            opened.store.delete(layout.key_name(ident))
            raise _changing(name)
        (made,) = [w for w in wrappers(opened.store) if isinstance(w, Wrapper) and w.id == ident]
        return _view(made, "", None)


def removal(ctx: Context, name: str, prefix: str) -> KeyView:
    """What `remove` would remove. PolicyError (`last-key`), NotFoundError."""
    with _opened(ctx, name) as opened:
        return _removal(opened, prefix)


def _removal(opened: _Opened, prefix: str) -> KeyView:
    ring, mine, _ = opened.ring()
    ident = match_prefix("key", prefix, opened.ids())
    wrapper = next((w for w in opened.wrappers if w.id == ident), None)
    if wrapper is None:
        return KeyView(
            id=ident, kind=None, label="", created_at=None, configured=False, version=None
        )
    if len(opened.wrappers) == 1:
        raise PolicyError(
            f"{ident} is the last way into the store: without it nothing could ever be read",
            code="last-key",
            hint="add another one first: offload key add",
        )
    return _view(wrapper, mine.id, ring.newest)


def remove(ctx: Context, name: str, prefix: str) -> KeyView:
    """Remove a way in: one deletion. It does not take the key from who has used it.

    PolicyError (`key-locked`) where object lock keeps it.
    """
    with _opened(ctx, name) as opened:
        gone = _removal(opened, prefix)
        opened.store.delete(layout.key_name(gone.id))
        step("key.removed")
        if _still_listed(opened.store, [layout.key_name(gone.id)]):
            raise PolicyError(
                f"{gone.id} is locked: it stays a way into the store {name} until its lock ends",
                code="key-locked",
                hint=f"to close what is written from now on to it: offload key rotate {name}",
            )
        return gone


def _still_listed(store: Store, names: Sequence[str]) -> tuple[str, ...]:
    """Ids of wrappers that were deleted and are there all the same: object lock keeps them."""
    left = set(store.list(layout.KEYS)) & set(names)
    return tuple(sorted(name.removeprefix(layout.KEYS) for name in left))


def rotation(ctx: Context, name: str, proofs: Sequence[KeySource] = ()) -> RotatePlan:
    """What `rotate` would do."""
    with _opened(ctx, name) as opened:
        return _plan(opened, name, proofs)[0]


def _plan(
    opened: _Opened, name: str, proofs: Sequence[KeySource]
) -> tuple[RotatePlan, list[tuple[Wrapper, Secret]]]:
    """The plan, and the proven wrappers with their secrets, the configured one last."""
    if opened.damaged:
        raise IntegrityError(
            f"a way into the store {name} is damaged: {opened.damaged[0]}",
            code="bad-key",
            hint=f"bring it back, or remove it: offload key remove {name} ID",
        )
    ring, mine, secret = opened.ring()
    proven: dict[str, tuple[Wrapper, Secret]] = {}
    for source in proofs:
        other = read_source(source)
        _, wrapper = open_ring(opened.store, opened.parameters, other, describe(source))
        proven[wrapper.id] = (wrapper, other)
    proven.pop(mine.id, None)
    kept = [*proven.values(), (mine, secret)]
    ids = {wrapper.id for wrapper, _ in kept}
    plan = RotatePlan(
        store=name,
        version=ring.newest + 1,
        kept=tuple(_view(w, mine.id, ring.newest) for w, _ in kept),
        dropped=tuple(_view(w, mine.id, None) for w in opened.wrappers if w.id not in ids),
    )
    return plan, kept


def rotate(
    ctx: Context, name: str, recovery: HandOver | None, proofs: Sequence[KeySource] = ()
) -> RotatePlan:
    """Make a new version of the key for all that is written from now on.

    Every way in that is proven now (the configured one, and `proofs`) is made anew, and a recovery
    key; the others are dropped. Writers that are running finish with the old version.
    """
    with _opened(ctx, name) as opened, ctx.journal.operation("key-rotate", name) as op:
        plan, kept = _plan(opened, name, proofs)
        fresh = next_ring(opened.ring()[0])
        first, *ids = (new_id() for _ in range(len(kept) + 1))
        commit = layout.key_name(ids[-1])
        old = [layout.key_name(w.id) for w in opened.wrappers]
        if recovery is None:
            old.append(layout.key_name(first))
        op.intend(
            "old-keys", "finish-rotation",
            {"store": opened.store.spec.text(), "commit": commit, "old": dump(old)},
        )  # fmt: skip
        maker = KeyMaker(op, opened.store, opened.parameters, commit=commit)
        _first(maker, fresh, recovery, first)
        for (wrapper, secret), ident in zip(kept, ids, strict=True):
            if ident == ids[-1]:
                _refuse_others(opened.store, name, {*old, *map(layout.key_name, (first, *ids))})
            maker.wrap(fresh, secret, wrapper.label, ident)
        step("key-rotate.committed")
        for gone in old:
            opened.store.delete(gone)
            step("key-rotate.old.deleted")
        return replace(plan, locked=_still_listed(opened.store, old))


def _first(maker: KeyMaker, ring: KeyRing, recovery: HandOver | None, ident: str) -> None:
    """The first new wrapper: of the recovery key, else one that nobody can open. Whoever rotates at
    the same time sees it."""
    if recovery is not None:
        maker.wrap(ring, maker.recovery_key(recovery), "recovery key of key rotate", ident)
        return
    nobody = Secret(kind=WrapperKind.RECOVERY, value=secrets.token_bytes(KEY_BYTES))
    maker.wrap(ring, nobody, "key rotate under way", ident)


def _refuse_others(store: Store, name: str, ours: set[str]) -> None:
    """Two rotations at once would make two versions of one number: each has put something before it
    looks, so that at least one of them sees the other."""
    if set(store.list(layout.KEYS)) - ours:
        raise _changing(name)


def _changing(name: str) -> BusyError:
    return BusyError(
        f"somebody else changes the keys of the store {name} at this moment",
        code="keys-changing",
        hint=f"nothing was changed; try again, after: offload key list {name}",
    )


def undo_rotation(instance: Instance, catalog: Catalog, args: Mapping[str, str]) -> None:  # noqa: ARG001
    """Finish a rotation that has got through; nothing, where it has not."""
    store = compose.open_store(args["store"])
    try:
        if store.exists(args["commit"]):
            for name in json.loads(args["old"]):
                store.delete(name)
    finally:
        store.close()
