"""Modules of the running kernel."""

from __future__ import annotations

from pathlib import Path

from offload import run
from offload.errors import UnavailableError

_LOADED = Path("/sys/module")


def load(purpose: str, *names: str) -> None:
    """Load modules that are not loaded (or built in); `purpose` is what needs them, in words.

    Raises UnavailableError (`module-missing`, `program-missing`).
    """
    wanted = [name for name in names if not (_LOADED / name.replace("-", "_")).is_dir()]
    if not wanted:
        return
    program = run.require_program("modprobe", "kmod")
    done = run.run([program, "--all", *wanted], check=False)
    if done.status != 0:
        said = done.stderr.strip().rpartition("\n")[2]
        raise UnavailableError(
            f"{purpose} needs what this kernel lacks, the module {' and '.join(wanted)}: {said}",
            code="module-missing",
            hint="install a kernel that has it: apt-get install linux-image-amd64, and boot it; "
            "in a container it is the host's to load",
        )


def available(name: str) -> bool:
    """Whether a module is loaded (or built in), or could be. Changes nothing."""
    if (_LOADED / name.replace("-", "_")).is_dir():
        return True
    program = run.find_program("modprobe")
    if program is None:
        return False
    return run.run([program, "--dry-run", "--quiet", name], check=False).status == 0
