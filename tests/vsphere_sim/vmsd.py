"""The list of a VM's snapshots, in memory and as .vmsd.

The keys are those of a .vmsd as it lies beside any VM with snapshots; `quiesced` alone is ours: the
real one has it in the binary .vmsn.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from tests.vsphere_sim import vmx

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(slots=True, kw_only=True)
class Snapshot:
    """One. `disks`: the file of each disk that stands still, by its place (`scsi0:0`)."""

    uid: int
    name: str
    description: str = ""
    parent: int = 0  # 0: none
    created: datetime
    quiesced: bool = False
    disks: dict[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class Tree:
    """All of a VM, in the order that they were made in."""

    all: list[Snapshot] = field(default_factory=list)
    current: int = 0
    last_uid: int = 0

    def get(self, uid: int) -> Snapshot | None:
        """By number."""
        return next((found for found in self.all if found.uid == uid), None)

    def children(self, uid: int) -> list[Snapshot]:
        """Directly below; of 0 the roots."""
        return [found for found in self.all if found.parent == uid]

    def below(self, uid: int) -> Iterator[int]:
        """All of them, leaves first."""
        for found in self.children(uid):
            yield from self.below(found.uid)
            yield found.uid

    def path(self, uid: int) -> Iterator[Snapshot]:
        """Up to the root."""
        found = self.get(uid)
        while found is not None:
            yield found
            found = self.get(found.parent)

    def remove(self, uid: int) -> None:
        """Its children take its place."""
        gone = self.get(uid)
        if gone is None:
            return
        self.all.remove(gone)
        for child in self.children(uid):
            child.parent = gone.parent
        if self.current == uid:
            self.current = gone.parent


def to_vmsd(tree: Tree) -> str:
    """The text."""
    values = {
        ".encoding": "UTF-8",
        "snapshot.lastUID": str(tree.last_uid),
        "snapshot.current": str(tree.current),
        "snapshot.numSnapshots": str(len(tree.all)),
    }
    for number, found in enumerate(tree.all):
        own = f"snapshot{number}"
        micros = (found.created - _EPOCH) // timedelta(microseconds=1)
        values |= {
            f"{own}.uid": str(found.uid),
            f"{own}.displayName": found.name,
            f"{own}.description": found.description,
            f"{own}.parent": str(found.parent),
            f"{own}.createTimeHigh": str(micros >> 32),
            f"{own}.createTimeLow": str(micros & 0xFFFFFFFF),
            f"{own}.quiesced": str(found.quiesced).upper(),
            f"{own}.numDisks": str(len(found.disks)),
        }
        for index, (place, file) in enumerate(found.disks.items()):
            values[f"{own}.disk{index}.node"] = place
            values[f"{own}.disk{index}.fileName"] = file
    return vmx.compose(values)


def from_vmsd(text: str) -> Tree:
    """The inverse; an empty list where there are no snapshots."""
    values = vmx.parse(text)
    tree = Tree(
        current=int(values.get("snapshot.current", 0)),
        last_uid=int(values.get("snapshot.lastUID", 0)),
    )
    for number in range(int(values.get("snapshot.numSnapshots", 0))):
        own = f"snapshot{number}"
        high, low = (int(values[f"{own}.createTime{part}"]) for part in ("High", "Low"))
        count = range(int(values[f"{own}.numDisks"]))
        tree.all.append(
            Snapshot(
                uid=int(values[f"{own}.uid"]),
                name=values[f"{own}.displayName"],
                description=values[f"{own}.description"],
                parent=int(values[f"{own}.parent"]),
                created=_EPOCH + timedelta(microseconds=(high << 32) | low),
                quiesced=values[f"{own}.quiesced"] == "TRUE",
                disks={
                    values[f"{own}.disk{i}.node"]: values[f"{own}.disk{i}.fileName"] for i in count
                },
            )
        )
    return tree
