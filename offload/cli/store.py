"""`offload store`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from offload.cli import complete
from offload.cli.app import Group, settings_of
from offload.cli.output import emit, facts, note, table
from offload.cli.quantities import size
from offload.cli.recovery_key import recovery_choice
from offload.cli.session import changing_context, reading_context
from offload.errors import IntegrityError
from offload.quantity import count_of, show_size

if TYPE_CHECKING:
    from offload.services.stores import CheckReport, StoreSummary


@click.group(cls=Group, examples=["offload store init main", "offload store list"])
def store() -> None:
    """Where backups live."""


@store.command(
    "init",
    examples=[
        "offload store init main",
        "offload store init main --recovery-key-to /media/usb/main.recovery",
        "offload store init second --like main",
    ],
)
@click.argument("name", shell_complete=complete.stores)
@click.option(
    "--recovery-key-to",
    "recovery_file",
    type=click.Path(path_type=Path, dir_okay=False, resolve_path=True),
    help="Write the recovery key to this new file instead of showing it.",
)
@click.option("--no-recovery-key", is_flag=True, help="Make none: one lost key loses everything.")
@click.option(
    "--like",
    metavar="STORE",
    shell_complete=complete.stores,
    help="Share ids and geometry with this store, so that copies send only what is missing.",
)
@click.option("--chunk-size", callback=size, help="Bytes of image in a chunk. Default: 256KiB.")
@click.option("--page-entries", type=click.IntRange(2, 65536), help="Width of the tree: 256.")
@click.option("--pack-size", callback=size, help="From which size a pack is closed: 32MiB.")
@click.option("--zstd-level", type=click.IntRange(1, 19), help="Compression. Default: 1.")
@click.pass_context
def init(
    ctx: click.Context,
    /,
    *,
    name: str,
    recovery_file: Path | None,
    no_recovery_key: bool,
    like: str | None,
    chunk_size: int | None,
    page_entries: int | None,
    pack_size: int | None,
    zstd_level: int | None,
) -> None:
    """Make the store NAME of the configuration. Its place must be empty or missing.

    With [stores.NAME.key] in the configuration it is encrypted. A key file that is missing is made;
    a recovery key is shown once, and a part of it asked back.
    """
    from offload.services import store_init

    settings = settings_of(ctx)
    with changing_context(settings) as context:
        encrypted = context.instance.config.store(name).key is not None
        chosen = store_init.InitOptions(
            chunk_bytes=chunk_size,
            page_entries=page_entries,
            pack_bytes=pack_size,
            zstd_level=zstd_level,
            like=like,
            recovery=recovery_choice(
                settings, recovery_file, none=no_recovery_key, encrypted=encrypted
            ),
        )
        made = store_init.init(context, name, chosen)
    if not encrypted:
        note(
            settings,
            f"the store {name} is NOT encrypted: whoever can read its place can read the backups, "
            "and who can write there can change them",
        )
    emit(settings, made, lambda: _show(made))


@store.command("list", examples=["offload store list", "offload store list --json"])
@click.pass_context
def list_(ctx: click.Context) -> None:
    """List the configured stores. One that cannot be opened says why in its row."""
    from offload.services import stores

    settings = settings_of(ctx)
    with reading_context(settings) as context:
        found = stores.listing(context)
    rows = [
        [
            entry.name,
            entry.kind,
            str(entry.backups),
            _size(entry.stored_bytes),
            _size(entry.free_bytes),
            entry.url,
            entry.state,
        ]
        for entry in found
    ]
    header = ["name", "kind", "backups", "stored", "free", "where", "state"]
    emit(settings, found, lambda: table(header, rows, "no stores are configured"))


@store.command("show", examples=["offload store show main"])
@click.argument("name", shell_complete=complete.stores)
@click.pass_context
def show(ctx: click.Context, name: str) -> None:
    """Show one store: what it holds, its format, its space."""
    from offload.services import stores

    settings = settings_of(ctx)
    with reading_context(settings) as context:
        found = stores.show(context, name)
    emit(settings, found, lambda: _show(found))


@store.command(
    "check",
    examples=[
        "offload store check main",
        "offload store check main --rebuild-catalog",
        "offload store check main --rebuild-index",
        "offload store check main --expect-head 1f0c6e2a77b04d91",
    ],
)
@click.argument("name", shell_complete=complete.stores)
@click.option(
    "--rebuild-catalog",
    is_flag=True,
    help="Enter what the store holds into the catalog, and drop what it does not.",
)
@click.option(
    "--rebuild-index",
    is_flag=True,
    help="Make lost or damaged index objects anew, from the packs themselves.",
)
@click.option(
    "--expect-head",
    metavar="HASH",
    help="A head that was noted before: a problem if the chain of backups lacks it.",
)
@click.pass_context
def check(
    ctx: click.Context,
    name: str,
    rebuild_catalog: bool,
    rebuild_index: bool,
    expect_head: str | None,
) -> None:
    """Check a store's structure, without reading the data: that is `offload verify`.

    The exit code is 7 if something is wrong.
    """
    from offload.services import stores

    settings = settings_of(ctx)
    opened = changing_context if rebuild_catalog or rebuild_index else reading_context
    with opened(settings) as context:
        report = stores.check(
            context,
            name,
            rebuild_catalog=rebuild_catalog,
            rebuild_index=rebuild_index,
            expect_head=expect_head,
        )
    emit(settings, report, lambda: _checked(report))
    if report.problems:
        count = len(report.problems)
        raise IntegrityError(
            f"store {name} has {count} problem" + ("s" if count > 1 else ""),
            code="store-damaged",
            hint=f"see what is hit: offload verify --all --store {name}",
        )


def _checked(report: CheckReport) -> None:
    for problem in report.problems:
        click.echo(f"PROBLEM: {problem}")
    counts = (count_of(report.backups, "backup"), count_of(report.packs, "pack"))
    click.echo(f"{', '.join(counts)}, {count_of(report.chunks, 'chunk')} looked at")
    if report.head is not None:
        click.echo(f"head of the chain of backups: {report.head}")
    if report.orphan_packs:
        orphans = count_of(len(report.orphan_packs), "pack")
        click.echo(f"not in the index: {orphans}; offload prune removes what no backup needs")
    if report.rebuilt is not None:
        click.echo(f"entered in the catalog: {count_of(report.rebuilt, 'backup')}")


def _show(entry: StoreSummary) -> None:
    facts(
        [
            ("name", entry.name),
            ("kind", entry.kind),
            ("where", entry.url),
            ("id", entry.id),
            ("state", entry.state),
            ("format", str(entry.format_version)),
            ("backups", str(entry.backups)),
            ("packs", str(entry.packs)),
            ("chunks", str(entry.chunks)),
            ("holds", f"{_size(entry.raw_bytes)} in {_size(entry.stored_bytes)}"),
            ("free", f"{_size(entry.free_bytes)} of {_size(entry.size_bytes)}"),
            ("chunk size", _size(entry.chunk_bytes)),
            ("encryption", f"key version {entry.key_version}" if entry.key_version else "none"),
            *entry.honours.items(),
        ]
    )


def _size(count: int | None) -> str:
    return "-" if count is None else show_size(count)
