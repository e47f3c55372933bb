"""Holds a virtual machine by stopping the CPUs of its QEMU for the instant of the snapshot.

What a snapshot then shows is what a power cut would leave (QEMU drains and flushes its disks when
it stops), so the consistency is `crash`; but all disks of the VM show one instant.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from offload.config import QmpQuiesce
from offload.instance import Instance
from offload.model import Consistency
from offload.qmp import Qmp
from offload.quiescers.holder import Holder, Targets, describe, undo_hold

if TYPE_CHECKING:  # a thaw never loads the catalog
    from offload.catalog.store import Catalog


class QmpQuiescer:
    """One `kind = "qmp"` entry. `volumes` are those of the entry, or all of the group: which files
    QEMU writes to behind them is the administrator's word."""

    kind = "qmp"

    def __init__(self, entry: QmpQuiesce, volumes: tuple[str, ...], instance: Instance) -> None:
        self._socket = entry.socket
        self.name = f"qmp:{entry.socket}"
        self.volumes = entry.volumes or volumes
        self._holder = Holder(instance, Targets(qmp=(entry.socket,)))
        self._notes: list[str] = []

    def check(self) -> None:
        """Whether a QEMU answers. Raises UnavailableError (`qmp-gone`, `qmp-timeout`)."""
        with Qmp(self._socket) as qmp:
            qmp.execute("query-status")

    def undos(self) -> list[tuple[str, dict[str, str]]]:
        """`thaw-qmp`: `cont`, where our `stop` is still in force."""
        return [("thaw-qmp", self._holder.undo_args())]

    def arm(self, deadline_s: float) -> None:
        """Start the guardian."""
        self._holder.arm(deadline_s)

    def freeze(self) -> Consistency:
        """Stop the CPUs. Raises UnavailableError (`freeze-failed`)."""
        self._holder.freeze()
        self._notes.append(describe(self._holder.frozen_ms))
        return Consistency.CRASH

    def still_frozen(self) -> bool:
        """Whether the CPUs stand, and no disk was written to since they stopped."""
        held = self._holder.still_frozen()
        if not held:
            self._notes.append(f"not held all the time: {self._holder.broken}")
        return held

    def thaw(self) -> None:
        """Let the CPUs run, if they ran before. Idempotent."""
        self._holder.thaw()

    def close(self) -> None:
        """End the guardian, which lets the CPUs run if that has not been done."""
        self._holder.close()

    @property
    def output(self) -> str:
        """What was noticed."""
        return "\n".join(self._notes)


def undo_thaw(instance: Instance, catalog: Catalog, args: Mapping[str, str]) -> None:  # noqa: ARG001
    """The journal's `thaw-qmp`: see `undo_hold`."""
    undo_hold(args)
