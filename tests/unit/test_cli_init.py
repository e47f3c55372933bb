"""`offload init` and `offload config`: the file that is written is right, and never lost."""

from __future__ import annotations

import json
import re
import stat
import tomllib
from pathlib import Path

import pytest

from offload import init_template
from offload.cli.main import run
from offload.config import Config, GroupConfig, VolumeConfig, load_config
from offload.configs.quiesce import LocalQuiesce
from offload.configs.stores import DiskStoreConfig, S3StoreConfig


def _uncommented(text: str) -> str:
    """The template with every commented setting switched on."""
    setting = re.compile(r"^# (\[.*|[a-z_]+ = .*)$", re.MULTILINE)
    return setting.sub(r"\1", text)


def test_template_as_it_is_loads(tmp_path: Path) -> None:
    path = tmp_path / "offload.toml"
    init_template.write(path, init_template.render(tmp_path / "state"), force=False)
    assert load_config(path) == Config(state_dir=tmp_path / "state")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_template_with_everything_switched_on_loads_and_names_every_key(tmp_path: Path) -> None:
    path = tmp_path / "offload.toml"
    path.write_text(_uncommented(init_template.render(tmp_path)))
    config = load_config(path)
    assert set(config.volumes) == {"shop-db", "shop-web", "shop-log"}
    assert len(config.groups["shop"].quiesce) == 2
    text = path.read_text()
    stores = (DiskStoreConfig, S3StoreConfig)
    for model in (Config, VolumeConfig, GroupConfig, *stores, LocalQuiesce):
        for key in model.model_fields:
            if key not in {"passphrase", "qmp_socket"}:  # of stores and providers yet to come
                assert re.search(rf"\b{key}\b", text), f"{model.__name__}.{key}"


def test_template_quotes_the_state_folder(tmp_path: Path) -> None:
    odd = tmp_path / 'a "b" \\c'
    assert tomllib.loads(init_template.render(odd))["state_dir"] == str(odd)


def test_init_writes_says_what_next_and_refuses_a_second_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "deep" / "offload.toml"
    args = ["--config", str(path), "init", "--state-dir", str(tmp_path / "s")]
    assert run(args) == 0
    assert f"offload --config {path} config check" in capsys.readouterr().out
    assert load_config(path).state_dir == tmp_path / "s"
    path.write_text("# mine\n")
    assert run(args) == 5
    assert "--force" in capsys.readouterr().err
    assert path.read_text() == "# mine\n"


def test_init_force_moves_the_old_file_aside(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "offload.toml"
    path.write_text("# mine\n")
    assert run(["--config", str(path), "init", "--force", "--json"]) == 0
    old = Path(json.loads(capsys.readouterr().out)["moved_aside"])
    assert old.read_text() == "# mine\n"
    assert "state_dir" in path.read_text()


def test_init_to_a_place_that_cannot_be_written_is_exit_3(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert run(["--config", str(tmp_path / "file" / "offload.toml"), "init"]) == 3
    assert "cannot write" in capsys.readouterr().err


def test_init_relative_state_folder_is_made_absolute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["--config", "o.toml", "init", "--state-dir", "state"]) == 0
    assert load_config(tmp_path / "o.toml").state_dir == tmp_path / "state"


@pytest.fixture
def full(tmp_path: Path) -> Path:
    path = tmp_path / "offload.toml"
    text = _uncommented(init_template.render(tmp_path / "state"))
    path.write_text(text)
    path.chmod(0o600)
    return path


def test_config_show_is_toml_that_says_the_same(
    full: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["--config", str(full), "config", "show"]) == 0
    shown = Config.model_validate(tomllib.loads(capsys.readouterr().out))
    loaded = load_config(full)
    assert shown.groups == loaded.groups
    assert shown.volumes == loaded.volumes
    assert shown.pool == loaded.pool


def test_config_check_unknown_provider_names_the_key(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "offload.toml"
    path.write_text('[volumes.db]\nprovider = "magic"\npath = "/x"\n')
    assert run(["--config", str(path), "config", "check"]) == 3
    said = capsys.readouterr().err
    assert "volumes.db.provider" in said
    assert "magic" in said
    assert "reflink" in said


def test_config_check_touches_nothing(full: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--config", str(full), "config", "check", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["volumes"] == 3
    assert not (full.parent / "state").exists()
