"""The configuration: every error names file, key, value and the way out."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from offload.config import (
    CONFIG_ENV,
    RESERVED_GROUP_NAMES,
    Config,
    find_config,
    load_config,
    usual_places,
)
from offload.configs.quiesce import LocalQuiesce
from offload.errors import ConfigError, NotFoundError
from offload.model import Consistency
from offload.storespec import KeySource, StoreSpec

GOOD = """
state_dir = "/var/lib/offload"

[volumes.shop-db]
provider = "reflink"
path = "/srv/pool/shop-db.raw"

[volumes.shop-web]
provider = "reflink"
path = "/srv/pool/shop-web.raw"

[groups.shop]
volumes = ["shop-db", "shop-web"]
consistency = "filesystem"

[[groups.shop.quiesce]]
kind = "local"
mounts = ["/srv/shop/db", "/srv/shop/web"]

[stores.main]
kind = "disk"
path = "/srv/backups"
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "offload.toml"
    path.write_text(GOOD)
    path.chmod(0o600)
    return path


def _with(file: Path, text: str, instead: str) -> Path:
    assert text in GOOD
    file.write_text(GOOD.replace(text, instead))
    return file


def test_load_the_documented_example_fills_in_defaults(file: Path) -> None:
    config = load_config(file)
    group = config.group("shop")
    assert group.consistency is Consistency.FILESYSTEM
    assert group.atomic == "require"
    assert isinstance(group.quiesce[0], LocalQuiesce)
    assert config.volume("shop-db").path == Path("/srv/pool/shop-db.raw")
    assert config.pool.min_free == "10%"


def test_load_empty_file_is_all_defaults(file: Path) -> None:
    file.write_text("")
    assert load_config(file) == Config()


@pytest.mark.parametrize(
    ("text", "instead", "said"),
    [
        ('provider = "reflink"', 'povider = "reflink"', "unknown key 'volumes.shop-db.povider'"),
        ('state_dir = "/var/lib/offload"', "sate_dir = 1", "unknown key 'sate_dir'"),
        ('path = "/srv/pool/shop-db.raw"', 'path = "db.raw"', "volumes.shop-db.path: must be an"),
        ('path = "/srv/pool/shop-db.raw"', "", "volumes.shop-db: needs path, a file or"),
        (
            'consistency = "filesystem"',
            'consistency = "perfect"',
            "groups.shop.consistency: Input should be 'crash', 'filesystem' or",
        ),
        ('["shop-db", "shop-web"]', '["shop-db", "nope"]', "there is no [volumes.nope]"),
        ('["shop-db", "shop-web"]', '["shop-db", "shop-db"]', "names a volume twice"),
        ('["shop-db", "shop-web"]', "[]", "groups.shop: needs volumes"),
        ('kind = "local"', 'kind = "remote"', "groups.shop.quiesce.0: "),
        ('mounts = ["/srv/shop/db", "/srv/shop/web"]', "", "groups.shop.quiesce.0: needs mounts"),
        (
            'mounts = ["/srv/shop/db", "/srv/shop/web"]',
            'mounts = ["/m"]\nvolumes = ["other"]',
            "groups.shop.quiesce: 'other' is not in the group",
        ),
        ('kind = "disk"', 'kind = "tape"', "stores.main: Input tag 'tape' found using"),
        ('kind = "disk"', 'kind = "disk"\nmin_free = "lots"', "stores.main.min_free: 'lots' is no"),
        ("[stores.main]", "[stores.Main]", "stores.Main: a name has lower-case letters"),
        (
            'consistency = "filesystem"',
            "deadline_s = 0",
            "groups.shop.deadline_s: Input should be greater than 0 (found 0)",
        ),
        ('consistency = "filesystem"', 'deadline_s = "soon"', "'soon' is no duration"),
        ('consistency = "filesystem"', 'store = "nope"', "there is no [stores.nope]"),
        ("[stores.main]", "[stores.main.keep]\nlast = -1\n[stores.main]", "stores.main.keep.last"),
    ],
)  # fmt: skip
def test_load_wrong_value_names_file_key_and_value(
    file: Path, text: str, instead: str, said: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(_with(file, text, instead))
    assert caught.value.code == "config-invalid"
    assert said in caught.value.message
    assert caught.value.message.startswith(f"{file}: ")
    assert "\n" not in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('address = "backup.example"', "nbd.address: 'backup.example' does not appear to be"),
        ('allow = ["10.0.0.1/8"]', "nbd.allow: 10.0.0.1/8 has host bits set"),
        ('allow = ["host"]', "nbd.allow: 'host' does not appear to be"),
        ('tls = "on"', "nbd.tls: Input should be 'off', 'certificates' or 'psk'"),
        ('tls = "certificates"', "nbd: tls = 'certificates' needs certificates, a folder"),
        ('tls = "psk"', "nbd: tls = 'psk' needs psk, a file"),
        ('psk = "keys.psk"', "nbd.psk: must be an absolute path"),
    ],
)
def test_load_wrong_nbd_value_names_it(file: Path, line: str, said: str) -> None:
    file.write_text(f"{GOOD}\n[nbd]\n{line}\n")
    with pytest.raises(ConfigError) as caught:
        load_config(file)
    assert said in caught.value.message


