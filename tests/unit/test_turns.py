"""Turns at something that takes only so many at once."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from offload.quiescers.turns import Turns

FAR_S = 60.0


def far() -> float:
    return time.monotonic() + FAR_S


def wait_until(condition: Callable[[], bool]) -> None:
    until = far()
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.001)


def test_turn_that_is_free_is_had_at_once() -> None:
    turns = Turns(2)
    with turns.one(0.0) as first, turns.one(0.0) as second, turns.one(0.0) as third:
        assert (first, second, third) == (True, True, False)
    with turns.one(0.0) as again:
        assert again


def test_turns_come_in_the_order_of_arrival() -> None:
    turns = Turns(1)
    order: list[int] = []

    def work(number: int) -> None:
        with turns.one(far()) as got:
            assert got
            order.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    with turns.one(0.0):
        for number, thread in enumerate(threads, 1):
            thread.start()
            wait_until(lambda number=number: len(turns._waiting) == number)  # type: ignore[misc]
    for thread in threads:
        thread.join(FAR_S)
    assert order == list(range(8))


def test_who_gives_up_holds_nobody_up() -> None:
    turns = Turns(1)
    late: list[bool] = []

    def give_up() -> None:
        with turns.one(time.monotonic() + 0.05) as got:
            late.append(got)

    def stay() -> None:
        with turns.one(far()) as got:
            late.append(got)

    with turns.one(0.0):
        impatient = threading.Thread(target=give_up)
        impatient.start()
        impatient.join(FAR_S)
        patient = threading.Thread(target=stay)
        patient.start()
        wait_until(lambda: len(turns._waiting) == 1)
    patient.join(FAR_S)
    assert late == [False, True]


def test_turn_is_given_back_after_an_error() -> None:
    turns = Turns(1)
    with pytest.raises(ZeroDivisionError), turns.one(0.0):
        _ = 1 // 0
    with turns.one(0.0) as got:
        assert got
