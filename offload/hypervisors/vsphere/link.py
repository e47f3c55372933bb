"""A session with a vSphere server that is made again when it is lost: expiry, a restart."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType
from typing import Self, TypeVar

from offload.configs.hypervisors import VsphereConfig
from offload.errors import UnavailableError
from offload.vsphere import Vsphere

T = TypeVar("T")

_LOST = ("vsphere-session", "vsphere-unavailable")
_CALL_S = 300.0  # a rescan of a host with many LUNs blocks for minutes
_FIRST_PAUSE_S = 0.05
_LAST_PAUSE_S = 5.0


class SessionLostError(UnavailableError):
    """What was being waited for went with the session: a task of a vCenter that was restarted."""

    code = "vsphere-session"


class Link:
    """Runs pieces of work, each in a living session. One thread at a time.

    A piece that loses its session is run again, whole, in a new one: it must be idempotent, and
    keep references (`_moId`), never objects. Whoever does not answer for `patience_s` is given up.
    """

    def __init__(self, config: VsphereConfig, *, patience_s: float) -> None:
        self._config = config
        self._patience_s = patience_s
        self._session: Vsphere | None = None

    def do(self, work: Callable[[Vsphere], T]) -> T:
        """What the work returns. Raises what it raises, ConfigError (`vsphere-login` …),
        UnavailableError (`vsphere-unavailable`)."""
        until = time.monotonic() + self._patience_s
        pause_s = _FIRST_PAUSE_S
        while True:
            try:
                return work(self._connected())
            except UnavailableError as error:
                if error.code not in _LOST or time.monotonic() + pause_s > until:
                    raise
                self.close()
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, _LAST_PAUSE_S)

    def _connected(self) -> Vsphere:
        if self._session is None:
            self._session = Vsphere(self._config, call_s=_CALL_S)
        return self._session

    def close(self) -> None:
        """Log out. Never raises."""
        session, self._session = self._session, None
        if session is not None:
            session.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
