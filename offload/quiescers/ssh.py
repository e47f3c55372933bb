"""A quiesce script in the guest, run over OpenSSH's client: one login a phase."""

from __future__ import annotations

import os
from pathlib import Path

from offload.configs.quiesce import SshApplication
from offload.errors import ConfigError
from offload.instance import Instance
from offload.quiescers.holds_program import Program
from offload.quiescers.program import ProgramPart, environment
from offload.run import require_program
from offload.secret_file import check_private

_CONNECT_S = 10
# Nothing of this machine's or the user's ssh_config, nothing is asked, nothing is forwarded, and
# nothing is trusted at first sight.
_OPTIONS = (
    "BatchMode=yes",
    "StrictHostKeyChecking=yes",
    "UpdateHostKeys=no",
    "GlobalKnownHostsFile=/dev/null",
    "IdentitiesOnly=yes",
    "IdentityAgent=none",
    "PreferredAuthentications=publickey",
    "ClearAllForwardings=yes",
    "ForwardAgent=no",
    "ForwardX11=no",
    "ControlPath=none",
    "ServerAliveInterval=5",
    "ServerAliveCountMax=2",
    "LogLevel=ERROR",
)


class SshPart(ProgramPart):
    """One `kind = "ssh"` entry."""

    kind = "ssh"

    def __init__(self, vm: str, entry: SshApplication, instance: Instance) -> None:
        self._entry = entry
        program = Program(
            name=f"ssh:{entry.name}@{entry.host}",
            command=entry.command,
            env=environment(vm, instance),
            timeout_s=entry.timeout_s,
            via=ssh_argv(entry),
        )
        super().__init__(program, entry.level, instance)

    def check(self) -> None:
        """Also raises ConfigError (`secret-missing`, `secret-unsafe`, `known-hosts-missing`)."""
        require_program("ssh", "openssh-client")
        _check_key(self._entry.identity_file)
        if not self._entry.known_hosts.is_file():
            raise ConfigError(
                f"there is no file {self._entry.known_hosts} with the guest's host key",
                code="known-hosts-missing",
                hint="read the key on the guest itself (ssh-keygen -lf) and compare",
            )
        super().check()


def ssh_argv(entry: SshApplication) -> tuple[str, ...]:
    """Up to the remote command, which is one word more."""
    options = [
        *_OPTIONS,
        f"ConnectTimeout={_CONNECT_S}",
        f"UserKnownHostsFile={_quoted(entry.known_hosts)}",
        f"IdentityFile={_quoted(entry.identity_file)}",
    ]
    argv = ["ssh", "-F", "none", "-T", "-p", str(entry.port), "-l", entry.user]
    for option in options:
        argv += ["-o", option]
    return (*argv, "--", entry.host)


def _quoted(path: Path) -> str:
    """A path as ssh_config(5) takes it: without tokens, spaces kept together."""
    return '"' + str(path).replace("%", "%%") + '"'


def _check_key(path: Path) -> None:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise ConfigError(
            f"cannot read the SSH key in {path}: {error.strerror}", code="secret-missing"
        ) from error
    try:
        check_private(fd, path, "SSH key")
    finally:
        os.close(fd)
