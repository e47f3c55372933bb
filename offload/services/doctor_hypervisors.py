"""Whether each hypervisor of the configuration lets us in, and what of ours was left on it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from offload import compose
from offload.config import Config
from offload.errors import CleanupError, OffloadError
from offload.instance import Instance
from offload.journal import Args, Journal
from offload.services import vm_snapshots
from offload.services.doctor import Check, Status


def look_at_hypervisors(config: Config, config_path: Path | None) -> list[Check]:
    """One after another. Nothing is changed."""
    known = config.state_dir / "instance"
    instance = Instance(
        config=config,
        config_path=config_path,
        state_dir=config.state_dir,
        runtime_dir=config.runtime_dir or config.state_dir / "run",
        id=known.read_text().strip() if known.is_file() else "",
    )
    checks = [_connect(name, instance) for name in config.hypervisors]
    return [*checks, *_left(instance)]


def _connect(name: str, instance: Instance) -> Check:
    label = f"hypervisor {name}"
    try:
        with compose.hypervisor(name, instance) as opened:
            return Check(name=label, status=Status.OK, detail=opened.kind, required=True)
    except OffloadError as error:
        return Check(
            name=label, status=Status.MISSING, detail=error.message, fix=error.hint, required=True
        )


def _left(instance: Instance) -> Iterator[Check]:
    if not instance.id:
        return  # nothing was ever made
    found = vm_snapshots.find(instance, Journal(instance.journal_dir, _never)).found
    if found:
        names = ", ".join(f"{snapshot.name} of {snapshot.vm}" for snapshot in found)
        yield Check(
            name="VM snapshots",
            status=Status.LIMITED,
            detail=f"left by a TimeMark, and growing: {names}",
            fix="offload recover",
        )


def _never(action: str, _args: Args) -> None:
    raise CleanupError(f"a look at the journal is no reason for {action}")
