"""Whether each VM of the configuration can be held: its freezer and its applications answer; and
whether placeholders can stand on each backup host."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from offload import compose
from offload.config import Config
from offload.configs.quiesce import VmConfig
from offload.errors import OffloadError
from offload.instance import Instance
from offload.model import Consistency
from offload.quiesce import Part
from offload.services.doctor import Check, Status

_AT_ONCE = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class _Question:
    vm: str
    kind: str
    build: Callable[[], Part]
    required: bool

    def ask(self) -> Check:
        """`check` of the part, as a TimeMark would do it."""
        name = f"vm {self.vm}: {self.kind}"
        try:
            part = self.build()
            try:
                part.check()
                said = part.output
            finally:
                part.close()
        except OffloadError as error:
            return Check(
                name=name,
                status=Status.MISSING,
                detail=error.message,
                fix=error.hint,
                required=self.required,
            )
        detail = "; ".join((part.name, *said.splitlines()))
        return Check(name=name, status=Status.OK, detail=detail, required=self.required)


def look_at_vms(config: Config, config_path: Path | None) -> list[Check]:
    """All of them, and all backup hosts, at the same time. Nothing is held or changed."""
    instance = Instance(
        config=config,
        config_path=config_path,
        state_dir=config.state_dir,
        runtime_dir=config.runtime_dir or config.state_dir / "run",
        id="doctor",
    )
    questions = [q for name, vm in config.vms.items() for q in _questions(name, vm, instance)]
    with ThreadPoolExecutor(max_workers=_AT_ONCE) as crew:
        vms = crew.map(_Question.ask, questions)
        hosts = crew.map(lambda name: _look_at_host(name, instance), config.backup_hosts)
        return [*vms, *hosts]


def _look_at_host(name: str, instance: Instance) -> Check:
    """`check` of the backup host, as a mount would do it: also privileges that are missing."""
    what = f"backup host {name}"
    try:
        host = compose.backup_host(name, instance)
        warnings = host.check()
        target, exposure, _ = host.export()
    except OffloadError as error:
        return Check(
            name=what, status=Status.MISSING, detail=error.message, fix=error.hint, required=False
        )
    views = f"{host.kind}, views by {target}"
    who = f" for {', '.join(exposure.initiators)}" if exposure.initiators else ""
    return Check(
        name=what,
        status=Status.OK,
        detail="; ".join((f"{views}{who}", *warnings)),
        required=False,
    )


def _questions(name: str, vm: VmConfig, instance: Instance) -> Iterator[_Question]:
    groups = [group for group in instance.config.groups if name in instance.config.vms_of(group)]
    least = [vm.consistency or instance.config.group(group).consistency for group in groups]
    freeze = vm.freeze
    if freeze is not None:
        yield _Question(
            vm=name,
            kind=freeze.kind,
            build=lambda: compose.freezer_part(name, freeze, vm.volumes, instance),
            required=any(level is not Consistency.CRASH for level in least),
        )
    for entry in vm.applications:
        yield _Question(
            vm=name,
            kind=entry.kind,
            build=lambda entry=entry: compose.application_part(name, entry, instance),  # type: ignore[misc]
            required=Consistency.APPLICATION in least,
        )
