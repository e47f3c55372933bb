"""A quiesce script on this machine."""

from __future__ import annotations

from offload import run
from offload.configs.quiesce import ScriptApplication
from offload.errors import NotFoundError
from offload.instance import Instance
from offload.quiescers.holds_program import Program
from offload.quiescers.program import ProgramPart, environment


class ScriptPart(ProgramPart):
    """One `kind = "script"` entry."""

    kind = "script"

    def __init__(self, vm: str, entry: ScriptApplication, instance: Instance) -> None:
        program = Program(
            name=f"script:{entry.name}",
            command=entry.command,
            env=environment(vm, instance),
            timeout_s=entry.timeout_s,
        )
        super().__init__(program, entry.level, instance)

    def check(self) -> None:
        """Also raises NotFoundError (`hook-missing`)."""
        if run.find_program(self._program.command[0]) is None:
            raise NotFoundError(
                f"{self.name}: {self._program.command[0]} is not there, or not executable",
                code="hook-missing",
            )
        super().check()
