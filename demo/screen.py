"""What the person in front of the demonstration sees, and how its commands are run."""

from __future__ import annotations

import json
import os
import shlex
import sys
import textwrap
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from offload import run
from offload.errors import OffloadError
from offload.run import find_program

_TIMEOUT_S = 600.0
_WIDTH = 92
_TERMINAL_ENV = ("TERM", "COLUMNS", "NO_COLOR", "COLORTERM")
OFFLOAD = Path(sys.executable).parent / "offload"


class DemoError(OffloadError):
    """The demonstration did not show what it promises."""

    code = "demo"


class Screen:
    """Prints headings and command lines, and runs the commands where they can be watched."""

    def __init__(self, config: Path) -> None:
        self._env = {name: os.environ[name] for name in _TERMINAL_ENV if name in os.environ}
        self._env["OFFLOAD_CONFIG"] = str(config)
        self._bold = sys.stdout.isatty() and "NO_COLOR" not in os.environ
        self._step = 0

    @property
    def env(self) -> Mapping[str, str]:
        """What the demonstration's programs get; it also marks them as its own."""
        return self._env

    def heading(self, text: str) -> None:
        """The next step."""
        self._step += 1
        line = f"{self._step}. {text}"
        print(f"\n\033[1m{line}\033[0m" if self._bold else f"\n{line}", flush=True)

    def say(self, text: str) -> None:
        """A paragraph."""
        print(textwrap.fill(" ".join(text.split()), _WIDTH, initial_indent="  ",
                            subsequent_indent="  "), flush=True)  # fmt: skip

    def echo(self, line: str) -> None:
        """A command line, before it runs."""
        print(f"\033[36m$ {line}\033[0m" if self._bold else f"$ {line}", flush=True)

    def offload(self, *words: str) -> float:
        """Run one `offload` command in view; returns its seconds. DemoError if it fails."""
        return self.program([str(OFFLOAD), *words], shown=["offload", *words])

    def program(self, argv: Sequence[str], *, shown: Sequence[str] = ()) -> float:
        """Run a program in view, its output going straight to the terminal."""
        self.echo(shlex.join(shown or argv))
        began = time.monotonic()
        process = run.spawn(argv, stdout=None, stderr=None, env=self._env)
        try:
            status = process.wait(timeout=_TIMEOUT_S)
        except BaseException:
            run.terminate(process, grace_s=20)
            raise
        if status != 0:
            raise DemoError(f"{shlex.join(shown or argv)} ended with status {status}")
        return time.monotonic() - began

    def ask(self, *words: str) -> Any:
        """Run `offload --json` out of view and read its one value."""
        argv = [str(OFFLOAD), "--json", *words]
        return json.loads(run.run(argv, env=self._env, timeout_s=_TIMEOUT_S).stdout)

    def compare(self, uri: str, file: Path) -> float:
        """Read a view to its end and compare it with a file, byte for byte; returns seconds."""
        copy, compare = find_program("nbdcopy"), find_program("cmp")
        if copy is None or compare is None:
            raise DemoError("nbdcopy or cmp is not installed", hint="make system")
        self.echo(f"nbdcopy {shlex.quote(uri)} - | cmp - {shlex.quote(str(file))}")
        began = time.monotonic()
        reader = run.spawn([copy, uri, "-"], stderr=None, env=self._env)
        try:
            assert reader.stdout is not None  # noqa: S101 - it is a pipe
            verdict = run.spawn(
                [compare, "-", str(file)], stdin=reader.stdout.fileno(), stdout=None, stderr=None,
                env=self._env,
            )  # fmt: skip
            reader.stdout.close()
            try:
                differs = verdict.wait(timeout=_TIMEOUT_S)
                failed = reader.wait(timeout=_TIMEOUT_S)
            finally:
                run.terminate(verdict)
        finally:
            run.terminate(reader)
        if differs or failed:
            raise DemoError(f"{file} differs from {uri}")
        return time.monotonic() - began


def print_table(title: str, rows: Sequence[Sequence[str]]) -> None:
    """Padded columns; the last may be long."""
    print(f"\n{title}")
    columns = max(len(row) for row in rows)
    widths = [max(len(row[i]) for row in rows if i < len(row)) for i in range(columns)]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=False))
        print("  " + "  ".join(cells).rstrip())
    sys.stdout.flush()
