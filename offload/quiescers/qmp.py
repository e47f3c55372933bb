"""Holds a virtual machine by stopping the CPUs of its QEMU for the instant of the snapshot.

What a snapshot then shows is what a power cut would leave (QEMU drains and flushes its disks when
it stops), so the consistency is `crash`; but all disks of the VM show one instant.

A VM that is shut down has no writers to hold: where nobody listens on the socket, and no QEMU has
the volumes open, before the snapshot and after it, they count as held.
"""

from __future__ import annotations

from offload import image_lock
from offload.configs.quiesce import QmpQuiesce
from offload.errors import BusyError
from offload.instance import Instance
from offload.model import Consistency, HeldPart
from offload.qmp import Qmp, QmpGoneError
from offload.quiescers.holder import Holder, Targets, describe


class QmpQuiescer:
    """One `kind = "qmp"` entry. `volumes` are those of the entry, or all of the group: which files
    QEMU writes to behind them is the administrator's word."""

    kind = "qmp"
    vm = ""
    holds = True
    freezes: tuple[str, ...] = ()
    least: Consistency | None = None
    image_at = None
    held_since: float | None = None

    def __init__(self, entry: QmpQuiesce, volumes: tuple[str, ...], instance: Instance) -> None:
        self._socket = entry.socket
        self._instance = instance
        self.name = f"qmp:{entry.socket}"
        self.volumes = entry.volumes or volumes
        self._holder = Holder(instance, Targets(qmp=(entry.socket,)))
        self._shut_down = False
        self._notes: list[str] = []
        self.what: tuple[str, ...] = ()
        self.unbroken = True

    def check(self) -> None:
        """Whether a QEMU answers, or is shut down. Raises BusyError (`volume-in-use`: no QEMU
        answers, yet one has a volume open), UnavailableError (`qmp-timeout`, `lock-unknown`)."""
        self._shut_down = not self._listens()
        if self._shut_down:
            volume = self._open_volume()
            if volume is not None:
                raise BusyError(
                    f"no QEMU listens on {self._socket}, but one has volume {volume} open",
                    code="volume-in-use",
                    hint="correct socket in the group's quiesce entry",
                )

    def _listens(self) -> bool:
        try:
            with Qmp(self._socket) as qmp:
                qmp.execute("query-status")
        except QmpGoneError:
            return False
        return True

    def _open_volume(self) -> str | None:
        """A volume that some QEMU may write to now."""
        for name in self.volumes:
            if image_lock.open_for_writing(self._instance.config.volume(name).path):
                return name
        return None

    def undos(self) -> list[tuple[str, dict[str, str]]]:
        """`thaw-qmp`: `cont`, where our `stop` is still in force."""
        return [("thaw-qmp", self._holder.undo_args())]

    def arm(self, deadline_s: float) -> None:
        """Start the guardian."""
        if not self._shut_down:
            self._holder.arm(deadline_s)

    def hold(self, until: float) -> None:
        """No application is known here."""

    def freeze(self, until: float) -> Consistency:
        """Stop the CPUs. Raises UnavailableError (`freeze-failed`), BusyError (`volume-in-use`:
        a VM that was shut down was started just now)."""
        if self._shut_down:
            if self._listens() or self._open_volume() is not None:
                raise BusyError(
                    f"the VM of {self._socket} was started just now", code="volume-in-use"
                )
            self._notes.append("the VM is shut down")
        else:
            self._holder.freeze(until)
            self.what = ("CPUs",)
            self._notes.append(describe(self._holder.frozen_ms))
        return Consistency.CRASH

    def still_frozen(self) -> bool:
        """Whether the CPUs stand, and no disk was written to since they stopped; or whether the VM
        is still shut down."""
        if self._shut_down:
            held = not self._listens() and self._open_volume() is None
            why = "the VM was started"
        else:
            held, why = self._holder.still_frozen(), self._holder.broken
        if not held:
            self._notes.append(f"not held all the time: {why}")
            self.unbroken = False
        return held

    def thaw(self) -> None:
        """Let the CPUs run, if they ran before. Idempotent."""
        self._holder.thaw()

    def close(self) -> None:
        """End the guardian, which lets the CPUs run if that has not been done."""
        self._holder.close()

    @property
    def reached(self) -> Consistency:
        """As of Quiescer."""
        return Consistency.CRASH

    @property
    def parts(self) -> tuple[HeldPart, ...]:
        """None: it is one."""
        return ()

    @property
    def output(self) -> str:
        """What was noticed."""
        return "\n".join(self._notes)
