"""URIs of views, as a client reads them."""

from __future__ import annotations

from pathlib import Path

import pytest

from offload.endpoint import IscsiEndpoint, NbdEndpoint, TlsClient, parse, with_files
from offload.errors import UsageError

IQN = "iqn.2026-11.internal.offload:k3.v7.db"


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        (
            "nbd+unix:///?socket=/run/offload/v/nbd.sock",
            NbdEndpoint(address=Path("/run/offload/v/nbd.sock")),
        ),
        (
            "nbd+unix:///disk%20one?socket=/run/a%20b",
            NbdEndpoint(address=Path("/run/a b"), export="disk one"),
        ),
        ("nbd://127.0.0.1", NbdEndpoint(address=("127.0.0.1", 10809))),
        ("nbd://[::1]:10810/disk", NbdEndpoint(address=("::1", 10810), export="disk")),
        (
            "nbds://backup2.example:1?tls-certificates=/etc/pki",
            NbdEndpoint(
                address=("backup2.example", 1), tls=TlsClient(certificates=Path("/etc/pki"))
            ),
        ),
        (
            "nbds://al%40ice@192.0.2.1:1?tls-psk-file=/etc/keys",
            NbdEndpoint(
                address=("192.0.2.1", 1),
                tls=TlsClient(pre_shared=True, psk=Path("/etc/keys"), user="al@ice"),
            ),
        ),
        (
            "nbds://alice@192.0.2.1:1",
            NbdEndpoint(address=("192.0.2.1", 1), tls=TlsClient(pre_shared=True, user="alice")),
        ),
        (
            f"iscsi://192.0.2.1:3261/{IQN}/2",
            IscsiEndpoint(host="192.0.2.1", port=3261, iqn=IQN, lun=2),
        ),
        (f"iscsi://[::1]/{IQN}/0", IscsiEndpoint(host="::1", port=3260, iqn=IQN, lun=0)),
    ],
)
def test_parse_gives_the_endpoint(uri: str, expected: NbdEndpoint | IscsiEndpoint) -> None:
    assert parse(uri) == expected


@pytest.mark.parametrize(
    "uri",
    [
        "ftp://host/x", "nbd://", "nbd+unix:///", "nbd+unix:///?socket=relative", "nbd://h:99999",
        "nbds://h?tls-certificates=pki", "iscsi://h/not-an-iqn/0", f"iscsi://h/{IQN}",
        f"iscsi:///{IQN}/0", f"iscsi://h/{IQN}/x", "://", "nbd://[::1",
    ],
)  # fmt: skip
def test_parse_of_something_else_names_the_forms(uri: str) -> None:
    with pytest.raises(UsageError) as error:
        parse(uri)
    assert error.value.code == "bad-uri"
    assert "nbd+unix:///" in error.value.hint


@pytest.mark.parametrize(
    "uri", [f"iscsi://bob%opensesame123@h/{IQN}/0", "nbds://bob:opensesame123@h"]
)
def test_parse_secret_in_a_uri_is_refused_and_not_repeated(uri: str) -> None:
    with pytest.raises(UsageError) as error:
        parse(uri)
    assert error.value.code == "secret-in-uri"
    assert "opensesame" not in error.value.message + error.value.hint


def test_with_files_is_read_again_as_it_was_meant() -> None:
    certificates = TlsClient(certificates=Path("/etc/pki of mine"))
    made = with_files("nbds://[::1]:1/disk", certificates)
    assert parse(made) == NbdEndpoint(address=("::1", 1), export="disk", tls=certificates)
    keys = TlsClient(pre_shared=True, psk=Path("/etc/keys"), user="b@b")
    made = with_files("nbds://old@192.0.2.1:1", keys)
    assert parse(made) == NbdEndpoint(address=("192.0.2.1", 1), tls=keys)


def test_parse_bad_uri_shows_no_secret() -> None:
    with pytest.raises(UsageError) as error:
        parse("nbds://bob:opensesame123@h:99999")
    assert "opensesame" not in error.value.message


@pytest.mark.parametrize(("host", "portal"), [("192.0.2.1", "192.0.2.1:1"), ("::1", "[::1]:1")])
def test_portal_of_ipv6_is_in_brackets(host: str, portal: str) -> None:
    assert IscsiEndpoint(host=host, port=1, iqn=IQN, lun=0).portal == portal
