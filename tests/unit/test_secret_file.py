"""Secrets are read from private files of one line, and from nothing else."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from offload.errors import ConfigError
from offload.secret_file import read_secret


def _write(path: Path, raw: bytes, mode: int = 0o600) -> Path:
    path.write_bytes(raw)
    path.chmod(mode)
    return path


@pytest.mark.parametrize("raw", [b"a good secret", b"a good secret\n", b"a good secret\r\n"])
def test_secret_one_line_is_read_without_its_end(tmp_path: Path, raw: bytes) -> None:
    found = read_secret(_write(tmp_path / "s", raw), "secret")
    assert found.get_secret_value() == "a good secret"
    assert "good" not in repr(found)


@pytest.mark.parametrize(
    ("raw", "mode", "code"),
    [
        (b"", 0o600, "secret-invalid"),
        (b"\n", 0o600, "secret-invalid"),
        (b"one\ntwo\n", 0o600, "secret-invalid"),
        (b"\xff\xfe", 0o600, "secret-invalid"),
        (b"x" * 5000, 0o600, "secret-invalid"),
        (b"readable", 0o640, "secret-unsafe"),
        (b"readable", 0o604, "secret-unsafe"),
    ],
)
def test_secret_bad_file_is_refused_without_showing_it(
    tmp_path: Path, raw: bytes, mode: int, code: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        read_secret(_write(tmp_path / "s", raw, mode), "CHAP secret")
    assert caught.value.code == code
    assert "CHAP secret" in caught.value.message
    assert "readable" not in caught.value.message


def test_secret_that_is_no_regular_file_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo", 0o600)
    (tmp_path / "folder").mkdir(mode=0o700)
    _write(tmp_path / "real", b"secret")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    for name, code in (
        ("fifo", "secret-unsafe"),
        ("folder", "secret-unsafe"),
        ("link", "secret-missing"),  # whoever may replace a link decides what is read
        ("gone", "secret-missing"),
    ):
        with pytest.raises(ConfigError) as caught:
            read_secret(tmp_path / name, "secret")
        assert caught.value.code == code
