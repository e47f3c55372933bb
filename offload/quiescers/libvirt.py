"""Freezes the file systems of a libvirt domain's guest, by its guest agent through the daemon.

The freeze is owned by the guardian process, which has a connection of its own. qemu-ga has no timer
that thaws: where this machine itself is lost while a guest is frozen, `offload recover` thaws it
after the reboot, or a hook in the guest does.

A domain that is off has no writers: it counts as held for as long as it stays off.
"""

from __future__ import annotations

import contextlib
from typing import Any

from offload import libvirtd
from offload.configs.hypervisors import LibvirtConfig
from offload.configs.quiesce import LibvirtFreeze
from offload.errors import ConfigError, NotFoundError, OffloadError, UnavailableError
from offload.instance import Instance
from offload.libvirtd import Domain, DomainState, Libvirt
from offload.model import Consistency
from offload.quiescers import ourselves
from offload.quiescers.holder import Holder, Targets

_HINTS = {
    DomainState.MIGRATING: "wait until the migration has ended",
    DomainState.PAUSED: "its guest cannot flush while it stands: virsh resume, or find out why "
    "(virsh domstate --reason); a full disk pauses domains too",
    DomainState.STOPPING: "wait until it is off",
    DomainState.CRASHED: "see: virsh domstate --reason",
    DomainState.ASLEEP: "wake it: virsh dompmwakeup",
}


