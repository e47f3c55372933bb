"""`offload key`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from offload.cli import complete
from offload.cli.app import Group, settings_of
from offload.cli.output import emit, note, show_time, table
from offload.cli.recovery_key import recovery_choice
from offload.cli.session import changing_context, confirm, reading_context
from offload.errors import UsageError
from offload.quantity import count_of

if TYPE_CHECKING:
    from offload.services.keymaker import HandOver
    from offload.services.store_keys import KeyListing, KeyView, RotatePlan
    from offload.storespec import KeySource

_FILE = click.Path(path_type=Path, dir_okay=False, resolve_path=True)


@click.group(cls=Group, examples=["offload key list main", "offload key rotate main"])
def key() -> None:
    """The ways into an encrypted store."""


@key.command("list", examples=["offload key list main"])
@click.argument("store", shell_complete=complete.stores)
@click.pass_context
def list_(ctx: click.Context, store: str) -> None:
    """List the ways into STORE: passphrases, key files, recovery keys. It needs none of them."""
    from offload.services import store_keys

    settings = settings_of(ctx)
    with reading_context(settings) as context:
        found = store_keys.listing(context, store)
    emit(settings, found, lambda: _show(found))


@key.command(
    "add",
    examples=[
        "offload key add main --passphrase-file /root/phrase --label Bern",
        "offload key add main --file /etc/offload/second.key",
        "offload key add main --recovery-to /media/usb/main.recovery",
    ],
)
@click.argument("store", shell_complete=complete.stores)
@click.option("--file", type=_FILE, help="A key file; it is made if it is missing.")
@click.option("--passphrase-file", type=_FILE, help="A file whose one line is a passphrase.")
@click.option("--recovery", is_flag=True, help="A fresh recovery key, shown once.")
@click.option("--recovery-to", type=_FILE, help="A fresh recovery key, into this new file.")
@click.option("--label", default="", help="What it is, for the list.")
@click.pass_context
def add(
    ctx: click.Context,
    /,
    *,
    store: str,
    file: Path | None,
    passphrase_file: Path | None,
    recovery: bool,
    recovery_to: Path | None,
    label: str,
) -> None:
    """Add one way into STORE. The configured key must open it."""
    from offload.services import store_keys

    settings = settings_of(ctx)
    given = [bool(way) for way in (file, passphrase_file, recovery, recovery_to)]
    if sum(given) != 1:
        raise UsageError("give exactly one of --file, --passphrase-file, --recovery, --recovery-to")
    sources = _sources([file] if file else [], [passphrase_file] if passphrase_file else [])
    what: KeySource | HandOver | None = sources[0] if sources else None
    if what is None:
        what = recovery_choice(settings, recovery_to, none=False)
    if what is None:
        raise AssertionError  # a choice without `none` is never none
    with changing_context(settings) as context:
        made = store_keys.add(context, store, what, label)
    emit(settings, made, lambda: click.echo(f"added: {_words(made)}"))


@key.command(
    "remove", examples=["offload key remove main k3v9", "offload key remove main k3 --yes"]
)
@click.argument("store", shell_complete=complete.stores)
@click.argument("id")
@click.option("--dry-run", is_flag=True, help="Only say which one would go.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.pass_context
def remove(ctx: click.Context, /, *, store: str, id: str, dry_run: bool, yes: bool) -> None:  # noqa: A002
    """Remove the way ID into STORE. Who has used it may still hold the key behind it.

    To make that useless for what is written from now on: offload key rotate.
    """
    from offload.services import store_keys

    settings = settings_of(ctx)
    with reading_context(settings) as context:
        gone = store_keys.removal(context, store, id)
    if not dry_run:
        extra = " It is the one that this machine uses!" if gone.configured else ""
        confirm(settings, f"Remove {_words(gone)}?{extra}", yes=yes)
        with changing_context(settings) as context:
            store_keys.remove(context, store, gone.id)
    done = "would be removed" if dry_run else "removed"
    emit(settings, gone, lambda: click.echo(f"{done}: {_words(gone)}"))


@key.command(
    "rotate",
    examples=[
        "offload key rotate main",
        "offload key rotate main --passphrase-file /root/phrase --recovery-key-to /media/usb/new",
    ],
)
@click.argument("store", shell_complete=complete.stores)
@click.option("--file", type=_FILE, multiple=True, help="Keep this key file too.")
@click.option("--passphrase-file", type=_FILE, multiple=True, help="Keep this passphrase too.")
@click.option("--recovery-key-to", "recovery_file", type=_FILE, help="The new one, to a new file.")
@click.option("--no-recovery-key", is_flag=True, help="Make no new recovery key.")
@click.option("--dry-run", is_flag=True, help="Only say which ways in stay, and which go.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.pass_context
def rotate(
    ctx: click.Context,
    /,
    *,
    store: str,
    file: tuple[Path, ...],
    passphrase_file: tuple[Path, ...],
    recovery_file: Path | None,
    no_recovery_key: bool,
    dry_run: bool,
    yes: bool,
) -> None:
    """Make a new version of the key of STORE, for all that is written from now on.

    The configured way in stays, and those that are given; all others are dropped, the recovery key
    too: a new one is made. What was written before stays readable for who had the old key.
    """
    from offload.services import store_keys

    settings = settings_of(ctx)
    proofs = _sources(file, passphrase_file)
    with reading_context(settings) as context:
        plan = store_keys.rotation(context, store, proofs)
    if dry_run:
        emit(settings, plan, lambda: _plan(plan, "would be "))
        return
    recovery = recovery_choice(settings, recovery_file, none=no_recovery_key)
    if not yes and not settings.json:
        _plan(plan, "will be ")
    confirm(settings, f"Rotate the key of store {store}?", yes=yes)
    with changing_context(settings) as context:
        done = store_keys.rotate(context, store, recovery, proofs)
    note(settings, store_keys.NOT_UNDONE)
    if done.locked:
        note(
            settings,
            f"{count_of(len(done.locked), 'old way')} in stay until object lock lets them go; they "
            "open nothing that is written from now on",
        )
    emit(settings, done, lambda: _plan(done, ""))


def _sources(files: Sequence[Path], phrases: Sequence[Path]) -> list[KeySource]:
    from offload.storespec import KeySource

    return [
        KeySource(kind=kind, value=(str(path),))
        for kind, paths in (("file", files), ("passphrase-file", phrases))
        for path in paths
    ]


def _words(way: KeyView) -> str:
    label = f" ({way.label})" if way.label else ""
    return f"{way.id}, {way.kind.value if way.kind else 'damaged'}{label}"


def _show(found: KeyListing) -> None:
    rows = [
        [
            way.id,
            way.kind.value if way.kind else "damaged",
            way.label,
            show_time(way.created_at) if way.created_at else "",
            "configured" if way.configured else "",
        ]
        for way in found.keys
    ]
    table(["id", "kind", "label", "made", ""], rows, "no way in: the keys are lost")
    for text in (*found.damaged, *([found.trouble] if found.trouble else [])):
        click.echo(f"PROBLEM: {text}")


def _plan(plan: RotatePlan, when: str) -> None:
    for way in plan.kept:
        click.echo(f"{when}kept: {_words(way)}")
    for way in plan.dropped:
        click.echo(f"{when}dropped: {_words(way)}")
    click.echo(f"key version of what is written from then on: {plan.version}")
