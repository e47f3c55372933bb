"""The process in the guest that forks a pytest for each module: to load one takes seconds there.

Its arguments are packages whose modules the tests need. A line of JSON on its standard input is the
words of one; the next line is read when it has ended. On the descriptor of the reports (see
`inside.py`) it says {"loaded": true}, then {"ended": status} each time, below 0 a signal's number.
"""

from __future__ import annotations

import json
import os
import sys

import pytest

from offload.testing.lab.inside import REPORTS_FD
from offload.testing.warm import leave, load

# what test modules import, besides what commands do
_MORE = ("email.message", "execnet", "numpy", "sqlalchemy.dialects.sqlite.pysqlite", "tomllib")


def serve() -> None:
    """Until the end of the standard input."""
    load(sys.argv[1:], _MORE if sys.argv[1:] else ())
    say = os.dup(int(os.environ[REPORTS_FD]))
    os.write(say, b'{"loaded": true}\n')
    while line := _next_line():
        words = json.loads(line)
        pid = os.fork()
        if pid == 0:
            os.close(say)
            with open(os.devnull, "rb") as nothing:
                os.dup2(nothing.fileno(), 0)
            sys.argv[1:] = words
            leave(pytest.main(words))
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        os.write(say, b'{"ended": %d}\n' % status)


def _next_line() -> bytes:
    """Not through a buffer, whose rest a child would have too: one line comes at a time."""
    line = b""
    while not line.endswith(b"\n"):
        piece = os.read(0, 1 << 16)
        if not piece:
            return b""
        line += piece
    return line


if __name__ == "__main__":
    serve()
