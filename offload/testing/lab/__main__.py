"""`make lab`: a person's shell in the lab guest, on this terminal."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from offload import run
from offload.errors import OffloadError
from offload.testing.lab import initramfs
from offload.testing.lab.guest import Guest, agent_settings, always_visible
from offload.testing.lab.machine import Hardware, qemu_argv

_BANNER = f"""\
The lab guest boots; a shell follows in some seconds. It has this machine's files: what you write
stays in its memory. Servers on this machine's loopback are at {Guest.host_address} there.
    exit        ends the guest
    Ctrl-A x    ends it at once, Ctrl-A c is QEMU's monitor and back
"""


def main() -> int:
    """Boot on this terminal and wait for the end. The exit status."""
    if not sys.stdin.isatty():
        sys.stderr.write("a shell in the lab guest needs a terminal\n")
        return 2
    sys.stdout.write(_BANNER)
    sys.stdout.flush()
    try:
        return _boot(os.memfd_create("initramfs", 0))  # no file is left, whatever ends this
    except OffloadError as error:
        sys.stderr.write(f"{error.message}\n{error.hint}\n")
        return error.exit_code


def _boot(memory: int) -> int:
    image = Path(f"/proc/self/fd/{memory}")
    size = shutil.get_terminal_size()
    here = Path.cwd()
    settings = agent_settings() | {
        "LAB_SHELL": "1",
        "LAB_FOLDER": str(here),
        "LAB_ROWS": str(size.lines),
        "LAB_COLUMNS": str(size.columns),
        "TERM": os.environ.get("TERM", "vt100"),
    }
    kernel = initramfs.find_kernel()
    visible = initramfs.hidden_folders([*always_visible(), here])
    initramfs.build(image, kernel, settings=settings, visible=visible)
    argv = [*qemu_argv(Hardware(kernel=kernel, initramfs=image)), "-serial", "mon:stdio"]
    process = run.spawn(
        argv, stdin=sys.stdin.fileno(), stdout=None, stderr=None, pass_fds=(memory,)
    )
    try:
        return process.wait()
    finally:
        run.terminate(process)


if __name__ == "__main__":
    sys.exit(main())
