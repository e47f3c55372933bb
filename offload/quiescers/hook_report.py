"""What hooks in a guest did for a freeze: the report that our dispatcher writes there.

`offload/guest_hooks/offload-fsfreeze-hook` writes it, in memory of the guest, a line each:

    offload-fsfreeze 1
    id 3f0c…                          of this freeze
    freeze mysql 0                    a hook has ended, with this status
    said mysql level=application      what it printed; this line is a claim, the others are words
    thaw mysql 0                      not 0: what it held had ended before
    end                               the thaw was complete

It is a guest's word, like everything that its agent says.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from offload.guest_agent import AgentError, GuestAgent, shown

PATH = "/run/offload-fsfreeze/report"

_MAX_BYTES = 64 << 10
_LINES_MAX = 40
_CLAIM = "level=application"


@dataclass(slots=True)
class Hook:
    """One hook. A status is None where it did not end."""

    freeze: int | None = None
    thaw: int | None = None
    said: list[str] = field(default_factory=list)
    claims: bool = False


@dataclass(slots=True)
class HookReport:
    """All hooks of a freeze, in their order."""

    hooks: dict[str, Hook] = field(default_factory=dict)
    complete: bool = False

    @property
    def held_applications(self) -> bool:
        """Whether hooks held applications, and every hook succeeded, from freeze to thaw."""
        hooks = self.hooks.values()
        good = all(hook.freeze == 0 and hook.thaw == 0 for hook in hooks)
        return self.complete and good and any(hook.claims for hook in hooks)

    def lines(self) -> list[str]:
        """For the report of a TimeMark."""
        return [_line(name, hook) for name, hook in self.hooks.items()][:_LINES_MAX]

    def failed(self) -> list[str]:
        """The lines of hooks that ended the freeze."""
        failed = [(name, hook) for name, hook in self.hooks.items() if hook.freeze != 0]
        return [_line(name, hook) for name, hook in failed][:_LINES_MAX]


def _line(name: str, hook: Hook) -> str:
    return f"hook {name}: {'; '.join(hook.said) or 'done'}{_trouble(hook)}"


def _trouble(hook: Hook) -> str:
    if hook.freeze != 0:
        return f" (freeze ended with status {hook.freeze})"
    if hook.thaw != 0:
        return f" (thaw ended with status {hook.thaw}: it had not held until then)"
    return ""


def read(agent: GuestAgent) -> str:
    """The report that is there, of whatever freeze; empty where there is none.

    Raises AgentError where the agent may not read files.
    """
    try:
        content = agent.read_file(PATH, _MAX_BYTES)
    except AgentError as error:
        if error.kind == "CommandNotFound":
            raise
        return ""  # there is no such file
    return content.decode("utf-8", "replace")


def number_of(text: str) -> str:
    """The `id` of a report; empty if it is none."""
    lines = text.splitlines()[:2]
    if len(lines) == 2 and lines[0] == "offload-fsfreeze 1" and lines[1].startswith("id "):
        return lines[1].removeprefix("id ")
    return ""


def parse(text: str) -> HookReport:
    """What is not understood is left out."""
    report = HookReport()
    for line in text.splitlines()[2:]:
        word, _, rest = line.partition(" ")
        name, _, value = rest.partition(" ")
        if word == "end":
            report.complete = True
        elif word in ("freeze", "thaw", "said") and name:
            hook = report.hooks.setdefault(shown(name), Hook())
            _take(hook, word, value)
    return report


def _take(hook: Hook, word: str, value: str) -> None:
    if word == "said":
        if value == _CLAIM:
            hook.claims = True
        elif len(hook.said) < _LINES_MAX:
            hook.said.append(shown(value))
    elif re.fullmatch(r"[0-9]{1,3}", value):
        if word == "freeze":
            hook.freeze = int(value)
        else:
            hook.thaw = int(value)
