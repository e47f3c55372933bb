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

SEEDS = os.environ.get("OFFLOAD_TEST_SEEDS", "1-16")
STEPS = int(os.environ.get("OFFLOAD_TEST_STEPS", "1500"))
KEPT = [
    line.split()
    for line in Path(__file__).with_name("seeds.txt").read_text(encoding="utf-8").splitlines()
    if line and not line.startswith("#")
]

FOUND_BY = {  # from the first seed that finds each now; the others, should that change
    "index-before-content": "1-30",
    "no-look-for-fences": "6-35",
    "no-rescue": "6-35",
    "readers-ignored": "6-35",
    "tombstones-ignored": "5-35",
    "void-without-looking": "13-40",
}


def play(*argv: str) -> run.Completed:
    """In a process of its own, in which sets have the same order each time."""
    words = [sys.executable, "-m", "offload.testing.model_run", *argv]
    return run.run(words, env={"PYTHONHASHSEED": "0"}, timeout_s=24 * 3600, check=False)


def test_store_of_many_hosts_in_any_interleaving_keeps_what_was_reported() -> None:
    done = play("--seeds", SEEDS, "--steps", str(STEPS))
    assert done.status == 0, done.stdout[-20_000:]


@pytest.mark.parametrize(("seed", "steps"), [(line[0], line[1]) for line in KEPT])
def test_store_in_an_interleaving_that_failed_once_does_not_again(seed: str, steps: str) -> None:
    done = play("--seeds", seed, "--steps", steps)
    assert done.status == 0, done.stdout[-20_000:]


def test_run_of_one_seed_is_the_same_each_time() -> None:
    one, two = (play("--seeds", "5", "--steps", "600") for _ in range(2))
    assert one.status == 0, one.stdout
    assert one.stdout == two.stdout


@pytest.mark.parametrize("mutant", FOUND_BY)
def test_store_with_a_rule_taken_out_is_found(mutant: str) -> None:
    done = play("--seeds", FOUND_BY[mutant], "--steps", "2500", "--mutant", mutant, "--first")
    assert done.status == 1
    assert re.search("ViolationError|chunk-missing|pack-missing", done.stdout), done.stdout[-5000:]
