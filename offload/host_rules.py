"""What keeps this machine from acting on what it sees in connected views: a rule for udev, a
blacklist for multipath, a filter for LVM. The texts are in `offload/host_files/`."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from enum import StrEnum
from importlib.resources import files
from pathlib import Path

from offload import run
from offload.errors import PolicyError, PrivilegeError, UnavailableError

_UDEV_NAME = "60-offload.rules"
_UDEV_FOLDERS = (  # udev(7), the first wins
    Path("/etc/udev/rules.d"),
    Path("/run/udev/rules.d"),
    Path("/usr/local/lib/udev/rules.d"),
    Path("/usr/lib/udev/rules.d"),
    Path("/lib/udev/rules.d"),
)
_UDEV_SOCKET = Path("/run/udev/control")
_MULTIPATH = Path("/etc/multipath/conf.d/offload.conf")  # multipath.conf(5), config_dir
_LVM_LOCAL = Path("/etc/lvm/lvmlocal.conf")
_LVM_DEVICES = Path("/etc/lvm/devices/system.devices")  # lvmdevices(8)
_LVM_PATTERN = "/dev/offload/"
_LISTENS = 0x10000  # include/linux/net.h, __SO_ACCEPTCON
_SETTLE_S = 15


class RuleState(StrEnum):
    """Whether a rule is in force."""

    INSTALLED = "installed"
    MISSING = "missing"
    OUTDATED = "outdated"  # a file of this name has another text
    NOT_NEEDED = "not needed"  # what it is for is not on this machine


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One rule, where it belongs, and its text."""

    name: str  # udev | multipath | lvm
    state: RuleState
    path: Path
    text: str
    by_hand: bool = (
        False  # an administrator has a setting of their own there: it is theirs to merge
    )

    @property
    def in_force(self) -> bool:
        """Whether nothing is left to be done about it."""
        return self.state in {RuleState.INSTALLED, RuleState.NOT_NEEDED}


def look() -> list[Rule]:
    """The rules and their state. Changes nothing."""
    return [_udev(), _multipath(), _lvm()]


def install() -> list[Rule]:
    """Write what is missing, and have udev read it; the state after that.

    Each file changes whole or not at all, and again is no harm. Raises PrivilegeError,
    UnavailableError (`host-file-unwritable`).
    """
    for rule in look():
        if rule.in_force or rule.by_hand:
            continue
        if rule.name == "lvm":  # not a file of ours: its other settings stay
            _write(rule.path, _content(rule.path) + rule.text)
        else:
            _write(rule.path, rule.text)
    if udev_runs():
        run.run([run.require_program("udevadm", "udev"), "control", "--reload"])
    return look()


def require() -> list[str]:
    """Refuse to let a view in where udev would act on it; what else a person should know.

    Raises PolicyError (`host-rules-missing`).
    """
    rule = _udev()
    if udev_runs() and not rule.in_force:
        raise PolicyError(
            f"this machine would act on what it finds in the view: its udev rule is {rule.state}",
            code="host-rules-missing",
            hint="install it: offload host-rules --install; or take the risk: --without-host-rules",
        )
    return [
        f"{rule.name} may act on what is in the view, its rule is {rule.state}: offload host-rules"
        for rule in (_multipath(), _lvm())
        if not rule.in_force
    ]


def settle() -> None:
    """Wait until udev has dealt with the devices that have come and gone. It need not run."""
    program = run.find_program("udevadm")
    if program is not None and udev_runs():
        argv = [program, "settle", f"--timeout={_SETTLE_S}"]
        run.run(argv, timeout_s=_SETTLE_S + 5, check=False)


def udev_runs() -> bool:
    """Whether this machine has a udevd, running or started by a connection to its socket.

    Nothing connects to it: it has room for one at a time. An ended udevd leaves the file.
    """
    for line in Path("/proc/net/unix").read_text().splitlines()[1:]:
        # Num RefCount Protocol Flags Type St Inode Path, proc(5)
        columns = line.split(maxsplit=7)
        if len(columns) == 8 and columns[7] == str(_UDEV_SOCKET):
            return bool(int(columns[3], 16) & _LISTENS)
    return False


def _udev() -> Rule:
    text = _text(_UDEV_NAME)
    places = [folder / _UDEV_NAME for folder in _UDEV_FOLDERS]
    path = next((place for place in places if place.exists()), places[0])
    needed = udev_runs() or run.find_program("udevadm") is not None
    return Rule(name="udev", state=_state(path, text, needed), path=path, text=text)


def _multipath() -> Rule:
    text = _text("multipath.conf")
    state = _state(_MULTIPATH, text, run.find_program("multipath") is not None)
    return Rule(name="multipath", state=state, path=_MULTIPATH, text=text)


def _lvm() -> Rule:
    text = _text("lvm.conf")
    program = run.find_program("lvmconfig")
    if program is None:
        return Rule(name="lvm", state=RuleState.NOT_NEEDED, path=_LVM_LOCAL, text=text)
    state, by_hand = RuleState.MISSING, False
    names = ["devices/global_filter", "devices/use_devicesfile"]  # older LVM knows only the first
    done = run.run([program, "--typeconfig", "full", *names], timeout_s=20, check=False)
    found = done.stdout.split()
    if f'"r|^{_LVM_PATTERN}|"' in done.stdout or f'"r|{_LVM_PATTERN}|"' in done.stdout:
        state = RuleState.INSTALLED
    elif "use_devicesfile=1" in found and _LVM_DEVICES.exists():
        state = RuleState.NOT_NEEDED  # LVM uses the devices of that list and no others
    else:
        by_hand = '"a|.*|"' not in done.stdout
    return Rule(name="lvm", state=state, path=_LVM_LOCAL, text=text, by_hand=by_hand)


def _state(path: Path, text: str, needed: bool) -> RuleState:
    if not needed:
        return RuleState.NOT_NEEDED
    with contextlib.suppress(OSError):
        return RuleState.INSTALLED if path.read_text() == text else RuleState.OUTDATED
    return RuleState.MISSING


def _write(path: Path, text: str) -> None:
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            fresh.write_text(text)
            fresh.rename(path)
        finally:
            fresh.unlink(missing_ok=True)
    except PermissionError as error:
        raise PrivilegeError(f"cannot write {path}", hint="run it as root") from error
    except OSError as error:
        raise UnavailableError(
            f"cannot write {path}: {error.strerror}", code="host-file-unwritable"
        ) from error


def _content(path: Path) -> str:
    with contextlib.suppress(FileNotFoundError):
        return path.read_text().rstrip("\n") + "\n\n"
    return ""


def _text(name: str) -> str:
    return (files("offload") / "host_files" / name).read_text(encoding="utf-8")
