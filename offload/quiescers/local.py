"""Holds file systems mounted on this machine, and runs commands before and after.

Order: pre command → freeze → (snapshot) → thaw → post command. A command gets
`OFFLOAD_PHASE` (pre or post) and `OFFLOAD_VOLUMES` (names, separated by commas). The deadline runs
from the freeze to the thaw; the commands have their own limit.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from offload import mountinfo, run
from offload.configs.quiesce import LocalQuiesce
from offload.errors import NotFoundError, PolicyError, PrivilegeError, UnavailableError
from offload.filesystem import fsync_folder
from offload.ids import new_id
from offload.instance import Instance
from offload.model import Consistency, HeldPart
from offload.mountinfo import MountPoint
from offload.quiescers import coverage
from offload.quiescers.holder import Holder, Targets, describe

if TYPE_CHECKING:  # a thaw never loads the catalog
    from offload.catalog.store import Catalog

# File systems whose super block can be frozen (freeze_fs or freeze_super, fs/*/super.c in Linux)
_FREEZABLE = frozenset(
    {"ext2", "ext3", "ext4", "xfs", "btrfs", "f2fs", "jfs", "nilfs2", "reiserfs", "gfs2"}
)
_OUTPUT_TAIL = 2000


class LocalQuiescer:
    """One `kind = "local"` entry. `volumes`: whose writers it was found to hold."""

    kind = "local"
    vm = ""
    holds = True
    least: Consistency | None = None
    image_at = None
    held_since: float | None = None

    def __init__(self, entry: LocalQuiesce, volumes: tuple[str, ...], instance: Instance) -> None:
        self._entry = entry
        self._group_volumes = volumes
        self._instance = instance
        self._notes: list[str] = []
        self._level = Consistency.CRASH
        self._held = False  # from the pre command, or the freeze, to the thaw
        self._frozen = False
        self.unbroken = True
        self.name = "local:" + (str(entry.mounts[0]) if entry.mounts else entry.pre[0])
        table = mountinfo.mounts()
        found = [mountinfo.find_mount(path, table) for path in entry.mounts]
        self._mounts = [m for m in found if m is not None and not m.read_only]
        self.volumes = self._held_volumes()
        self.freezes = coverage.carrying(self._mounts, self._paths())
        # one freeze a file system: a second mount of it would be refused as frozen already
        points = {m.device: m.point for m in reversed(self._mounts)}
        self._holder = Holder(instance, Targets(mounts=tuple(points.values()))) if points else None
        self._post = _Post(instance, entry, self.volumes) if entry.post else None

    def check(self) -> None:
        """Raises NotFoundError (`no-mount`, `hook-missing`), PolicyError (`cannot-freeze`,
        `would-freeze-ourselves`), PrivilegeError (`needs-root`). Changes nothing."""
        table = mountinfo.mounts()
        for path in self._entry.mounts:
            self._check_mount(path, table)
        if self._holder is not None and os.geteuid() != 0:
            raise PrivilegeError(
                f"freezing {self._entry.mounts[0]} needs root",
                code="needs-root",
                hint="run as root, or remove mounts from this quiesce entry",
            )
        for argv in (self._entry.pre, self._entry.post):
            if argv and run.find_program(argv[0]) is None:
                raise NotFoundError(
                    f"the command {argv[0]} of a quiesce entry is not there, or not executable",
                    code="hook-missing",
                )

    def _check_mount(self, path: Path, table: list[MountPoint]) -> None:
        mount = mountinfo.find_mount(path, table)
        if mount is None:
            raise NotFoundError(
                f"nothing is mounted on {path}",
                code="no-mount",
                hint="mount it, or correct mounts in the group's quiesce entry",
            )
        if mount.read_only:
            return  # nothing writes to it
        if mount.kind not in _FREEZABLE:
            raise PolicyError(
                f"{path} is {mount.kind}, which cannot be frozen", code="cannot-freeze"
            )
        for what, needed in self._needed():
            with contextlib.suppress(LookupError):
                holding = mountinfo.mount_holding(needed, table)
                if mount.device in mountinfo.stack_below(holding, table):
                    raise PolicyError(
                        f"freezing {path} would stop {what} ({needed})",
                        code="would-freeze-ourselves",
                        hint="freeze the file systems inside the volumes, never those that hold "
                        "them or that this program needs",
                    )

    def _needed(self) -> Iterator[tuple[str, Path]]:
        """What must go on while the writers are held."""
        config = self._instance.config
        yield "the whole machine", Path("/")
        yield "the state folder", self._instance.state_dir
        yield "the runtime folder", self._instance.runtime_dir
        if self._instance.config_path is not None:
            yield "the configuration", self._instance.config_path
        for program in (sys.executable, sys.prefix, sys.base_prefix, os.__file__, __file__):
            yield "this program", Path(program)
        yield "this program's working folder", Path("/proc/self/cwd")
        for name, store in config.stores.items():
            if store.folder is not None:
                yield f"the store {name}", store.folder
        for name in self._group_volumes:
            volume = config.volume(name)
            if not volume.path.is_block_device():
                yield f"the pool of volume {name}", volume.path
            if volume.snapshot_dir is not None:
                yield f"the snapshots of volume {name}", volume.snapshot_dir

    def _held_volumes(self) -> tuple[str, ...]:
        """Those that the frozen mounts were found to cover; the administrator's word where nothing
        can be looked up."""
        declared = self._entry.volumes
        if not self._entry.mounts:
            return declared or self._group_volumes
        found = coverage.cover(self._mounts, self._paths())
        for volume, points in found.loose.items():
            shown = ", ".join(str(point) for point in points)
            self._notes.append(f"{volume} is not held: {shown} on it would go on writing")
        if not declared:
            return found.held
        taken = [name for name in declared if name not in found.loose]
        word = [name for name in taken if name not in found.held]
        if word:
            self._notes.append(f"held by the configuration's word alone: {', '.join(word)}")
        return tuple(taken)

    def _paths(self) -> dict[str, Path]:
        return {name: self._instance.config.volume(name).path for name in self._group_volumes}

    def undos(self) -> list[tuple[str, dict[str, str]]]:
        """`run-post` first, `thaw-local` last: the thaw is undone before the post command runs."""
        undos = []
        if self._post is not None:
            undos.append(("run-post", self._post.undo_args()))
        if self._holder is not None:
            undos.append(("thaw-local", self._holder.undo_args()))
        return undos

    def arm(self, deadline_s: float) -> None:
        """Start the guardian."""
        if self._holder is not None:
            self._holder.arm(deadline_s)

    def hold(self, until: float) -> None:  # noqa: ARG002 - commands have a limit of their own
        """The pre command. Raises UnavailableError (`hook-failed`); then nothing is held."""
        if self._entry.pre:
            self._run_pre()
            self._held = True

    def freeze(self, until: float) -> Consistency:
        """The mounts. Raises UnavailableError (`freeze-failed`): then they are not frozen, and the
        post command is due at the thaw."""
        if self._holder is not None:
            self._holder.freeze(until)
            self._notes.append(describe(self._holder.frozen_ms))
        self._held = self._frozen = True
        self._level = self._entry.level if self._entry.pre else Consistency.FILESYSTEM
        return self._level

    def _run_pre(self) -> None:
        if self._post is not None:
            self._post.expect()
        try:
            done = run.run(
                self._entry.pre,
                timeout_s=self._entry.timeout_s,
                env=_hook_env("pre", self.volumes),
            )
        except UnavailableError as error:
            if self._post is not None:
                self._post.forget()
            raise UnavailableError(
                f"the pre command failed, nothing was frozen: {error.message}", code="hook-failed"
            ) from error
        self._keep(done)

    def _run_post(self) -> None:
        if self._post is not None:
            self._keep(self._post.run())

    def _keep(self, done: run.Completed | None) -> None:
        text = (done.stdout + done.stderr).strip() if done is not None else ""
        if text:
            self._notes.append(text[-_OUTPUT_TAIL:])

    def still_frozen(self) -> bool:
        """Whether the mounts were held without a break; commands are taken at their word."""
        if not self._frozen:
            return False
        if self._holder is None:
            return True
        held = self._holder.still_frozen()
        if not held:
            self._notes.append(f"not held all the time: {self._holder.broken}")
            self.unbroken = False
        return held

    def thaw(self) -> None:
        """Thaw, then the post command. Idempotent. Raises UnavailableError (`thaw-failed`,
        `hook-failed`)."""
        if not self._held:
            return
        self._held = self._frozen = False
        with contextlib.ExitStack() as stack:
            stack.callback(self._run_post)  # also when the thaw cannot be confirmed
            if self._holder is not None:
                self._holder.thaw()

    def close(self) -> None:
        """End the guardian; thaws, and runs the post command, if that has not been done."""
        with contextlib.ExitStack() as stack:
            if self._holder is not None:
                stack.callback(self._holder.close)
            self.thaw()

    @property
    def what(self) -> tuple[str, ...]:
        """The frozen mount points."""
        return tuple(self._holder.frozen_ms) if self._holder is not None else ()

    @property
    def reached(self) -> Consistency:
        """As of Quiescer."""
        return self._level if self.unbroken else Consistency.CRASH

    @property
    def parts(self) -> tuple[HeldPart, ...]:
        """None: it is one."""
        return ()

    @property
    def output(self) -> str:
        """What was noticed and what the commands printed."""
        return "\n".join(self._notes)


class _Post:
    """The post command, run once: a marker in the state folder exists from before pre starts
    until post has run (or pre has failed), so that recovery knows whether it is due."""

    def __init__(self, instance: Instance, entry: LocalQuiesce, volumes: tuple[str, ...]) -> None:
        self._argv = entry.post
        self._timeout_s = entry.timeout_s
        self._volumes = volumes
        self._marker = instance.state_dir / "hooks" / new_id()

    def undo_args(self) -> dict[str, str]:
        return {
            "marker": str(self._marker),
            "argv": json.dumps(self._argv),
            "timeout_s": str(self._timeout_s),
            "volumes": ",".join(self._volumes),
        }

    def expect(self) -> None:
        self._marker.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._marker.touch(mode=0o600)
        fsync_folder(self._marker.parent)

    def forget(self) -> None:
        self._marker.unlink(missing_ok=True)

    def run(self) -> run.Completed | None:
        return _run_post_once(self.undo_args(), self.forget)


def _run_post_once(args: Mapping[str, str], forget: Callable[[], None]) -> run.Completed | None:
    """None where it is not due (any more). A failure is reported once and not tried again: the
    command need not bear that, and the error names it."""
    if not Path(args["marker"]).exists():
        return None
    argv = json.loads(args["argv"])
    try:
        return run.run(
            argv,
            timeout_s=float(args["timeout_s"]),
            env=_hook_env("post", tuple(args["volumes"].split(","))),
        )
    except UnavailableError as error:
        raise UnavailableError(
            f"the post command failed: {error.message}",
            code="hook-failed",
            hint=f"writers go on; run it by hand: {' '.join(argv)}",
        ) from error
    finally:
        forget()


def _hook_env(phase: str, volumes: tuple[str, ...]) -> dict[str, str]:
    return {"OFFLOAD_PHASE": phase, "OFFLOAD_VOLUMES": ",".join(volumes)}


def undo_post(instance: Instance, catalog: Catalog, args: Mapping[str, str]) -> None:  # noqa: ARG001
    """The journal's `run-post`: runs the post command if pre may have succeeded and post has not
    run. Where the process died inside pre it runs too: what pre began must not stay."""
    _run_post_once(args, lambda: Path(args["marker"]).unlink(missing_ok=True))
