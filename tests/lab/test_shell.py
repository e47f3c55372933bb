"""`make lab`: a person's shell in the guest."""

from __future__ import annotations

import os
import pty
import select
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from offload import run

pytestmark = pytest.mark.timeout(600)  # booting on a busy machine

_PATIENCE_S = 250
ROOT = Path(__file__).resolve().parents[2]


class Terminal:
    """A program on a terminal of its own."""

    def __init__(self, *argv: str) -> None:
        self.said = b""
        self._seen = 0
        self._status: int | None = None
        self._pid, self._fd = pty.fork()
        if self._pid == 0:
            os.chdir(ROOT)
            os.execv(argv[0], argv)  # noqa: S606

    def type(self, text: str) -> None:
        os.write(self._fd, text.encode())

    def wait_for(self, text: str) -> None:
        """Read on until it says this, after all that was waited for before."""
        until = time.monotonic() + _PATIENCE_S
        while (found := self.said.find(text.encode(), self._seen)) < 0:
            ready, _, _ = select.select([self._fd], [], [], max(0.0, until - time.monotonic()))
            assert ready, f"no {text!r} in {self.said!r}"
            self.said += os.read(self._fd, 4096)
        self._seen = found + len(text)

    def end(self) -> int:
        """What else it says, and its status."""
        while True:
            try:
                more = os.read(self._fd, 4096)
            except OSError:  # a terminal's way to say that nobody is left on the other side
                break
            self.said += more
        self._status = os.waitpid(self._pid, 0)[1]
        return os.waitstatus_to_exitcode(self._status)

    def close(self) -> None:
        """Hang up; what still runs there ends."""
        if self._status is None:
            os.kill(self._pid, signal.SIGKILL)
            os.waitpid(self._pid, 0)
        os.close(self._fd)


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    made = Terminal(sys.executable, "-m", "offload.testing.lab")
    yield made
    made.close()


def test_shell_is_in_the_guest_and_exit_ends_it(terminal: Terminal) -> None:
    prompt = f"lab:{ROOT}# "
    terminal.wait_for("Ctrl-A x")
    terminal.wait_for(prompt)
    # said by the program that has the terminal: a Ctrl-C before that is the shell's, and lost
    terminal.type("sh -c \"echo sle''eping; exec sleep 300\"\n")
    terminal.wait_for("sleeping")
    terminal.type("\x03")  # Ctrl-C is for the program in the guest
    terminal.wait_for(prompt)
    terminal.type("echo this is $(hostname)\n")
    terminal.wait_for("this is lab")
    terminal.wait_for(prompt)
    terminal.type("exit\n")
    assert terminal.end() == 0


def test_shell_ctrl_a_x_ends_it_at_once(terminal: Terminal) -> None:
    terminal.wait_for(f"lab:{ROOT}# ")
    terminal.type("\x01x")
    assert terminal.end() == 0


def test_shell_without_a_terminal_is_refused() -> None:
    done = run.run([sys.executable, "-m", "offload.testing.lab"], cwd=ROOT, check=False)
    assert (done.status, done.stderr) == (2, "a shell in the lab guest needs a terminal\n")
