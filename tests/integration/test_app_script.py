"""Quiesce scripts: each phase, each exit code, and what is left when somebody is killed."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

import pytest

from offload import run
from offload.catalog.store import Catalog
from offload.configs.quiesce import ScriptApplication
from offload.errors import CleanupError, NotFoundError, UnavailableError
from offload.model import Consistency
from offload.quiescers.holder import undo_thaw
from offload.quiescers.script import ScriptPart
from offload.testing.instances import make_instance

ROOT = Path(__file__).parents[2]
NO_CATALOG = cast("Catalog", None)

# It notes each phase in the file `log`. What a file of the phase's name holds, it runs then.
SCRIPT = """\
#!/bin/sh
cd "$(dirname "$0")" || exit 1
echo "$1" >>log
env | grep ^OFFLOAD_ | sort >env.$1
if [ -e "do.$1" ]; then . "./do.$1"; fi
exit 0
"""

HOLDER = """
import sys, time
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from tests.integration.test_app_script import Site
part = Site(Path(sys.argv[2])).part()
part.arm(60)
part.freeze(time.monotonic() + 60)
print(part._holder.pid, part._holder.marker, flush=True)
time.sleep(60)
"""


class Site:
    """A script and what it did."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.instance = make_instance(
            folder / "i",
            {
                "volumes": {"db": {"provider": "copy", "path": str(folder / "db.raw")}},
                "vms": {"shop": {"volumes": ["db"], "applications": [self.entry()]}},
            },
        )

    def entry(self, **more: Any) -> dict[str, Any]:
        command = [str(self.folder / "quiesce"), "a b", "$c"]
        return {"kind": "script", "name": "erp", "command": command, **more}

    def part(self, **more: Any) -> ScriptPart:
        return ScriptPart(
            "shop", ScriptApplication.model_validate(self.entry(**more)), self.instance
        )

    def on(self, phase: str, commands: str) -> None:
        (self.folder / f"do.{phase}").write_text(commands)

    def phases(self) -> list[str]:
        log = self.folder / "log"
        return [line.split()[-1] for line in log.read_text().splitlines()] if log.exists() else []

    def env(self, phase: str) -> dict[str, str]:
        lines = (self.folder / f"env.{phase}").read_text().splitlines()
        return dict(line.split("=", 1) for line in lines)

    def undo(self, part: ScriptPart, **more: str) -> None:
        ((action, args),) = part.undos()
        assert action == "thaw-script"
        undo_thaw(self.instance, NO_CATALOG, {**args, **more})


@pytest.fixture
def site(tmp_path: Path) -> Site:
    script = tmp_path / "quiesce"
    # the phase is the last argument: after those of the configuration
    script.write_text(SCRIPT.replace('"$0")" || exit 1', '"$0")" || exit 1\nshift 2'))
    script.chmod(0o755)
    return Site(tmp_path)


Make = Callable[..., ScriptPart]


@pytest.fixture
def make(site: Site) -> Iterator[Make]:
    """Parts that are closed at the end."""
    with ExitStack() as stack:

        def build(**more: Any) -> ScriptPart:
            made = site.part(**more)
            stack.callback(made.close)
            return made

        yield build


def arm_and_freeze(part: ScriptPart, within_s: float = 30.0) -> Consistency:
    part.arm(within_s)
    return part.freeze(time.monotonic() + within_s)


def wait_for(condition: Callable[[], bool], within_s: float = 20.0) -> None:
    until = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


