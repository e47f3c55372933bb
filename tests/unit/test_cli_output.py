"""What people and programs get to see: JSON forms, tables, progress, doctor and status."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest

from offload import run as programs
from offload.cli import bars, output
from offload.cli.app import Settings
from offload.cli.main import run
from offload.cli.session import only_context
from offload.model import (
    Backup,
    BackupId,
    Consistency,
    ImageRecord,
    Instant,
    RawSource,
    TimeMark,
    TimeMarkId,
    View,
    ViewId,
)
from offload.progress import NoProgress
from offload.services import doctor, status
from offload.services.context import Context
from offload.testing import certificates

NOON = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)


@dataclass(frozen=True)
class _Thing:
    name: str
    size_bytes: int
    made_at: datetime
    level: Consistency
    where: Path
    parts: tuple[int, ...]


def test_to_json_gives_rfc3339_strings_and_plain_values() -> None:
    at = datetime(2026, 3, 1, 14, 0, 0, 5000, tzinfo=timezone(timedelta(hours=2)))
    thing = _Thing("a", 1 << 50, at, Consistency.CRASH, Path("/x"), (1, 2))
    assert json.dumps(output.to_json({"t": thing, "n": None, "b": True})) == json.dumps(
        {
            "t": {
                "name": "a",
                "size_bytes": 1 << 50,
                "made_at": "2026-03-01T12:00:00.005Z",
                "level": "crash",
                "where": "/x",
                "parts": [1, 2],
            },
            "n": None,
            "b": True,
        }
    )


def test_to_json_of_something_unknown_is_refused() -> None:
    with pytest.raises(TypeError, match="no JSON form"):
        output.to_json(object())


def test_table_not_on_a_terminal_cuts_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    long = "x" * 300
    output.table(["name", "what"], [["a", long], ["bbb", ""]], "nothing")
    said = capsys.readouterr()
    assert said.out == f"NAME  WHAT\na     {long}\nbbb\n"


def test_table_without_rows_says_so_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    output.table(["name"], [], "nothing")
    said = capsys.readouterr()
    assert (said.out, said.err) == ("", "nothing\n")


def test_table_on_a_terminal_shows_brackets_as_they_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    screen = Terminal()
    monkeypatch.setattr("sys.stdout", screen)
    output.table(["name"], [["[bold]x[/bold]"]], "nothing")
    assert "[bold]x[/bold]" in screen.getvalue()


def test_long_table_on_a_terminal_is_not_folded(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr("sys.stdout", terminal := Terminal())
    wide = "x" * 300
    output.table(["name", "size"], [[wide, "1"]] * 1001, "nothing")
    assert terminal.getvalue().splitlines()[1] == f"{wide}  1"


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0, "0 s"), (119, "119 s"), (120, "2 min"), (7200, "2 h"), (86400 * 3, "3 d"), (-5, "0 s")],
)
def test_age_is_shown_in_one_unit(seconds: float, shown: str) -> None:
    assert output.show_age(seconds) == shown


@pytest.mark.parametrize("settings", [Settings(json=True), Settings(quiet=True)])
def test_progress_with_json_or_quiet_is_silent(
    settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    with bars.progress(settings) as shown:
        _work(shown)
    assert capsys.readouterr() == ("", "")


def test_progress_not_on_a_terminal_is_messages_on_stderr(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with bars.progress(Settings()) as shown:
        _work(shown)
    assert capsys.readouterr() == ("", "look\n")


def test_progress_on_a_terminal_is_bars_on_stderr(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    screen = Terminal()
    monkeypatch.setattr("sys.stderr", screen)
    with bars.progress(Settings()) as shown:
        _work(shown)
    assert "db" in screen.getvalue()
    assert "look" in screen.getvalue()
    assert capsys.readouterr().out == ""


def _work(shown: object) -> None:
    assert isinstance(shown, NoProgress | bars.BarProgress)
    shown.advance("never started", 5)
    shown.start("db", None)
    shown.start("web", 100)
    shown.advance("db", 10)
    shown.message("look")
    shown.finish("db")
    shown.finish("db")
    shown.finish("web")


# -- doctor ------------------------------------------------------------------------------------


def _by_name(checks: list[doctor.Check]) -> dict[str, doctor.Check]:
    return {check.name: check for check in checks}


def test_doctor_without_configuration_requires_nothing() -> None:
    checks = doctor.examine(None)
    assert checks
    assert not [check for check in checks if check.required]
    assert doctor.lacking(checks) == []


def test_doctor_names_what_would_give_a_missing_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(programs, "find_program", lambda _name: None)
    checks = _by_name(doctor.examine(None))
    for name, package in (
        ("nbdkit", "nbdkit"),
        ("nbdkit plugin python", "nbdkit-plugin-python"),
        ("qemu-img", "qemu-utils"),
        ("guestfish", "libguestfs-tools"),
    ):
        assert checks[name].status is doctor.Status.MISSING
        assert checks[name].fix == f"apt-get install {package}"


def test_doctor_every_check_that_is_not_ok_has_a_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(programs, "find_program", lambda _name: None)
    monkeypatch.setattr(doctor, "has_capability", lambda _number: False)
    monkeypatch.setattr(doctor, "find_spec", lambda _name: None)
    checks = doctor.examine(None)
    assert [c for c in checks if c.status is not doctor.Status.OK and not c.fix] == []
    assert sum(c.status is doctor.Status.MISSING for c in checks) >= 8


@pytest.fixture
def config(tmp_path: Path) -> Path:
    (tmp_path / "db.raw").write_bytes(bytes(1 << 20))
    path = tmp_path / "offload.toml"
    path.write_text(
        f'state_dir = "{tmp_path}/state"\nruntime_dir = "{tmp_path}/run"\n'
        f'[volumes.db]\nprovider = "copy"\npath = "{tmp_path}/db.raw"\n'
        '[groups.shop]\nvolumes = ["db"]\nstore = "main"\n'
        f'[stores.main]\nkind = "disk"\npath = "{tmp_path}/store"\n'
        '[pool]\nmin_free = "1MiB"\n'
    )
    return path


def _doctor(
    config: Path, capsys: pytest.CaptureFixture[str], code: int
) -> dict[str, dict[str, object]]:
    assert run(["--config", str(config), "doctor", "--json"]) == code
    return {check["name"]: check for check in json.loads(capsys.readouterr().out)}


def test_doctor_store_not_initialised_is_limited_and_says_how(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (config.parent / "store").mkdir()
    checks = _doctor(config, capsys, 0)
    assert checks["store main"]["status"] == "limited"
    assert checks["store main"]["fix"] == "offload store init main"
    assert not (config.parent / "state").exists()
    assert run(["--config", str(config), "store", "init", "main"]) == 0
    capsys.readouterr()
    assert _doctor(config, capsys, 0)["store main"]["status"] == "ok"


def test_doctor_what_the_configuration_needs_and_is_missing_is_exit_6(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (config.parent / "db.raw").unlink()
    checks = _doctor(config, capsys, 6)
    assert checks["volume db"]["status"] == "missing"
    assert checks["volume db"]["required"] is True


def test_doctor_freeze_is_required_only_where_mounts_are_frozen(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "has_capability", lambda _number: False)
    (config.parent / "store").mkdir()
    assert _doctor(config, capsys, 0)["freeze"]["required"] is False
    text = config.read_text()
    config.write_text(text + '[[groups.shop.quiesce]]\nkind = "local"\nmounts = ["/srv/x"]\n')
    assert _doctor(config, capsys, 6)["freeze"]["status"] == "missing"


def test_doctor_pool_under_its_watermark_is_limited(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (config.parent / "store").mkdir()
    config.write_text(config.read_text().replace('"1MiB"', '"100%"'))
    checks = _doctor(config, capsys, 0)
    assert "limited" in [c["status"] for name, c in checks.items() if name.startswith("pool ")]


def test_doctor_looks_at_the_certificates_and_keys_of_nbd(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (config.parent / "store").mkdir()
    assert not [name for name in _doctor(config, capsys, 0) if "TLS" in name]
    folder, keys = config.parent / "tls", config.parent / "nbd.psk"
    table = f'[nbd]\ntls = "certificates"\ncertificates = "{folder}"\npsk = "{keys}"\n'
    plain = config.read_text()
    config.write_text(plain + table)
    authority = certificates.make_authority(days=(-1, 90))
    issued = certificates.issue("server", certificates.Wanted(days=(-1, 60)), authority)
    certificates.write_server(folder, authority, issued)
    checks = _doctor(config, capsys, 0)
    assert checks["NBD over TLS, certificates"]["status"] == "ok"
    assert "127.0.0.1, ::1, localhost" in str(checks["NBD over TLS, certificates"]["detail"])
    assert checks["NBD over TLS, psk"]["status"] == "missing"
    assert checks["NBD over TLS, psk"]["required"] is False
    certificates.write_keys(keys, ["alice", "bob"])
    config.write_text(plain + table + 'address = "192.0.2.10"\n')
    checks = _doctor(config, capsys, 0)
    assert str(checks["NBD over TLS, psk"]["detail"]).endswith("2 users")
    assert checks["NBD over TLS, certificates"]["status"] == "limited"
    assert "not for 192.0.2.10" in str(checks["NBD over TLS, certificates"]["fix"])
    certificates.write_server(folder, authority)
    checks = _doctor(config, capsys, 0)
    assert "renew" in str(checks["NBD over TLS, certificates"]["fix"])
    (folder / "server-key.pem").chmod(0o644)
    checks = _doctor(config, capsys, 6)
    assert checks["NBD over TLS, certificates"]["status"] == "missing"
    assert "chmod 600" in str(checks["NBD over TLS, certificates"]["fix"])


# -- status and volume list --------------------------------------------------------------------


@pytest.fixture
def context(config: Path) -> Iterator[Context]:
    with only_context(Settings(config_path=config)) as opened:
        yield opened


def _backup(name: str, at: datetime, *, alarms: tuple[str, ...] = ()) -> Backup:
    image = ImageRecord(volume="db", size_bytes=1, sector_size=512, identity="i", root="00")
    return Backup(
        id=BackupId(name), store="main", group="shop", created_at=at, finished_at=at, timemark="t",
        consistency=Consistency.CRASH, instant=Instant.ONE, images=(image,), alarms=alarms,
    )  # fmt: skip


def test_status_of_an_empty_instance_shows_what_should_be_backed_up(context: Context) -> None:
    report = status.collect(context)
    assert [(row.group, row.store, row.last_id) for row in report.backups] == [
        ("shop", "main", None)
    ]
    assert [(group.name, group.timemarks) for group in report.groups] == [("shop", 0)]
    assert [pool.volumes for pool in report.pools] == [("db",)]
    assert report.alarms == ()


def test_status_last_backup_age_and_alarms_of_the_last_only(context: Context) -> None:
    context.catalog.add_backup(_backup("old", NOON, alarms=("old alarm",)))
    context.catalog.add_backup(_backup("new", NOON + timedelta(hours=1), alarms=("new alarm",)))
    context.catalog.note_verified("old", NOON + timedelta(hours=2), "all", 3)
    report = status.collect(context, now=NOON + timedelta(hours=3))
    (row,) = report.backups
    assert (row.backups, row.last_id, row.age_s, row.verified_at) == (2, "new", 7200.0, None)
    assert [alarm for alarm in report.alarms if "new alarm" in alarm]
    assert [alarm for alarm in report.alarms if "offload verify old" in alarm]
    assert len(report.alarms) == 2


def test_status_counts_timemarks_also_of_groups_that_are_configured_no_more(
    context: Context,
) -> None:
    mark = TimeMark(
        id=TimeMarkId("m1"), group="gone", created_at=NOON, snapshots=(), freeze_ms=0.0,
        consistency=Consistency.CRASH, instant=Instant.ONE,
    )  # fmt: skip
    context.catalog.add_timemark(mark)
    context.catalog.add_timemark(replace(mark, id=TimeMarkId("m2"), created_at=NOON + timedelta(1)))
    groups = {group.name: group for group in status.collect(context).groups}
    assert (groups["gone"].timemarks, groups["gone"].oldest_at) == (2, NOON)


def test_status_view_without_its_server_is_dead_and_an_alarm(context: Context) -> None:
    source = RawSource(path=Path("/x"), size_bytes=512)
    context.catalog.add_view(
        View(
            id=ViewId("v1"), name="shown", origin="timemark:m/db", target="nbd", uri="nbd://x",
            writable=False, size_bytes=512, sector_size=512, created_at=NOON, source=source,
        )
    )  # fmt: skip
    report = status.collect(context)
    assert [(view.name, view.alive) for view in report.views] == [("shown", False)]
    assert report.alarms == ("view shown is not served: offload recover",)


def test_status_low_pool_and_missing_volume_are_alarms(config: Path) -> None:
    config.write_text(
        config.read_text().replace('"1MiB"', '"100%"')
        + f'[volumes.lost]\nprovider = "copy"\npath = "{config.parent}/lost.raw"\n'
    )
    with only_context(Settings(config_path=config)) as opened:
        report = status.collect(opened)
    assert [pool.low for pool in report.pools] == [True]
    assert any(alarm.startswith("volume lost: ") for alarm in report.alarms)
    assert any("under its watermark" in alarm for alarm in report.alarms)


def test_status_for_people_shows_every_section(
    context: Context, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    context.catalog.add_backup(_backup("b1", NOON, alarms=("look here",)))
    assert run(["--config", str(config), "status"]) == 0
    out = capsys.readouterr().out
    for part in ("Pools", "Groups", "Backups", "Views\n  none", "Alarms", "look here", "b1"):
        assert part in out


def test_volume_list_shows_the_error_of_one_in_its_row(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = config.read_text()
    config.write_text(text + '[volumes.lost]\nprovider = "copy"\npath = "/nonexistent/x"\n')
    assert run(["--config", str(config), "volume", "list", "--json"]) == 0
    found = {entry["name"]: entry for entry in json.loads(capsys.readouterr().out)}
    assert found["db"]["state"]["size_bytes"] == 1 << 20
    assert found["db"]["error"] is None
    assert found["db"]["groups"] == ["shop"]
    assert found["lost"]["state"] is None
    assert found["lost"]["error"]["code"] == "volume-missing"
    assert run(["--config", str(config), "volume", "list"]) == 0
    assert "/nonexistent/x: " in capsys.readouterr().out
    assert run(["--config", str(config), "volume", "show", "lost"]) == 4
