"""The guest agent's client, and the part, with answers that no agent here gives.

Real agents in real guests: tests/lab/test_guest_agent_in_guests.py.
"""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

import pytest

from offload import procs
from offload.catalog.store import Catalog
from offload.cli.main import run as cli
from offload.configs.quiesce import GuestAgentFreeze
from offload.errors import CleanupError, OffloadError, PolicyError, UnavailableError
from offload.guest_agent import (
    AgentBusyError,
    AgentError,
    AgentGoneError,
    AgentProtocolError,
    AgentSilentError,
    GuestAgent,
    shown,
)
from offload.instance import Instance
from offload.model import Consistency
from offload.quiescers import hook_report
from offload.quiescers.guest_agent import GuestAgentPart
from offload.quiescers.holder import undo_thaw
from offload.quiescers.vm import VmQuiescer
from offload.testing.instances import make_instance
from offload.testing.scripted_agent import LINUX, VSS_TIMEOUT, WINDOWS, ScriptedAgent
from offload.testing.scripted_agent import scripted_agent as scripted

NO_CATALOG = cast("Catalog", None)


@pytest.fixture
def folder() -> Iterator[Path]:
    """Short: unix sockets lie in it."""
    made = Path(tempfile.mkdtemp(prefix="ofs-"))
    yield made
    shutil.rmtree(made)


Serve = Callable[..., ScriptedAgent]


@pytest.fixture
def serve(folder: Path) -> Iterator[Serve]:
    with ExitStack() as stack:

        def start(base: Any = LINUX, **changes: Any) -> ScriptedAgent:
            answers = {**base, **{name.replace("_", "-"): a for name, a in changes.items()}}
            return stack.enter_context(scripted(folder / "ga", answers))

        yield start


@pytest.fixture
def instance(folder: Path) -> Instance:
    return make_instance(folder / "i", {})


Make = Callable[..., GuestAgentPart]


@pytest.fixture
def make(folder: Path, instance: Instance) -> Iterator[Make]:
    with ExitStack() as stack:

        def build(*mounts: str) -> GuestAgentPart:
            entry = GuestAgentFreeze(kind="qemu-ga", socket=folder / "ga", mounts=mounts)
            part = GuestAgentPart("shop", entry, instance)
            stack.callback(part.close)
            return part

        yield build


def soon(seconds: float = 5.0) -> float:
    return time.monotonic() + seconds


def frozen(part: GuestAgentPart) -> Consistency:
    part.check()
    part.arm(5.0)
    return part.freeze(soon())


class Freezing:
    """Answers of an agent that freezes, and says so."""

    def __init__(self, thaw: Any = 2, freeze: Any = 2) -> None:
        self.is_frozen = False
        self._thaw, self._freeze = thaw, freeze

    def answers(self) -> dict[str, Any]:
        return {
            "guest_fsfreeze_status": lambda: "frozen" if self.is_frozen else "thawed",
            "guest_fsfreeze_freeze": lambda: self._become(True, self._freeze),
            "guest_fsfreeze_thaw": lambda: self._become(False, self._thaw),
        }

    def _become(self, state: bool, answer: Any) -> Any:
        self.is_frozen = state
        return answer


# -- the protocol ----------------------------------------------------------------------------------


def test_client_passes_over_what_an_earlier_client_left(serve: Serve, folder: Path) -> None:
    agent = serve()
    stale = b'{"return": 7}\n\xff{"return": 12345}\n\xff{"retu\xff{"return": [[\n'
    agent.greeting = stale + b'{"error": {"class": "GenericError", "desc": "JSON parse error"}}\n'
    with GuestAgent(folder / "ga") as session:
        assert session.version() == "7.2.22"
        assert not session.frozen()


def test_client_where_nobody_listens_says_so(folder: Path) -> None:
    with pytest.raises(AgentGoneError) as caught:
        GuestAgent(folder / "ga")
    assert caught.value.code == "agent-gone"


def test_client_of_a_silent_agent_gives_up_in_time_and_answers_stay_in_step(
    serve: Serve, folder: Path
) -> None:
    serve(guest_fsfreeze_freeze=b"")
    with GuestAgent(folder / "ga", 0.3) as session:
        began = time.monotonic()
        with pytest.raises(AgentSilentError):
            session.freeze([], 0.3)
        assert time.monotonic() - began < 3
        assert session.system().id == "debian"
        assert session.host_name() == "shop"


