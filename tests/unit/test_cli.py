"""The command line as a whole: help, errors, exit codes, JSON."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest

from offload import errors
from offload.cli import failures, session
from offload.cli.app import Group, LazyGroup, Settings
from offload.cli.main import COMMANDS, cli, run
from offload.services.context import Context


def _commands(group: click.Group, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    ctx = click.Context(group)
    for name in group.list_commands(ctx):
        found = group.get_command(ctx, name)
        assert found is not None, name
        yield (*path, name)
        if isinstance(found, click.Group):
            yield from _commands(found, (*path, name))


ALL = list(_commands(cli))


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "offload.toml"
    path.write_text(
        f'state_dir = "{tmp_path}/state"\nruntime_dir = "{tmp_path}/run"\n'
        f'[volumes.db]\nprovider = "copy"\npath = "{tmp_path}/db.raw"\n'
        '[groups.shop]\nvolumes = ["db"]\n'
    )
    return path


def test_every_noun_of_the_table_is_there() -> None:
    assert {path[0] for path in ALL} == set(COMMANDS)
    assert ("backup", "create") in ALL
    assert len(ALL) > 30


@pytest.mark.parametrize("path", ALL, ids=" ".join)
def test_help_has_an_example_that_parses_and_json(
    path: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([*path, "--help"]) == 0
    text = capsys.readouterr().out
    assert "--json" in text
    examples = re.findall(r"^  (offload .*)$", text.partition("Examples:\n")[2], re.MULTILINE)
    assert examples
    for example in examples:
        _parses(example.partition(" > ")[0])
    assert any(_names(example, path) for example in examples)


def _names(example: str, path: tuple[str, ...]) -> bool:
    return path[0] in example.split()


def _parses(line: str) -> None:
    """Parse a whole command line without running it."""
    _parse(cli, line.split()[1:], None)


def _parse(command: click.Command, args: list[str], parent: click.Context | None) -> None:
    ctx = command.make_context(command.name, args, parent=parent, obj=Settings())
    if not isinstance(command, click.Group):
        return
    rest: list[str] = [*ctx._protected_args, *ctx.args]
    _, found, rest = command.resolve_command(ctx, rest)
    assert found is not None
    _parse(found, rest, ctx)


def test_help_of_the_table_is_the_same_idea_as_the_commands_own() -> None:
    for name, entry in COMMANDS.items():
        assert entry.help.endswith("."), name
        assert len(entry.help) < 60, name


def test_help_imports_no_command(capsys: pytest.CaptureFixture[str]) -> None:
    code = (
        "import sys; from offload.cli.main import run; run(['--help'])\n"
        "heavy = {'sqlalchemy', 'pydantic', 'rich', 'alembic', 'numpy', 'logging', 'asyncio'}\n"
        "print(sorted(heavy & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"


# What docs/reference.md promises: family → exit code.
EXIT_CODES = {
    errors.OffloadError: 1,
    errors.UsageError: 2,
    errors.ConfigError: 3,
    errors.NotFoundError: 4,
    errors.BusyError: 5,
    errors.UnavailableError: 6,
    errors.IntegrityError: 7,
    errors.CleanupError: 8,
    errors.PolicyError: 9,
    errors.PrivilegeError: 10,
}


def _families() -> set[type[errors.OffloadError]]:
    own = {f for f in errors.OffloadError.__subclasses__() if f.__module__ == errors.__name__}
    return {errors.OffloadError, *own}


def test_exit_codes_are_as_documented() -> None:
    assert {family: family.exit_code for family in _families()} == EXIT_CODES


@pytest.mark.parametrize("family", list(EXIT_CODES))
def test_report_gives_one_line_and_a_hint(
    family: type[errors.OffloadError], capsys: pytest.CaptureFixture[str]
) -> None:
    error = family("volume x is gone", hint="look elsewhere")
    error.add_note("thawed late")
    assert failures.report(error, Settings()) == family.exit_code
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.splitlines() == [
        "offload: error: volume x is gone",
        "  also: thawed late",
        "  hint: look elsewhere",
    ]


def test_report_with_json_is_one_object_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    error = errors.BusyError("taken", hint="wait", code="view-busy")
    error.add_note("and more")
    failures.report(error, Settings(json=True))
    said = capsys.readouterr()
    assert said.out == ""
    assert json.loads(said.err) == {
        "code": "view-busy",
        "message": "taken",
        "hint": "wait",
        "notes": ["and more"],
    }


def _broken() -> None:
    raise ZeroDivisionError("oops")


@pytest.mark.parametrize("debug", [False, True])
def test_report_of_a_bug_is_one_line_and_a_traceback_only_with_debug(
    debug: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ZeroDivisionError) as caught:
        _broken()
    assert failures.report(caught.value, Settings(debug=debug)) == 1
    said = capsys.readouterr().err
    assert ("Traceback" in said) is debug
    assert "internal error: ZeroDivisionError: oops at test_cli.py:" in said
    assert ("--debug" in said) is not debug


@pytest.mark.parametrize(
    "args",
    [
        ["nosuch"],
        ["--nosuch"],
        ["views", "extra"],
        ["mount"],
        ["mount", "a", "--port", "1"],
        ["restore", "b"],
        ["verify"],
        ["verify", "a", "--all"],
        ["verify", "a", "--store", "s"],
        ["verify", "--all", "--sample", "200%"],
        ["prune", "--keep-within", "soon"],
        ["unmount"],
        ["unmount", "v", "--all"],
        ["timemark", "create", "g", "--consistency", "perfect"],
        ["completion", "csh"],
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("as_json", [False, True])
def test_usage_error_is_exit_2_and_one_line(
    args: list[str], as_json: bool, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--config", str(config), *args, *(["--json"] if as_json else [])]
    assert run(words) == 2
    said = capsys.readouterr()
    assert said.out == ""
    if as_json:
        assert set(json.loads(said.err)) == {"code", "message", "hint"}
    else:
        assert said.err.startswith("offload: error: ")
        assert len(said.err.splitlines()) <= 2
    assert not (config.parent / "state").exists()


@pytest.mark.parametrize("args", [[], ["backup"], ["store"]])
def test_missing_verb_shows_the_help_and_is_exit_2(
    args: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(args) == 2
    assert "Commands:" in capsys.readouterr().err
    assert run([*args, "--json"]) == 2


@pytest.mark.parametrize(
    ("args", "code"),
    [
        (["timemark", "create", "nosuch"], 4),
        (["timemark", "show", "zzz"], 4),
        (["timemark", "list", "--group", "nosuch"], 4),
        (["timemark", "delete", "zzz", "--yes"], 4),
        (["backup", "nosuch"], 4),
        (["backup", "list", "--store", "nosuch"], 4),
        (["backup", "show", "zzz"], 4),
        (["backup", "delete", "zzz", "--dry-run"], 4),
        (["volume", "show", "nosuch"], 4),
        (["volume", "show", "db"], 4),  # its file is missing
        (["store", "show", "nosuch"], 4),
        (["unmount", "nosuch"], 4),
        (["unmount", "--group", "nosuch"], 4),
        (["mount", "timemark:zzz/db"], 4),
        (["mount", "Not A Thing"], 2),
        (["restore", "zzz", "--to", "/nonexistent/x"], 4),
        (["verify", "zzz"], 4),
        (["prune"], 2),  # no store to choose
        (["backup", "shop"], 2),  # the same
        (["doctor"], 6),  # the volume's file is missing
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value),
)
def test_bad_input_is_one_json_object_with_a_code(
    args: list[str], code: int, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["--config", str(config), "--json", *args]) == code
    error = json.loads(capsys.readouterr().err)
    assert error["code"]
    assert error["message"]


@pytest.mark.parametrize(
    "args",
    [
        ["views"], ["status"], ["timemark", "list"], ["backup", "list"], ["store", "list"],
        ["volume", "list"], ["recover"], ["recover", "--dry-run"], ["config", "check"],
        ["config", "show"], ["unmount", "--all"], ["unmount", "--group", "shop"],
    ],
    ids=" ".join,
)  # fmt: skip
@pytest.mark.parametrize("place", ["before", "behind"])
def test_json_before_or_behind_the_command_is_one_value_on_stdout(
    args: list[str], place: str, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--json", *args] if place == "before" else [*args, "--json"]
    assert run(["--config", str(config), *words]) == 0
    said = capsys.readouterr()
    assert isinstance(json.loads(said.out), dict | list)
    assert said.err == ""


def test_json_in_the_middle_of_a_noun_and_its_verb(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["--config", str(config), "backup", "--json", "list"]) == 0
    assert json.loads(capsys.readouterr().out) == []


def test_config_missing_is_exit_3_and_names_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["--config", str(tmp_path / "no.toml"), "views"]) == 3
    said = capsys.readouterr().err
    assert str(tmp_path / "no.toml") in said
    assert "init" in said


def test_destroying_command_with_json_needs_yes(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(errors.UsageError) as caught:
        session.confirm(Settings(json=True), "Really?", yes=False)
    assert caught.value.code == "not-confirmed"
    session.confirm(Settings(json=True), "Really?", yes=True)


class _Terminal:
    def __init__(self, answer: str) -> None:
        self.answer = answer

    def isatty(self) -> bool:
        return True

    def readline(self) -> str:
        return self.answer


@pytest.mark.parametrize(("answer", "goes_on"), [("y\n", True), ("n\n", False), ("\n", False)])
def test_confirm_on_a_terminal_asks(
    answer: str, goes_on: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", _Terminal(answer))
    monkeypatch.setattr(click.termui, "visible_prompt_func", lambda _prompt="": answer.strip())
    if goes_on:
        session.confirm(Settings(), "Really?", yes=False)
    else:
        with pytest.raises(click.exceptions.Exit) as caught:
            session.confirm(Settings(), "Really?", yes=False)
        assert caught.value.exit_code == 1


def test_unknown_verb_of_backup_is_taken_for_a_group(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["--config", str(config), "backup", "lst"]) == 4
    assert "no group 'lst'" in capsys.readouterr().err


def test_lazy_group_knows_only_its_table() -> None:
    group = LazyGroup(name="x", table={})
    assert group.get_command(click.Context(group), "views") is None
    assert isinstance(cli.get_command(click.Context(cli), "backup"), Group)


# -- what happens around a command -------------------------------------------------------------


def _leave(context: Context, undo: str) -> None:
    """An operation whose process is dead: its file is there and nobody locks it."""
    op = context.journal._begin("mount", "shop")
    op.intend("server", undo, {"path": "/nonexistent/x.offload-part"})
    op.close()


@pytest.fixture
def opened(config: Path) -> Iterator[Context]:
    with session.only_context(Settings(config_path=config)) as context:
        yield context


def test_reading_command_reports_leftovers_and_touches_nothing(
    opened: Context, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _leave(opened, "remove-path")
    assert run(["--config", str(config), "views"]) == 0
    assert "offload recover" in capsys.readouterr().err
    assert run(["--config", str(config), "views", "--json"]) == 0
    assert capsys.readouterr().err == ""
    assert len(opened.journal.leftovers()) == 1


def test_status_shows_leftovers_as_alarm(
    opened: Context, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _leave(opened, "remove-path")
    assert run(["--config", str(config), "--json", "status"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [entry["steps"] for entry in report["leftovers"]] == [["server"]]
    assert any("offload recover" in alarm for alarm in report["alarms"])


def test_changing_command_takes_leftovers_back_first(
    opened: Context, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _leave(opened, "remove-path")
    assert run(["--config", str(config), "unmount", "--all"]) == 0
    assert "took back mount shop" in capsys.readouterr().err
    assert opened.journal.leftovers() == []


def test_changing_command_with_a_stuck_leftover_runs_and_ends_with_8(
    opened: Context, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _leave(opened, "of-another-version")
    assert run(["--config", str(config), "unmount", "--all", "--json"]) == 8
    said = capsys.readouterr()
    assert json.loads(said.out) == []
    assert json.loads(said.err)["code"] == "cleanup"
    assert len(opened.journal.leftovers()) == 1


def test_changing_context_failing_body_keeps_its_error_and_notes_the_leftover(
    opened: Context, config: Path
) -> None:
    _leave(opened, "of-another-version")
    with (
        pytest.raises(errors.BusyError) as caught,
        session.changing_context(Settings(config_path=config)),
    ):
        raise errors.BusyError("first")
    assert any("of-another-version" in note for note in caught.value.__notes__)


def test_recover_takes_leftovers_back(
    opened: Context, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _leave(opened, "remove-path")
    assert run(["--config", str(config), "recover", "--dry-run", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["undone"]) == 1
    assert run(["--config", str(config), "recover"]) == 0
    assert "taken back: mount shop" in capsys.readouterr().out
    assert run(["--config", str(config), "recover"]) == 0
    assert "nothing to recover" in capsys.readouterr().out


# -- signals and pipes, in a real process ------------------------------------------------------

_SLEEPER = """
import sys, time, click
from offload.cli import main
from offload.cli.app import Command, Lazy
import types

