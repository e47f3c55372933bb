"""The programs on the page docs/howto/quiesce-scripts.md."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest

from offload import run
from offload.configs.quiesce import ScriptApplication
from offload.errors import UnavailableError
from offload.quiescers.script import ScriptPart
from offload.testing.instances import make_instance

PAGE = (Path(__file__).parents[2] / "docs/howto/quiesce-scripts.md").read_text(encoding="utf-8")
SCRIPTS = [code for code in re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL) if "case" in code]


def test_page_has_the_skeleton_and_the_oracle_example() -> None:
    assert len(SCRIPTS) == 2


@pytest.mark.parametrize("code", SCRIPTS)
def test_page_script_has_no_error_that_the_shell_sees(tmp_path: Path, code: str) -> None:
    script = tmp_path / "script"
    script.write_text(code)
    run.run(["sh", "-n", str(script)])


@pytest.mark.parametrize("code", SCRIPTS)
def test_page_script_does_not_know_phases_to_come(tmp_path: Path, code: str) -> None:
    script = tmp_path / "script"
    script.write_text(code)
    assert run.run(["sh", str(script), "settle"], check=False).status == 3


class Queue:
    """The skeleton, at work in a folder."""

    def __init__(self, folder: Path) -> None:
        self.hold = folder / "queue" / "hold"
        self.hold.parent.mkdir()
        script = folder / "quiesce-queue"
        script.write_text(SCRIPTS[0].replace("/run/queue", str(self.hold.parent)))
        script.chmod(0o755)
        self._entry = ScriptApplication(kind="script", name="queue", command=(str(script),))
        self._instance = make_instance(folder / "i")

    def part(self) -> ScriptPart:
        return ScriptPart("erp", self._entry, self._instance)


@pytest.fixture
def queue(tmp_path: Path) -> Queue:
    return Queue(tmp_path)


def freeze(part: ScriptPart, within_s: float = 30.0) -> None:
    part.check()
    part.arm(within_s)
    part.freeze(time.monotonic() + within_s)


def test_skeleton_holds_the_queue_until_the_thaw(queue: Queue) -> None:
    part = queue.part()
    freeze(part)
    assert queue.hold.exists()
    assert part.output == "the queue waits"
    part.thaw()
    part.close()
    assert part.unbroken
    assert not queue.hold.exists()


def test_skeleton_without_a_queue_has_nothing_to_hold(queue: Queue) -> None:
    queue.hold.parent.rmdir()
    part = queue.part()
    freeze(part)
    assert part.what == ()
    part.close()


def test_skeleton_tells_that_somebody_let_go_before_the_thaw(queue: Queue) -> None:
    part = queue.part()
    freeze(part)
    queue.hold.unlink()
    part.thaw()
    part.close()
    assert not part.unbroken


def test_skeleton_lets_go_by_itself_when_nobody_is_left(queue: Queue) -> None:
    """By its own timer alone: there is no guardian in this one."""
    script = queue.hold.parents[1] / "quiesce-queue"
    env = {"OFFLOAD_HOLD": "one", "OFFLOAD_DEADLINE_S": "1"}
    run.run([str(script), "freeze"], env=env, timeout_s=60)
    until = time.monotonic() + 60
    while queue.hold.exists():
        assert time.monotonic() < until
        time.sleep(0.05)


def test_skeleton_leaves_the_hold_of_another_alone(queue: Queue) -> None:
    other, part = queue.part(), queue.part()
    freeze(other)
    with pytest.raises(UnavailableError, match="somebody else holds the queue"):
        part.check()
    assert queue.hold.exists()
    other.thaw()
    assert other.unbroken
    other.close()