def test_client_second_one_is_told_that_the_socket_is_held(serve: Serve, folder: Path) -> None:
    serve()
    with GuestAgent(folder / "ga"):
        with pytest.raises(AgentBusyError) as caught:
            GuestAgent(folder / "ga", 0.3)
        assert caught.value.code == "agent-busy"
    with GuestAgent(folder / "ga"):
        pass


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 400 Bad Request\n",
        b"[1, 2]\n",
        b'{"neither": 1}\n',
        b'{"error": "text"}\n',
        b"[" * 100_000 + b"\n",
        b'{"return": "sideways"}\n',
        b'{"return": true}\n',
        b"\x00\xfe\n",
    ],
)
def test_client_nonsense_is_a_protocol_error(serve: Serve, folder: Path, answer: bytes) -> None:
    serve(guest_fsfreeze_status=answer)
    with GuestAgent(folder / "ga") as session, pytest.raises(AgentProtocolError):
        session.frozen()


def test_client_answer_without_an_end_is_not_read_for_ever(serve: Serve, folder: Path) -> None:
    serve(guest_fsfreeze_status=b"x" * (5 << 20))
    with GuestAgent(folder / "ga") as session, pytest.raises(AgentProtocolError):
        session.frozen()


def test_client_shows_a_guest_s_words_without_control_characters(
    serve: Serve, folder: Path
) -> None:
    said = b'{"error": {"class": "GenericError", "desc": "\\u001b[2Jgone\\nnext"}}\n'
    serve(guest_fsfreeze_thaw=said)
    with GuestAgent(folder / "ga") as session, pytest.raises(AgentError) as caught:
        session.thaw(1)
    assert caught.value.description == "?[2Jgone next"
    assert len(shown("x" * 10_000)) == 400


def test_client_reads_a_file_in_pieces_and_no_more_than_asked(serve: Serve, folder: Path) -> None:
    piece = {"count": 3, "buf-b64": base64.b64encode(b"abc").decode(), "eof": False}
    serve(guest_file_open=1000, guest_file_read=piece, guest_file_close={})
    with GuestAgent(folder / "ga") as session:
        assert session.read_file("/etc/motd", 7) == b"abcabca"


# -- what is refused before the freeze -------------------------------------------------------------


def test_part_agent_that_may_not_freeze_is_refused(serve: Serve, make: Make) -> None:
    info = {
        "version": "7.2.22",
        "supported_commands": [{"name": "guest-fsfreeze-freeze", "enabled": False}],
    }
    serve(guest_info=info)
    with pytest.raises(UnavailableError, match="guest-fsfreeze-freeze") as caught:
        make().check()
    assert caught.value.code == "agent-refused"


def test_part_guest_without_file_systems_to_freeze_is_refused(serve: Serve, make: Make) -> None:
    only = [{"name": "vda15", "mountpoint": "/boot/efi", "type": "vfat", "disk": []}]
    serve(guest_get_fsinfo=only)
    with pytest.raises(PolicyError) as caught:
        make().check()
    assert caught.value.code == "cannot-freeze"


def test_part_guest_that_is_this_machine_is_refused(serve: Serve, make: Make) -> None:
    boot = base64.b64encode(procs.boot_id().encode() + b"\n").decode()
    serve(
        guest_file_open=1,
        guest_file_read={"count": 37, "buf-b64": boot, "eof": True},
        guest_file_close={},
    )
    with pytest.raises(PolicyError) as caught:
        make().check()
    assert caught.value.code == "would-freeze-ourselves"


# -- freeze and thaw -------------------------------------------------------------------------------


def test_part_thaw_of_fewer_file_systems_than_were_frozen_is_a_break(
    serve: Serve, make: Make
) -> None:
    serve(**Freezing(thaw=1).answers())
    part = make()
    assert frozen(part) is Consistency.FILESYSTEM
    assert part.what == ("/", "/srv")
    assert part.still_frozen()
    part.thaw()
    assert not part.unbroken
    assert "2 file systems were frozen, and 1 were so at the thaw" in part.output


def test_part_break_found_at_the_thaw_lowers_the_vm(serve: Serve, make: Make) -> None:
    serve(**Freezing(thaw=0).answers())
    vm = VmQuiescer(
        "shop", volumes=("v",), least=Consistency.CRASH, applications=[], freezer=make()
    )
    vm.check()
    vm.arm(5.0)
    vm.hold(soon())
    assert vm.freeze(soon()) is Consistency.FILESYSTEM
    assert vm.still_frozen()
    vm.thaw()
    vm.close()
    assert not vm.unbroken
    assert vm.reached is Consistency.CRASH
    assert not vm.parts[0].unbroken


