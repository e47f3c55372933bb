"""Every error that a user may see.

A family gives the exit code (documented in docs/reference.md and tested); `code` is stable and
kebab-case; `hint` says what to try. Only `UnavailableError` may be retried.
"""

from __future__ import annotations


class OffloadError(Exception):
    """The root of all errors of this project.

    `message` names what failed, on which object and why; `hint` the way out.
    """

    code = "error"
    exit_code = 1

    def __init__(self, message: str, *, hint: str = "", code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        if code is not None:
            self.code = code


class UsageError(OffloadError):
    """The request makes no sense as it stands."""

    code = "usage"
    exit_code = 2


class ConfigError(OffloadError):
    """The configuration file is missing, unsafe or wrong."""

    code = "config"
    exit_code = 3


class NotFoundError(OffloadError):
    """A named thing does not exist, or a prefix fits several."""

    code = "not-found"
    exit_code = 4


class BusyError(OffloadError):
    """Something is in use, exists already, or another process holds it."""

    code = "busy"
    exit_code = 5


class UnavailableError(OffloadError):
    """Something outside is missing or does not answer; a later try may succeed."""

    code = "unavailable"
    exit_code = 6


class IntegrityError(OffloadError):
    """Data is not what it must be. Never retried, never downgraded."""

    code = "integrity"
    exit_code = 7


class CleanupError(OffloadError):
    """Something could not be taken back; `offload recover` tries again."""

    code = "cleanup"
    exit_code = 8


class PolicyError(OffloadError):
    """Refused by a rule: too little space, too weak a consistency, a protected object."""

    code = "policy"
    exit_code = 9


class PrivilegeError(OffloadError):
    """The step needs root (or a capability) that this process lacks."""

    code = "privilege"
    exit_code = 10
