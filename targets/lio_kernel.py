"""What LIO needs of this machine: root, kernel modules, configfs, rtslib.

rtslib is Debian's (python3-rtslib-fb), not one of our environment's own: it tells the kernel where
LIO keeps its files (`dbroot`), and that has to be where the administrator's targetcli looks.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from offload import run
from offload.errors import PrivilegeError, UnavailableError

CONFIGFS = Path("/sys/kernel/config")
MODULES = ("configfs", "target_core_mod", "target_core_iblock", "iscsi_target_mod")
LOADED = Path("/sys/module")
INSTALLED = Path("/lib/modules")
DATABASE = Path("/etc/rtslib-fb-target")  # Debian's place of rtslib's files

_KERNEL_PACKAGE = "linux-image-amd64"
_LIBRARY_PACKAGE = "python3-rtslib-fb"


def check() -> None:
    """Whether views can be served by LIO here. Changes nothing, loads nothing.

    Raises PrivilegeError, UnavailableError (`module-missing`, `library-missing`).
    """
    if os.geteuid() != 0:
        raise PrivilegeError(
            "the target lio needs root: it configures the kernel",
            hint="run as root, or use --target tgt",
        )
    if find_spec("rtslib_fb") is None:
        raise library_missing()
    lacking = missing(MODULES)
    if lacking:
        raise module_missing(lacking)


def missing(names: Iterable[str]) -> list[str]:
    """Modules that are neither loaded (or built in) nor can be loaded."""
    wanted = [name for name in names if not (LOADED / name).is_dir()]
    if not wanted:
        return []
    modprobe = run.require_program("modprobe", "kmod")
    return [
        name
        for name in wanted
        if run.run([modprobe, "--dry-run", "--quiet", name], check=False).status != 0
    ]


def load() -> None:
    """Load the modules of LIO and mount configfs, where that is still to be done. Idempotent.

    Raises UnavailableError (`module-missing`, `configfs-missing`).
    """
    load_modules(MODULES)
    if not CONFIGFS.is_mount():
        mount = run.require_program("mount", "mount")
        try:
            run.run([mount, "-t", "configfs", "configfs", str(CONFIGFS)])
        except run.ProgramError as error:
            raise UnavailableError(
                f"configfs is not mounted on {CONFIGFS}, and cannot be: {error.stderr}",
                code="configfs-missing",
                hint=f"mount -t configfs configfs {CONFIGFS}; in a container it is the host's",
            ) from error


def load_modules(names: Iterable[str]) -> None:
    """Load modules where they are not loaded. UnavailableError (`module-missing`)."""
    wanted = [name for name in names if not (LOADED / name).is_dir()]
    if not wanted:
        return
    modprobe = run.require_program("modprobe", "kmod")
    try:
        run.run([modprobe, "--all", *wanted])
    except run.ProgramError as error:
        raise module_missing(missing(wanted) or wanted, error.stderr) from error


def library() -> Any:
    """The package rtslib_fb. UnavailableError (`library-missing`)."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # six, of old
            import rtslib_fb
    except ImportError as error:
        raise library_missing() from error
    return rtslib_fb


def library_missing() -> UnavailableError:
    """The error for a machine without rtslib."""
    return UnavailableError(
        "the Python library rtslib_fb is not installed",
        code="library-missing",
        hint=f"install it: apt-get install {_LIBRARY_PACKAGE} (and a virtual environment with "
        "system site packages)",
    )


def module_missing(names: Iterable[str], said: str = "") -> UnavailableError:
    """The error for a kernel without these modules; what would give them."""
    release = os.uname().release
    what = f"the kernel {release} has no module {', '.join(names)}"
    if said:
        what += f" ({said.rpartition(chr(10))[2]})"
    if not (INSTALLED / release).is_dir():
        return UnavailableError(
            f"{what}: its modules are not installed on this machine",
            code="module-missing",
            hint="in a container LIO cannot be had: use --target tgt; "
            f"else boot the kernel of {_KERNEL_PACKAGE}",
        )
    cloud = " (Debian's cloud kernel has no LIO)" if "cloud" in release else ""
    return UnavailableError(
        f"{what}{cloud}",
        code="module-missing",
        hint=f"apt-get install {_KERNEL_PACKAGE} and boot it, or use --target tgt",
    )