def test_part_fewer_frozen_than_there_are_fails_and_is_thawed(serve: Serve, make: Make) -> None:
    state = Freezing(freeze=1)
    agent = serve(**state.answers())
    with pytest.raises(UnavailableError, match="froze 1 file systems"):
        frozen(make())
    assert not state.is_frozen
    assert agent.asked.count("guest-fsfreeze-thaw") == 1


def test_part_freeze_whose_answer_never_came_is_thawed(serve: Serve, make: Make) -> None:
    state = Freezing(freeze=b"")
    serve(**state.answers())
    part = make()
    part.check()
    part.arm(1.0)
    with pytest.raises(UnavailableError) as caught:
        part.freeze(soon(1.0))
    assert caught.value.code == "freeze-failed"
    part.close()
    assert not state.is_frozen


def test_part_freeze_that_is_refused_changes_nothing(serve: Serve, make: Make) -> None:
    said = b'{"error": {"class": "GenericError", "desc": "failed to freeze /srv: Input/output"}}\n'
    agent = serve(guest_fsfreeze_freeze=said)
    with pytest.raises(UnavailableError, match="failed to freeze /srv"):
        frozen(make())
    assert "guest-fsfreeze-thaw" not in agent.asked


def test_part_guest_that_dies_while_frozen_hangs_nothing(
    serve: Serve, make: Make, instance: Instance
) -> None:
    agent = serve(**Freezing().answers())
    part = make()
    frozen(part)
    agent.hang_up()
    began = time.monotonic()
    assert not part.still_frozen()
    part.thaw()
    part.close()
    assert time.monotonic() - began < 5
    assert not part.unbroken
    assert "lost the guest agent" in part.output
    undo_thaw(instance, NO_CATALOG, part.undos()[0][1])
    assert list((instance.runtime_dir / "holds").glob("*.json")) == []


def test_part_garbage_while_frozen_is_a_break_and_the_thaw_is_tried(
    serve: Serve, make: Make
) -> None:
    state = Freezing()
    agent = serve(**state.answers())
    part = make()
    frozen(part)
    agent.answers["guest-fsfreeze-status"] = b"garbage\n"
    assert not part.still_frozen()
    part.thaw()
    assert not part.unbroken
    assert not state.is_frozen


def test_part_thaw_hook_that_fails_leaves_unknown_how_long_it_held(
    serve: Serve, make: Make
) -> None:
    said = b'{"error": {"class": "GenericError", "desc": "fsfreeze hook has failed"}}\n'
    serve(**Freezing(thaw=said).answers())
    part = make()
    frozen(part)
    part.thaw()
    assert not part.unbroken
    assert "nobody knows how long it was held" in part.output


def test_part_thaw_that_is_refused_is_an_error(serve: Serve, make: Make) -> None:
    state = Freezing()
    said = b'{"error": {"class": "GenericError", "desc": "not today"}}\n'
    agent = serve(**state.answers())
    part = make()
    frozen(part)
    agent.answers["guest-fsfreeze-thaw"] = said
    with pytest.raises(UnavailableError, match="not today") as caught:
        part.thaw()
    assert caught.value.code == "thaw-failed"
    assert not part.unbroken
    agent.answers["guest-fsfreeze-thaw"] = lambda: state._become(False, 2)
    part.close()  # the guardian tries on
    assert not state.is_frozen


# -- the undo --------------------------------------------------------------------------------------


def is_frozen(state: Freezing) -> bool:
    return state.is_frozen


def test_undo_of_a_guest_whose_qemu_is_another_one_leaves_it_alone(
    serve: Serve, make: Make, instance: Instance
) -> None:
    state = Freezing()
    serve(**state.answers())
    part = make()
    part.check()
    args = part.undos()[0][1]
    marker = Path(args["marker"])
    marker.parent.mkdir(parents=True, exist_ok=True)
    marker.write_text(f'["{part._entry.socket}"]')
    state.is_frozen = True
    other = {**args, "agents": args["agents"].replace(f'"{procs_of(args)}"', '"1:1"')}
    assert other != args
    undo_thaw(instance, NO_CATALOG, other)
    assert is_frozen(state)
    marker.write_text(f'["{part._entry.socket}"]')
    undo_thaw(instance, NO_CATALOG, args)
    assert not is_frozen(state)
    assert not marker.exists()


def procs_of(args: dict[str, str]) -> str:
    return args["agents"].partition('"qemu": "')[2].partition('"')[0]