def test_script_runs_each_phase_with_its_environment_and_is_heard(site: Site, make: Make) -> None:
    site.on("freeze", "echo tablespaces in backup mode")
    part = make()
    part.check()
    assert arm_and_freeze(part) is Consistency.APPLICATION
    assert part.still_frozen()
    part.thaw()
    part.thaw()
    assert part.unbroken
    assert site.phases() == ["check", "freeze", "thaw"]
    assert part.what == ("script:erp",)
    assert part.output == "tablespaces in backup mode"
    frozen = site.env("freeze")
    hold = frozen.pop("OFFLOAD_HOLD")
    assert frozen == {
        "OFFLOAD_DEADLINE_S": "30",
        "OFFLOAD_PHASE": "freeze",
        "OFFLOAD_TIMEOUT_S": "30",
        "OFFLOAD_VM": "shop",
        "OFFLOAD_VOLUMES": "db",
    }
    assert [site.env(phase)["OFFLOAD_HOLD"] for phase in ("check", "thaw")] == [hold] * 2


def test_script_gets_its_arguments_as_they_are(site: Site, make: Make) -> None:
    (site.folder / "quiesce").write_text('#!/bin/sh\nprintf "<%s>" "$@"\n')
    part = make()
    arm_and_freeze(part)
    assert part.output == "<a b><$c><freeze>"


def test_script_level_is_what_the_configuration_says(make: Make) -> None:
    assert arm_and_freeze(make(level="filesystem")) is Consistency.FILESYSTEM


def test_script_freeze_that_fails_is_followed_by_thaw(site: Site, make: Make) -> None:
    site.on("freeze", "echo ORA-01123 >&2; exit 1")
    part = make()
    with pytest.raises(UnavailableError) as caught:
        arm_and_freeze(part)
    assert caught.value.code == "hook-failed"
    assert "script:erp: the freeze phase ended with status 1: ORA-01123" in caught.value.message
    assert site.phases() == ["freeze", "thaw"]
    part.thaw()
    part.close()
    site.undo(part)
    assert site.phases() == ["freeze", "thaw"]


def test_script_freeze_that_hangs_is_ended_in_time_and_followed_by_thaw(
    site: Site, make: Make
) -> None:
    site.on("freeze", "exec sleep 60")
    part = make(timeout_s=0.5)
    began = time.monotonic()
    with pytest.raises(UnavailableError) as caught:
        arm_and_freeze(part)
    assert time.monotonic() - began < 20
    assert "did not end in 0.5 s" in caught.value.message
    assert site.phases() == ["freeze", "thaw"]


def test_script_freeze_that_is_later_than_the_deadline_fails_then_and_is_followed_by_thaw(
    site: Site, make: Make
) -> None:
    site.on("freeze", "sleep 1.5")
    part = make()
    part.arm(0.5)
    with pytest.raises(UnavailableError) as caught:
        part.freeze(time.monotonic() + 0.5)
    assert caught.value.code == "hook-failed"
    wait_for(lambda: site.phases() == ["freeze", "thaw"])
    assert part.what == ()


def test_script_with_nothing_to_hold_is_not_thawed(site: Site, make: Make) -> None:
    site.on("freeze", "exit 3")
    part = make()
    assert arm_and_freeze(part) is Consistency.APPLICATION
    assert part.what == ()
    assert "nothing to hold" in part.output
    assert part.still_frozen()
    part.thaw()
    part.close()
    assert part.unbroken
    assert site.phases() == ["freeze"]


@pytest.mark.parametrize("status", [2, 3])
def test_script_thaw_that_finds_it_let_go_breaks_the_hold(
    site: Site, make: Make, status: int
) -> None:
    site.on("thaw", f"exit {status}")
    part = make()
    arm_and_freeze(part)
    assert part.still_frozen()
    part.thaw()
    assert not part.unbroken
    assert "had ended before" in part.output
    assert site.phases() == ["freeze", "thaw"]


def test_script_thaw_that_fails_is_raised_and_done_again(site: Site, make: Make) -> None:
    site.on("thaw", "[ -e mended ] || { echo listener down; exit 1; }")
    part = make()
    arm_and_freeze(part)
    with pytest.raises(UnavailableError) as caught:
        part.thaw()
    assert caught.value.code == "thaw-failed"
    assert "listener down" in caught.value.message
    with pytest.raises(CleanupError, match="listener down"):
        site.undo(part)
    (site.folder / "mended").touch()
    site.undo(part)
    assert list((site.instance.runtime_dir / "holds").iterdir()) == []
    part.close()
    done = site.phases().count("thaw")
    site.undo(part)
    assert site.phases().count("thaw") == done


