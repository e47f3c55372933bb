"""A whole site for tests of the command line: a pool, two mounted production volumes, a store."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from offload import run
from offload.services.context import Context, open_context
from offload.testing.pools import loop_pool, mounted
from offload.testing.warm import warm_python

ROOT = Path(__file__).resolve().parents[2]
OFFLOAD = ROOT / ".venv" / "bin" / "offload"
MIB = 1 << 20


@dataclass
class Site:
    """Where everything of one test is, and how to run `offload` there."""

    folder: Path
    pool: Path
    config: Path
    mounts: dict[str, Path] = field(default_factory=dict)

    @property
    def store(self) -> Path:
        """The disk store's folder."""
        return self.folder / "store"

    @property
    def state(self) -> Path:
        """The state folder."""
        return self.folder / "state"

    def volume(self, name: str) -> Path:
        """The file of a volume."""
        return self.pool / f"{name}.raw"

    def run(self, *words: str, **env: str) -> run.Completed:
        """Run `offload`; the caller looks at the status."""
        argv = ("-m", "offload.cli", "--config", str(self.config), *words)
        return warm_python().run(*argv, env=env)

    def ok(self, *words: str, **env: str) -> str:
        """Run `offload`, which must succeed."""
        done = self.run(*words, **env)
        assert done.status == 0, f"{words}: {done.stderr}\n{done.stdout}"
        return done.stdout

    def ask(self, *words: str) -> Any:
        """Run `offload --json`, which must succeed, and read its one JSON value."""
        return json.loads(self.ok("--json", *words))

    def refused(self, *words: str) -> dict[str, Any]:
        """Run `offload --json`, which must fail with one clear error; returns it with `status`."""
        done = self.run("--json", *words)
        assert done.status != 0, f"{words} succeeded: {done.stdout}"
        assert "Traceback" not in done.stderr
        assert done.stdout == ""
        error = json.loads(done.stderr)
        assert set(error) == {"code", "message", "hint"}
        assert "\n" not in error["message"]
        return {**error, "status": done.status}

    @contextmanager
    def context(self) -> Iterator[Context]:
        """The instance, opened in this process: faster than a command where much is looked at."""
        with open_context(self.config) as opened:
            yield opened

    def write(self, volume: str, text: str) -> None:
        """A file inside a mounted volume, on disk."""
        path = self.mounts[volume] / "written.txt"
        path.write_text(text)
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)

    # -- what is there ---------------------------------------------------------------------------

    def servers(self) -> list[str]:
        """Command lines of servers that know this site's folder."""
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
            except OSError:
                continue
            if str(self.folder) in line and "nbd" in line and state not in "ZX":
                found.append(line)
        return found

    def guardians(self) -> list[str]:
        """Guardian processes of this site (they end at once when their parent is gone)."""
        lines = []
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue
            if "guardian" in line and str(self.folder) in line:
                lines.append(line)
        return lines

    def snapshots(self) -> list[Path]:
        """Files of snapshots in the pool."""
        return sorted(p for p in (self.pool / ".offload").rglob("*") if p.is_file())

    def run_files(self) -> list[Path]:
        """Sockets, pid files and folders of views in the runtime folder."""
        return sorted((self.folder / "run").glob("*/views/*"))

    def overlays(self) -> list[Path]:
        """What was written to views."""
        return sorted((self.state / "overlays").glob("*"))

    def journal_files(self) -> list[Path]:
        """Intents of operations that are not finished."""
        return sorted((self.state / "journal").glob("*"))

    def store_files(self, *parts: str) -> list[str]:
        """Objects of the store below some folders."""
        return sorted(
            str(p.relative_to(self.store))
            for part in parts
            for p in (self.store / part).rglob("*")
            if p.is_file()
        )

    def writable(self) -> bool:
        """Whether the production file systems take writes: nothing is frozen."""
        for point in self.mounts.values():
            done = run.run(["timeout", "-k", "1", "5", "touch", str(point / "probe")], check=False)
            if done.status != 0:
                return False
        return True


_CONFIG = """
state_dir = "{folder}/state"
runtime_dir = "{folder}/run"

[pool]
min_free = "10MiB"

[volumes.db]
provider = "reflink"
path = "{pool}/db.raw"

[volumes.web]
provider = "reflink"
path = "{pool}/web.raw"

[groups.shop]
volumes = ["db", "web"]
consistency = "filesystem"
store = "main"
[[groups.shop.quiesce]]
kind = "local"
mounts = ["{folder}/db", "{folder}/web"]

[groups.loose]
volumes = ["db", "web"]

[groups.solo]
volumes = ["web"]
store = "main"

[stores.main]
kind = "disk"
path = "{folder}/store"
min_free = "16MiB"
"""


@contextmanager
def new_site() -> Iterator[Site]:
    """Two volumes of 64 MiB (ext4, and XFS of 320 MiB, its least) in a reflink pool, mounted."""
    with ExitStack() as stack:
        # A short path: unix sockets have at most 107 bytes.
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ofl-")))
        pool = stack.enter_context(loop_pool(folder, "xfs", size_bytes=1 << 30))
        made = Site(folder=folder, pool=pool, config=folder / "offload.toml")
        made.config.write_text(_CONFIG.format(folder=folder, pool=pool))
        made.config.chmod(0o600)
        for name, size, mkfs in (
            ("db", 64 * MIB, ["mke2fs", "-q", "-t", "ext4", "-F"]),
            ("web", 320 * MIB, ["mkfs.xfs", "-q"]),
        ):
            file = made.volume(name)
            file.touch()
            os.truncate(file, size)
            run.run([*mkfs, str(file)])
            point = folder / name
            point.mkdir()
            stack.enter_context(mounted(file, point))
            made.mounts[name] = point
            (point / "random").write_bytes(os.urandom(3 * MIB))
        made.ok("store", "init", "main")
        stack.callback(_end_servers, made)
        yield made


def _end_servers(made: Site) -> None:
    made.run("unmount", "--all", "--force")
    shutil.rmtree(made.store, ignore_errors=True)