def test_undo_where_the_agent_is_silent_is_tried_again_later(
    serve: Serve, make: Make, instance: Instance
) -> None:
    state = Freezing()
    agent = serve(**state.answers())
    part = make()
    part.check()
    args = part.undos()[0][1]
    marker = Path(args["marker"])
    marker.parent.mkdir(parents=True, exist_ok=True)
    marker.write_text(f'["{part._entry.socket}"]')
    state.is_frozen = True
    agent.answers["guest-fsfreeze-status"] = b""
    with pytest.raises(CleanupError):
        undo_thaw(instance, NO_CATALOG, args)
    assert marker.exists()
    agent.answers["guest-fsfreeze-status"] = "frozen"
    undo_thaw(instance, NO_CATALOG, args)
    assert not is_frozen(state)


# -- Windows, by the documentation -----------------------------------------------------------------


def test_windows_freeze_is_application_consistent(serve: Serve, make: Make) -> None:
    agent = serve(WINDOWS, **Freezing().answers())
    part = make()
    assert frozen(part) is Consistency.APPLICATION
    assert part.what == ("C:\\", "System Reserved")
    assert part.still_frozen()
    part.thaw()
    part.close()
    assert part.unbroken
    assert part.reached is Consistency.APPLICATION
    assert "guest-file-read" not in agent.asked


def test_windows_volumes_of_the_list_are_given_to_the_agent(serve: Serve, make: Make) -> None:
    state = Freezing(freeze=1, thaw=1)
    answers = state.answers()
    agent = serve(WINDOWS, guest_fsfreeze_freeze_list=answers.pop("guest_fsfreeze_freeze"),
                  **answers)  # fmt: skip
    part = make("C:\\")
    assert frozen(part) is Consistency.APPLICATION
    assert "guest-fsfreeze-freeze-list" in agent.asked
    part.thaw()
    assert part.unbroken


def test_windows_vss_that_could_not_hold_so_long_is_a_break(serve: Serve, make: Make) -> None:
    """VSS holds writes for 10 seconds at most; its error comes with the thaw."""
    serve(WINDOWS, **Freezing(thaw=VSS_TIMEOUT).answers())
    part = make()
    frozen(part)
    assert part.still_frozen()
    part.thaw()
    assert not part.unbroken
    assert "couldn't hold writes: fsfreeze is limited up to 10 seconds" in part.output


# -- the report of hooks ---------------------------------------------------------------------------

REPORT = """offload-fsfreeze 1
id {number}
freeze deadman 0
said deadman thaws after 60 s
freeze mysql 0
said mysql level=application
said mysql 10.11: held
thaw mysql 0
thaw deadman 0
end
"""


@pytest.mark.parametrize(
    ("old", "new", "held"),
    [
        ("", "", True),
        ("end\n", "", False),  # the thaw is not complete
        ("thaw mysql 0", "thaw mysql 1", False),
        ("thaw deadman 0", "thaw deadman 1", False),
        ("thaw mysql 0\n", "", False),
        ("freeze mysql 0", "freeze mysql 1", False),
        ("said mysql level=application\n", "", False),
        ("thaw mysql 0", "thaw mysql -0", False),
        ("thaw mysql 0", "thaw mysql " + "9" * 5000, False),
    ],
)
def test_report_counts_as_held_only_if_everything_succeeded(old: str, new: str, held: bool) -> None:
    text = REPORT.format(number="x")
    assert hook_report.parse(text.replace(old, new) if old else text).held_applications is held


def test_report_is_bounded_and_without_control_characters() -> None:
    text = REPORT.format(number="x") + "said mysql \x1b[2J\n" * 1000 + "junk\n\x00\n"
    lines = hook_report.parse(text).lines()
    assert len(lines) == 2
    assert len(lines[1]) < 40 * 420
    assert "\x1b" not in lines[1]


def test_part_hooks_that_held_make_it_application_consistent(serve: Serve, make: Make) -> None:
    numbers = iter(["old", "new"])

    def read() -> dict[str, Any]:
        content = base64.b64encode(REPORT.format(number=next(numbers)).encode()).decode()
        return {"count": 1, "buf-b64": content, "eof": True}

    agent = serve(guest_file_open=1, guest_file_close={}, **Freezing().answers())
    boot = {"count": 4, "buf-b64": base64.b64encode(b"boot").decode(), "eof": True}
    reads = iter((boot, read(), read()))
    agent.answers["guest-file-read"] = lambda: next(reads)
    part = make()
    frozen(part)
    part.thaw()
    part.close()
    assert part.reached is Consistency.APPLICATION
    assert "hook mysql: 10.11: held" in part.output