module = types.ModuleType("sleeper")

@click.command(cls=Command)
def nap() -> None:
    try:
        print("ready", flush=True)
        time.sleep(30)
    finally:
        print("rolled back", flush=True)

module.nap = nap
sys.modules["sleeper"] = module
main.cli.table["nap"] = Lazy("sleeper:nap", "Sleep.")
sys.argv = ["offload", "nap"]
main.main()
"""


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=["TERM", "INT"]
)
def test_signal_rolls_back_and_gives_its_code(number: int, code: int) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", _SLEEPER], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (code, "rolled back\n")
    assert "Traceback" not in err


def test_closed_pipe_is_silent() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "offload.cli", "--help"],
        stdout=writer, stderr=subprocess.PIPE, check=False,
    )  # fmt: skip
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


# -- completion --------------------------------------------------------------------------------


def _completed(config: Path, *words: str) -> list[str]:
    line = ["offload", "--config", str(config), *words]
    env = {
        **os.environ,
        "_OFFLOAD_COMPLETE": "bash_complete",
        "COMP_WORDS": " ".join(line),
        "COMP_CWORD": str(len(line) - 1),
    }
    done = subprocess.run(
        [sys.executable, "-m", "offload.cli"], env=env, capture_output=True, text=True, check=True
    )
    return [entry.partition(",")[2] for entry in done.stdout.split()]


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["tim"], ["timemark"]),
        (["timemark", "cr"], ["create"]),
        (["timemark", "create", "sh"], ["shop"]),
        (["volume", "show", ""], ["db"]),
        (["backup", "s"], ["show", "shop"]),
        (["mount", ""], ["shop"]),
        (["unmount", ""], []),
        (["--verb"], ["--verbose"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_completion_offers_commands_and_names(
    words: list[str], offered: list[str], config: Path
) -> None:
    assert _completed(config, *words) == offered


def test_completion_without_configuration_offers_nothing_and_does_not_fail(tmp_path: Path) -> None:
    assert _completed(tmp_path / "no.toml", "timemark", "create", "") == []


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_script_names_the_variable_that_main_reads(
    shell: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["completion", shell]) == 0
    assert "_OFFLOAD_COMPLETE" in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    from offload import __version__

    assert run(["--version"]) == 0
    assert capsys.readouterr().out == f"offload {__version__}\n"


def test_log_level_follows_the_options(config: Path) -> None:
    import logging

    levels: dict[str, Any] = {}
    for options in ("", "-v", "-vv", "-q", "--json", "--debug"):
        began = time.monotonic()
        assert run(["--config", str(config), *options.split(), "config", "check"]) == 0
        levels[options] = logging.getLogger().level
        assert time.monotonic() - began < 30
    assert levels == {
        "": logging.WARNING,
        "-v": logging.INFO,
        "-vv": logging.DEBUG,
        "-q": logging.ERROR,
        "--json": logging.CRITICAL,
        "--debug": logging.DEBUG,
    }
