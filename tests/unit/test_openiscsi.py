"""Node records of open-iscsi, in a folder of a test's own."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
from pydantic import SecretStr

from offload import openiscsi, run
from offload.endpoint import IscsiEndpoint
from offload.errors import ConfigError, OffloadError, UnavailableError
from offload.iscsi import Chap
from offload.run import Completed

ENDPOINT = IscsiEndpoint(
    host="192.0.2.1", port=3260, iqn="iqn.2026-11.internal.offload:k3.v7.db", lun=0
)
RECORD = """\
# BEGIN RECORD 2.1.8
node.name = iqn.2026-11.internal.offload:k3.v7.db
node.startup = automatic
node.session.auth.authmethod = None
node.session.timeo.replacement_timeout = 120
node.conn[0].address = 192.0.2.1
# END RECORD
"""
CHAP = Chap(
    user="backup",
    secret=SecretStr("secretsecret1"),
    mutual_user="storage",
    mutual_secret=SecretStr("secretsecret2"),
)


@pytest.fixture
def nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(openiscsi, "_FOLDER", tmp_path)
    monkeypatch.setattr(openiscsi, "_NODES", tmp_path / "nodes")
    monkeypatch.setattr(openiscsi, "_SESSIONS", tmp_path / "sessions")
    return tmp_path / "nodes"


def write_record(path: Path) -> Path:
    path.parent.mkdir(parents=True)
    path.write_text(RECORD)
    return path


def settings_in(path: Path) -> dict[str, str]:
    lines = [line for line in path.read_text().splitlines() if " = " in line]
    return dict(line.split(" = ", 1) for line in lines)


@pytest.mark.parametrize("place", ["192.0.2.1,3260", "192.0.2.1,3260,1/default"])
def test_amend_sets_what_is_wanted_in_a_private_file(nodes: Path, place: str) -> None:
    path = write_record(nodes / ENDPOINT.iqn / place)
    openiscsi._amend(ENDPOINT, openiscsi._settings(CHAP, 17))
    found = settings_in(path)
    assert found["node.startup"] == "manual"
    assert found["node.session.timeo.replacement_timeout"] == "17"
    assert found["node.session.auth.authmethod"] == "CHAP"
    assert found["node.session.auth.username"] == "backup"
    assert found["node.session.auth.password"] == "secretsecret1"
    assert found["node.session.auth.password_in"] == "secretsecret2"
    assert found["node.conn[0].address"] == "192.0.2.1"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    lines = path.read_text().splitlines()
    assert (lines[0], lines[-1]) == ("# BEGIN RECORD 2.1.8", "# END RECORD")
    assert len(lines) == len(set(lines))
    assert sorted(entry.name for entry in nodes.parent.iterdir()) == ["nodes"]


def test_amend_without_chap_names_no_secret(nodes: Path) -> None:
    path = write_record(nodes / ENDPOINT.iqn / "192.0.2.1,3260")
    openiscsi._amend(ENDPOINT, openiscsi._settings(None, 17))
    assert settings_in(path)["node.session.auth.authmethod"] == "None"
    assert "password" not in path.read_text()


@pytest.mark.parametrize("place", ["192.0.2.1,3260", "192.0.2.1,3260,1/default"])
def test_logout_forgets_the_record_and_no_other(nodes: Path, place: str) -> None:
    write_record(nodes / ENDPOINT.iqn / place)
    others = [
        write_record(nodes / "iqn.2004-10.com.example:other" / "192.0.2.1,3260"),
        nodes / ENDPOINT.iqn / "192.0.2.1,32601",
        nodes / ENDPOINT.iqn / "192.0.2.11,3260",
    ]
    for path in others[1:]:
        path.write_text(RECORD)
    assert openiscsi.known(ENDPOINT)
    for _ in range(2):
        openiscsi.logout(ENDPOINT)
        assert not openiscsi.known(ENDPOINT)
    assert all(path.exists() for path in others)


def test_logout_leaves_neither_an_empty_folder_nor_half_a_record(nodes: Path) -> None:
    """A crash while a record is written leaves it, with a secret."""
    (nodes.parent / f".offload.{ENDPOINT.iqn}").write_text("password")
    write_record(nodes / ENDPOINT.iqn / "192.0.2.1,3260,1" / "default")
    openiscsi.logout(ENDPOINT)
    assert list(nodes.iterdir()) == []
    assert list(nodes.parent.iterdir()) == [nodes]


def test_check_without_open_iscsi_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "find_program", lambda _: None)
    with pytest.raises(UnavailableError) as error:
        openiscsi.check()
    assert error.value.code == "program-missing"
    assert "apt-get install open-iscsi" in error.value.hint


@pytest.mark.parametrize(
    ("status", "family", "code"),
    [
        (24, ConfigError, "login-refused"),
        (20, UnavailableError, "iscsid-missing"),
        (19, UnavailableError, "login-failed"),
    ],
)
def test_explain_names_what_to_do(
    nodes: Path, status: int, family: type[OffloadError], code: str
) -> None:
    nodes.parent.joinpath("initiatorname.iscsi").write_text(
        "## a comment\nInitiatorName=iqn.1993-08.org.debian:01:x\n"
    )
    stderr = (
        "iscsiadm: initiator reported error (19 - no such target)\niscsiadm: Could not log in\n"
    )
    done = Completed(argv=("iscsiadm",), status=status, seconds=0.1, stdout="", stderr=stderr)
    error = openiscsi._explain(ENDPOINT, done, "login-failed")
    assert isinstance(error, family)
    assert error.code == code
    words = error.message + error.hint
    expected = {24: "iqn.1993-08.org.debian:01:x", 20: "systemctl", 19: "no such target"}
    assert expected[status] in words
