"""Real OpenSSH servers on a port of 127.0.0.1, with keys of their own.

Who may log in is the user who runs the test, by one key. Needs the Debian package `openssh-server`.
"""

from __future__ import annotations

import os
import pwd
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from offload.run import require_program, run
from offload.testing.daemon import Daemon, running
from offload.testing.instances import free_port

_PRIVSEP = Path("/run/sshd")  # where sshd, as root, wants an empty folder
_CONF = """\
ListenAddress 127.0.0.1
Port {port}
HostKey {folder}/host
PidFile none
AuthorizedKeysFile {folder}/authorized
StrictModes no
UsePAM no
PermitRootLogin prohibit-password
PasswordAuthentication no
KbdInteractiveAuthentication no
PrintMotd no
LogLevel VERBOSE
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningSshd:
    """A server, and what a client needs: `user`, `identity_file`, `known_hosts`."""

    port: int
    user: str
    identity_file: Path
    known_hosts: Path
    log: Path
    process: subprocess.Popen[bytes]

    def sessions(self) -> list[int]:
        """The pids of the server's processes that serve a connection now."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        return [int(pid) for pid in children.split()]


def make_key(path: Path) -> str:
    """A private key without a passphrase in `path`; the public one, as a line."""
    keygen = require_program("ssh-keygen", "openssh-client")
    run([keygen, "-q", "-t", "ed25519", "-N", "", "-C", "", "-f", str(path)])
    return path.with_suffix(".pub").read_text().strip()


def known_host(port: int, public_key: str) -> str:
    """A line for known_hosts."""
    return f"[127.0.0.1]:{port} {public_key}\n"


@contextmanager
def running_sshd(folder: Path, port: int | None = None) -> Iterator[RunningSshd]:
    """A server; `folder` is made, keys too, unless they are there."""
    folder.mkdir(mode=0o700, exist_ok=True)
    port = port or free_port()
    identity = folder / "identity"
    if not identity.exists():
        (folder / "authorized").write_text(make_key(identity) + "\n")
        make_key(folder / "host")
    known_hosts = folder / "known_hosts"
    known_hosts.write_text(known_host(port, (folder / "host.pub").read_text().strip()))
    conf, log = folder / "sshd_config", folder / "server.log"
    conf.write_text(_CONF.format(folder=folder, port=port))
    if os.geteuid() == 0:
        _PRIVSEP.mkdir(mode=0o755, exist_ok=True)
    argv = [require_program("sshd", "openssh-server"), "-D", "-e", "-f", str(conf)]

    def answers() -> bool:
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=10) as probe:
                return probe.recv(4) == b"SSH-"
        except OSError:
            return False

    with running(Daemon(argv=argv, log=log), answers) as process:
        yield RunningSshd(
            port=port,
            user=pwd.getpwuid(os.geteuid()).pw_name,
            identity_file=identity,
            known_hosts=known_hosts,
            log=log,
            process=process,
        )
