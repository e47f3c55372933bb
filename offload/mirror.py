"""Moving the bytes under an export of a qemu-storage-daemon, while clients read and write.

A mirror job copies a node to another one, and again what clients write meanwhile. Once it has
caught up, `hold` lets what is in flight end and keeps new requests waiting: both nodes are equal,
and stay so, until `switch` or `cancel`. So the caller can note durably which of the two counts
while they are the same. The clients notice a pause.

Not with `copy-mode` write-blocking, in which a write goes to both nodes before it is answered:
under load, QEMU 7.2 has lost acknowledged writes that came while it copied (seen here; the target
kept what had been read before).

Source: qapi/block-core.json, qapi/job.json and block/mirror.c of QEMU 7.2: with `auto-finalize`
off, a mirror that was told to complete is `pending` inside its drained section.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from enum import Enum
from typing import Any

from offload.errors import UnavailableError
from offload.qemu_storage import Node
from offload.qmp import Qmp, QmpError

_JOB = "migrate"
_FILTER = "migrate-top"
_POLL_S = 0.2
_STEP_S = 0.01
_SWITCH_S = 60.0  # for requests in flight, on storage that hangs for a while
_CATCH_UP_S = 600.0  # clients are served meanwhile

Moved = Callable[[int, int], None]  # bytes done, bytes in all: both grow with what clients write


class State(Enum):
    """What there is of a mirror in a daemon."""

    NONE = "none"
    COPYING = "copying"  # or ready: clients are served from the old node
    HELD = "held"  # clients wait
    ENDED = "ended"  # done, failed or cancelled, and not yet forgotten


def served_node(qmp: Qmp) -> str:
    """The node that clients read and write."""
    (export,) = qmp.execute("query-block-exports")
    return str(export["node-name"])


def state(qmp: Qmp) -> State:
    """How far a mirror is."""
    job = _job(qmp)
    if job is None:
        return State.NONE
    match job["status"]:
        case "pending":
            return State.HELD
        case "concluded":
            return State.ENDED
        case _:
            return State.COPYING


def start(qmp: Qmp, source: str, name: str, target: Node) -> None:
    """Open the target as node `name` and begin to copy. What it holds is lost.

    Raises UnavailableError (`target-unavailable`).
    """
    try:
        qmp.execute("blockdev-add", {"node-name": name, **target})
        qmp.execute(
            "blockdev-mirror",
            {
                "job-id": _JOB,
                "device": source,
                "target": name,
                "sync": "full",
                "copy-mode": "background",
                "filter-node-name": _FILTER,
                "auto-finalize": False,
                "auto-dismiss": False,
            },
        )
    except QmpError as error:
        raise UnavailableError(
            f"cannot write to the target: {error.description}", code="target-unavailable"
        ) from error


def wait_ready(qmp: Qmp, moved: Moved) -> None:
    """Until the target has caught up for once. Raises UnavailableError (`migration-failed`)."""
    while True:
        job = _living(qmp)
        moved(int(job["current-progress"]), int(job["total-progress"]))
        if job["status"] == "ready":
            return
        qmp.wait_event("BLOCK_JOB_READY", _POLL_S)


def hold(qmp: Qmp) -> None:
    """Keep clients waiting, both nodes equal. Raises UnavailableError (`migration-failed`)."""
    qmp.execute("job-complete", {"id": _JOB})
    until = time.monotonic() + _CATCH_UP_S
    while _living(qmp)["status"] != "pending":
        if time.monotonic() > until:
            raise UnavailableError(
                f"the target has not caught up with what clients write in {_CATCH_UP_S:g} s",
                code="migration-failed",
                hint="let them write less for a moment, or choose a faster target",
            )
        time.sleep(_STEP_S)


def switch(qmp: Qmp) -> None:
    """Clients go on, on the target. Raises UnavailableError (`migration-failed`): on the source."""
    qmp.execute("job-finalize", {"id": _JOB})
    _forget(qmp)


def cancel(qmp: Qmp) -> None:
    """Clients go on, on the source. Idempotent."""
    with contextlib.suppress(QmpError):  # it has ended
        qmp.execute("job-cancel", {"id": _JOB})
    with contextlib.suppress(UnavailableError):  # an error of the target is why it is cancelled
        _forget(qmp)


def close_node(qmp: Qmp, name: str) -> None:
    """Let go of a node that nobody uses. Idempotent."""
    with contextlib.suppress(QmpError):
        qmp.execute("blockdev-del", {"node-name": name})


def _job(qmp: Qmp) -> dict[str, Any] | None:
    return next((job for job in qmp.execute("query-jobs") if job["id"] == _JOB), None)


def _living(qmp: Qmp) -> dict[str, Any]:
    job = _job(qmp)
    if job is None or job["status"] in {"aborting", "concluded", "null"} or job.get("error"):
        raise _failed(job)
    return job


def _forget(qmp: Qmp) -> None:
    """Wait for its end; the error that it ended with is raised."""
    until = time.monotonic() + _SWITCH_S
    while (job := _job(qmp)) is not None and job["status"] != "concluded":
        if time.monotonic() > until:
            raise UnavailableError("the mirror does not end", code="migration-failed")
        time.sleep(_STEP_S)
    if job is not None:
        qmp.execute("job-dismiss", {"id": _JOB})
        if job.get("error"):
            raise _failed(job)


def _failed(job: dict[str, Any] | None) -> UnavailableError:
    why = (job or {}).get("error") or "it was cancelled"
    return UnavailableError(
        f"the copy has failed: {why}",
        code="migration-failed",
        hint="the view goes on as before; mend the cause and migrate again",
    )
