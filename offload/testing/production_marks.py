"""TimeMarks of a production VM under load, with what is known of the load at each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tomli_w

from offload.model import Consistency, TimeMark
from offload.progress import NoProgress
from offload.services import director
from offload.services.context import Context, open_context
from offload.testing.production import BACKUP_USER, DATABASE, EXT4, POINTS, XFS, ProductionVm
from offload.testing.production_load import Load

GROUP = "shop"
_DEADLINE_S = 60.0  # emulation, on a busy machine


@dataclass(frozen=True, slots=True, kw_only=True)
class Taken:
    """A TimeMark. `acknowledged`, by writer, is of before its command; `begun` of when all writers
    were held, and with `crash`, where they are not, of after the command."""

    timemark: TimeMark
    acknowledged: Mapping[str, int]
    begun: Mapping[str, int]
    wal_before: int  # PostgreSQL's position before the command, in bytes

    @property
    def level(self) -> Consistency:
        """What it reached."""
        return self.timemark.consistency

    def image(self, volume: str) -> Path:
        """The clone of a volume."""
        snapshot = self.timemark.snapshot(volume)
        assert snapshot is not None  # noqa: S101 - the group has these volumes
        return Path(snapshot.ref["path"])


@dataclass(slots=True)
class Witness(NoProgress):
    """Reads the counts of the load at the moment in which the VM is held."""

    load: Load
    begun: dict[str, int] = field(default_factory=dict)

    def status(self, task: str, text: str) -> None:
        """The director says `frozen` of a VM once its file systems are."""
        if task.startswith("vm:") and text == "frozen":
            self.begun = self.load.begun


def configuration(vm: ProductionVm, level: Consistency, state: Path) -> dict[str, Any]:
    """Of an instance that takes TimeMarks of this level of the VM. `state` is a short path."""
    tables: dict[str, Any] = {
        "state_dir": str(state / "state"),
        "runtime_dir": str(state / "run"),
        "pool": {"min_free": "0%"},
        "volumes": {
            name: {"provider": "reflink", "path": str(path)} for name, path in vm.disks.items()
        },
        "groups": {
            GROUP: {
                "volumes": [EXT4, XFS],
                "consistency": str(level),
                "deadline_s": _DEADLINE_S,
                "atomic": "record" if level is Consistency.CRASH else "require",
            }
        },
    }
    if level is Consistency.CRASH:
        return tables
    machine: dict[str, Any] = {
        "volumes": [EXT4, XFS],
        "freeze": {"kind": "qemu-ga", "socket": str(vm.agent), "mounts": list(POINTS.values())},
    }
    if level is Consistency.APPLICATION:
        machine["applications"] = [_postgresql(vm), _mysql(vm)]
    return {**tables, "vms": {"production": machine}}


def _postgresql(vm: ProductionVm) -> dict[str, Any]:
    return {
        "kind": "postgresql",
        "host": "127.0.0.1",
        "port": vm.postgres.port,
        "user": BACKUP_USER,
        "database": DATABASE,
        "password_file": str(vm.password_file("postgres")),
    }


def _mysql(vm: ProductionVm) -> dict[str, Any]:
    return {
        "kind": "mysql",
        "host": "127.0.0.1",
        "port": vm.mariadb.port,
        "user": BACKUP_USER,
        "password_file": str(vm.password_file("mariadb")),
        "timeout_s": _DEADLINE_S / 2,
    }


def write_configuration(path: Path, tables: Mapping[str, Any]) -> Path:
    """As a file, which is the caller's alone."""
    path.touch(mode=0o600)
    path.write_text(tomli_w.dumps(tables))
    return path


@contextmanager
def instances(vm: ProductionVm, folder: Path) -> Iterator[dict[Consistency, Context]]:
    """One for each level, all of the same volumes."""
    with ExitStack() as stack:
        yield {
            level: stack.enter_context(open_context(_configured(vm, level, folder / str(level))))
            for level in Consistency
        }


def _configured(vm: ProductionVm, level: Consistency, folder: Path) -> Path:
    folder.mkdir(mode=0o700)
    return write_configuration(folder / "offload.toml", configuration(vm, level, folder))


def take(ctx: Context, vm: ProductionVm, load: Load) -> Taken:
    """A TimeMark, while the load goes on."""
    load.check()
    wal_before = vm.wal_position()
    acknowledged = load.acknowledged
    witness = Witness(load)
    timemark = director.create(ctx, GROUP, progress=witness)
    return Taken(
        timemark=timemark,
        acknowledged=acknowledged,
        begun=witness.begun or load.begun,
        wal_before=wal_before,
    )
