"""The parent's side of the guardian: starts it, talks to it, and stands in for it if it dies."""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import offload
from offload import procs, run
from offload.errors import CleanupError, OffloadError, UnavailableError
from offload.ids import new_id
from offload.instance import Instance
from offload.qmp import Qmp, QmpGoneError
from offload.quiescers.guardian import thaw_fd
from offload.quiescers.holds_agent import undo_agent_hold
from offload.quiescers.holds_libvirt import undo_libvirt_hold
from offload.quiescers.holds_program import undo_program

if TYPE_CHECKING:  # a thaw never loads the catalog
    from offload.catalog.store import Catalog

_START_S = 10.0
_SLACK_S = 5.0  # the guardian answers at its deadline; so much later it is taken for hung
_END_S = 5.0
_CODE = (
    "import sys; sys.path.insert(0, {root!r}); "
    "from offload.quiescers.guardian import main; sys.exit(main(sys.argv[1]))"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Targets:
    """What is to be held: mount points by path, QEMUs by QMP socket, guests by the socket of their
    agent or by libvirt domain."""

    mounts: tuple[Path, ...] = ()
    qmp: tuple[Path, ...] = ()
    agents: tuple[Mapping[str, Any], ...] = ()  # `socket`, `mounts`, `least` of AgentHold; `qemu`
    libvirt: tuple[Mapping[str, Any], ...] = ()  # arguments of LibvirtHold
    sqlite: tuple[Mapping[str, Any], ...] = ()  # arguments of SqliteHold
    programs: tuple[Mapping[str, Any], ...] = ()  # orders of Program


class Holder:
    """Holds `targets` through a guardian process. Life: `arm` → `freeze` → `thaw` → `close`."""

    def __init__(self, instance: Instance, targets: Targets, slack_s: float = _SLACK_S) -> None:
        self._targets = targets
        self._slack_s = slack_s
        self.marker = instance.runtime_dir / "holds" / f"{new_id()}.json"
        self._process: subprocess.Popen[bytes] | None = None
        self._pending = b""
        self._deadline_s = 0.0
        self._frozen = False
        self.frozen_ms: Mapping[str, float] = {}
        self.said: Mapping[str, str] = {}  # what holds have for the report
        self.broken = ""  # why the hold did not last from freeze to thaw

    def undo_args(self) -> dict[str, str]:
        """What `undo_hold` needs to let go after both processes have died."""
        return {
            "marker": str(self.marker),
            "boot": procs.boot_id(),
            "mounts": json.dumps({str(m): device_of(m) for m in self._targets.mounts}),
            "qmp": json.dumps([str(s) for s in self._targets.qmp]),
            "agents": json.dumps(self._targets.agents),
            "libvirt": json.dumps(self._targets.libvirt),
            "programs": json.dumps(self._targets.programs),
        }

    def arm(self, deadline_s: float) -> None:
        """Start the guardian; it opens all it needs. Raises UnavailableError (`freeze-failed`)."""
        self._deadline_s = deadline_s
        self.marker.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        order = {
            "mounts": [str(m) for m in self._targets.mounts],
            "qmp": [str(s) for s in self._targets.qmp],
            "agents": [_agent_order(entry, deadline_s) for entry in self._targets.agents],
            "libvirt": self._targets.libvirt,
            "sqlite": self._targets.sqlite,
            "programs": self._targets.programs,
            "within_s": deadline_s,
            "marker": str(self.marker),
        }
        root = str(Path(offload.__file__).parent.parent)
        self._process = run.spawn(
            [sys.executable, "-I", "-S", "-c", _CODE.format(root=root), json.dumps(order)],
            stdin=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            new_session=True,  # Ctrl-C ends the command, not the one that must thaw for it
        )
        answer = self._receive(_START_S)
        if not answer["ok"]:
            self.close()
            raise UnavailableError(f"cannot freeze: {answer['error']}", code="freeze-failed")

    def freeze(self, until: float) -> None:
        """All or none, before `until` (of `time.monotonic`).

        The dead-man timer lets go at the same time. Raises UnavailableError (`freeze-failed`);
        then nothing is held.
        """
        within_s = max(0.0, until - time.monotonic())
        answer = self._ask("freeze", within_s + self._slack_s, within_s=within_s)
        if not answer["ok"]:
            raise UnavailableError(f"cannot freeze: {answer['error']}", code="freeze-failed")
        self._frozen = True
        self.frozen_ms = answer["ms"]
        self.said = answer["said"]

    def still_frozen(self) -> bool:
        """Whether all was held without a break until now; `broken` says why not."""
        if not self._frozen:
            return False
        try:
            answer = self._ask("status", self._slack_s)
        except UnavailableError as error:
            self.broken = error.message
            self._stand_in()
            return False
        self.broken = answer["why"]
        return bool(answer["held"])

    def thaw(self) -> None:
        """Let go. Idempotent. Raises UnavailableError (`thaw-failed`)."""
        if not self._frozen:
            return
        try:
            answer = self._ask("thaw", self._deadline_s + self._slack_s)
        except UnavailableError as error:
            self.broken = error.message
            self._stand_in()
            return
        self._frozen = False
        self.broken = answer["broken"] if answer["ok"] else answer["error"]
        self.said = answer.get("said", self.said)
        if not answer["ok"]:
            raise UnavailableError(
                f"cannot thaw: {answer['error']}", code="thaw-failed", hint="run: offload recover"
            )

    @property
    def pid(self) -> int | None:
        """Of the guardian, while it is ours."""
        return self._process.pid if self._process is not None else None

    def close(self) -> None:
        """End the guardian, which thaws what is frozen still.

        It is never killed: a freeze that is under way in the kernel would outlive it for ever.
        One that hangs is left alone with its dead-man timer.
        """
        process, self._process = self._process, None
        if process is None:
            return
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()
        try:
            process.wait(timeout=_END_S)
        except subprocess.TimeoutExpired:
            return
        if process.returncode != 0 and self._frozen:
            self._stand_in()
        self._frozen = False

    def _stand_in(self) -> None:
        """The guardian is dead or deaf: let go ourselves of what its marker names."""
        self._frozen = False
        try:
            undo_hold(self.undo_args())
        except OffloadError as error:
            raise UnavailableError(
                f"the guardian of the freeze died: {error.message}",
                code="thaw-failed",
                hint="run: offload recover",
            ) from error

    def _ask(self, command: str, timeout_s: float, **more: float) -> dict[str, Any]:
        process = self._process
        if process is None or process.stdin is None:
            raise UnavailableError("the guardian of the freeze is not running", code="guardian")
        try:
            os.write(process.stdin.fileno(), json.dumps({"do": command, **more}).encode() + b"\n")
        except OSError as error:
            raise _gone() from error
        return self._receive(timeout_s)

    def _receive(self, timeout_s: float) -> dict[str, Any]:
        if self._process is None or self._process.stdout is None:
            raise _gone()
        fd = self._process.stdout.fileno()
        until = time.monotonic() + timeout_s
        while b"\n" not in self._pending:
            ready, _, _ = select.select([fd], [], [], max(0.0, until - time.monotonic()))
            if not ready:
                raise UnavailableError(
                    "the guardian of the freeze does not answer; its dead-man timer lets go",
                    code="guardian",
                )
            more = os.read(fd, 1 << 16)
            if not more:
                raise _gone()
            self._pending += more
        line, _, self._pending = self._pending.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        return answer


def _gone() -> UnavailableError:
    return UnavailableError("the guardian of the freeze died", code="guardian")


def _agent_order(entry: Mapping[str, Any], within_s: float) -> dict[str, Any]:
    return {k: entry[k] for k in ("socket", "mounts", "least")} | {"within_s": within_s}


def device_of(mount: Path) -> str:
    """The device number (`st_dev`) under a path as text, empty if there is nothing."""
    try:
        return str(mount.stat().st_dev)
    except OSError:
        return ""


def undo_hold(args: Mapping[str, str]) -> None:
    """Let go of what a dead process and its dead guardian left frozen. Idempotent.

    Acts only on what the guardian's marker names, on the same boot, and on mount points that carry
    the same file system as then. What somebody else froze is left alone, but for one case that
    cannot be told apart: both processes died frozen, somebody thawed by hand, and somebody else
    froze it again before this ran. Raises CleanupError.
    """
    marker = Path(args["marker"])
    for guest in json.loads(args.get("libvirt", "[]")):
        undo_libvirt_hold(guest, marker, same_boot=args["boot"] == procs.boot_id())
    for program in json.loads(args.get("programs", "[]")):
        undo_program(program, marker, same_boot=args["boot"] == procs.boot_id())
    if args["boot"] != procs.boot_id():
        marker.unlink(missing_ok=True)  # no freeze here outlives the kernel that did it
        return
    try:
        named: Sequence[str] = json.loads(marker.read_text())
    except FileNotFoundError:
        return
    devices: dict[str, str] = json.loads(args["mounts"])
    for path, device in devices.items():
        if path in named and device and device_of(Path(path)) == device:
            _thaw_mount(path)
    for socket in json.loads(args["qmp"]):
        if socket in named:
            _continue(Path(socket))
    for guest in json.loads(args.get("agents", "[]")):
        undo_agent_hold(guest, named)
    marker.unlink(missing_ok=True)


def undo_thaw(instance: Instance, catalog: Catalog, args: Mapping[str, str]) -> None:  # noqa: ARG001
    """The journal's `thaw-…` actions: see `undo_hold`."""
    undo_hold(args)


def _thaw_mount(path: str) -> None:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    except OSError as error:
        raise CleanupError(f"cannot open {path} to thaw it: {error.strerror}") from error
    try:
        thaw_fd(fd)
    except OSError as error:
        raise CleanupError(
            f"cannot thaw {path}: {error.strerror}", hint=f"by hand: fsfreeze --unfreeze {path}"
        ) from error
    finally:
        os.close(fd)


def _continue(socket: Path) -> None:
    """`cont` a QEMU that stands paused; one that is gone, or stands for a reason of its own, is
    left alone."""
    with contextlib.suppress(QmpGoneError), Qmp(socket) as qmp:
        if qmp.execute("query-status")["status"] == "paused":
            qmp.execute("cont")


def describe(frozen_ms: Mapping[str, float]) -> str:
    """What was frozen and how long that took, for the report."""
    return "; ".join(f"{name} frozen in {ms:.0f} ms" for name, ms in sorted(frozen_ms.items()))
