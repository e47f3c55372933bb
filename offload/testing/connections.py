"""An instance whose views are mounted and connected, in a temporary folder, for tests that run as
root where the kernel has an NBD client or open-iscsi works: in the lab guest."""
# ruff: noqa: S101 - what a test is made of

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import tomli_w

from offload import kernel_nbd
from offload.journal import CRASH_ENV, TRACE_ENV
from offload.model import Connection, Exposure, View
from offload.services import connect, mount
from offload.services.connect import ConnectOptions
from offload.services.context import Context, open_context
from offload.services.mount import MountOptions

MIB = 1 << 20
LINKS = Path("/dev/offload")

_PATIENCE_S = 60.0  # emulated, on a machine that may be busy

Action = Callable[[Context], object]


class Site:
    """One instance with one volume, `db`, in the group `shop`."""

    def __init__(self, folder: Path, tables: Mapping[str, object]) -> None:
        """Take the folder, which must be short; `tables` as in the configuration file."""
        self.folder = folder
        self.volume = folder / "db.raw"
        self.config = folder / "offload.toml"
        if not self.volume.exists():
            self.volume.write_bytes(os.urandom(2 * MIB))
        text = {
            "state_dir": str(folder / "state"),
            "runtime_dir": str(folder / "run"),
            "volumes": {"db": {"provider": "copy", "path": str(self.volume)}},
            "overlays": {"limit": "64MiB", "min_free": "16MiB"},  # /tmp of the lab is small
            "groups": {"shop": {"volumes": ["db"], "atomic": "record"}},
            **tables,
        }
        self.config.write_text(tomli_w.dumps(text))
        self._stack = ExitStack()
        self.ctx: Context = self._stack.enter_context(open_context(self.config))

    def close(self) -> None:
        """Take everything away."""
        with self._stack:
            self.ctx.journal.recover()
            connect.disconnect(self.ctx, [], all_connections=True, force=True)
            mount.unmount(self.ctx, [], all_views=True, force=True)

    @property
    def content(self) -> bytes:
        """What the volume holds."""
        return self.volume.read_bytes()

    def mount(
        self,
        name: str = "v",
        *,
        target: str = "nbd",
        writable: bool = False,
        exposure: Exposure | None = None,
    ) -> View:
        """A view of a fresh TimeMark."""
        options = MountOptions(
            name=name, target=target, writable=writable, exposure=exposure or Exposure()
        )
        (view,) = mount.mount(self.ctx, ["shop"], options)
        return view

    def connect(
        self, what: str = "v", *, name: str | None = None, timeout_s: int = 30
    ) -> Connection:
        """A view as a block device."""
        options = ConnectOptions(name=name, timeout_s=timeout_s)
        return connect.connect(self.ctx, what, options).connection

    def kill_server(self, name: str = "v") -> None:
        """`kill -9` of the server of a view that has one of its own."""
        view = self.ctx.catalog.view(name)
        os.kill(int(view.server["pid"]), signal.SIGKILL)
        wait_for(lambda: not next(s for s in mount.views(self.ctx) if s.view == view).alive)

    def steps(self, action: Action) -> list[str]:
        """The journal's steps that an action goes through, each once, in order."""
        trace = self.folder / "trace"
        os.environ[TRACE_ENV] = str(trace)
        try:
            action(self.ctx)
        finally:
            del os.environ[TRACE_ENV]
        found = list(dict.fromkeys(trace.read_text().split()))
        trace.unlink()
        return found

    def kill_at(self, step: str, action: Action) -> None:
        """Have a process of its own do it, which dies at a step."""
        pid = os.fork()
        if pid == 0:
            try:
                os.environ[CRASH_ENV] = step
                with open_context(self.config) as ctx:
                    action(ctx)
            finally:
                os._exit(1)
        _, status = os.waitpid(pid, 0)
        assert os.WIFSIGNALED(status), f"{step} was not reached: status {status}"
        assert os.WTERMSIG(status) == signal.SIGKILL

    def assert_clean(self, *, connected: int = 0) -> None:
        """No device, link, tunnel or row beyond those of so many connections; an empty journal."""
        assert len(self.ctx.catalog.connections()) == connected
        wait_for(lambda: len(self.devices()) == connected)
        links = [] if not LINKS.exists() else [p for p in LINKS.iterdir() if p.is_symlink()]
        assert len(links) == connected
        tunnels = self.ctx.instance.runtime_dir / "tunnels"
        assert not tunnels.exists() or len(list(tunnels.iterdir())) <= connected
        assert list(self.ctx.instance.journal_dir.glob("*")) == []

    def devices(self) -> list[str]:
        """NBD devices of this instance."""
        prefix = f"offload-{self.ctx.instance.id}-"
        return [
            folder.name
            for folder in Path("/sys/block").glob("nbd*")
            if (kernel_nbd.identifier_of(folder.name) or "").startswith(prefix)
        ]


@contextmanager
def connection_site(tables: Mapping[str, object] | None = None) -> Iterator[Site]:
    """A site that leaves nothing."""
    folder = Path(tempfile.mkdtemp(prefix="ofc-", dir="/tmp"))
    try:
        site = Site(folder, tables or {})
        try:
            yield site
        finally:
            site.close()
    finally:
        shutil.rmtree(folder)


def wait_for(what: Callable[[], bool]) -> None:
    """Until it is true, or an AssertionError."""
    until = time.monotonic() + _PATIENCE_S
    while not what():
        assert time.monotonic() < until, f"it did not come true within {_PATIENCE_S:g} s"
        time.sleep(0.005)
