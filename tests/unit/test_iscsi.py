"""iSCSI names, identities, secrets, and where a portal may be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from offload import iscsi
from offload.configs.targets import IscsiConfig
from offload.errors import ConfigError, OffloadError, UsageError
from offload.iqn import check_iqn, view_iqn
from offload.model import Exposure

KNOWN = "iqn.1998-01.com.example:esx1"


@pytest.mark.parametrize(
    "name",
    [
        KNOWN,
        "iqn.2001-04.com.example",
        "iqn.2001-04.com.example:storage:diskarrays-sn-a8675309",
        "eui.02004567A425678D",
        "naa.52004567BA64678D",
        "naa.62004567BA64678D0123456789ABCDEF",
    ],
)
def test_iqn_good_names_pass(name: str) -> None:
    check_iqn(name)


@pytest.mark.parametrize(
    "name",
    [
        "", "iqn", "esx1", "iqn.98-01.com.example", "iqn.1998-13.com.example", "iqn.1998-01.",
        "iqn.1998-01.com.Example", "iqn.1998-01.com.example:", "iqn.1998-01.com.example:a b",
        "iqn.1998-01.com.example:a_b", "eui.123", "naa.123", KNOWN + "\n", KNOWN + "x" * 200,
    ],
)  # fmt: skip
def test_iqn_bad_names_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="iSCSI name"):
        check_iqn(name)


@pytest.mark.parametrize("name", ["shop", "a_b.c", "x" * 63, "a-", "a."])
def test_view_iqn_is_a_good_name_for_any_view(name: str) -> None:
    for prefix in ("iqn.2026-11.internal.offload", "iqn.2026-11." + "d" * 60 + "." + "e" * 60):
        made = view_iqn(prefix, "inst123456", name, "view123456")
        check_iqn(made)
        assert made.startswith(f"{prefix}:inst123456.view123456.")


def test_identity_is_of_the_view_alone_and_stable() -> None:
    assert iscsi.identity("a") == iscsi.identity("a")
    assert iscsi.identity("a").serial != iscsi.identity("b").serial
    assert len(iscsi.identity("a").serial) == 32
    int(iscsi.identity("a").serial, 16)


def _config(folder: Path, text: str = "twelve bytes", **more: Any) -> IscsiConfig:
    path = folder / "secret"
    path.write_text(text)
    path.chmod(0o600)
    return IscsiConfig.model_validate(
        {"chap": {"user": "backup", "secret_file": str(path)}, **more}
    )


@pytest.mark.parametrize(("length", "good"), [(11, False), (12, True), (255, True), (256, False)])
def test_chap_secret_length_is_checked(tmp_path: Path, length: int, good: bool) -> None:
    config = _config(tmp_path, "x" * length)
    if good:
        assert iscsi.load_chap(config) is not None
        return
    with pytest.raises(ConfigError) as caught:
        iscsi.load_chap(config)
    assert caught.value.code == "chap-secret-length"
    assert "x" * 11 not in caught.value.message


def test_chap_same_secret_both_ways_is_refused(tmp_path: Path) -> None:
    config = _config(tmp_path)
    assert config.chap is not None
    both = {"mutual_user": "offload", "mutual_secret_file": config.chap.secret_file}
    twice = config.model_copy(update={"chap": config.chap.model_copy(update=both)})
    with pytest.raises(ConfigError) as caught:
        iscsi.load_chap(twice)
    assert caught.value.code == "chap-secret-reused"


def test_resolve_loopback_needs_nothing_and_is_filled_in() -> None:
    found = iscsi.resolve(IscsiConfig(), Exposure())
    assert (found.transport, found.address, found.port) == ("tcp", "127.0.0.1", 3260)


def test_resolve_storage_network_with_chap_and_initiators_passes(tmp_path: Path) -> None:
    config = _config(tmp_path, networks=["192.0.2.0/24"], initiators=[KNOWN])
    found = iscsi.resolve(config, Exposure(address="192.0.2.5", port=3333))
    assert (found.address, found.port, found.initiators) == ("192.0.2.5", 3333, (KNOWN,))
    other = iscsi.resolve(config, Exposure(address="198.51.100.5", insecure_network=True))
    assert other.insecure_network


@pytest.mark.parametrize(
    ("tables", "asked", "family", "code"),
    [
        ({"networks": ["192.0.2.0/24"]}, {"address": "198.51.100.5"}, UsageError, "not-loopback"),
        ({"networks": ["192.0.2.0/24"]}, {"address": "192.0.2.5"}, ConfigError, "acl-for-no-one"),
        (
            {"networks": ["192.0.2.0/24"], "chap": None},
            {"address": "192.0.2.5", "initiators": (KNOWN,)},
            ConfigError,
            "chap-needed",
        ),
        ({}, {"address": "0.0.0.0"}, UsageError, "bad-address"),  # noqa: S104
        ({}, {"address": "storage.example"}, UsageError, "bad-address"),
        ({}, {"initiators": ("esx1",)}, UsageError, "bad-iqn"),
        ({}, {"transport": "unix"}, UsageError, "bad-transport"),
        ({}, {"tls": "psk"}, UsageError, "nbd-only"),
    ],
)
def test_resolve_unsafe_or_wrong_is_refused_with_the_way_out(
    tmp_path: Path,
    tables: dict[str, Any],
    asked: dict[str, Any],
    family: type[OffloadError],
    code: str,
) -> None:
    with pytest.raises(family) as caught:
        iscsi.resolve(_config(tmp_path, **tables), Exposure(**asked))
    assert caught.value.code == code
    assert caught.value.hint or "one looks like" in caught.value.message
