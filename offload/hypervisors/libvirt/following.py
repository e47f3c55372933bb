"""What a libvirt daemon says has changed: its events, collected until somebody asks.

https://libvirt.org/html/libvirt-libvirt-domain.html#virDomainEventID. They come on the thread that
`offload.libvirtd` keeps for them.
"""

from __future__ import annotations

import contextlib
import threading
from functools import partial
from typing import Any

from offload.libvirtd import Libvirt

# of virDomainEventID: LIFECYCLE, DISK_CHANGE, DEVICE_REMOVED, BLOCK_JOB_2, AGENT_LIFECYCLE,
# DEVICE_ADDED, METADATA_CHANGE. The callback's first argument after the connection is the domain.
_DOMAIN_EVENTS = (0, 9, 15, 16, 18, 19, 23)
_POOL_EVENTS = (0, 1)  # of virStoragePoolEventID: LIFECYCLE, REFRESH


class Following:
    """The names of what has changed since it was last asked."""

    def __init__(self, link: Libvirt) -> None:
        """Begin. Raises UnavailableError."""
        self._link = link
        self._condition = threading.Condition()
        self._domains: set[str] = set()
        self._pools = False
        self._numbers: list[tuple[str, int]] = []
        with link.translated("does not tell what changes"):
            connection = link.connection
            for event in _DOMAIN_EVENTS:
                number = connection.domainEventRegisterAny(None, event, self._domain, None)
                self._numbers.append(("domainEventDeregisterAny", number))
            connection.registerCloseCallback(self._closed, None)
        for event in _POOL_EVENTS:
            number = link.optional("does not tell what changes", partial(self._on_pool, event), -1)
            if number >= 0:
                self._numbers.append(("storagePoolEventDeregisterAny", number))

    def _on_pool(self, event: int) -> int:
        register = self._link.connection.storagePoolEventRegisterAny
        return int(register(None, event, self._pool, None))

    def wait(self, seconds: float) -> bool:
        """Whether anything has changed, or the connection is gone; at once if it has already."""
        with self._condition:
            return self._condition.wait_for(
                lambda: bool(self._domains) or self._pools or not self._link.alive(), seconds
            )

    def take(self) -> tuple[frozenset[str], bool]:
        """UUIDs of domains, and whether storage pools have changed. Forgets them."""
        with self._condition:
            found = frozenset(self._domains), self._pools
            self._domains, self._pools = set(), False
            return found

    def end(self) -> None:
        """Never raises."""
        for name, number in self._numbers:
            with contextlib.suppress(self._link.api.libvirtError):
                getattr(self._link.connection, name)(number)
        with contextlib.suppress(self._link.api.libvirtError):
            self._link.connection.unregisterCloseCallback()
        self._numbers = []

    def _domain(self, _connection: Any, domain: Any, *_rest: Any) -> None:
        with self._condition:
            self._domains.add(domain.UUIDString())
            self._condition.notify_all()

    def _pool(self, _connection: Any, _pool: Any, *_rest: Any) -> None:
        with self._condition:
            self._pools = True
            self._condition.notify_all()

    def _closed(self, _connection: Any, _reason: int, _opaque: Any) -> None:
        with self._condition:
            self._condition.notify_all()
