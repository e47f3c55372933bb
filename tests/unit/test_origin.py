"""What a person writes for an origin."""

from __future__ import annotations

import pytest

from offload.errors import UsageError
from offload.origin import Origin, OriginKind, parse_origin

TIMEMARK, BACKUP, GROUP = OriginKind.TIMEMARK, OriginKind.BACKUP, OriginKind.GROUP


@pytest.mark.parametrize(
    ("text", "kind", "wanted", "volume"),
    [
        ("timemark:k3x", TIMEMARK, "k3x", None),
        ("timemark:k3x/shop-db", TIMEMARK, "k3x", "shop-db"),
        ("backup:b/v.1_2", BACKUP, "b", "v.1_2"),
        ("shop", GROUP, "shop", None),
        ("timemark", GROUP, "timemark", None),
    ],
)
def test_origin_accepted_form_is_read_and_written_back(
    text: str, kind: OriginKind, wanted: str, volume: str | None
) -> None:
    origin = parse_origin(text)
    assert origin == Origin(kind=kind, id=wanted, volume=volume)
    assert str(origin) == text


@pytest.mark.parametrize(
    "text",
    [
        "", " ", "timemark:", "timemark:/v", "timemark:ab/", "timemark:ab/v/w", "timemark:a b",
        "timemark:../x", "backup:AB", "tape:ab", "group:shop", "shop/db", "Shop", "-shop",
        "backup:ab/-v", "backup:ab\n", "shop\n", "x" * 64,
    ],
)  # fmt: skip
def test_origin_bad_form_is_refused_with_the_accepted_ones(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_origin(text)
    assert caught.value.code == "bad-origin"
    assert "timemark:ID[/VOLUME]" in caught.value.hint
    assert "backup:ID[/VOLUME]" in caught.value.hint
