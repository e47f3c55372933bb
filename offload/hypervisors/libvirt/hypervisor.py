"""`[hypervisors.NAME]` of kind libvirt: what a daemon has, followed by its events.

libvirt tells most changes at once: domains defined, started, stopped, undefined, disks plugged,
tags given, agents that connect. Of some it says nothing (a disk that was resized, one that was
added to a domain that is off): a wait that ends without an event looks at everything.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import replace
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Self

from offload.configs.hypervisors import LibvirtConfig
from offload.errors import ConfigError, NotFoundError, UnavailableError
from offload.hypervisors.libvirt import domain_xml
from offload.hypervisors.libvirt.domains import DomainReader
from offload.hypervisors.libvirt.following import Following
from offload.instance import Instance
from offload.inventory import Inventory, InventoryChange, by_kind
from offload.libvirtd import Libvirt
from offload.machine import Machine


class LibvirtHypervisor:
    """A libvirt daemon as an inventory; see `offload.hypervisor`."""

    kind = "libvirt"

    def __init__(self, name: str, entry: LibvirtConfig, instance: Instance) -> None:  # noqa: ARG002
        if not isinstance(entry, LibvirtConfig):
            raise ConfigError(f"[hypervisors.{name}] is not of kind libvirt")
        self.name = name
        self._uri = entry.uri
        self._link: Libvirt | None = None
        self._reader: DomainReader | None = None
        self._following: Following | None = None
        self._known = Inventory(hypervisor=name, taken_at=datetime.now(UTC))
        self._begun = False

    def __enter__(self) -> Self:
        """Raises UnavailableError (`libvirt-unavailable`), PrivilegeError."""
        self._connect()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._hang_up()

    def _connect(self) -> DomainReader:
        link = Libvirt(self._uri)
        try:
            self._reader = DomainReader(link)
        except BaseException:
            link.close()
            raise
        self._link = link
        return self._reader

    def _hang_up(self) -> None:
        following, self._following = self._following, None
        if following is not None:
            following.end()
        link, self._link, self._reader = self._link, None, None
        if link is not None:
            link.close()

    def _used(self) -> tuple[Libvirt, DomainReader]:
        if self._link is None or self._reader is None:
            raise UnavailableError(
                f"there is no connection to libvirt at {self._uri}", code="libvirt-unavailable"
            )
        return self._link, self._reader

    # -- inventory -----------------------------------------------------------------------------

    def inventory(self) -> Inventory:
        """All domains, storage pools, the host."""
        link, reader = self._used()
        if self._following is None:
            self._following = Following(link)
        self._following.take()  # before it is read: what comes meanwhile is seen again
        self._known = self._read(reader)
        self._begun = True
        return self._known

    def _read(self, reader: DomainReader) -> Inventory:
        now = datetime.now(UTC)
        datastores = reader.read_pools()
        vms = []
        for handle in reader.handles():
            with contextlib.suppress(NotFoundError):  # gone since it was listed
                vms.append(reader.vm(handle))
        return Inventory(
            hypervisor=self.name,
            taken_at=now,
            vms=tuple(sorted(vms, key=lambda vm: (vm.name, vm.id))),
            datastores=datastores,
            hosts=(reader.host(),),
        )

    def changes(self, wait_s: float) -> InventoryChange:
        """See `offload.hypervisor`."""
        until = time.monotonic() + wait_s
        while True:
            if not self._begun:
                raise UnavailableError("nobody has read the inventory yet", code="not-followed")
            following = self._following
            told = following is not None and following.wait(max(0.0, until - time.monotonic()))
            if following is None or self._link is None or not self._link.alive():
                return self._compare(self._read_anew())
            domains, pools = following.take()
            if not told or pools:
                found = self._compare(self._read(self._used()[1]))
            else:
                found = self._compare(self._again(domains))
            if found or not told:
                return found

    def _read_anew(self) -> Inventory:
        """By another connection, as the one that there was is dead."""
        self._hang_up()
        reader = self._connect()
        self._following = Following(self._used()[0])
        return self._read(reader)

    def _again(self, ids: frozenset[str]) -> Inventory:
        """What was known, with these domains read again."""
        _, reader = self._used()
        kept = [vm for vm in self._known.vms if vm.id not in ids]
        for number in ids:
            with contextlib.suppress(NotFoundError):  # gone
                kept.append(reader.vm(self._handle(number)))
        return replace(
            self._known,
            taken_at=datetime.now(UTC),
            vms=tuple(sorted(kept, key=lambda vm: (vm.name, vm.id))),
        )

    def _compare(self, now: Inventory) -> InventoryChange:
        """What differs from what was known; `now` is known from here on."""
        before, self._known = self._known, now
        old = {entry.id: entry for entry in before.entries}
        new = {entry.id for entry in now.entries}
        return InventoryChange(
            at=now.taken_at,
            **by_kind(entry for entry in now.entries if old.get(entry.id) != entry),
            gone=tuple(number for number in old if number not in new),
        )

    # -- one VM --------------------------------------------------------------------------------

    def find(self, wanted: str) -> str:
        """By name or UUID. Raises NotFoundError (`unknown-vm`)."""
        handle = self._handle(wanted)
        with self._used()[0].about(wanted):
            mark = domain_xml.mark_of(domain_xml.parse(handle.XMLDesc(0)))
        if mark is not None and mark.kind == domain_xml.PLACEHOLDER:
            raise self._unknown(wanted)
        return str(handle.UUIDString())

    def machine(self, vm_id: str) -> Machine:
        """Raises NotFoundError (`unknown-vm`)."""
        _, reader = self._used()
        return reader.machine(self._handle(vm_id), self.name)

    def _handle(self, wanted: str) -> Any:
        link, _ = self._used()
        try:
            return link.domain(wanted).handle
        except NotFoundError as error:
            raise self._unknown(wanted) from error

    def _unknown(self, wanted: str) -> NotFoundError:
        return NotFoundError(
            f"hypervisor {self.name} has no VM '{wanted}'",
            code="unknown-vm",
            hint=f"see: virsh -c {self._uri} list --all",
        )
