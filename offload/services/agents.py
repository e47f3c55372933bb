"""What a VM's guest agent says: for setting one up."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from pathlib import Path

from offload.config import Config
from offload.configs.quiesce import GuestAgentFreeze
from offload.errors import NotFoundError, UsageError
from offload.guest_agent import AgentError, FileSystem, GuestAgent, GuestSystem
from offload.quiescers import hook_report
from offload.quiescers.ourselves import agent_facts


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentReport:
    """What it does not tell is empty. `hooks`: what hooks of ours did at the last freeze."""

    vm: str
    socket: Path
    version: str
    frozen: bool
    system: GuestSystem
    host_name: str
    addresses: tuple[str, ...]
    file_systems: tuple[FileSystem, ...]
    hooks: tuple[str, ...]


def look(config: Config, vm: str) -> AgentReport:
    """Ask the agent of a VM. Changes nothing.

    Raises NotFoundError (`unknown-vm`), UsageError (`no-agent`), and what GuestAgent raises.
    """
    entry = config.vms.get(vm)
    if entry is None:
        raise NotFoundError(
            f"there is no VM {vm} in the configuration",
            code="unknown-vm",
            hint=f"there are: {', '.join(sorted(config.vms))}" if config.vms else "",
        )
    if not isinstance(entry.freeze, GuestAgentFreeze):
        raise UsageError(
            f"VM {vm} is not frozen by a guest agent's socket",
            code="no-agent",
            hint=f'vms.{vm}.freeze.kind is not "qemu-ga"',
        )
    with GuestAgent(entry.freeze.socket) as agent:
        version, frozen = agent.version(), agent.frozen()
        report = AgentReport(
            vm=vm,
            socket=entry.freeze.socket,
            version=version,
            frozen=frozen,
            system=GuestSystem(id="", name=""),
            host_name="",
            addresses=(),
            file_systems=(),
            hooks=(),
        )
        return report if frozen else _with_more(report, agent)


def _with_more(report: AgentReport, agent: GuestAgent) -> AgentReport:
    """What a frozen agent refuses to say, and its administrator may have blocked."""
    system, host_name = report.system, ""
    addresses: tuple[str, ...] = ()
    lines: list[str] = []
    with contextlib.suppress(AgentError):
        system = agent.system()
    with contextlib.suppress(AgentError):
        host_name = agent.host_name()
    with contextlib.suppress(AgentError):
        addresses = tuple(sorted(agent_facts(agent.interfaces()).addresses))
    with contextlib.suppress(AgentError):
        text = hook_report.read(agent)
        lines = hook_report.parse(text).lines() if hook_report.number_of(text) else []
    return replace(
        report,
        system=system,
        host_name=host_name,
        addresses=addresses,
        file_systems=agent.file_systems(),
        hooks=tuple(lines),
    )
