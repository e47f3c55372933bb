"""The entry point: global options, the table of commands, signals, errors and exit codes.

Nothing heavy is imported here: `offload --help` and completion read only the table.
"""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import click

from offload import __version__
from offload.cli import failures
from offload.cli.app import Lazy, LazyGroup, Settings

COMMANDS = {
    "init": Lazy("offload.cli.init:init", "Write a commented configuration."),
    "config": Lazy("offload.cli.config:config", "Check and show the configuration."),
    "doctor": Lazy("offload.cli.doctor:doctor", "What this machine has and lacks."),
    "status": Lazy("offload.cli.status:status", "Pools, TimeMarks, views, backups, leftovers."),
    "volume": Lazy("offload.cli.volume:volume", "The configured volumes."),
    "agent": Lazy("offload.cli.agent:agent", "Guest agents of VMs; freeze hooks for guests."),
    "inventory": Lazy("offload.cli.inventory:inventory", "What the hypervisors have."),
    "timemark": Lazy("offload.cli.timemark:timemark", "Points in time of a group."),
    "mount": Lazy("offload.cli.mount:mount", "Present a point in time as a block device."),
    "unmount": Lazy("offload.cli.mount:unmount", "Withdraw TimeViews."),
    "views": Lazy("offload.cli.mount:views", "The TimeViews that are mounted."),
    "placeholder": Lazy("offload.cli.placeholder:placeholder", "VMs on a backup host, off."),
    "connect": Lazy("offload.cli.connect:connect", "Attach a view as a block device."),
    "disconnect": Lazy("offload.cli.connect:disconnect", "Detach views."),
    "connections": Lazy("offload.cli.connect:connections", "The views that are attached here."),
    "host-rules": Lazy("offload.cli.connect:host_rules", "Keep this machine off the views' data."),
    "backup": Lazy("offload.cli.backup:backup", "Back a group up; list, compare, delete backups."),
    "restore": Lazy("offload.cli.restore:restore", "Write an image of a backup somewhere."),
    "verify": Lazy("offload.cli.verify:verify", "Read backups and check every byte."),
    "migrate": Lazy("offload.cli.migrate:migrate", "Bring a writable view home while it runs."),
    "repair": Lazy("offload.cli.repair:repair", "Mend a store from where its data still is."),
    "copy": Lazy("offload.cli.copy:copy", "Copy backups to another store."),
    "prune": Lazy("offload.cli.prune:prune", "Delete the backups that no rule keeps."),
    "key": Lazy("offload.cli.key:key", "The ways into an encrypted store."),
    "store": Lazy("offload.cli.store:store", "Make, show and check stores."),
    "watch": Lazy("offload.cli.watch:watch", "Take care of pools, views, overlays all the time."),
    "recover": Lazy("offload.cli.recover:recover", "Take back what a dead process left."),
    "completion": Lazy("offload.cli.completion:completion", "Shell completion for this command."),
}

COMPLETE_ENV = "_OFFLOAD_COMPLETE"  # set by the completion scripts that click writes


def _print_version(ctx: click.Context, _param: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        click.echo(f"offload {__version__}")
        ctx.exit()


@click.group(
    cls=LazyGroup,
    table=COMMANDS,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    examples=[
        "offload doctor",
        "offload backup shop --store main",
        "offload --json views",
    ],
)
@click.option(
    "--config",
    "config_path",
    type=click.Path(path_type=Path, dir_okay=False),
    help="The configuration file (or OFFLOAD_CONFIG).",
)
@click.option("--debug", is_flag=True, help="Show tracebacks, and log all that happens.")
@click.option("-v", "--verbose", count=True, help="Log what happens on stderr; twice: more.")
@click.option("-q", "--quiet", is_flag=True, help="No progress, and only errors on stderr.")
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_version,
    help="Show the version and exit.",
)
@click.pass_context
def cli(
    ctx: click.Context, config_path: Path | None, debug: bool, verbose: int, quiet: bool
) -> None:
    """Snapshot volumes, present points in time, back them up, restore them."""
    settings = ctx.ensure_object(Settings)
    settings.config_path = config_path
    settings.debug = debug
    settings.quiet = quiet
    _start_log(settings, 2 if debug else verbose)


def _start_log(settings: Settings, verbose: int) -> None:
    import logging

    level = {0: logging.WARNING, 1: logging.INFO}.get(verbose, logging.DEBUG)
    if settings.quiet:
        level = logging.ERROR
    if settings.json and not verbose:
        level = logging.CRITICAL  # stderr holds one JSON object, if anything
    logging.basicConfig(level=level, format="offload: %(levelname)s: %(message)s", force=True)
    for noisy in ("alembic", "sqlalchemy"):
        logging.getLogger(noisy).setLevel(max(level, logging.WARNING))


def run(args: Sequence[str]) -> int:
    """Run one command line; returns the exit code. Everything that goes wrong is reported here."""
    settings = Settings(json=failures.wants_json(args))
    try:
        if COMPLETE_ENV in os.environ:
            cli.main(list(args), "offload", complete_var=COMPLETE_ENV)
        # not cli.main(): that would turn Ctrl-C and a closed pipe into errors of its own
        with cli.make_context("offload", list(args), obj=settings) as ctx:
            result: Any = cli.invoke(ctx)
        sys.stdout.flush()
    except BrokenPipeError:
        # the reader has gone: nothing more can be said, and Python's own flush at exit must not try
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt as stop:
        return failures.interrupted(stop, settings)
    except Exception as error:  # noqa: BLE001 - the outermost place: nothing may escape as a traceback
        return failures.report(error, settings)
    code = result if isinstance(result, int) else 0
    if settings.unclean is not None and code == 0:
        return failures.report(settings.unclean, settings)
    return code


def _on_sigterm(_number: int, _frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + signal.SIGTERM)  # operations roll back on the way out


def main() -> NoReturn:
    """The console script."""
    # The libraries make many lasting objects while they load: looking through them again and again
    # for garbage cost a tenth of the time that a command takes to start.
    gc.set_threshold(50_000)
    # Else pydantic looks through all installed packages for plug-ins, which nobody here wants.
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
    signal.signal(signal.SIGTERM, _on_sigterm)
    code = run(sys.argv[1:])
    gc.freeze()  # the end of the process frees everything: looking for garbage first took 40 ms
    sys.exit(code)
