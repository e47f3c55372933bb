"""A guest that the guardian holds through its guest agent. Loads the standard library only."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from offload.errors import CleanupError, OffloadError, UnavailableError
from offload.guest_agent import AgentError, AgentGoneError, GuestAgent
from offload.procs import ref_of

_STATUS_S = 3.0  # the parent waits 5 s for the answer
_THAW_SLACK_S = 4.0  # beyond `within_s`; the parent waits 5 s beyond it
_LINGER_S = 600.0
_RETRY_S = 0.2
_UNDO_S = 10.0


class AgentHold:
    """The file systems of a guest, by the guest agent behind `socket`.

    The session is opened beforehand and kept: as long as it is, nobody else reaches the agent over
    this port. `mounts`: in the guest, none for all; `least`: how many file systems must freeze;
    `within_s`: how long the freeze may take.
    """

    def __init__(self, *, socket: str, mounts: Sequence[str], least: int, within_s: float) -> None:
        self.name = socket
        self.ours = True
        self.stuck = False
        self.seen = ""
        self._socket = Path(socket)
        self._mounts = mounts
        self._least = least
        self._within_s = within_s
        self._count = 0
        self._agent = GuestAgent(self._socket)

    def freeze(self) -> None:
        """Raises UnavailableError (`frozen-by-others`, `not-all-frozen`) and what the agent says;
        then nothing is frozen, or the thaw stands behind the freeze in the agent's queue."""
        if self._agent.frozen(self._within_s):
            raise UnavailableError(
                f"somebody else has frozen the guest of {self._socket} already",
                code="frozen-by-others",
            )
        try:
            self._count = self._agent.freeze(self._mounts, self._within_s)
        except AgentError:
            if self._agent.frozen():
                self.thaw()
            raise
        except OffloadError:
            with contextlib.suppress(OffloadError):  # then it is stuck; the freeze is to be told
                self.thaw()
            raise
        if self._count < self._least:
            self._agent.thaw(self._within_s + _THAW_SLACK_S)
            raise UnavailableError(
                f"the guest agent at {self._socket} froze {self._count} file systems where at "
                f"least {self._least} are to be held: somebody else holds one of them, or it "
                "cannot be frozen",
                code="not-all-frozen",
            )

    def intact(self) -> bool:
        """What the agent says: it does not look. Only the thaw tells whether it was so."""
        frozen = self._agent.frozen(_STATUS_S)
        if not frozen:
            self.seen = "its agent says that it was thawed"
        return frozen

    def thaw(self) -> bool:
        """False if not just as many file systems were frozen still as had been frozen, or the guest
        has ended. Raises what the agent says while it says that it is frozen."""
        self.stuck = True
        until = time.monotonic() + self._within_s + _THAW_SLACK_S
        try:
            thawed = self._thaw(until)
        except AgentGoneError as error:
            self.stuck = False
            self.seen = f"the guest has ended: {error.message}"
            return False
        except AgentError as error:
            if self._agent.frozen():
                raise
            self.stuck = False
            self.seen = f"nobody knows how long it was held: {error.message}"
            return False
        self.stuck = False
        if thawed != self._count:
            self.seen = (
                f"{self._count} file systems were frozen, and {thawed} were so at the thaw: "
                "somebody else, or a dead-man timer, has thawed or frozen in between"
            )
        return thawed == self._count

    def _thaw(self, until: float) -> int:
        """By a new session if this one was lost: QEMU may have hung up, and live."""
        with contextlib.suppress(AgentGoneError):
            return self._agent.thaw(until - time.monotonic())
        self._agent.close()
        self._agent = GuestAgent(self._socket, max(_RETRY_S, until - time.monotonic()))
        return self._agent.thaw(until - time.monotonic())

    def linger(self) -> bool:
        """After a thaw that was not confirmed: stay until it is, for ten minutes; whether it was.

        What was sent to a QEMU that hangs is lost if the session ends before it has read it.
        """
        until = time.monotonic() + _LINGER_S
        while time.monotonic() < until:
            try:
                if self._agent.frozen(until - time.monotonic()):
                    self._thaw(until)
                return True
            except AgentGoneError:
                if not self._reconnected():
                    return True
            except UnavailableError:
                time.sleep(_RETRY_S)
        return False

    def _reconnected(self) -> bool:
        self._agent.close()
        try:
            self._agent = GuestAgent(self._socket)
        except AgentGoneError:
            return False
        except UnavailableError:
            time.sleep(_RETRY_S)
        return True


def process_behind(agent: GuestAgent) -> str:
    """Which process listens on the socket, so that it can be told from a later one; may be empty
    (in another namespace)."""
    process = ref_of(agent.peer_pid())
    return f"{process.pid}:{process.start}" if process is not None else ""


def undo_agent_hold(guest: Mapping[str, Any], named: Sequence[str]) -> None:
    """Thaw a guest that a dead guardian left frozen. Idempotent. Raises CleanupError.

    Acts only where the marker names it (`named`) and the same QEMU runs as then.
    """
    if guest["socket"] not in named:
        return
    try:
        with GuestAgent(Path(guest["socket"])) as agent:
            if guest["qemu"] in ("", process_behind(agent)) and agent.frozen():
                _thaw_surely(agent)
    except AgentGoneError:
        return  # no QEMU, no writers to let go
    except OffloadError as error:
        raise CleanupError(
            f"cannot see whether a guest is frozen still: {error.message}",
            hint="by hand, in the guest: fsfreeze --unfreeze MOUNT-POINT",
        ) from error


def _thaw_surely(agent: GuestAgent) -> None:
    try:
        agent.thaw(_UNDO_S)
    except AgentError:
        if agent.frozen():  # else a hook failed after the thaw
            raise
