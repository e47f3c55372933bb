"""A guest that the guardian holds through a libvirt daemon. Loads the standard library only."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from offload.errors import CleanupError, NotFoundError, OffloadError, UnavailableError
from offload.libvirtd import Domain, DomainGoneError, DomainState, Libvirt

_STATUS_S = 4.0  # the parent waits 5 s for the answer
_THAW_S = 10.0  # a daemon may be restarted meanwhile, another client's job may have the domain
_LINGER_S = 600.0
_RETRY_S = 0.2


class LibvirtHold:
    """The file systems of a domain's guest, by its agent.

    The connection is made beforehand. `domain`: its name or UUID; `mounts`: in the guest, none for
    all; `bindings`: the folder of libvirt's Python bindings.
    """

    def __init__(
        self, *, uri: str, domain: str, mounts: Sequence[str], bindings: str | None
    ) -> None:
        self._uri = uri
        self._wanted = domain
        self._mounts = mounts
        self._bindings = bindings
        self.ours = True
        self.stuck = False
        self.seen = ""
        self.count = 0
        self._link = Libvirt(uri, bindings)
        try:
            self._domain = self._link.domain(domain)
        except BaseException:
            self._link.close()
            raise
        self.name = hold_name(domain)

    def freeze(self) -> None:
        """Raises UnavailableError (`frozen-by-others`; `nothing-frozen`) and what libvirt says;
        then nothing of ours is frozen."""
        if self._domain.frozen():
            self.ours = False  # not ours to thaw
            raise UnavailableError(
                f"domain {self._domain.name}: somebody else has frozen its guest already",
                code="frozen-by-others",
                hint=f"by hand, if it was forgotten: virsh domfsthaw {self._domain.name}",
            )
        try:
            self.count = self._domain.freeze(self._mounts)
            if self.count == 0:
                raise UnavailableError(
                    f"domain {self._domain.name}: its guest found no file system to freeze",
                    code="nothing-frozen",
                )
        except OffloadError:
            with contextlib.suppress(OffloadError):  # an answer that came too late, or a part
                if self._domain.frozen():
                    self.thaw()
            raise

    def intact(self) -> bool:
        """What the agent says; only the thaw tells whether each file system was frozen still."""
        frozen = self._domain.frozen(_STATUS_S)
        if not frozen:
            self.seen = "its agent says that it was thawed"
        return frozen

    def thaw(self) -> bool:
        """False if not just as many file systems were frozen still as had been frozen, or the guest
        has ended. Raises UnavailableError where it may be frozen still."""
        return self._thaw(time.monotonic() + _THAW_S)

    def linger(self) -> bool:
        """After a thaw that was not confirmed: try on, for ten minutes; whether it was."""
        with contextlib.suppress(UnavailableError):
            self._thaw(time.monotonic() + _LINGER_S)
        return not self.stuck

    def _thaw(self, until: float) -> bool:
        self.stuck = True
        while self.stuck:
            try:
                self._try_thaw()
                self.stuck = False
            except (DomainGoneError, NotFoundError) as error:  # no guest, no writers to let go
                self.seen = f"the guest has ended: {error.message}"
                self.stuck = False
            except UnavailableError:
                if time.monotonic() > until:
                    raise
                time.sleep(_RETRY_S)
        return not self.seen

    def _try_thaw(self) -> None:
        domain = self._reached()
        try:
            thawed = domain.thaw()
        except UnavailableError as error:
            if isinstance(error, DomainGoneError) or domain.frozen():
                raise
            self.seen = f"nobody knows how long it was held: {error.message}"
            return
        if thawed != self.count:
            self.seen = (
                f"{self.count} file systems were frozen, and {thawed} were so at the thaw: "
                "somebody else, or a dead-man timer, has thawed or frozen in between"
            )

    def _reached(self) -> Domain:
        """The domain, by a new connection if the daemon has gone meanwhile."""
        if not self._link.alive():
            self._link.close()
            self._link = Libvirt(self._uri, self._bindings)
            self._domain = self._link.domain(self._wanted)
        return self._domain


def hold_name(domain: str) -> str:
    """How a guest is called in the guardian's answers and its marker."""
    return f"the guest of {domain}"


def undo_libvirt_hold(guest: Mapping[str, Any], marker: Path, *, same_boot: bool) -> None:
    """Thaw a guest that a dead guardian left frozen. Idempotent. Raises CleanupError.

    On the same boot the marker says whether it may be ours. After a reboot of this machine the
    marker is gone and a guest elsewhere may be frozen still: then it is thawed if it is frozen.
    """
    if same_boot and not _named(hold_name(guest["domain"]), marker):
        return
    try:
        with Libvirt(guest["uri"], guest["bindings"]) as link:
            domain = link.domain(guest["domain"])
            if domain.state() is DomainState.RUNNING and domain.frozen():
                domain.thaw()
    except (DomainGoneError, NotFoundError):
        return
    except OffloadError as error:
        raise CleanupError(
            f"cannot see whether a guest is frozen still: {error.message}",
            hint=f"by hand: virsh -c {guest['uri']} domfsthaw {guest['domain']}",
        ) from error


def _named(name: str, marker: Path) -> bool:
    try:
        return name in json.loads(marker.read_text())
    except FileNotFoundError:
        return False
