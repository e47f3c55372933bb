"""Many hosts at one store, beside a model of what must be true: whole runs by seed.

`OFFLOAD_TEST_SEEDS=1-500 OFFLOAD_TEST_STEPS=20000` for long ones. A run that fails prints what led
to it; its seed goes to seeds.txt with the reason, once that is known.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest

from offload import run

LONG = os.environ.get("OFFLOAD_TEST_SEEDS")
STEPS = os.environ.get("OFFLOAD_TEST_STEPS")
KEPT = [
    line.partition("#")[0].split()
    for line in Path(__file__).with_name("seeds.txt").read_text(encoding="utf-8").splitlines()
    if not line.startswith("#")
]

KINDS = {  # of stores, and of what goes wrong; seeds and steps of a quick run
    "memory": ((), "1-8", "1500"),
    "folder, encrypted": (("--store", "disk", "--encrypted"), "1-2", "1000"),
    "clocks that jump": (("--clocks",), "1-2", "1000"),
    "folder, clocks that jump": (("--store", "disk", "--clocks"), "3-4", "1000"),
    "object lock": (("--store", "locked"), "1-3", "1000"),
    "object lock, encrypted": (("--store", "locked", "--encrypted"), "11-12", "1000"),
}

FOUND_BY = {  # seeds, from the first that finds it now (the others, should that change), steps
    "hold-before-note": ("5-60", "2500"),
    "hold-without-waiting": ("7-60", "2500"),
    "index-before-content": ("1-30", "2500"),
    "locks-not-extended": ("1-40", "2500", "--store", "locked"),
    "no-look-for-fences": ("1-35", "2500"),
    "no-rescue": ("4-35", "2500"),
    "readers-ignored": ("8-35", "2500"),
    "tombstones-ignored": ("5-35", "2500"),
}


def play(*argv: str) -> run.Completed:
    """In a process of its own, in which sets have the same order each time."""
    words = [sys.executable, "-m", "offload.testing.model_run", *argv]
    return run.run(words, env={"PYTHONHASHSEED": "0"}, timeout_s=24 * 3600, check=False)


@pytest.mark.parametrize("kind", KINDS)
def test_store_of_many_hosts_in_any_interleaving_keeps_what_was_reported(kind: str) -> None:
    options, seeds, steps = KINDS[kind]
    done = play("--seeds", LONG or seeds, "--steps", STEPS or steps, *options)
    assert done.status == 0, done.stdout[-20_000:]


@pytest.mark.parametrize("line", KEPT, ids=" ".join)
def test_store_in_an_interleaving_that_failed_once_does_not_again(line: list[str]) -> None:
    done = play("--seeds", line[0], "--steps", *line[1:])
    assert done.status == 0, done.stdout[-20_000:]


@pytest.mark.parametrize("options", [(), ("--store", "locked", "--encrypted")])
def test_run_of_one_seed_is_the_same_each_time(options: tuple[str, ...]) -> None:
    one, two = (play("--seeds", "5", "--steps", "600", *options) for _ in range(2))
    assert one.status == 0, one.stdout
    assert one.stdout == two.stdout


@pytest.mark.parametrize("mutant", FOUND_BY)
def test_store_with_a_rule_taken_out_is_found(mutant: str) -> None:
    seeds, steps, *options = FOUND_BY[mutant]
    done = play("--seeds", seeds, "--steps", steps, "--mutant", mutant, "--first", *options)
    assert done.status == 1
    assert re.search("ViolationError|chunk-missing|pack-missing", done.stdout), done.stdout[-5000:]
