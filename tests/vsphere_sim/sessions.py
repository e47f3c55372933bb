"""Sessions, and what may be called without one."""

from __future__ import annotations

import threading
from datetime import datetime
from typing import Any

from pyVmomi import vim

from tests.vsphere_sim.calls import Call, Part
from tests.vsphere_sim.properties import Managed
from tests.vsphere_sim.soap import SoapFault

_OPEN = ("RetrieveServiceContent", "Login", "CurrentTime")  # without a session


class Sessions(Part):
    """Who may come in."""

    def __init__(self, model: Any, user: str, password: str) -> None:
        super().__init__(model)
        self.passwords = {user: password}
        self._users: dict[str, str] = {}  # by session
        self._calling = threading.local()

    @property
    def count(self) -> int:
        """Logged in now."""
        with self.model.changed:
            return len(self._users)

    def end(self) -> None:
        """All of them, as after a time-out or a restart."""
        with self.model.changed:
            self._users.clear()

    def user(self, session: str) -> str | None:
        """Who has logged in."""
        return self._users.get(session)

    def admit(self, session: str, found: Managed, method: str) -> Call:
        """Raises SoapFault (NotAuthenticated)."""
        user = self._users.get(session)
        if user is None and method not in _OPEN:
            raise SoapFault(
                vim.fault.NotAuthenticated(object=found.ref, privilegeId="System.View"),
                "The session is not authenticated.",
            )
        self._calling.session = session
        return Call(session=session, user=user or "", method=method)

    def current(self) -> Any:
        """The session of the call that this thread answers: SessionManager.currentSession."""
        session = getattr(self._calling, "session", "")
        user = self._users.get(session)
        return None if user is None else self._session(session, user)

    def _session(self, session: str, user: str) -> Any:
        now = self.model.now()
        return vim.UserSession(
            key=session, userName=user, fullName=user, loginTime=now, lastActiveTime=now,
            locale="en", messageLocale="en",
        )  # fmt: skip

    def CurrentTime(self, _call: Call, _of: Managed) -> datetime:
        """The server's clock."""
        return self.model.now()

    def Login(
        self, call: Call, _of: Managed, userName: str, password: str, locale: str | None
    ) -> Any:
        """Raises InvalidLogin "if the user and password combination is invalid"."""
        if self.passwords.get(userName) != password:
            raise SoapFault(
                vim.fault.InvalidLogin(),
                "Cannot complete login due to an incorrect user name or password.",
            )
        self._users[call.session] = userName
        return self._session(call.session, userName)

    def Logout(self, call: Call, _of: Managed) -> None:
        """The session ends."""
        self._users.pop(call.session, None)
