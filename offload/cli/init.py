"""`offload init`."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from offload.cli.app import Command, Settings, settings_of
from offload.cli.output import emit
from offload.errors import OffloadError, UsageError

if TYPE_CHECKING:
    from offload.services.bare import Address
    from offload.storespec import KeySource

_FOLDER = click.Path(path_type=Path, file_okay=False, resolve_path=True)
_FILE = click.Path(path_type=Path, dir_okay=False, resolve_path=True)
_KEYS = {  # kind of key source → option
    "recovery-file": "recovery_key_file",
    "file": "key_file",
    "passphrase-file": "passphrase_file",
}


@click.command(
    cls=Command,
    examples=[
        "offload init",
        "offload --config ./offload.toml init --state-dir /srv/offload",
        "offload init --from-store /mnt/backups",
        "offload init --from-store s3://backups/main --endpoint https://s3.example.org",
        "offload init --from-store s3://backups/main --recovery-key-file /media/usb/main.recovery",
    ],
)
@click.option(
    "--state-dir", type=_FOLDER, help="Where this instance keeps its catalog and journal."
)
@click.option(
    "--from-store",
    metavar="FOLDER|s3://BUCKET/PREFIX",
    help="A bare machine: take groups and volumes from the backups in this store, and list them.",
)
@click.option("--recovery-key-file", type=_FILE, help="What opens an encrypted store, 0600.")
@click.option("--key-file", type=_FILE, help="The same, a key file.")
@click.option("--passphrase-file", type=_FILE, help="The same, a passphrase.")
@click.option("--endpoint", metavar="URL", help="Of S3; without it, AWS.")
@click.option("--region", help="Of S3.")
@click.option("--profile", help="Whose credentials, in the files of AWS's tools.")
@click.option("--credentials-file", type=_FILE, help="Such a file in another place.")
@click.option("--ca-file", type=_FILE, help="Certificates of an authority of one's own.")
@click.option("--path-style", is_flag=True, help="The bucket in the path: most servers but AWS.")
@click.option("--as-of", metavar="TIME", help="Of S3, after an attack: as it was then, read-only.")
@click.option("--force", is_flag=True, help="Move an existing configuration aside first.")
@click.pass_context
def init(
    ctx: click.Context,
    /,
    *,
    state_dir: Path | None,
    from_store: str | None,
    force: bool,
    **given: Any,
) -> None:
    """Write a commented configuration.

    It goes to --config, OFFLOAD_CONFIG, or the usual place (/etc/offload/offload.toml for root), is
    readable by its owner only, and never overwrites anything. With --from-store, an encrypted store
    needs one of its keys: without an option the recovery key is asked for.
    """
    from offload import init_template
    from offload.config import CONFIG_ENV, usual_places

    settings = settings_of(ctx)
    chosen = settings.config_path or os.environ.get(CONFIG_ENV) or usual_places()[0]
    path = Path(chosen).absolute()
    state = state_dir or init_template.default_state_dir()
    if from_store is not None:
        init_template.check(path, force=force)  # before anybody types a key
        _from_store(settings, path, state, _address(settings, path, from_store, given), force)
        return
    unused = [f"--{name.replace('_', '-')}" for name, value in given.items() if value]
    if unused:
        raise UsageError(f"{', '.join(unused)}: only with --from-store")
    old = init_template.write(path, init_template.render(state), force=force)

    def human() -> None:
        say = f"offload --config {path}" if path not in usual_places() else "offload"
        click.echo(f"wrote {path}" + (f" (the old one is now {old})" if old else ""))
        click.echo("Next:")
        click.echo("  1. name your volumes, groups and a store in it")
        click.echo(f"  2. {say} config check")
        click.echo(f"  3. {say} doctor")
        click.echo(f"  4. {say} store init NAME")
        click.echo(f"  5. {say} backup GROUP")

    emit(settings, {"path": path, "state_dir": state, "moved_aside": old}, human)


def _address(settings: Settings, config: Path, place: str, given: dict[str, Any]) -> Address:
    """The store, and what opens it."""
    from offload.services import bare
    from offload.storespec import KeySource

    keys = [
        KeySource(kind=kind, value=(str(path),))
        for kind, name in _KEYS.items()
        if (path := given.pop(name)) is not None
    ]
    if len(keys) > 1:
        raise UsageError(f"only one of {', '.join(f'--{n}' for n in _KEYS.values())}")
    options = {n: v if n == "path_style" else str(v) for n, v in given.items() if v}
    address = bare.Address(place=place, options=options, key=keys[0] if keys else None)
    if not keys and bare.needs_key(address):
        return replace(address, key=_ask(settings, config))
    return address


def _ask(settings: Settings, config: Path) -> KeySource:
    from offload.services import bare

    if settings.json or not sys.stdin.isatty():
        raise UsageError(
            "the store is encrypted, and nobody is there to type its recovery key",
            code="key-missing",
            hint="give --recovery-key-file, --key-file or --passphrase-file",
        )
    file = _asked_file(config)
    click.echo(f"The store is encrypted. Its recovery key will be kept in {file}.", err=True)
    return bare.keep_recovery_key(click.prompt("Recovery key", hide_input=True, err=True), file)


def _asked_file(config: Path) -> Path:
    """Where a recovery key that was typed is kept."""
    return config.with_name(f"{config.stem}.recovery-key")


def _from_store(settings: Settings, path: Path, state: Path, address: Address, force: bool) -> None:
    from offload import init_template
    from offload.quantity import count_of
    from offload.services import bare
    from offload.services.context import open_context

    asked = _asked_file(path)
    try:
        text, name = bare.configuration(address, state)
    except OffloadError:
        if address.key is not None and address.key.value == (str(asked),):
            asked.unlink(missing_ok=True)  # what was typed opens nothing
        raise
    old = init_template.write(path, text, force=force)
    with open_context(path) as context:
        found = bare.fill_catalog(context, name)

    def human() -> None:
        click.echo(f"wrote {path}" + (f" (the old one is now {old})" if old else ""))
        click.echo(f"in the catalog now: {count_of(found.backups, 'backup')} of store {name}")
        for problem in found.problems:
            click.echo(f"problem: {problem}", err=True)
        click.echo("Next:")
        click.echo("  1. offload backup list")
        click.echo("  2. offload restore BACKUP --to FOLDER/")
        click.echo("  3. look at the paths in the configuration before the next backup")
        if address.key is not None and address.key.kind == "recovery-file":
            file = path.with_name(f"{name}.key")
            click.echo(f"  4. a key of this machine's own: offload key add {name} --file {file}")
            click.echo(f'     then in [stores.{name}.key]: file = "{file}"')

    data = {"path": path, "state_dir": state, "moved_aside": old, "store": name,
            "backups": found.backups, "problems": found.problems}  # fmt: skip
    emit(settings, data, human)
