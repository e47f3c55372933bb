"""`offload restore`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from offload.cli import complete
from offload.cli.app import Command, Settings, settings_of
from offload.cli.bars import progress
from offload.cli.output import emit, table
from offload.cli.session import changing_context, confirm
from offload.quantity import show_seconds, show_size

if TYPE_CHECKING:
    from offload.services.restore import RestoreReport


@click.command(
    cls=Command,
    examples=[
        "offload restore b7k2/shop-db --to /srv/restore/shop-db.raw",
        "offload restore b7k2 --to /srv/restore/",
        "offload restore b7k2/shop-db --to /srv/restore/shop-db.qcow2",
        "offload restore b7k2/shop-db --to /dev/vg0/shop-db",
        "offload restore b7k2/shop-db --to /dev/vg0/shop-db --diff",
        "offload restore b7k2/shop-db --to nbd://10.0.0.5:10809",
        "offload restore --abandon --to /srv/restore/shop-db.raw",
        "offload restore b7k2/ds1 --vmdk web/web.vmdk --to /srv/restore/web.raw",
        "offload restore b7k2 --as-vm shop --host kvm-backup --to /srv/restore/",
        "offload restore b7k2 --as-vm shop --host kvm-backup --instant --name shop-test",
    ],
)
@click.argument("what", metavar="[BACKUP]", required=False, shell_complete=complete.backups)
@click.option(
    "--to",
    metavar="PATH|BLOCKDEV|NBD-URI",
    help="A new file, a folder, a block device that nobody uses, or an NBD server.",
)
@click.option(
    "--format",
    "form",
    type=click.Choice(["raw", "qcow2", "vmdk", "vhdx"]),
    help="Of a new file. By default its ending says it; anything but .qcow2, .vmdk, .vhdx is raw.",
)
@click.option(
    "--overwrite", is_flag=True, help="Replace a file that exists, once the new one is whole."
)
@click.option(
    "--diff",
    is_flag=True,
    help="Read the target and write only what differs. A file that exists is written in place.",
)
@click.option("--restart", is_flag=True, help="Begin anew, whatever an interrupted run has done.")
@click.option(
    "--onto-production",
    "production",
    metavar="VOLUME",
    help="Overwrite this production volume: it must be the target, and nobody may use it.",
)
@click.option("--vmdk", metavar="PATH", help="A VM's disk on the volume's VMFS: see volume vmdks.")
@click.option("--as-vm", "vm", metavar="VM", help="Make this VM again: its disks and settings.")
@click.option("--host", metavar="BACKUP_HOST", help="With --as-vm: where; [backup_hosts.NAME].")
@click.option("--name", help="With --as-vm: what it is called; default: as it was.")
@click.option("--instant", is_flag=True, help="With --as-vm: on TimeViews, without --to.")
@click.option("--abandon", is_flag=True, help="Give the unfinished restore to this target up.")
@click.option("--yes", is_flag=True, help="With --diff in place: do not ask.")
@click.pass_context
def restore(ctx: click.Context, /, what: str | None, to: str | None, **asked: Any) -> None:
    """Write the image of a BACKUP somewhere.

    BACKUP is ID[/VOLUME] or timemark:ID[/VOLUME]; the volume may be left out where there is one
    only, or where --to is a folder. A file appears under its name when it is whole; a device holds
    neither the old nor the new content until the end. A device that is mounted or too small is
    refused, and so is a production volume. A restore that was interrupted goes on when the same
    command is given again.

    With --as-vm a VM is made again from its disks and its settings, and registered on a backup
    host, powered off: its disks in the folder --to, or, with --instant, as TimeViews.
    """
    settings = settings_of(ctx)
    of_vm = {key: asked.pop(key) for key in ("vm", "host", "name", "instant")}
    if of_vm["vm"] is not None:
        _as_vm(settings, what, to, of_vm, asked)
        return
    for key, value in of_vm.items():
        if value:
            raise click.UsageError(f"--{key} goes with --as-vm")
    if to is None:
        raise click.UsageError("Missing option '--to'.", ctx)
    yes = asked.pop("yes")
    if asked.pop("abandon"):
        _abandon(settings, what, to)
        return
    if what is None:
        raise click.UsageError("Missing argument 'BACKUP'.", ctx)
    from offload.services import restore as service

    request = service.Request(what=what, to=to, **asked)
    if service.in_place(request):
        confirm(settings, f"Write over {to}, which holds a mixture until the end?", yes=yes)
    with changing_context(settings) as context, progress(settings) as shown:
        report = service.restore(context, request, progress=shown)
    emit(settings, report, lambda: _show(report))


def _as_vm(
    settings: Settings, what: str | None, to: str | None, of_vm: dict[str, Any],
    others: dict[str, Any],
) -> None:  # fmt: skip
    from offload.services import restore_vm as service

    form, overwrite = others.pop("form") or "raw", others.pop("overwrite")
    if any(others.values()) or form not in ("raw", "qcow2"):
        raise click.UsageError(
            "with --as-vm go --host, --name, --to, --instant, --overwrite, --format raw or qcow2"
        )
    if what is None or of_vm["host"] is None:
        raise click.UsageError("--as-vm needs a BACKUP and --host")
    if (to is None) != of_vm["instant"]:
        raise click.UsageError("--as-vm needs a folder for its disks, --to, or else --instant")
    request = service.VmRequest(
        what=what,
        vm=of_vm["vm"],
        host=of_vm["host"],
        name=of_vm["name"],
        to=Path(to).absolute() if to is not None else None,
        form=form,
        overwrite=overwrite,
    )
    with changing_context(settings) as context, progress(settings) as shown:
        made = service.restore_vm(context, request, shown)

    def human() -> None:
        table(["disk", "is now"], [[name, place] for name, place in made.disks.items()], "")
        for warning in made.warnings:
            click.echo(f"note: {warning}", err=True)
        click.echo(f"VM {made.name} is registered on {made.host}, powered off: {made.id}")

    emit(settings, made, human)


def _abandon(settings: Settings, what: str | None, to: str) -> None:
    from offload.services import restore as service

    if what is not None:
        raise click.UsageError("--abandon takes no BACKUP: it goes by the target")
    with changing_context(settings) as context:
        gone = service.abandon(context, to)

    def human() -> None:
        for entry in gone:
            left = "" if entry.head.temp else f": {entry.head.to} stays as it is, a mixture"
            click.echo(f"gave up {entry.head.origin} to {entry.head.to}{left}")

    data: list[dict[str, Any]] = [
        {"origin": entry.head.origin, "to": entry.head.to, "done_bytes": entry.done_bytes}
        for entry in gone
    ]
    emit(settings, data, human)


def _show(report: RestoreReport) -> None:
    rate = report.written_bytes / report.seconds if report.seconds else 0.0
    rows = [
        [entry.volume, show_size(entry.size_bytes), show_size(entry.written_bytes), entry.to]
        for entry in report.volumes
    ]
    table(["volume", "size", "written", "to"], rows, "")
    compared = sum(entry.compared_bytes for entry in report.volumes)
    resumed = sum(entry.resumed_bytes for entry in report.volumes)
    if compared:
        click.echo(f"compared: {show_size(compared)}")
    if resumed:
        click.echo(f"there already, from the interrupted restore: {show_size(resumed)}")
    click.echo(
        f"restored {report.origin}: {show_size(report.written_bytes)} in "
        f"{show_seconds(report.seconds)}, {show_size(rate)}/s"
    )
