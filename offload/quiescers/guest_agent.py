"""Freezes the file systems of a guest by its QEMU guest agent, over the socket of its port.

The guardian owns the freeze, with a session of its own. While it is frozen the agent answers next
to nothing, and says `frozen` whatever somebody else has thawed meanwhile: how many file systems
were frozen until the end is known by the count that the thaw returns.

On Linux that reaches `filesystem`; `application` where hooks of ours in the guest held one and say
so afterwards (`hook_report.py`). On Windows the agent freezes through VSS and its writers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

from offload.configs.quiesce import GuestAgentFreeze
from offload.errors import NotFoundError, OffloadError, PolicyError, UnavailableError
from offload.guest_agent import AgentError, FileSystem, GuestAgent, GuestSystem
from offload.instance import Instance
from offload.model import Consistency
from offload.quiescers import hook_report, ourselves
from offload.quiescers.holder import Holder, Targets
from offload.quiescers.holds_agent import process_behind

WINDOWS = "mswindows"
_NEEDED = (
    "guest-fsfreeze-status",
    "guest-fsfreeze-freeze",
    "guest-fsfreeze-thaw",
    "guest-get-fsinfo",
)
# File systems of Linux that can be frozen; the agent passes over all others without a word
_FREEZABLE = frozenset(
    {"ext2", "ext3", "ext4", "xfs", "btrfs", "f2fs", "jfs", "nilfs2", "reiserfs", "gfs2"}
)
_HOOK_FAILED = "fsfreeze hook has failed"  # qemu-ga's words: qga/commands-posix.c
_BOOT_ID = "/proc/sys/kernel/random/boot_id"


class GuestAgentPart:
    """`[vms.NAME.freeze]` of kind qemu-ga."""

    kind = "qemu-ga"
    image_at = None

    def __init__(self, vm: str, entry: GuestAgentFreeze, instance: Instance) -> None:
        self._vm = vm
        self._entry = entry
        self._instance = instance
        self._holder: Holder | None = None
        self._system = GuestSystem(id="", name="")
        self._chosen: tuple[str, ...] = ()  # mount points, one a file system
        self._earlier = ""  # what a freeze before this one left in the guest as its report
        self._notes: list[str] = []
        self._frozen = False
        self._hooks_due = False
        self.name = f"qemu-ga:{entry.socket}"
        self.what: tuple[str, ...] = ()
        self.unbroken = True
        self.reached = Consistency.CRASH

    # -- before the freeze -------------------------------------------------------------------------

    def check(self) -> None:
        """Raises NotFoundError (`no-mount`), PolicyError (`cannot-freeze`,
        `would-freeze-ourselves`), UnavailableError (`frozen-by-others`, `agent-gone`, `agent-busy`,
        `agent-silent`, `agent-refused`, `agent-protocol`)."""
        with GuestAgent(self._entry.socket) as agent:
            if agent.frozen():
                raise UnavailableError(
                    f"somebody else has frozen the guest of VM {self._vm} already",
                    code="frozen-by-others",
                    hint="if it was forgotten, thaw it in the guest: fsfreeze --unfreeze MOUNT, "
                    "then restart qemu-ga",
                )
            can = agent.commands()
            missing = [command for command in self._needed() if command not in can]
            if missing:
                raise UnavailableError(
                    f"the guest agent of VM {self._vm} does not do {', '.join(missing)}",
                    code="agent-refused",
                    hint="its administrator has blocked it (block-rpcs in qemu-ga.conf), or it "
                    "is too old",
                )
            with contextlib.suppress(AgentError):
                self._system = agent.system()
            ourselves.check(self._vm, _facts(agent), self._instance)
            least = self._choose(agent.file_systems())
            with contextlib.suppress(AgentError):
                self._earlier = hook_report.number_of(hook_report.read(agent))
            target = {
                "socket": str(self._entry.socket),
                "mounts": self._entry.mounts,
                "least": least,
                "qemu": process_behind(agent),
            }
        self._holder = Holder(self._instance, Targets(agents=(target,)))

    def _needed(self) -> tuple[str, ...]:
        return (*_NEEDED, *(("guest-fsfreeze-freeze-list",) if self._entry.mounts else ()))

    def _choose(self, there: tuple[FileSystem, ...]) -> int:
        """What is to be frozen; how many file systems the agent has to count."""
        wanted = {found.mount: found for found in there}
        if self._entry.mounts:
            self._refuse_unfit(wanted)
            wanted = {mount: wanted[mount] for mount in self._entry.mounts}
        elif self._system.id != WINDOWS:
            wanted = {m: found for m, found in wanted.items() if found.kind in _FREEZABLE}
        by_device = {found.device: mount for mount, found in sorted(wanted.items(), reverse=True)}
        self._chosen = tuple(sorted(by_device.values()))
        if self._system.id == WINDOWS and not self._entry.mounts:
            return 1  # of its volumes, VSS takes those that it can
        if not by_device:
            raise PolicyError(
                f"the guest of VM {self._vm} has no file system that can be frozen",
                code="cannot-freeze",
            )
        return len(by_device)

    def _refuse_unfit(self, there: Mapping[str, FileSystem]) -> None:
        """The agent passes over what is not there, or cannot be frozen, without a word."""
        missing = [mount for mount in self._entry.mounts if mount not in there]
        if missing:
            raise NotFoundError(
                f"nothing is mounted on {', '.join(missing)} in the guest of VM {self._vm}",
                code="no-mount",
                hint=f"correct vms.{self._vm}.freeze.mounts; there are: {', '.join(sorted(there))}",
            )
        unfit = [m for m in self._entry.mounts if there[m].kind not in _FREEZABLE]
        if unfit and self._system.id != WINDOWS:
            raise PolicyError(
                f"{unfit[0]} in the guest of VM {self._vm} is {there[unfit[0]].kind}, which "
                "cannot be frozen",
                code="cannot-freeze",
            )

    def undos(self) -> list[tuple[str, dict[str, str]]]:
        """`thaw-agent`: where the freeze may be ours still."""
        return [("thaw-agent", self._holder.undo_args())] if self._holder is not None else []

    def arm(self, deadline_s: float) -> None:
        """Start the guardian, which opens its session."""
        if self._holder is not None:
            self._holder.arm(deadline_s)

    # -- the freeze --------------------------------------------------------------------------------

    def freeze(self, until: float) -> Consistency:
        """Raises UnavailableError (`freeze-failed`; `hook-failed`: in the guest)."""
        if self._holder is None:
            raise UnavailableError(f"VM {self._vm} was not looked at", code="freeze-failed")
        try:
            self._holder.freeze(until)
        except UnavailableError as error:
            if _HOOK_FAILED not in error.message:
                raise
            self._holder.close()  # the agent serves one client
            raise UnavailableError(
                f"{error.message}{self._failed_hooks()}", code="hook-failed", hint=error.hint
            ) from error
        self._frozen = self._hooks_due = True
        self.what = self._chosen
        self._notes.append(f"frozen in {max(self._holder.frozen_ms.values()):.0f} ms")
        windows = self._system.id == WINDOWS
        self.reached = Consistency.APPLICATION if windows else Consistency.FILESYSTEM
        return self.reached

    def still_frozen(self) -> bool:
        """What the agent says; whether it was so is known after the thaw."""
        if self._holder is None or not self._frozen:
            return False
        held = self._holder.still_frozen()
        if not held:
            self._break(self._holder.broken)
        return held

    def _break(self, why: str) -> None:
        if self.unbroken:
            self._notes.append(f"not held all the time: {why}")
        self.unbroken = False

    def thaw(self) -> None:
        """Idempotent. Raises UnavailableError (`thaw-failed`). Counts what was frozen still."""
        if self._holder is None or not self._frozen:
            return
        self._frozen = False
        try:
            self._holder.thaw()
        finally:
            if self._holder.broken:
                self._break(self._holder.broken)

    def close(self) -> None:
        """End the guardian, which thaws; then the agent can be asked what its hooks did."""
        if self._holder is not None:
            self._holder.close()
        if self._hooks_due:
            self._hooks_due = False
            self._learn_from_hooks()

    def _failed_hooks(self) -> str:
        """Which, and what they said, where they are ours."""
        try:
            with GuestAgent(self._entry.socket) as agent:
                report = hook_report.parse(hook_report.read(agent))
        except OffloadError:
            return ""
        return "".join(f"; {line}" for line in report.failed())

    def _learn_from_hooks(self) -> None:
        """An agent that keeps its files to itself leaves it at `filesystem`."""
        if self._system.id == WINDOWS:
            return
        try:
            with GuestAgent(self._entry.socket) as agent:
                text = hook_report.read(agent)
        except OffloadError as error:
            self._notes.append(f"what hooks in the guest did is not known: {error.message}")
            return
        if hook_report.number_of(text) in ("", self._earlier):
            return
        report = hook_report.parse(text)
        self._notes += report.lines()
        if report.held_applications and self.unbroken:
            self.reached = Consistency.APPLICATION

    @property
    def output(self) -> str:
        """What was noticed, and what hooks in the guest said."""
        return "\n".join(self._notes)


def _facts(agent: GuestAgent) -> ourselves.Facts:
    """What the agent tells of the guest; it may refuse to."""
    interfaces: Any = None
    boot_id = host_name = ""
    with contextlib.suppress(AgentError):
        interfaces = agent.interfaces()
    with contextlib.suppress(AgentError):
        host_name = agent.host_name()
    with contextlib.suppress(AgentError):
        boot_id = agent.read_file(_BOOT_ID, 100).decode("ascii", "replace").strip()
    return ourselves.agent_facts(interfaces, boot_id=boot_id, host_name=host_name)
