"""The site of the demonstration: two production volumes, their writer, a configuration."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from demo import writer
from demo.screen import DemoError
from offload import run

MIB = 1 << 20
VOLUMES = ("shop-db", "shop-web")
_WRITER_START_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Partition:
    """Where a partition lies in its volume, in bytes."""

    offset: int
    size: int


class Ground(Protocol):
    """One way to have two production volumes with a live writer."""

    folder: Path
    note: str  # what kind of site this is, for the person who watches
    one_instant: bool  # whether the writer is held for TimeMarks of both volumes

    @property
    def pool(self) -> Path:
        """The folder that holds the volumes and their snapshots."""
        ...

    def build(self) -> int:
        """Make the volumes and fill them; returns the bytes of the files."""
        ...

    def writer_argv(self) -> list[str]:
        """How the writer process is started."""
        ...

    def config(self) -> str:
        """The configuration, as a user writes it."""
        ...

    def change(self) -> int:
        """Add and modify files on both volumes; returns the bytes written."""
        ...


def volume_path(pool: Path, name: str) -> Path:
    """The image file of a volume."""
    return pool / f"{name}.raw"


def partition_volume(path: Path, size_bytes: int, table: str) -> list[Partition]:
    """A sparse image of this size with a GPT; returns its partitions."""
    with path.open("xb") as out:
        os.ftruncate(out.fileno(), size_bytes)
    sfdisk = run.require_program("sfdisk", "fdisk")
    run.run([sfdisk, "--quiet", str(path)], stdin=f"label: gpt\n{table}\n".encode())
    found = json.loads(run.run([sfdisk, "--json", str(path)]).stdout)["partitiontable"]
    sector = found.get("sectorsize", 512)
    return [
        Partition(offset=entry["start"] * sector, size=entry["size"] * sector)
        for entry in found["partitions"]
    ]


def base_config(folder: Path, pool: Path, provider: str) -> str:
    """What both sites have in common."""
    volumes = "".join(
        f'[volumes.{name}]\nprovider = "{provider}"\npath = "{volume_path(pool, name)}"\n\n'
        for name in VOLUMES
    )
    return (
        f'state_dir = "{folder}/state"\nruntime_dir = "{folder}/run"\n\n'
        f'{volumes}[stores.main]\nkind = "disk"\npath = "{folder}/store"\nmin_free = "256MiB"\n\n'
    )


@contextmanager
def running_writer(ground: Ground, log: Path, env: Mapping[str, str]) -> Iterator[None]:
    """The writer process, from its first round on; at the end it finishes its round and is gone."""
    log.touch()
    reader, hold = os.pipe()
    said = log.with_suffix(".stderr")
    with said.open("wb") as errors:
        argv = [sys.executable, writer.__file__, "--log", str(log), *ground.writer_argv()]
        try:
            # its own session: Ctrl-C is for the demonstration, which then ends the writer
            process = run.spawn(
                argv, stdin=reader, stdout=errors.fileno(), stderr=errors.fileno(), env=env,
                new_session=True,
            )  # fmt: skip
        finally:
            os.close(reader)
    try:
        until = time.monotonic() + _WRITER_START_S
        while not log.stat().st_size and time.monotonic() < until:
            if process.poll() is not None:
                raise DemoError(f"the writer ended: {said.read_text().strip()}")
            time.sleep(0.02)
        yield
        if process.poll() is not None:
            raise DemoError(f"the writer ended: {said.read_text().strip()}")
    finally:
        os.close(hold)
        with contextlib.suppress(Exception):
            process.wait(timeout=5)
        run.terminate(process)