def test_load_misspelt_key_suggests_the_right_one(file: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(_with(file, "consistency =", "consistancy ="))
    assert "did you mean 'consistency'?" in caught.value.message


def test_load_several_mistakes_are_all_named(file: Path) -> None:
    _with(file, 'kind = "disk"', 'kind = "disk"\nmin_free = "much"\nfoo = 1')
    file.write_text(file.read_text().replace('consistency = "filesystem"', "bar = 2"))
    with pytest.raises(ConfigError) as caught:
        load_config(file)
    for part in ("unknown key 'stores.main.foo'", "stores.main.min_free", "groups.shop.bar"):
        assert part in caught.value.message


@pytest.mark.parametrize("name", RESERVED_GROUP_NAMES)
def test_load_group_named_like_a_verb_is_refused(file: Path, name: str) -> None:
    file.write_text(GOOD.replace("groups.shop", f"groups.{name}"))
    with pytest.raises(ConfigError, match="a word of the command line"):
        load_config(file)


def test_reserved_names_are_the_verbs_of_backup() -> None:
    from offload.cli.backup import backup

    assert set(RESERVED_GROUP_NAMES) == set(backup.commands)


def test_load_no_toml_says_where(file: Path) -> None:
    file.write_text("state_dir = \n")
    with pytest.raises(ConfigError, match="line 1") as caught:
        load_config(file)
    assert caught.value.code == "config-syntax"


def test_load_no_utf8_is_a_syntax_error(file: Path) -> None:
    file.write_bytes(b'state_dir = "/\xff"')
    with pytest.raises(ConfigError) as caught:
        load_config(file)
    assert caught.value.code == "config-syntax"


def test_load_file_writable_by_everyone_is_refused(file: Path) -> None:
    file.chmod(0o666)
    with pytest.raises(ConfigError) as caught:
        load_config(file)
    assert (caught.value.code, caught.value.hint) == ("config-unsafe", f"chmod o-w {file}")


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644])
def test_load_secret_that_others_may_read_is_refused_and_not_shown(file: Path, mode: int) -> None:
    file.write_text(GOOD + 'passphrase = "hunter2"\n')
    file.chmod(mode)
    with pytest.raises(ConfigError) as caught:
        load_config(file)
    assert caught.value.hint == f"chmod 600 {file}"
    assert "hunter2" not in caught.value.message


def test_load_passphrase_in_the_file_is_refused_with_the_way_out(file: Path) -> None:
    file.write_text(GOOD + 'passphrase = "hunter2"\n')
    file.chmod(0o600)
    with pytest.raises(ConfigError) as caught:
        load_config(file)
    assert "did you mean 'passphrase_file'?" in caught.value.message
    assert "hunter2" not in caught.value.message


def test_load_wrong_secret_is_not_shown(file: Path) -> None:
    file.write_text(GOOD + "passphrase = 123456\n")
    with pytest.raises(ConfigError) as caught:
        load_config(file)
    assert "passphrase" in caught.value.message
    assert "123456" not in caught.value.message


@pytest.mark.parametrize("kind", ["volume", "group", "store"])
def test_unknown_name_lists_those_that_are_configured(file: Path, kind: str) -> None:
    with pytest.raises(NotFoundError) as caught:
        getattr(load_config(file), kind)("nope")
    assert caught.value.code == f"unknown-{kind}"
    assert {"volume": "shop-db", "group": "shop", "store": "main"}[kind] in caught.value.hint


def test_find_explicit_wins_over_environment(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other.toml"
    other.write_text("")
    monkeypatch.setenv(CONFIG_ENV, str(other))
    assert find_config(file) == file
    assert find_config(None) == other


@pytest.mark.parametrize("by", ["argument", "environment"])
def test_find_explicit_that_is_missing_does_not_fall_back(
    by: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = tmp_path / "no.toml"
    monkeypatch.setenv(CONFIG_ENV, str(missing))
    with pytest.raises(ConfigError) as caught:
        find_config(missing if by == "argument" else None)
    assert caught.value.code == "config-missing"
    assert str(missing) in caught.value.message
    assert "init" in caught.value.hint


def test_usual_places_of_a_user_come_before_the_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.delenv(CONFIG_ENV, raising=False)
    own = tmp_path / "offload" / "offload.toml"
    assert usual_places() == (own, Path("/etc/offload/offload.toml"))
    own.parent.mkdir()
    own.write_text("")
    assert find_config(None) == own


def test_usual_places_of_root_are_the_system_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file in somebody's home must not decide what root does."""
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert usual_places() == (Path("/etc/offload/offload.toml"),)


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ("", "stores.main.key: needs exactly one of"),
        ('file = "/k"\npassphrase_file = "/p"', "stores.main.key: needs exactly one of"),
        ('file = "main.key"', "stores.main.key.file: must be an absolute path"),
        ('passphrase = "hunter2"', "unknown key 'stores.main.key.passphrase'"),
    ],
    ids=["none", "two", "relative", "in the open"],
)
def test_load_key_of_a_store_that_is_none_is_refused(file: Path, table: str, said: str) -> None:
    file.write_text(GOOD + f"[stores.main.key]\n{table}\n")
    with pytest.raises(ConfigError) as caught:
        load_config(file)
    assert said in caught.value.message
    assert "hunter2" not in caught.value.message


@pytest.mark.parametrize(
    ("table", "kind", "value"),
    [
        ('file = "/k"', "file", ("/k",)),
        ('passphrase_file = "/p"', "passphrase-file", ("/p",)),
        ('recovery_file = "/r"', "recovery-file", ("/r",)),
        ('command = ["pass", "show", "x"]', "command", ("pass", "show", "x")),
    ],
    ids=["file", "passphrase", "recovery", "command"],
)
def test_key_of_a_store_is_named_in_its_spec_and_comes_back_from_its_text(
    file: Path, table: str, kind: str, value: tuple[str, ...]
) -> None:
    file.write_text(GOOD + f"[stores.main.key]\n{table}\n")
    spec = load_config(file).store("main").spec()
    assert spec.key == KeySource(kind=kind, value=value)
    assert StoreSpec.parse(spec.text()) == spec