class LibvirtPart:
    """`[vms.NAME.freeze]` of kind libvirt."""

    kind = "libvirt"
    image_at = None

    def __init__(self, vm: str, entry: LibvirtFreeze, instance: Instance) -> None:
        hypervisor = instance.config.hypervisors.get(entry.hypervisor)
        if not isinstance(hypervisor, LibvirtConfig):
            raise ConfigError(f"[hypervisors.{entry.hypervisor}] is not of kind libvirt")
        self._vm = vm
        self._entry = entry
        self._instance = instance
        self._uri = hypervisor.uri
        self.name = f"libvirt:{entry.domain}"
        self._link: Libvirt | None = None
        self._known: Domain | None = None
        self._holder: Holder | None = None
        self._off = False
        self._notes: list[str] = []
        self.what: tuple[str, ...] = ()
        self.unbroken = True

    @property
    def _domain(self) -> Domain:
        """By a connection that is made when it is first needed."""
        if self._known is None:
            self._link = Libvirt(self._uri)
            self._known = self._link.domain(self._entry.domain)
        return self._known

    def check(self) -> None:
        """Raises NotFoundError (`unknown-domain`, `no-mount`), PolicyError
        (`would-freeze-ourselves`), UnavailableError (`domain-not-running`, `frozen-by-others`,
        `agent-timeout`, `agent-missing`, `libvirt-unavailable`), PrivilegeError."""
        domain = self._domain
        state = self._usable_state()
        facts = self._facts(asks_agent=state is DomainState.RUNNING)
        ourselves.check(self._vm, facts, self._instance)
        if state is DomainState.OFF:
            return
        if domain.frozen():
            raise UnavailableError(
                f"domain {domain.name}: somebody else has frozen its guest already",
                code="frozen-by-others",
                hint=f"by hand, if it was forgotten: virsh domfsthaw {domain.name}",
            )
        there = self._mounts()
        missing = [mount for mount in self._entry.mounts if mount not in there]
        if missing:
            raise NotFoundError(
                f"nothing is mounted on {', '.join(missing)} in the guest of domain {domain.name}",
                code="no-mount",
                hint=f"correct vms.{self._vm}.freeze.mounts; there are: {', '.join(there)}",
            )

    def _usable_state(self) -> DomainState:
        """Running, or off. Raises UnavailableError (`domain-not-running`) otherwise."""
        state = self._domain.state()
        if state is DomainState.OFF and self._domain.migrated_away():
            raise UnavailableError(
                f"domain {self._domain.name} was migrated to another host",
                code="domain-not-running",
                hint=f"correct vms.{self._vm}.freeze.hypervisor",
            )
        if state not in (DomainState.RUNNING, DomainState.OFF):
            raise UnavailableError(
                f"domain {self._domain.name} is {state}",
                code="domain-not-running",
                hint=_HINTS.get(state, ""),
            )
        return state

    def _facts(self, *, asks_agent: bool) -> ourselves.Facts:
        """By the domain's definition, and what its agent says; an agent may refuse to say."""
        answers: dict[str, Any] = {}
        if asks_agent:
            for command in ("guest-network-get-interfaces", "guest-get-host-name"):
                with contextlib.suppress(UnavailableError):
                    answers[command] = self._domain.agent(command)
        name = answers.get("guest-get-host-name")
        facts = ourselves.agent_facts(
            answers.get("guest-network-get-interfaces"),
            uuids=[self._domain.uuid],
            host_name=str(name.get("host-name", "")) if isinstance(name, dict) else "",
        )
        return ourselves.with_macs(facts, self._domain.macs())

    def _mounts(self) -> tuple[str, ...]:
        """What the agent would freeze."""
        said = self._domain.agent("guest-get-fsinfo")
        entries = [e for e in said if isinstance(e, dict)] if isinstance(said, list) else []
        return tuple(sorted({str(e.get("mountpoint", "")) for e in entries} - {""}))

    def undos(self) -> list[tuple[str, dict[str, str]]]:
        """`thaw-libvirt`: where the freeze may be ours still."""
        return [("thaw-libvirt", self._made_holder().undo_args())]

    def _made_holder(self) -> Holder:
        if self._holder is None:
            target = {
                "uri": self._uri,
                "domain": self._entry.domain,
                "mounts": self._entry.mounts,
                "bindings": libvirtd.bindings(),
            }
            self._holder = Holder(self._instance, Targets(libvirt=(target,)))
        return self._holder

    def arm(self, deadline_s: float) -> None:
        """Start the guardian, which connects; look what there is to freeze."""
        if self._usable_state() is DomainState.OFF:
            self._off = True
            return
        self.what = self._entry.mounts or self._mounts()
        self._made_holder().arm(deadline_s)

    def freeze(self, until: float) -> Consistency:
        """Raises UnavailableError (`freeze-failed`: also for a domain that was off and has been
        started just now)."""
        if self._off:
            return self._freeze_off()
        holder = self._made_holder()
        try:
            holder.freeze(until)
        except UnavailableError:
            self.what = ()
            raise
        self._notes.append(f"frozen in {max(holder.frozen_ms.values()):.0f} ms")
        return Consistency.FILESYSTEM

    def _freeze_off(self) -> Consistency:
        if not self._stays_off():
            raise UnavailableError(
                f"domain {self._domain.name} was off, and was started just now",
                code="freeze-failed",
            )
        if self._domain.shut_itself_down():
            self._notes.append("the domain is off: its guest shut down")
            return Consistency.FILESYSTEM
        self._notes.append(
            "the domain is off, and its guest did not shut down (or nobody knows any more): what "
            "is on its disks is what a power cut leaves"
        )
        return Consistency.CRASH

    def _stays_off(self) -> bool:
        return self._domain.state() is DomainState.OFF

    def still_frozen(self) -> bool:
        """Whether the agent still says so, or the domain is still off; whether each file system
        was held is known after the thaw."""
        if self._off:
            held, why = self._is_still_off()
        else:
            holder = self._made_holder()
            held, why = holder.still_frozen(), holder.broken
        if not held:
            self._break(why)
        return held

    def _is_still_off(self) -> tuple[bool, str]:
        try:
            return self._stays_off(), "the domain was started"
        except OffloadError as error:
            return False, error.message

    def _break(self, why: str) -> None:
        if self.unbroken:
            self._notes.append(f"not held all the time: {why}")
        self.unbroken = False

    def thaw(self) -> None:
        """Idempotent. Raises UnavailableError (`thaw-failed`)."""
        if self._holder is None or self._off:
            return
        try:
            self._holder.thaw()
        finally:
            if self._holder.broken:
                self._break(self._holder.broken)

    def close(self) -> None:
        """End the guardian, which thaws; and the connection."""
        if self._holder is not None:
            self._holder.close()
        link, self._link, self._known = self._link, None, None
        if link is not None:
            link.close()

    @property
    def output(self) -> str:
        """What was noticed."""
        return "\n".join(self._notes)
