"""What a demonstration has on this machine, and taking it away, also after a kill -9.

Nothing here relies on what an earlier run remembered: processes are known by the configuration in
their environment or by the work folder in their command line, mounts and loop devices by the work
folder in their paths.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path

from demo.screen import OFFLOAD, DemoError
from offload import mountinfo, procs
from offload.run import ProgramError, find_program, run

MARKER = ".offload-demo"
_PATIENCE_S = 30.0
_SERVERS = ("nbdkit", "qemu-nbd")


def config_of(folder: Path) -> Path:
    """The configuration in a work folder."""
    return folder / "offload.toml"


def programs(folder: Path) -> list[procs.ProcessRef]:
    """Processes that a demonstration in this folder started, but not this one."""
    wanted = f"OFFLOAD_CONFIG={config_of(folder)}".encode()
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if wanted in (entry / "environ").read_bytes().split(b"\0"):
                found.append(procs.ref_of(int(entry.name)))
    return [ref for ref in found if ref is not None and ref.pid != os.getpid()]


def servers(folder: Path) -> list[procs.ProcessRef]:
    """Servers of TimeViews in this folder."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
            ours = any(f"{folder}/" in word for word in words[1:])
            if Path(words[0]).name in _SERVERS and ours:
                found.append(procs.ref_of(int(entry.name)))
    return [ref for ref in found if ref is not None]


def mounts(folder: Path) -> list[Path]:
    """Mount points below this folder, the last made first."""
    return [m.point for m in reversed(mountinfo.mounts()) if m.point.is_relative_to(folder)]


def loops(folder: Path) -> list[str]:
    """Loop devices over files below this folder."""
    losetup = find_program("losetup")
    if losetup is None:
        return []
    listed = run([losetup, "--list", "--json", "--output", "NAME,BACK-FILE"], check=False).stdout
    devices = json.loads(listed)["loopdevices"] if listed.strip() else []
    inside = f"{folder}/"
    return [d["name"] for d in devices if str(d["back-file"]).startswith(inside)]


def sockets(folder: Path) -> list[Path]:
    """Unix sockets of TimeViews."""
    return [p for p in (folder / "run").rglob("*") if p.is_socket()]


def snapshots(pool: Path) -> list[Path]:
    """Files of snapshots beside the volumes."""
    return [p for p in (pool / ".offload").rglob("*") if p.is_file()]


def intents(folder: Path) -> list[Path]:
    """Operations in the journal that are not finished."""
    return list((folder / "state" / "journal").glob("*"))


def clean(folder: Path, env: Mapping[str, str]) -> None:
    """Take everything away that a demonstration in this folder made. Idempotent.

    Raises DemoError if something stays.
    """
    if not folder.exists():
        return
    for ref in programs(folder):
        ref.end()
    if config_of(folder).exists() and (folder / "state").exists():
        for words in (["recover"], ["unmount", "--all", "--force"]):
            with contextlib.suppress(ProgramError):
                run([str(OFFLOAD), "--quiet", *words], env=env, check=False)
    for ref in servers(folder):
        ref.end()
    for point in mounts(folder):
        _unmount(point)
    _free_loops(folder)
    if mounts(folder) or loops(folder):
        raise DemoError(f"{folder} is still in use", hint=f"see: findmnt -R {folder}; losetup -l")
    shutil.rmtree(folder)


def _unmount(point: Path) -> None:
    until = time.monotonic() + _PATIENCE_S
    while True:
        try:
            run(["umount", str(point)])
        except ProgramError as error:
            if time.monotonic() > until:
                raise DemoError(
                    f"{point} cannot be unmounted: {error.message}", hint=f"see: fuser -vm {point}"
                ) from error
            time.sleep(0.1)
        else:
            return


def _free_loops(folder: Path) -> None:
    """Detach what was never mounted; those that were go by themselves, a moment later."""
    until = time.monotonic() + _PATIENCE_S
    while (left := loops(folder)) and time.monotonic() < until:
        for device in left:
            run(["losetup", "--detach", device], check=False)
        time.sleep(0.05)
