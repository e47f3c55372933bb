"""Ids: readable, and found by a prefix that is unambiguous."""

from __future__ import annotations

import re

import pytest

from offload.errors import NotFoundError
from offload.ids import match_prefix, new_id


def test_new_id_is_ten_readable_characters_from_a_letter() -> None:
    made = {new_id() for _ in range(500)}
    assert len(made) == 500
    assert all(re.fullmatch(r"[a-hjkmnp-tv-z][0-9a-hjkmnp-tv-z]{9}", i) for i in made)


def test_match_prefix_unique_start_finds_it() -> None:
    assert match_prefix("backup", "ab", ["abc", "xyz"]) == "abc"


def test_match_prefix_full_id_wins_over_longer_ones() -> None:
    assert match_prefix("backup", "ab", ["ab", "abc"]) == "ab"


@pytest.mark.parametrize(("prefix", "code"), [("q", "unknown-backup"), ("", "unknown-backup"),
                                              ("a", "ambiguous-backup")])  # fmt: skip
def test_match_prefix_none_or_several_is_not_found(prefix: str, code: str) -> None:
    with pytest.raises(NotFoundError) as caught:
        match_prefix("backup", prefix, ["ab", "ac"])
    assert caught.value.code == code
    assert caught.value.hint