def test_script_deadline_passed_thaws_and_is_noticed(site: Site, make: Make) -> None:
    part = make()
    arm_and_freeze(part, 1.0)
    wait_for(lambda: "thaw" in site.phases())
    assert not part.still_frozen()
    part.thaw()
    assert not part.unbroken
    assert "deadline" in part.output
    assert site.phases() == ["freeze", "thaw"]


def start_director(site: Site) -> tuple[Any, int, Path]:
    process = run.spawn([sys.executable, "-c", HOLDER, str(ROOT), str(site.folder)], stderr=None)
    assert process.stdout is not None
    guardian, marker = process.stdout.readline().split()
    return process, int(guardian), Path(os.fsdecode(marker))


def test_script_director_killed_is_thawed_by_the_guardian(site: Site) -> None:
    process, _, marker = start_director(site)
    try:
        process.kill()
        wait_for(lambda: "thaw" in site.phases())
        wait_for(lambda: not marker.exists())
        assert site.phases() == ["freeze", "thaw"]
    finally:
        run.terminate(process)


def test_script_director_and_guardian_killed_is_thawed_by_the_undo_and_once(
    site: Site, make: Make
) -> None:
    process, guardian, marker = start_director(site)
    try:
        process.send_signal(signal.SIGSTOP)  # so that it cannot stand in for its guardian
        os.kill(guardian, signal.SIGKILL)
        process.kill()
        process.wait()
    finally:
        run.terminate(process)
    assert site.phases() == ["freeze"]
    part = make()
    site.undo(part, marker=str(marker))
    assert site.phases() == ["freeze", "thaw"]
    site.undo(part, marker=str(marker))
    assert site.phases() == ["freeze", "thaw"]


def test_script_undo_after_another_boot_thaws_without_a_marker(site: Site, make: Make) -> None:
    site.undo(make(), boot="another")
    assert site.phases() == ["thaw"]


def test_script_undo_where_freeze_never_ran_does_nothing(site: Site, make: Make) -> None:
    site.undo(make())
    assert site.phases() == []


def test_script_guardian_killed_is_thawed_by_the_director_and_is_no_unbroken_hold(
    site: Site, make: Make
) -> None:
    part = make()
    arm_and_freeze(part)
    assert part._holder.pid is not None
    os.kill(part._holder.pid, signal.SIGKILL)
    assert not part.still_frozen()
    assert site.phases() == ["freeze", "thaw"]
    part.thaw()
    assert not part.unbroken


def test_script_closed_while_held_is_thawed(site: Site, make: Make) -> None:
    part = make()
    arm_and_freeze(part)
    part.close()
    assert site.phases() == ["freeze", "thaw"]


def test_script_that_cannot_be_held_says_why_in_its_check(site: Site, make: Make) -> None:
    site.on("check", "echo database is in NOARCHIVELOG mode; exit 1")
    with pytest.raises(UnavailableError) as caught:
        make().check()
    assert caught.value.code == "hook-failed"
    assert "NOARCHIVELOG" in caught.value.message


def test_script_that_is_missing_is_refused(site: Site, make: Make) -> None:
    (site.folder / "quiesce").unlink()
    with pytest.raises(NotFoundError) as caught:
        make().check()
    assert caught.value.code == "hook-missing"


def test_script_output_is_cut_to_its_end(site: Site, make: Make) -> None:
    site.on("freeze", "seq 100000; echo the end")
    part = make()
    arm_and_freeze(part)
    assert len(part.output) <= 2000
    assert part.output.endswith("the end")
