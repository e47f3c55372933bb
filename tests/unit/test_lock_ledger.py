"""What a host knows of locks, and when it must not believe it any longer."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from offload.engine.lockledger import LockLedger

PACKS = ["packs/ab/abcdefghjk-000001", "packs/ab/abcdefghjk-000002"]
PAGE = bytes(32)


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[LockLedger]:
    made = LockLedger(tmp_path / "locks.db")
    yield made
    made.close()


def test_trees_are_forgotten_when_the_damage_of_the_store_is_another_one(
    ledger: LockLedger,
) -> None:
    needed = ledger.numbers(PACKS)
    for damage, known in ((b"none", None), (b"none", needed), (b"mended", None)):
        ledger.trees_under(damage)
        assert (ledger.page(PAGE), ledger.root(PAGE)) == (known, known)
        ledger.set_pages({PAGE: needed})
        ledger.set_roots({PAGE: needed})


def test_dates_of_locks_outlive_what_is_forgotten_of_trees(ledger: LockLedger) -> None:
    until = datetime.now(UTC).replace(microsecond=0) + timedelta(days=1)
    ledger.note({PACKS[0]: until})
    ledger.trees_under(b"mended")
    assert ledger.locks(PACKS) == {PACKS[0]: until}
