"""What parts of kind script and ssh share: a program of the administrator's, phase by phase."""

from __future__ import annotations

from offload.errors import UnavailableError
from offload.ids import new_id
from offload.instance import Instance
from offload.model import Consistency
from offload.quiescers.guarded import GuardedPart
from offload.quiescers.holder import Holder, Targets
from offload.quiescers.holds_program import DONE, NOTHING, NOTHING_HELD, Program, printed

_SLACK_S = 5.0


class ProgramPart(GuardedPart):
    """A quiesce script, held by the guardian: docs/howto/quiesce-scripts.md has its contract."""

    kind = ""

    def __init__(self, program: Program, level: Consistency, instance: Instance) -> None:
        self._program = program
        self._level = level
        holder = Holder(
            instance,
            Targets(programs=(program.to_order(),)),
            slack_s=program.timeout_s + _SLACK_S,
        )
        super().__init__(program.name, holder)

    def check(self) -> None:
        """The check phase. Raises UnavailableError (`hook-failed`; over SSH see Program)."""
        done = self._program.run_phase("check")
        if done.status not in (DONE, NOTHING):
            raise self._program.failure("check", done)
        said = printed(done)
        if said:
            self._notes.append(said)

    def undos(self) -> list[tuple[str, dict[str, str]]]:
        """`thaw-script` or `thaw-ssh`: the thaw phase, where freeze may have run."""
        return [(f"thaw-{self.kind}", self._holder.undo_args())]

    def freeze(self, until: float) -> Consistency:
        """The freeze phase. Raises UnavailableError (`hook-failed`: failed, or late); then the
        thaw phase has run, or runs still."""
        try:
            self._holder.freeze(until)
        except UnavailableError as error:
            raise UnavailableError(error.message, code="hook-failed", hint=error.hint) from error
        self._frozen = True
        nothing = self._holder.said[self.name].endswith(NOTHING_HELD)
        self.what = () if nothing else (self.name,)
        return self._level

    def still_frozen(self) -> bool:
        """Whether the guardian has not let go; the thaw phase tells the rest."""
        if not self._frozen:
            return False
        if not self._holder.still_frozen():
            self._break(self._holder.broken)
        return self.unbroken

    @property
    def output(self) -> str:
        """What the phases printed."""
        said = self._holder.said.get(self.name, "")
        return "\n".join([*self._notes, said] if said else self._notes)


def environment(vm: str, instance: Instance) -> dict[str, str]:
    """What each phase gets, but for what belongs to the phase."""
    entry = instance.config.vms.get(vm)
    return {
        "OFFLOAD_VM": vm,
        "OFFLOAD_VOLUMES": ",".join(entry.volumes if entry is not None else ()),
        "OFFLOAD_HOLD": new_id(),
    }
