"""A real QEMU guest agent in a lab guest."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from offload.errors import UnavailableError
from offload.guest_agent import AgentSilentError, GuestAgent
from offload.testing.lab.channel import RemoteCommand
from offload.testing.lab.guest import Guest

PORT = "org.qemu.guest_agent.0"  # as virtual machines usually name it
STATE = "/run/qemu-ga"  # in the guest: where the agent notes that it has frozen

_START_S = 60.0  # emulated, on a machine that may be busy
_ANSWER_S = 2.0

# Without udev there is no /dev/virtio-ports: find the port $1; the rest are options of qemu-ga.
_RUN = f"""
file=$(grep -lx -- "$1" /sys/class/virtio-ports/*/name)
mkdir -p {STATE}
shift
echo $$
exec qemu-ga -m virtio-serial -p "/dev/$(basename "$(dirname "$file")")" -t {STATE} "$@"
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningAgent:
    """`socket` is the port's on the host."""

    guest: Guest
    socket: Path
    command: RemoteCommand

    @property
    def pid(self) -> int:
        """In the guest."""
        return int(self.command.stdout.split()[0])

    def signal(self, name: str) -> None:
        """Send it a signal: STOP, CONT …"""
        self.guest.run(["kill", "-s", name, str(self.pid)])

    def stop(self) -> None:
        """End it with SIGKILL: what it has frozen stays so. Idempotent."""
        self.command.kill()
        self.command.wait(_START_S)


def start_agent(
    guest: Guest, socket: Path, *, hook: str = "", options: Sequence[str] = (), port: str = PORT
) -> RunningAgent:
    """Start qemu-ga on a port that the guest was given (`ports={PORT: socket}`), and wait until it
    answers. `hook`: a script in the guest, run with `freeze` and `thaw`.

    UnavailableError where it does not come up.
    """
    guest.modprobe("virtio_console")
    more = [f"-F{hook}"] if hook else []
    command = guest.start(["bash", "-euc", _RUN, "bash", port, *more, *options])
    made = RunningAgent(guest=guest, socket=socket, command=command)
    try:
        _wait_ready(made)
    except BaseException:
        made.stop()
        raise
    return made


def _wait_ready(agent: RunningAgent) -> None:
    until = time.monotonic() + _START_S
    while time.monotonic() < until and not agent.command.ended:
        with contextlib.suppress(AgentSilentError), GuestAgent(agent.socket, _ANSWER_S):
            return
    said = agent.command.stderr.decode("utf-8", "replace").strip()
    raise UnavailableError(f"qemu-ga in the guest does not answer: {said or 'it said nothing'}")


@contextmanager
def running_agent(
    guest: Guest, socket: Path, *, hook: str = "", options: Sequence[str] = (), port: str = PORT
) -> Iterator[RunningAgent]:
    """As `start_agent`; ended with the block."""
    agent = start_agent(guest, socket, hook=hook, options=options, port=port)
    try:
        yield agent
    finally:
        agent.stop()
