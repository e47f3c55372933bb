"""`offload backup`: make one; list, show, compare, delete."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import click

from offload.cli import complete
from offload.cli.app import DefaultGroup, settings_of
from offload.cli.bars import progress
from offload.cli.output import emit, facts, show_age, show_time, table
from offload.cli.quantities import tags_of
from offload.cli.session import changing_context, confirm, reading_context
from offload.errors import IntegrityError
from offload.model import Backup, LegalHold
from offload.quantity import show_seconds, show_size

if TYPE_CHECKING:
    from offload.catalog.store import Verification
    from offload.services.backup import BackupReport
    from offload.services.backups import VolumeDiff


class BackupGroup(DefaultGroup):
    """Offers groups and origins beside its verbs: `offload backup shop`."""

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[Any]:
        """Verbs, options, then what can be backed up."""
        from click.shell_completion import CompletionItem

        offered = super().shell_complete(ctx, incomplete)
        param = click.Argument(["what"])
        return [*offered, *map(CompletionItem, complete.origins(ctx, param, incomplete))]


@click.group(
    cls=BackupGroup,
    subcommand_metavar="GROUP|ORIGIN [--store S] | COMMAND [ARGS]...",
    examples=[
        "offload backup shop",
        "offload backup shop --store main",
        "offload backup timemark:k3f9 --store main",
        "offload backup list --group shop",
    ],
)
def backup() -> None:
    """Back up a GROUP (a fresh TimeMark of it) or an ORIGIN that exists already.

    ORIGIN is timemark:ID[/VOLUME] or backup:ID[/VOLUME]; to back one up is the same as
    `offload backup create`.
    """


@backup.command(
    "create",
    examples=[
        "offload backup create shop",
        "offload backup create shop --store main",
        "offload backup shop --tag release",
    ],
)
@click.argument("what", metavar="GROUP|ORIGIN", shell_complete=complete.origins)
@click.option(
    "--store",
    shell_complete=complete.stores,
    help="Where to; default: the group's own, or the only one.",
)
@click.option(
    "--tag",
    "tags",
    multiple=True,
    metavar="TAG",
    callback=tags_of,
    help="A mark for keep rules (stores.NAME.keep.tags); can be given several times.",
)
@click.pass_context
def create(ctx: click.Context, what: str, store: str | None, tags: tuple[str, ...]) -> None:
    """Back up a GROUP or an ORIGIN; incremental wherever a parent allows it."""
    from offload.services import backup as service

    settings = settings_of(ctx)
    with changing_context(settings) as context, progress(settings) as shown:
        report = service.backup(context, what, store, shown, tags=tags)
    emit(settings, {"id": report.backup.id, **_fields(report)}, lambda: _report(report))
    if report.alarms:  # the backup is whole, and whoever reads exit codes must know all the same
        raise IntegrityError(
            "; ".join(report.alarms),
            code="change-tracking-wrong",
            hint="the backup is complete; find out why the storage reports changes wrongly",
        )


def _fields(report: BackupReport) -> dict[str, Any]:
    return {
        "timemark": report.backup.timemark,
        "backup": report.backup,
        "images": report.images,
        "seconds": round(report.seconds, 3),
        "read_bytes": report.read_bytes,
        "stored_bytes": report.stored_bytes,
        "parent_kept": report.parent_kept,
        "alarms": report.alarms,
    }


def _report(report: BackupReport) -> None:
    made = report.backup
    click.echo(
        f"backup {made.id} of {made.group} in {made.store}: read {show_size(report.read_bytes)}, "
        f"stored {show_size(report.stored_bytes)}, {show_seconds(report.seconds)}"
    )
    rows = [
        [
            image.volume,
            image.mode,
            show_size(image.size_bytes),
            show_size(image.read_bytes),
            show_size(image.stored_bytes),
            image.reason,
        ]
        for image in report.images
    ]
    table(["volume", "mode", "size", "read", "stored", "why"], rows, "")


@backup.command("list", examples=["offload backup list", "offload backup list --store main"])
@click.option("--store", shell_complete=complete.stores, help="Only those in this store.")
@click.option("--group", shell_complete=complete.groups, help="Only those of this group.")
@click.pass_context
def list_(ctx: click.Context, store: str | None, group: str | None) -> None:
    """List the backups, the oldest first."""
    settings = settings_of(ctx)
    with reading_context(settings) as context:
        found = context.catalog.backups(store=store, group=group)
        holds = context.catalog.holds()
        verified = context.catalog.verifications()
        if not found:  # an unknown name is an error, not an empty list
            if store is not None:
                context.instance.config.store(store)
            if group is not None:
                context.instance.config.group(group)
    from offload.cli.output import to_json

    now = datetime.now(UTC)
    rows = [
        [
            entry.id,
            entry.group,
            entry.store,
            show_time(entry.created_at),
            show_age((now - entry.created_at).total_seconds()),
            entry.consistency.value,
            show_size(sum(image.size_bytes for image in entry.images)),
            show_size(sum(image.stored_bytes for image in entry.images)),
            _verified(verified.get(entry.id)),
            ", ".join(
                [
                    *(["held"] if entry.id in holds else []),
                    *entry.tags,
                    *(["alarm"] if entry.alarms else []),
                ]
            ),
        ]
        for entry in found
    ]
    header = ["id", "group", "store", "of", "age", "consistency", "size", "new", "verified", ""]
    data = [
        {**to_json(entry), "held": holds.get(entry.id), "verified": verified.get(entry.id)}
        for entry in found
    ]
    emit(settings, data, lambda: table(header, rows, "no backups"))


def _verified(last: Verification | None) -> str:
    if last is None:
        return "never"
    return f"{last.at.astimezone():%Y-%m-%d}" + (" BAD" if last.problems else "")


@backup.command("show", examples=["offload backup show b7k2"])
@click.argument("id", shell_complete=complete.backups)
@click.pass_context
def show(ctx: click.Context, id: str) -> None:  # noqa: A002 - the argument's name in the help
    """Show one backup and its images. ID may be a prefix."""
    settings = settings_of(ctx)
    with reading_context(settings) as context:
        found = context.catalog.backup(id)
        verified = context.catalog.last_verified(found.id)
        held = context.catalog.holds().get(found.id)
    from offload.cli.output import to_json

    data = {**to_json(found), "held": held, "verified": verified}
    emit(settings, data, lambda: _show(found, held))
    if verified is not None and not settings.json:
        click.echo(
            f"\nverified ({verified.how}) {show_time(verified.at)}: {verified.problems} problems"
        )


def _show(found: Backup, held: LegalHold | None) -> None:
    facts(
        [
            ("id", found.id),
            ("group", found.group),
            ("store", found.store),
            ("of", show_time(found.created_at)),
            ("finished", show_time(found.finished_at)),
            ("timemark", found.timemark),
            ("consistency", found.consistency.value),
            ("instant", found.instant.value),
            ("parent", found.parent or "none"),
            ("host", found.host),
            *([("tags", ", ".join(found.tags))] if found.tags else []),
            *([("VMs", ", ".join(found.vms))] if found.vms else []),
            *([("held", _held(held))] if held else []),
            *(("alarm", alarm) for alarm in found.alarms),
        ]
    )
    click.echo()
    rows = [
        [
            image.volume,
            show_size(image.size_bytes),
            image.mode,
            show_size(image.read_bytes),
            show_size(image.stored_bytes),
            image.root[:16],
            image.reason,
        ]
        for image in found.images
    ]
    table(["volume", "size", "mode", "read", "stored", "root", "why"], rows, "")


def _held(hold: LegalHold) -> str:
    since = f"since {show_time(hold.placed_at)}, placed on {hold.host or 'an unknown host'}"
    return f"{since}: {hold.reason}" if hold.reason else since


@backup.command(
    "diff", examples=["offload backup diff b7k2 c1m4", "offload backup diff A B --json"]
)
@click.argument("a", shell_complete=complete.backups)
@click.argument("b", shell_complete=complete.backups)
@click.pass_context
def diff(ctx: click.Context, a: str, b: str) -> None:
    """Say what differs between two backups of one store. What is equal is never read."""
    from offload.services import backups as service

    settings = settings_of(ctx)
    with reading_context(settings) as context:
        found = service.diff(context, a, b)
    data = [_diff(entry) for entry in found]
    rows = [
        [entry.volume, show_size(entry.changed_bytes), str(len(entry.ranges)), entry.note]
        for entry in found
    ]
    emit(settings, data, lambda: table(["volume", "differs", "ranges", "note"], rows, "no volumes"))


def _diff(entry: VolumeDiff) -> dict[str, Any]:
    ranges = [{"offset_bytes": start, "length_bytes": end - start} for start, end in entry.ranges]
    return {
        "name": entry.volume,
        "changed_bytes": entry.changed_bytes,
        "ranges": ranges,
        "note": entry.note,
    }


@backup.command(
    "delete", examples=["offload backup delete b7k2 --dry-run", "offload backup delete b7k2 --yes"]
)
@click.argument("ids", nargs=-1, required=True, metavar="ID...", shell_complete=complete.backups)
@click.option("--dry-run", is_flag=True, help="Only say what would be deleted.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.pass_context
def delete(ctx: click.Context, ids: tuple[str, ...], dry_run: bool, yes: bool) -> None:
    """Delete backups. The space comes back with the next `offload prune`."""
    from offload.services import backups as service

    settings = settings_of(ctx)
    opened = reading_context if dry_run else changing_context
    with opened(settings) as context:
        known = {b.id: b for b in (context.catalog.backup(prefix) for prefix in ids)}
        if not dry_run:
            names = ", ".join(f"{b.id} of {b.group} in {b.store}" for b in known.values())
            confirm(settings, f"Delete {names}?", yes=yes)
            service.delete(context, list(known))
    wanted = list(known.values())
    data: dict[str, Any] = {"dry_run": dry_run, "deleted": [] if dry_run else wanted}
    if dry_run:
        data["would_delete"] = wanted
    said = "would delete" if dry_run else "deleted"

    def human() -> None:
        for entry in wanted:
            click.echo(f"{said} {entry.id} of {entry.group} in {entry.store}")

    emit(settings, data, human)


@backup.command(
    "hold",
    examples=[
        "offload backup hold b7k2 --reason 'case 2026-117'",
        "offload backup hold b7k2 c1m4",
    ],
)
@click.argument("ids", nargs=-1, required=True, metavar="ID...", shell_complete=complete.backups)
@click.option("--reason", default="", help="Why; shown by list, show and prune.")
@click.pass_context
def hold(ctx: click.Context, ids: tuple[str, ...], reason: str) -> None:
    """Place a legal hold: the backups stay, whatever the rules say, until they are released."""
    from offload.services import legalholds as service

    settings = settings_of(ctx)
    with changing_context(settings) as context:
        placed = service.hold(context, ids, reason)

    def human() -> None:
        for entry in placed:
            click.echo(f"held {entry.backup} {_held(entry)}")

    emit(settings, {"held": placed}, human)


@backup.command("release", examples=["offload backup release b7k2"])
@click.argument("ids", nargs=-1, required=True, metavar="ID...", shell_complete=complete.backups)
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.pass_context
def release(ctx: click.Context, ids: tuple[str, ...], yes: bool) -> None:
    """End the legal holds on backups: the keep rules count for them again."""
    from offload.services import legalholds as service

    settings = settings_of(ctx)
    with changing_context(settings) as context:
        known = [context.catalog.backup(prefix) for prefix in ids]
        names = ", ".join(f"{b.id} of {b.group} in {b.store}" for b in known)
        confirm(settings, f"End the legal hold on {names}?", yes=yes)
        ended = service.release(context, [b.id for b in known])

    def human() -> None:
        for entry in ended:
            click.echo(f"released {entry.id} of {entry.group} in {entry.store}")

    emit(settings, {"released": ended}, human)
