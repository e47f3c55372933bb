"""From where a key comes to the keys of a store.

Secrets are read from files or from a command's output, and go nowhere but into the keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from offload.errors import ConfigError, NotFoundError, OffloadError
from offload.format import layout
from offload.format.keyfile import (
    Secret,
    Wrapper,
    WrapperKind,
    decode_wrapper,
    parse_key_file,
    parse_recovery,
    unwrap,
)
from offload.format.keys import KeyRing, Keys, ring_keys
from offload.format.layout import Parameters
from offload.store import Store
from offload.storespec import KeySource

_COMMAND_S = 120.0  # somebody may have to touch a token
_MAX_PASSPHRASE = 4096


def read_source(source: KeySource) -> Secret:
    """The secret that a source names. ConfigError (`secret-missing`, `secret-unsafe`,
    `secret-invalid`, `key-invalid`, `key-command-failed`)."""
    if source.kind == "command":
        return Secret(kind=WrapperKind.PASSPHRASE, value=_said(source.value))
    from offload.secret_file import read_secret  # a heavy library: not for servers of plain stores

    path = Path(source.value[0])
    if source.kind == "passphrase-file":
        text = read_secret(path, "passphrase").get_secret_value()
        return Secret(kind=WrapperKind.PASSPHRASE, value=text.encode())
    recovery = source.kind == "recovery-file"
    what = "recovery key" if recovery else "key file"
    text = read_secret(path, what).get_secret_value()
    value = parse_recovery(text) if recovery else parse_key_file(text)
    if value is None:
        raise ConfigError(
            f"{path} holds no {what}, or a damaged one: its check sum is wrong",
            code="key-invalid",
            hint="bring back the right file; another way in: offload key list",
        )
    return Secret(kind=WrapperKind.RECOVERY if recovery else WrapperKind.FILE, value=value)


def _said(argv: tuple[str, ...]) -> bytes:
    from offload import run  # not for servers of stores without a key's command

    try:
        done = run.run(argv, timeout_s=_COMMAND_S)
    except OffloadError as error:
        raise ConfigError(
            f"the key's command failed: {error.message}",
            code="key-command-failed",
            hint="run it by hand; it must print the passphrase, one line, and end with status 0",
        ) from error
    text = done.stdout.removesuffix("\n").removesuffix("\r")
    if not text or "\n" in text or len(text) > _MAX_PASSPHRASE:
        raise ConfigError(
            f"the key's command {Path(argv[0]).name} did not print one line of text",
            code="key-command-failed",
            hint="it must print the passphrase and nothing else",
        )
    return text.encode()


def describe(source: KeySource) -> str:
    """A source in words, without what is secret: a command is named by its program."""
    if source.kind == "command":
        return f"the command {Path(source.value[0]).name}"
    kinds = {"file": "key file", "passphrase-file": "passphrase", "recovery-file": "recovery key"}
    return f"the {kinds[source.kind]} in {source.value[0]}"


def wrappers(store: Store) -> Iterator[Wrapper | OffloadError]:
    """All ways into a store, or what is wrong with one."""
    for name in store.list(layout.KEYS):
        try:
            yield decode_wrapper(name, store.get(name))
        except NotFoundError:
            continue  # removed meanwhile
        except OffloadError as error:
            yield error


def unlock(store: Store, parameters: Parameters) -> Keys:
    """The keys of a store, by what its spec says of a key.

    ConfigError (`key-missing`, `key-wrong`, `store-not-encrypted`) and those of `read_source`.
    """
    source = store.spec.key
    if not parameters.encrypted:
        if source is not None:
            raise ConfigError(
                f"the store {store.url} is not encrypted, but a key is configured for it",
                code="store-not-encrypted",
                hint="if it never was, remove its [key]; if it was, somebody has replaced it",
            )
        return parameters.keys()
    if source is None:
        raise ConfigError(
            f"the store {store.url} is encrypted, and no key is configured for it",
            code="key-missing",
            hint="add [stores.NAME.key] to the configuration",
        )
    return ring_keys(open_ring(store, parameters, read_source(source), describe(source))[0])


def open_ring(
    store: Store, parameters: Parameters, secret: Secret, what: str
) -> tuple[KeyRing, Wrapper]:
    """The newest key ring that a secret opens, and its wrapper; `what` names the secret.

    Between two steps of a rotation there are two.
    """
    best: tuple[KeyRing, Wrapper] | None = None
    wrong: list[str] = []
    count = 0
    for wrapper in wrappers(store):
        if isinstance(wrapper, OffloadError):
            wrong.append(wrapper.message)
            continue
        count += 1
        ring = unwrap(wrapper, secret, parameters.store_id)
        if ring is not None and (best is None or ring.newest > best[0].newest):
            best = (ring, wrapper)
    if best is None:
        damage = f"; {'; '.join(wrong)}" if wrong else ""
        raise ConfigError(
            f"{what} does not open the store {store.url}: it fits none of its {count} keys{damage}",
            code="key-wrong",
            hint="is it the key of another store, or one that was removed? Another way in is the "
            "recovery key",
        )
    return best
