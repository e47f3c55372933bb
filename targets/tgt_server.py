"""The tgtd of one portal, shared by the views that are presented there.

| in `servers/tgt-ADDRESS-PORT` | |
| --- | --- |
| `control.0`, `control.0.lock` | its management socket; the lock is tgtd's own |
| `log` | what it says; cut off at 1 MiB |
| `chap` | salted hashes of the secrets that it was given (`targets.tgt_chap`) |

Its socket is ours alone (`TGT_IPC_SOCKET`; tgtd adds `.0`), so it never meets an administrator's
tgtd, nor another instance's. Beside the folder lies a lock: whoever starts, changes or ends a
server holds it.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from offload import procs, run
from offload.errors import CleanupError, ConfigError, OffloadError, UnavailableError
from offload.filelock import alone
from offload.iscsi import portal
from targets.tgt_mgmt import Management, TgtGoneError

_READY_S = 30.0  # of a busy machine
_ENDS_S = 5.0
_LOG_MAX = 1 << 20  # bytes
_SUN_PATH_MAX = 107  # bytes of a unix socket address, sys/un.h
_TAKEN_SIGN = "Address already in use"  # strerror(EADDRINUSE) in the C locale

# Threads that read and write, a view: tgtd's default of 16 is 1024 threads for 64 views.
_THREADS = 8
# tgtd asks silent initiators for a sign of life every 5 s and gives up those that owe it three:
# one that vanished without a word is gone after 20 s.
_NOPS = "nop_interval=5,nop_count=3"

_CAP_SETPCAP = 8  # linux/capability.h
# As root, tgtd opens for writing whatever it can, read-only view or not, and then looks after its
# clients itself. Without CAP_DAC_OVERRIDE a snapshot (mode 0400) cannot be opened for writing.
# Left are: reading others' files, ports under 1024, many files open.
_KEPT = "-all,+dac_read_search,+net_bind_service,+sys_resource"


@dataclass(frozen=True, slots=True, kw_only=True)
class PortalServer:
    """The server of `address` and `port`, whether it runs or not."""

    folder: Path
    address: str
    port: int

    @classmethod
    def of(cls, servers_dir: Path, address: str, port: int) -> Self:
        """The one of a portal."""
        address = ipaddress.ip_address(address).compressed
        return cls(folder=servers_dir / f"tgt-{address}-{port}", address=address, port=port)

    @classmethod
    def of_folder(cls, folder: Path) -> Self:
        """The one with this folder."""
        address, _, port = folder.name.removeprefix("tgt-").rpartition("-")
        return cls(folder=folder, address=address, port=int(port))

    @classmethod
    def all(cls, servers_dir: Path) -> list[Self]:
        """Those that have a folder."""
        return [cls.of_folder(f) for f in sorted(servers_dir.glob("tgt-*-*/")) if f.is_dir()]

    @property
    def name(self) -> str:
        """`ADDRESS:PORT`."""
        return portal(self.address, self.port)

    @property
    def management(self) -> Management:
        """Its management protocol."""
        return Management(self.folder / "control.0")

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Hold the portal: nobody else starts, changes or ends its server meanwhile."""
        self.folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with alone(self.folder.with_name(f"{self.folder.name}.lock")):
            yield

    def find(self) -> list[procs.ProcessRef]:
        """Live processes that were started for it. More than one: an earlier one is wedged."""
        return procs.find_running("tgtd", self._mark)

    def check(self) -> None:
        """Raise ConfigError (`runtime-path-too-long`, `runtime-path-comma`) where it could have no
        socket, or open no view."""
        runtime = self.folder.parents[1]
        if len(os.fsencode(self.management.socket)) > _SUN_PATH_MAX:
            raise ConfigError(
                f"the runtime folder {runtime} is too long a path for unix sockets",
                code="runtime-path-too-long",
                hint="set runtime_dir to a shorter path",
            )
        if "," in str(runtime):
            raise ConfigError(
                f"tgtd takes no path with a comma, as the runtime folder {runtime} has one",
                code="runtime-path-comma",
                hint="set runtime_dir to another path",
            )

    def running(self) -> procs.ProcessRef | None:
        """The process, if it runs and answers. One that cannot be reached any more is ended.

        Raises TgtSilentError, TgtDeniedError.
        """
        found = self.find()
        try:
            if found:
                self.management.portals()
                self._cut_log()
                return found[0]
        except TgtGoneError:
            self.kill()
        return None

    def start(self) -> procs.ProcessRef:
        """Start it, and return when it listens at its portal and nowhere else.

        Raises UnavailableError (`program-missing`, `port-taken`, `server-failed`).
        """
        self._remove()
        self.folder.mkdir(mode=0o700)
        fd = os.open(self._log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            env = {"TGT_IPC_SOCKET": str(self.folder / "control")}
            pid = run.spawn_detached(self._argv(), output=fd, env=env)
        finally:
            os.close(fd)
        try:
            return self._wait_ready(pid)
        except BaseException:
            self.kill()
            raise

    def end_if_idle(self) -> None:
        """End it where it has no targets. Raises what requests to it raise."""
        if self.management.targets():
            return
        self.management.shut_down()
        for ref in self.find():
            ref.end(_ENDS_S)  # SIGTERM does no more than to wake it, so that it ends at once
        self._remove()

    def kill(self) -> None:
        """End it, whatever it presents."""
        for ref in self.find():
            ref.end(0)  # SIGTERM does nothing to it
        if self.find():
            raise CleanupError(f"the tgtd of {self.name} cannot be ended", code="cleanup")
        self._remove()

    @property
    def _mark(self) -> str:
        """An argument that names our folder, to be found by. In the foreground, tgtd writes no
        such file."""
        return str(self.folder / "tgtd.pid")

    @property
    def _log(self) -> Path:
        return self.folder / "log"

    def _argv(self) -> list[str]:
        argv = [run.require_program("tgtd", "tgt"), "--foreground"]
        argv += ["--nr_iothreads", str(_THREADS), "--pid-file", self._mark]
        argv += ["--iscsi", f"portal={self.name},{_NOPS}"]
        if os.geteuid() == 0 and procs.has_capability(_CAP_SETPCAP):
            setpriv = run.require_program("setpriv", "util-linux")
            argv = [setpriv, "--no-new-privs", f"--bounding-set={_KEPT}", "--", *argv]
        return argv

    def _wait_ready(self, pid: int) -> procs.ProcessRef:
        until = time.monotonic() + _READY_S
        while (ref := procs.ref_of(pid)) is not None:
            try:
                found = self.management.portals()
            except TgtGoneError:
                if time.monotonic() > until:
                    raise
                time.sleep(0.002)
                continue
            if found == [(self.address, self.port)]:
                return ref
            # where it cannot bind its portal, tgtd takes port 3260 of all addresses instead
            break
        raise self._failed()

    def _failed(self) -> OffloadError:
        words = ""
        with contextlib.suppress(OSError):
            words = self._log.read_text(errors="replace").strip()
        if _TAKEN_SIGN in words:
            return self.port_taken()
        last = words.splitlines()[-1].strip() if words else "it said nothing"
        return UnavailableError(f"the tgtd of {self.name} failed: {last}", code="server-failed")

    def port_taken(self) -> UnavailableError:
        """The error for a portal that another server has."""
        return UnavailableError(
            f"port {self.port} of {self.address} is taken by another server",
            code="port-taken",
            hint="choose another one: --port, or [iscsi] port",
        )

    def _cut_log(self) -> None:
        with contextlib.suppress(OSError):
            if self._log.stat().st_size > _LOG_MAX:
                os.truncate(self._log, 0)

    def _remove(self) -> None:
        """The folder and its files, which are of no use without the process."""
        try:
            for path in self.folder.iterdir():
                path.unlink(missing_ok=True)
            self.folder.rmdir()
        except FileNotFoundError:
            return
        except OSError as error:
            raise CleanupError(
                f"cannot remove {error.filename or self.folder}: {error.strerror}", code="cleanup"
            ) from error