def test_part_agent_that_keeps_its_files_leaves_it_at_file_systems(
    serve: Serve, make: Make
) -> None:
    agent = serve(**Freezing().answers())
    agent.answers["guest-file-open"] = None
    part = make()
    frozen(part)
    part.thaw()
    part.close()
    assert part.reached is Consistency.FILESYSTEM
    assert "what hooks in the guest did is not known" in part.output


# -- the command -----------------------------------------------------------------------------------


@pytest.fixture
def config(folder: Path) -> Path:
    path = folder / "offload.toml"
    path.write_text(f"""
        state_dir = "{folder}/state"
        [volumes.db]
        provider = "copy"
        path = "{folder}/db.raw"
        [vms.shop]
        volumes = ["db"]
        freeze = {{ kind = "qemu-ga", socket = "{folder}/ga" }}
        [vms.other]
        volumes = ["db"]
        freeze = {{ kind = "qmp", socket = "{folder}/qmp" }}
    """)
    path.chmod(0o600)
    return path


def test_agent_show_tells_what_the_guest_is(
    serve: Serve, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    serve()
    assert cli(["--config", str(config), "agent", "show", "shop"]) == 0
    said = capsys.readouterr().out
    assert "Debian GNU/Linux 12 (bookworm)" in said
    assert "/srv (xfs on vdb)" in said
    assert cli(["--config", str(config), "--json", "agent", "show", "shop"]) == 0
    assert json.loads(capsys.readouterr().out)["file_systems"][0]["mount"] == "/"


def test_timemark_of_a_freeze_that_broke_is_refused_or_labelled(
    serve: Serve, config: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Known only at the thaw, when the snapshot is made already."""
    (folder / "db.raw").write_bytes(bytes(1 << 20))
    only = f"""
        state_dir = "{folder}/state"
        runtime_dir = "{folder}/run"
        [volumes.db]
        provider = "copy"
        path = "{folder}/db.raw"
        [vms.shop]
        volumes = ["db"]
        freeze = {{ kind = "qemu-ga", socket = "{folder}/ga" }}
        [groups.g]
        volumes = ["db"]
        atomic = "record"
    """
    config.write_text(only)
    agent = serve(**Freezing().answers())
    command = ["--config", str(config), "--json", "timemark", "create", "g"]
    assert cli([*command, "--consistency", "filesystem"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["consistency"] == "filesystem"
    assert made["reports"][0]["parts"][0]["unbroken"]
    agent.answers.update({k.replace("_", "-"): v for k, v in Freezing(thaw=1).answers().items()})
    assert cli([*command, "--consistency", "filesystem"]) == 9
    assert "1 were so at the thaw" in capsys.readouterr().err
    assert cli([*command, "--consistency", "crash"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["consistency"] == "crash"
    assert not made["reports"][0]["frozen"]
    assert cli(["--config", str(config), "--json", "timemark", "list"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == 2


def test_agent_show_of_a_frozen_guest_says_so(
    serve: Serve, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    serve(guest_fsfreeze_status="frozen", guest_get_fsinfo=None)
    assert cli(["--config", str(config), "agent", "show", "shop"]) == 0
    assert re.search(r"state +frozen", capsys.readouterr().out)


@pytest.mark.parametrize(("vm", "code"), [("none", 4), ("other", 2), ("shop", 6)])
def test_agent_show_that_cannot_is_one_line(
    config: Path, capsys: pytest.CaptureFixture[str], vm: str, code: int
) -> None:
    assert cli(["--config", str(config), "agent", "show", vm]) == code
    assert capsys.readouterr().err.startswith("offload: ")


def test_agent_hooks_are_written_where_they_are_wanted(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    to = folder / "hooks"
    assert cli(["agent", "hooks", "--to", str(to), "--only", "deadman", "--json"]) == 0
    files = json.loads(capsys.readouterr().out)["files"]
    assert f"{to}/fsfreeze-hook.d/deadman" in files
    assert not (to / "fsfreeze-hook.d/mysql").exists()
    assert os.access(to / "offload-fsfreeze-hook", os.X_OK)
    assert cli(["agent", "hooks", "--to", "/proc/nowhere"]) == 6


def test_every_error_of_the_client_has_a_code() -> None:
    kinds = (AgentError, AgentGoneError, AgentBusyError, AgentSilentError, AgentProtocolError)
    codes = {kind.code for kind in kinds}
    assert len(codes) == len(kinds)
    assert all(issubclass(kind, OffloadError) and kind.exit_code == 6 for kind in kinds)
