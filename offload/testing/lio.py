"""A lio target in a temporary folder, and a look at what it has left in the kernel.

For tests in the lab guest, as root.
"""
# ruff: noqa: S101, S105 - what a test is made of

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from offload import kernel_nbd
from offload.model import Exposure, RawSource, Source
from offload.run import run
from offload.target import Endpoint, ExportRequest
from offload.testing.instances import make_instance
from offload.testing.target import writable
from targets import lio_kernel, lio_loop, lio_state
from targets.lio import LioTarget

MIB = 1 << 20
HERE = "iqn.2026-11.example.test:here"
THERE = "iqn.2026-11.example.test:there"
SECRET = "correct horse battery"
MUTUAL_SECRET = "staple a battery horse"
WRONG_SECRET = "wrong horse battery"
CHAP = {"user": "backup", "secret": SECRET}
MUTUAL = CHAP | {"mutual_user": "offload", "mutual_secret": MUTUAL_SECRET}


class Site:
    """A target of an instance of its own. What it exported is withdrawn with it."""

    def __init__(self, folder: Path, iscsi: Mapping[str, object]) -> None:
        """Take the folder, which must be short, and what stands under `[iscsi]`."""
        self.folder = folder
        self.instance = make_instance(folder, {"iscsi": iscsi})
        self.target = LioTarget(self.instance)
        self.served: dict[Path, Endpoint] = {}

    def image(self, size_bytes: int = MIB) -> Path:
        """A file of random bytes."""
        path = Path(tempfile.mkstemp(prefix="image-", dir=self.folder)[1])
        path.write_bytes(os.urandom(size_bytes))
        return path

    def request(
        self,
        source: Source | Path | None = None,
        *,
        view_id: str = "v1",
        exposure: Exposure | None = None,
        on_overlay: bool = False,
    ) -> ExportRequest:
        """A view of a source, of a raw file or device, or of a fresh image."""
        if source is None or isinstance(source, Path):
            path = source or self.image()
            size = device_size(path) if path.is_block_device() else path.stat().st_size
            source = RawSource(path=path, size_bytes=size)
        made = ExportRequest(
            view_id=view_id,
            name=f"view-{view_id}",
            source=source,
            run_dir=self.folder / "run" / "views" / view_id,
            exposure=exposure or Exposure(),
        )
        return writable(made) if on_overlay else made

    def export(self, request: ExportRequest) -> Endpoint:
        """Serve a view until the end, or until `withdraw`."""
        endpoint = self.target.export(request)
        self.served[request.run_dir] = endpoint
        return endpoint

    def withdraw(self, request: ExportRequest) -> None:
        """Withdraw one that was exported."""
        self.target.withdraw(request.run_dir, self.served.pop(request.run_dir).server)

    def close(self) -> None:
        """Withdraw all that is served."""
        for run_dir, endpoint in self.served.items():
            self.target.withdraw(run_dir, endpoint.server)

    def leftovers(self) -> list[str]:
        """What of this instance is in the kernel, or runs."""
        names = f"offload-{self.instance.id}-"
        core, fabric = lio_state.TARGET / "core", lio_state.ISCSI
        found = [str(path) for path in core.glob(f"*/{names}*")]
        found += [str(path) for path in fabric.glob(f"*:{self.instance.id}.*")]
        for device in Path("/sys/block").iterdir():
            name = lio_loop.name_of(device.name) or kernel_nbd.identifier_of(device.name) or ""
            if name.startswith(names):
                found.append(device.name)
        found += [f"process {line}" for line in _processes(str(self.folder))]
        return found + [str(path) for path in (self.folder / "run" / "views").glob("*")]


@contextmanager
def site(chap: Mapping[str, str] | None = None, **iscsi: object) -> Iterator[Site]:
    """A target; `chap` with the secrets themselves. Nothing may be left of it."""
    folder = Path(tempfile.mkdtemp(prefix="ofl-", dir="/tmp"))
    if chap is not None:
        iscsi["chap"] = _secrets_in_files(folder, chap)
    made = Site(folder, iscsi)
    try:
        try:
            yield made
        finally:
            made.close()
        wait_until(lambda: not made.leftovers(), lambda: f"left: {made.leftovers()}")
    finally:
        shutil.rmtree(folder)


def _secrets_in_files(folder: Path, chap: Mapping[str, str]) -> dict[str, str]:
    table = dict(chap)
    for key in ("secret", "mutual_secret"):
        if key in table:
            path = folder / key
            path.touch(mode=0o600)
            path.write_text(table.pop(key) + "\n")
            table[f"{key}_file"] = str(path)
    return table


def wait_until(
    condition: Callable[[], object], why: Callable[[], str] = str, patience_s: float = 30
) -> None:
    """The kernel ends sessions and devices in its own time."""
    until = time.monotonic() + patience_s
    while not condition():
        assert time.monotonic() < until, why()
        time.sleep(0.02)


def device_size(path: Path) -> int:
    """In bytes."""
    return int(run(["blockdev", "--getsize64", str(path)]).stdout)


@contextmanager
def loop_disk(path: Path, sector_size: int = 512) -> Iterator[Path]:
    """An administrator's disk: a writable loop device."""
    lio_kernel.load_modules(["loop"])
    argv = ["losetup", "--find", "--show", "--sector-size", str(sector_size), str(path)]
    device = run(argv).stdout.strip()
    try:
        yield Path(device)
    finally:
        run(["losetup", "--detach", device])


def _processes(text: str) -> list[str]:
    """Command lines that name a path, without our own."""
    return [line for line in run(["ps", "-eo", "args"]).stdout.splitlines() if text in line]


def command_lines() -> str:
    """Of all processes, with their environment."""
    return run(["ps", "axeww"]).stdout
