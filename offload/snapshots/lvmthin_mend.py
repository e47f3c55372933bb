"""What an `lvcreate` that was killed leaves, put right before its snapshot is deleted.

`lvcreate -s` writes the volume group's metadata (with the order to the pool in it), suspends the
origin, tells the pool to make the snapshot and then to count one transaction up, resumes the
origin, and takes the order out of the metadata. What is mended:

| killed | is left | mended by |
| --- | --- | --- |
| before the messages | origin suspended, the order | counting up, resuming |
| between them | also a snapshot, and the pool's count one behind | counting up, resuming |
| after them | origin suspended, the order | resuming |
| never, but the origin was suspended before | the pool was told nothing | counting up |

Where the count is behind, LVM's commands do not change the pool any more: production could not even
extend it. Counting up makes true what the metadata says: a thin device of the snapshot's id (an
empty one, where there is none: it is to be deleted), and the transaction.

`lvchange --refresh` resumes: under LVM's own lock, so never in the middle of another command.
"""

from __future__ import annotations

import logging
import time

from offload import devicemapper, procs
from offload.errors import BusyError
from offload.snapshots import lvmthin_lvm as lvm
from offload.snapshots import lvmthin_pool
from offload.snapshots.lvmthin_lvm import LogicalVolume
from offload.snapshots.lvmthin_names import mapper_name

log = logging.getLogger(__name__)

_RUNNING_S = 60.0  # for a command whose offload was killed and that goes on by itself
_POLL_S = 0.05


def wait_for_lvcreate(name: str) -> None:
    """Wait until no `lvcreate` makes a snapshot of this name any more: one whose parent was killed
    goes on. BusyError (`snapshot-in-use`) if it does not end."""
    until = time.monotonic() + _RUNNING_S
    while procs.find_running("lvcreate", name):
        if time.monotonic() > until:
            raise BusyError(
                f"an lvcreate of {name} still runs",
                code="snapshot-in-use",
                hint="find out what it waits for; then: offload recover",
            )
        time.sleep(_POLL_S)


def mend(snapshot: LogicalVolume) -> None:
    """Put the pool and the origin right if this snapshot is the last thing that was done in its
    pool. Idempotent. Needs a row that is newer than the end of its `lvcreate`."""
    if snapshot.transaction_id is None or devicemapper.find(snapshot.pool_dm_uuid) is None:
        return  # after a reboot: nothing is suspended, and LVM activates the pool when it must
    pool = lvmthin_pool.look_at(snapshot.pool_name, snapshot.pool_dm_uuid)
    if pool.transaction_id == snapshot.transaction_id:
        _count_up(snapshot, pool.transaction_id)
    elif pool.transaction_id != snapshot.transaction_id + 1:
        return
    if snapshot.origin:
        _resume(snapshot.vg, snapshot.origin)


def _count_up(snapshot: LogicalVolume, count: int) -> None:
    """The pool counts as if the snapshot had not been made: LVM must be one ahead, no more."""
    row = lvm.look_up([snapshot.pool_name]).get(snapshot.pool_name)
    if row is None or row.transaction_id != count + 1 or snapshot.thin_id is None:
        return
    log.warning(
        "the thin pool %s is one transaction behind LVM's metadata: counted up", snapshot.pool_name
    )
    probe = lvmthin_pool.probe_name(snapshot.vg, snapshot.name)
    thin_id, size_bytes = snapshot.thin_id, snapshot.size_bytes
    if not lvmthin_pool.knows(snapshot.pool_dm_uuid, thin_id, size_bytes, probe):
        devicemapper.message(snapshot.pool_dm_uuid, f"create_thin {thin_id}")
    devicemapper.message(snapshot.pool_dm_uuid, f"set_transaction_id {count} {count + 1}")


def _resume(vg: str, origin: str) -> None:
    device = devicemapper.find_named(mapper_name(vg, origin))
    if device is None or not device.suspended:
        return
    name = f"{vg}/{origin}"
    log.warning("%s was left suspended by a command that was killed: resumed", name)
    lvm.command(["lvchange", "--quiet", "--refresh", name], about=name)
