"""A bare machine: everything from the store alone.

Each manifest carries the configuration of its group (no secrets), so that a store's address, and
for an encrypted one a key, are enough to write a configuration, to rebuild the catalog, to go on.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import ValidationError

from offload import compose
from offload.config import Config
from offload.engine.repository import Repository
from offload.errors import BusyError, ConfigError, OffloadError, UnavailableError, UsageError
from offload.filesystem import fsync_folder
from offload.format import layout
from offload.format.keyfile import parse_recovery
from offload.format.manifest import Manifest
from offload.services import stores
from offload.services.context import Context
from offload.store import Exclusive, Store
from offload.storespec import KeySource, StoreSpec

_HEAD = """\
# Written by `offload init --from-store` out of the newest backup of each group.
# Paths are those of the machine that made the backups: check them before the next backup.

"""
_KEY_NAMES = {
    "file": "file",
    "passphrase-file": "passphrase_file",
    "recovery-file": "recovery_file",
}
_ANY_NAME = "main"


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """Where a store is: a folder or `s3://BUCKET[/PREFIX]`; `options`: keys of `[stores.NAME]`."""

    place: str
    options: Mapping[str, str | bool] = field(default_factory=dict)
    key: KeySource | None = None

    def table(self) -> dict[str, Any]:
        """`[stores.NAME]`."""
        kind, scheme, rest = self.place.partition("://")
        if not scheme:
            if self.options:
                raise UsageError(
                    f"{', '.join(self.options)}: only for a store on S3", code="bad-address",
                    hint="leave it out, or give s3://BUCKET/PREFIX",
                )  # fmt: skip
            table: dict[str, Any] = {"kind": "disk", "path": str(Path(self.place).absolute())}
        elif kind == "s3" and rest.strip("/"):
            bucket, _, prefix = rest.strip("/").partition("/")
            table = {"kind": "s3", "bucket": bucket, **({"prefix": prefix} if prefix else {})}
            table |= self.options
        else:
            raise UsageError(
                f"'{self.place}' is no address of a store", code="bad-address",
                hint="write a folder, or s3://BUCKET/PREFIX",
            )  # fmt: skip
        if self.key is not None:
            table["key"] = {_KEY_NAMES[self.key.kind]: self.key.value[0]}
        return table

    def spec(self) -> StoreSpec:
        """How it is opened. Raises UsageError (`bad-address`)."""
        try:
            config = Config.model_validate({"stores": {_ANY_NAME: self.table()}})
        except ValidationError as error:
            said = "; ".join(e["msg"].removeprefix("Value error, ") for e in error.errors())
            raise UsageError(f"{self.place}: {said}", code="bad-address") from error
        return config.store(_ANY_NAME).spec()


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What the store gave: backups now in the catalog, and what is wrong with others."""

    store: str
    backups: int
    problems: tuple[str, ...]


def needs_key(address: Address) -> bool:
    """Whether the store is encrypted. Raises UnavailableError (`store-not-initialised`)."""
    store = _opened(address)
    try:
        return layout.decode_parameters(store.get(layout.STORE_OBJECT), store.url).encrypted
    finally:
        store.close()


def keep_recovery_key(text: str, path: Path) -> KeySource:
    """Write a recovery key that somebody has typed to a new file (0600).

    Raises ConfigError (`key-invalid`, `config-unwritable`), BusyError (`key-file-exists`).
    """
    if parse_recovery(text) is None:
        raise ConfigError(
            "that is no recovery key: its check sum is wrong", code="key-invalid",
            hint="look at each group again; capitals and dashes do not matter",
        )  # fmt: skip
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(fd, "w", encoding="utf-8") as out:
            out.write(text.strip() + "\n")
            out.flush()
            os.fsync(out.fileno())
        fsync_folder(path.parent)
    except FileExistsError as error:
        raise BusyError(
            f"there is a file {path} already", code="key-file-exists",
            hint=f"if it holds the recovery key: --recovery-key-file {path}; else move it aside",
        ) from error  # fmt: skip
    except OSError as error:
        raise ConfigError(
            f"cannot write {path}: {error.strerror}", code="config-unwritable"
        ) from error
    return KeySource(kind="recovery-file", value=(str(path),))


def configuration(address: Address, state_dir: Path) -> tuple[str, str]:
    """A configuration for this store: its text, and the name that the store has in it.

    Raises UnavailableError (`store-not-initialised`, `store-newer`), IntegrityError, ConfigError
    (`key-missing`, `key-wrong`, `key-invalid`).
    """
    newest = _newest_of_each_group(address)
    groups: dict[str, Any] = {}
    volumes: dict[str, Any] = {}
    hypervisors: dict[str, Any] = {}
    for manifest in newest.values():
        groups.update(manifest.group_config.get("groups", {}))
        volumes.update(manifest.group_config.get("volumes", {}))
        hypervisors.update(manifest.group_config.get("hypervisors", {}))
    name = _store_name(groups)
    for group in groups.values():
        group.pop("store", None)
        group["store"] = name
    value = {
        "state_dir": str(state_dir),
        "volumes": volumes,
        "groups": groups,
        **({"hypervisors": hypervisors} if hypervisors else {}),
        "stores": {name: address.table()},
    }
    return _HEAD + tomli_w.dumps(value), name


def fill_catalog(ctx: Context, name: str) -> Found:
    """Enter every backup of the store into the catalog. It reads manifests only: whether all that
    they name is there is for `store check` and `verify` to say."""
    found, problems = [], []
    with stores.opened(ctx, name, exclusive=False) as repository:
        for _, manifest in stores.manifests(repository, name):
            if isinstance(manifest, OffloadError):
                problems.append(manifest.message)
            else:
                found.append(manifest.backup)
    stores.adopt(ctx.catalog, found)
    return Found(store=name, backups=len(found), problems=tuple(problems))


def _opened(address: Address) -> Store:
    store = compose.open_store(address.spec())
    with contextlib.ExitStack() as stack:
        stack.callback(store.close)
        if not store.exists(layout.STORE_OBJECT):
            raise UnavailableError(
                f"there is no store in {address.place}",
                code="store-not-initialised",
                hint="give the folder, or the bucket and prefix, that holds store.json",
            )
        stack.pop_all()
    return store


def _newest_of_each_group(address: Address) -> dict[str, Manifest]:
    newest: dict[str, Manifest] = {}
    with ExitStack() as stack:
        cache = stack.enter_context(tempfile.TemporaryDirectory(prefix="offload-"))
        store = _opened(address)
        stack.callback(store.close)
        if isinstance(store, Exclusive):
            stack.enter_context(store.lock(exclusive=False, wait_s=5))
        repository = Repository.open(store, Path(cache))
        stack.callback(repository.index.close)
        for _, found in stores.manifests(repository, ""):
            if isinstance(found, OffloadError):
                continue  # reported when the catalog is filled
            known = newest.get(found.backup.group)
            if known is None or known.backup.created_at < found.backup.created_at:
                newest[found.backup.group] = found
    return newest


def _store_name(groups: dict[str, Any]) -> str:
    """The name that the groups know their store by, if they agree on one."""
    names = {group["store"] for group in groups.values() if "store" in group}
    return names.pop() if len(names) == 1 else _ANY_NAME
