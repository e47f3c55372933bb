"""A process that outlives a migration which is killed while the clients of its view wait.

It does what the next command would do, at once: it takes back, or finishes, what the dead process
left. It lives for the moment of the switch only.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from offload import procs, run
from offload.procs import ProcessRef
from offload.services.context import Context, open_context

_POLL_S = 0.05
_ROOT = Path(__file__).resolve().parents[2]
_CODE = (
    "import sys; sys.path.insert(0, {root!r}); from offload.services.migrate_guard import main; "
    "main(sys.argv[1:])"
)


@contextmanager
def guarded(ctx: Context) -> Iterator[None]:
    """For the block: should this process die in it, its leftovers are taken back."""
    me = procs.ref_of(os.getpid())
    config = ctx.instance.config_path
    if me is None or config is None:  # no process, or none that could find the configuration
        yield
        return
    code = _CODE.format(root=str(_ROOT))
    output = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
    try:
        argv = [sys.executable, "-I", "-c", code, str(config.absolute())]
        guard = procs.ref_of(
            run.spawn_detached([*argv, str(me.pid), me.start, me.boot], output=output)
        )
    finally:
        os.close(output)
    try:
        yield
    finally:
        if guard is not None:
            guard.end()


def main(argv: list[str]) -> None:
    """CONFIG PID START BOOT: wait for the end of that process, then recover."""
    config, pid, start, boot = argv
    watched = ProcessRef(pid=int(pid), start=start, boot=boot)
    while watched.alive():
        time.sleep(_POLL_S)
    with open_context(Path(config)) as ctx:
        ctx.journal.recover()
