"""open-iscsi: an iSCSI LUN as a disk of this machine.

A target is made known by a node record (open-iscsi's own file, 0600), into which the CHAP secrets
are written: `iscsiadm` would take them on its command line only. open-iscsi itself never logs in
to it (startup manual), and only the LUN that was asked for becomes a disk (scan manual).

Sources: open-iscsi 2.1.8, README and include/iscsi_err.h; the kernel's scsi_transport_iscsi.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from offload import kernel_module, run
from offload.endpoint import IscsiEndpoint
from offload.errors import (
    BusyError,
    ConfigError,
    NotFoundError,
    OffloadError,
    PrivilegeError,
    UnavailableError,
)
from offload.iscsi import Chap

_FOLDER = Path("/etc/iscsi")
_NODES = _FOLDER / "nodes"
_SESSIONS = Path("/sys/class/iscsi_session")
_HOSTS = Path("/sys/class/scsi_host")
_LOGIN_S = 60.0  # for iscsiadm; the limits in the record are shorter
_DISK_S = 20.0  # for the kernel to make a disk of a LUN
_REACH_S = 5.0

# include/iscsi_err.h
_SESSION_EXISTS = 15
_NO_DAEMON = 20
_NOTHING_FOUND = 21
_AUTH_FAILED = 24


def check() -> None:
    """Load the modules if need be.

    Raises PrivilegeError, UnavailableError (`program-missing`, `module-missing`).
    """
    run.require_program("iscsiadm", "open-iscsi")
    if os.geteuid() != 0:
        raise PrivilegeError("iSCSI sessions are root's to make", hint="run it as root")
    kernel_module.load("a disk over iSCSI", "iscsi_tcp", "sd_mod")  # sd_mod: where no udevd runs


def known(endpoint: IscsiEndpoint) -> bool:
    """Whether open-iscsi has a record of this target at this portal, or a session with it."""
    return bool(_records(endpoint)) or find_session(endpoint) is not None


def initiator_name() -> str:
    """The IQN of this machine, "" where it has none."""
    with contextlib.suppress(OSError):
        text = (_FOLDER / "initiatorname.iscsi").read_text()
        found = re.search(r"^InitiatorName=(\S+)", text, re.MULTILINE)
        return found[1] if found else ""
    return ""


def login(endpoint: IscsiEndpoint, chap: Chap | None, *, timeout_s: int) -> str:
    """Log in and make a disk of the LUN; its path.

    A request that is not answered within `timeout_s` of the loss of the session fails. Raises what
    `check` raises, UnavailableError (`server-gone`, `iscsid-missing`, `login-failed`, `no-device`),
    ConfigError (`login-refused`), BusyError (`already-connected`), NotFoundError (`lun-missing`).
    What an error leaves is for `logout`.
    """
    check()
    _reach(endpoint)
    _remove_records(endpoint)
    _iscsiadm(endpoint, "--op", "new")
    _amend(endpoint, _settings(chap, timeout_s))
    _iscsiadm(endpoint, "--login")
    return _wait_disk(endpoint)


def logout(endpoint: IscsiEndpoint) -> None:
    """End the session and forget the target. Idempotent.

    Raises UnavailableError (`program-missing`, `iscsid-missing`, `logout-failed`).
    """
    session = find_session(endpoint)
    if session is not None:
        program = run.require_program("iscsiadm", "open-iscsi")
        number = session.name.removeprefix("session")
        argv = [program, "--mode", "session", "--sid", number, "--logout"]
        done = run.run(argv, timeout_s=_LOGIN_S, check=False)
        if done.status not in (0, _NOTHING_FOUND):
            raise _explain(endpoint, done, "logout-failed")
    _remove_records(endpoint)


def find_session(endpoint: IscsiEndpoint) -> Path | None:
    """The session with this target at this portal (its folder in sysfs), or None."""
    wanted = {(address, endpoint.port) for address in _addresses(endpoint.host)}
    for session in _SESSIONS.glob("session*"):
        with contextlib.suppress(OSError, ValueError):
            if _text(session / "targetname") == endpoint.iqn and wanted & _portals(session):
                return session
    return None


def find_disk(endpoint: IscsiEndpoint) -> str | None:
    """The disk that the LUN is, or None."""
    session = find_session(endpoint)
    return None if session is None else _disk(session, endpoint.lun)


def logged_in(endpoint: IscsiEndpoint) -> bool:
    """Whether there is a session and it works at present: iscsid mends a broken one by itself."""
    session = find_session(endpoint)
    with contextlib.suppress(OSError):
        return session is not None and _text(session / "state") == "LOGGED_IN"
    return False


def wait_logged_in(endpoint: IscsiEndpoint, patience_s: float) -> bool:
    """Wait for iscsid to mend a session; whether it did."""
    until = time.monotonic() + patience_s
    while not logged_in(endpoint):
        if find_session(endpoint) is None or time.monotonic() > until:
            return False
        time.sleep(0.05)
    return True


# -- node records -----------------------------------------------------------------------------


def _settings(chap: Chap | None, timeout_s: int) -> dict[str, str]:
    settings = {
        "node.startup": "manual",
        "node.conn[0].startup": "manual",
        "node.session.scan": "manual",
        "node.session.timeo.replacement_timeout": str(timeout_s),
        # for a server that does not answer: open-iscsi's own defaults try for minutes
        "node.session.initial_login_retry_max": "2",
        "node.conn[0].timeo.login_timeout": "10",
        "node.conn[0].timeo.logout_timeout": "5",
    }
    if chap is None:
        return settings
    settings |= {
        "node.session.auth.authmethod": "CHAP",
        "node.session.auth.username": chap.user,
        "node.session.auth.password": chap.secret.get_secret_value(),
    }
    if chap.mutual_user is not None and chap.mutual_secret is not None:
        settings |= {
            "node.session.auth.username_in": chap.mutual_user,
            "node.session.auth.password_in": chap.mutual_secret.get_secret_value(),
        }
    return settings


def _amend(endpoint: IscsiEndpoint, settings: Mapping[str, str]) -> None:
    """Set lines `name = value` of the record, which `iscsiadm` has just made."""
    for path in _records(endpoint):
        kept = [
            line
            for line in path.read_text().splitlines()
            if line.partition(" = ")[0] not in settings and line != "# END RECORD"
        ]
        lines = [*kept, *(f"{name} = {value}" for name, value in settings.items()), "# END RECORD"]
        fresh = _unfinished(endpoint)
        fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            with os.fdopen(fd, "w") as out:
                out.write("\n".join(lines) + "\n")
            fresh.rename(path)
        finally:
            fresh.unlink(missing_ok=True)


def _unfinished(endpoint: IscsiEndpoint) -> Path:
    """A record that is being written. Not in the folder of records, where it were one; and known
    by its name, for a crash may leave it, with secrets."""
    return _FOLDER / f".offload.{endpoint.iqn}"


def _records(endpoint: IscsiEndpoint) -> list[Path]:
    """Its files: `IQN/HOST,PORT`, or where the portal group is known `IQN/HOST,PORT,TPGT/IFACE`."""
    name = f"{endpoint.host},{endpoint.port}"
    found = []
    for path in (_NODES / endpoint.iqn).glob("*"):
        if path.name == name and path.is_file():
            found.append(path)
        elif path.name.startswith(f"{name},"):
            found += list(path.iterdir())
    return found


def _remove_records(endpoint: IscsiEndpoint) -> None:
    _unfinished(endpoint).unlink(missing_ok=True)
    for path in _records(endpoint):
        path.unlink(missing_ok=True)
        if path.parent.name != endpoint.iqn:
            shutil.rmtree(path.parent, ignore_errors=True)
    with contextlib.suppress(OSError):  # other portals of it are known, or nothing ever was
        (_NODES / endpoint.iqn).rmdir()


# -- sessions and disks -------------------------------------------------------------------------


def _iscsiadm(endpoint: IscsiEndpoint, *words: str) -> None:
    program = run.require_program("iscsiadm", "open-iscsi")
    target = ("--targetname", endpoint.iqn, "--portal", endpoint.portal)
    done = run.run([program, "--mode", "node", *target, *words], timeout_s=_LOGIN_S, check=False)
    if done.status != 0:
        raise _explain(endpoint, done, "login-failed")


def _explain(endpoint: IscsiEndpoint, done: run.Completed, code: str) -> OffloadError:
    where = f"{endpoint.iqn} at {endpoint.portal}"
    if done.status == _AUTH_FAILED:
        return ConfigError(
            f"{where} refused the login of {initiator_name()}",
            code="login-refused",
            hint="the target must name this initiator, and [iscsi.chap] hold its user and secret",
        )
    if done.status == _NO_DAEMON:
        return UnavailableError(
            "iscsid, the daemon of open-iscsi, does not run",
            code="iscsid-missing",
            hint="start it: systemctl start iscsid.socket (without systemd: iscsid)",
        )
    if done.status == _SESSION_EXISTS:
        return BusyError(f"there is a session with {where} already", code="already-connected")
    lines = [line.removeprefix("iscsiadm: ") for line in done.stderr.splitlines() if line.strip()]
    said = next((line for line in lines if "reported error" in line), "; ".join(lines[-2:]))
    return UnavailableError(
        f"open-iscsi and {where}: {said}",
        code=code,
        hint="see whether the view is still served there: offload views",
    )


def _reach(endpoint: IscsiEndpoint) -> None:
    """iscsid would try for a long time where nobody listens."""
    try:
        socket.create_connection((endpoint.host, endpoint.port), timeout=_REACH_S).close()
    except OSError as error:
        raise UnavailableError(
            f"no iSCSI portal answers at {endpoint.portal}: {error.strerror or error}",
            code="server-gone",
            hint="serve it again (offload recover), or check the address",
        ) from error


def _wait_disk(endpoint: IscsiEndpoint) -> str:
    """Have the kernel look for this one LUN, and wait for its disk."""
    session = find_session(endpoint)
    if session is None:
        raise UnavailableError(
            f"the session with {endpoint.iqn} ended at once", code="login-failed"
        )
    host = (session / "device").resolve().parent.name
    (_HOSTS / host / "scan").write_text(f"- - {endpoint.lun}")  # the session's own host
    if not list(_luns(session, endpoint.lun)):
        raise NotFoundError(
            f"{endpoint.iqn} at {endpoint.portal} shows this initiator no LUN {endpoint.lun}",
            code="lun-missing",
        )
    until = time.monotonic() + _DISK_S
    while time.monotonic() < until:
        found = _disk(session, endpoint.lun)
        if found is not None and Path(found).exists():
            return found
        time.sleep(0.01)
    raise UnavailableError(
        f"the kernel made no disk of LUN {endpoint.lun} of {endpoint.iqn}",
        code="no-device",
        hint="see what it says: dmesg",
    )


def _disk(session: Path, lun: int) -> str | None:
    for folder in _luns(session, lun):
        for disk in (folder / "block").glob("*"):
            return f"/dev/{disk.name}"
    return None


def _luns(session: Path, lun: int) -> Iterator[Path]:
    """SCSI devices of a session are called HOST:CHANNEL:TARGET:LUN."""
    for folder in (session / "device").glob("target*/*:*:*:*"):
        if folder.name.rpartition(":")[2] == str(lun):
            yield folder


def _portals(session: Path) -> set[tuple[str, int]]:
    found = set()
    for connection in (session / "device").glob("connection*/iscsi_connection/*"):
        port = int(_text(connection / "persistent_port"))
        found.add((_text(connection / "persistent_address"), port))
    return found


def _addresses(host: str) -> set[str]:
    """A host as it was named, and its addresses."""
    found = {host}
    with contextlib.suppress(OSError):
        found |= {str(entry[4][0]) for entry in socket.getaddrinfo(host, None)}
    return found


def _text(path: Path) -> str:
    return path.read_text().strip()
