"""What hypervisors have: read from them, kept in the catalog, shown from there."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime

from offload import compose
from offload.errors import ConfigError, NotFoundError, UnavailableError
from offload.inventory import (
    Datastore,
    Entry,
    HypervisorHost,
    Inventory,
    InventoryChange,
    InventoryVm,
)
from offload.services.context import Context
from offload.services.disk_volumes import volumes_of
from offload.services.inventory_changes import differences

_KINDS: dict[type[Entry], str] = {
    InventoryVm: "vm", Datastore: "datastore", HypervisorHost: "host",
}  # fmt: skip
_WAIT_S = 10.0  # for the next change, before it is looked whether to end
_PAUSE_S = 5.0  # after a server did not answer


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Something that `follow` saw. `event`: read | changed | gone | lost."""

    at: datetime
    hypervisor: str
    event: str
    kind: str = ""  # vm | datastore | host
    name: str = ""
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ShownVm:
    """A VM out of an inventory. `volumes`: those of ours that hold each disk, by its name."""

    hypervisor: str
    taken_at: datetime
    vm: InventoryVm
    volumes: Mapping[str, tuple[str, ...]]


def names(ctx: Context, wanted: str | None) -> list[str]:
    """The hypervisor of this name, or all. Raises NotFoundError (`unknown-hypervisor`), ConfigError
    (`no-hypervisor`)."""
    config = ctx.instance.config
    if wanted is not None:
        config.hypervisor(wanted)
        return [wanted]
    if not config.hypervisors:
        raise ConfigError(
            "no hypervisor is configured",
            code="no-hypervisor",
            hint="add a [hypervisors.NAME] table, see: offload init",
        )
    return list(config.hypervisors)


def fresh(ctx: Context, hypervisor: str) -> Inventory:
    """What a hypervisor has now; kept in the catalog. Raises what it raises."""
    with compose.hypervisor(hypervisor, ctx.instance) as opened:
        found = opened.inventory()
    ctx.catalog.set_inventory(found)
    return found


def last(ctx: Context, hypervisor: str) -> Inventory:
    """As it was when it was last read. Raises NotFoundError (`unknown-inventory`)."""
    found = ctx.catalog.inventory(hypervisor)
    if found is None:
        raise NotFoundError(
            f"the inventory of {hypervisor} was never read",
            code="unknown-inventory",
            hint=f"offload inventory refresh {hypervisor}",
        )
    return found


def show(ctx: Context, wanted: str, hypervisor: str | None) -> ShownVm:
    """One VM, by name, id, UUID or instance UUID. Raises NotFoundError (`unknown-vm`,
    `ambiguous-vm`, `unknown-inventory`)."""
    plain = wanted.lower()
    inventories = [last(ctx, name) for name in names(ctx, hypervisor)]
    hits = [
        (inventory, vm)
        for inventory in inventories
        for vm in inventory.vms
        if wanted in (vm.name, vm.id) or plain in (vm.uuid.lower(), vm.instance_uuid.lower())
    ]
    # a placeholder has the UUIDs of what it stands for
    hits = [hit for hit in hits if not hit[1].placeholder] or hits
    if not hits:
        raise NotFoundError(
            f"no VM '{wanted}' was there when the inventory was read",
            code="unknown-vm",
            hint="see: offload inventory list; read it anew: offload inventory refresh",
        )
    if len(hits) > 1:
        ids = ", ".join(sorted(vm.instance_uuid or vm.id for _, vm in hits))
        raise NotFoundError(
            f"there are {len(hits)} VMs '{wanted}'",
            code="ambiguous-vm",
            hint=f"name it by one of: {ids}",
        )
    inventory, vm = hits[0]
    config = ctx.instance.config
    return ShownVm(
        hypervisor=inventory.hypervisor,
        taken_at=inventory.taken_at,
        vm=vm,
        volumes={disk.name: volumes_of(config, disk) for disk in vm.disks},
    )


def follow(ctx: Context, hypervisor: str) -> Iterator[Event]:
    """Keep an inventory current, for ever. A server that does not answer is tried again."""
    with compose.hypervisor(hypervisor, ctx.instance) as opened:
        found = opened.inventory()
        ctx.catalog.set_inventory(found)
        known = {entry.id: entry for entry in found.entries}
        yield Event(
            at=found.taken_at,
            hypervisor=hypervisor,
            event="read",
            message=f"{len(found.vms)} VMs, {len(found.datastores)} datastores, "
            f"{len(found.hosts)} hosts",
        )
        while True:
            try:
                change = opened.changes(_WAIT_S)
            except UnavailableError as error:
                yield Event(
                    at=datetime.now(found.taken_at.tzinfo),
                    hypervisor=hypervisor,
                    event="lost",
                    message=error.message,
                )
                time.sleep(_PAUSE_S)
                continue
            if change:
                ctx.catalog.change_inventory(hypervisor, change)
                yield from _events(hypervisor, known, change)


def _events(hypervisor: str, known: dict[str, Entry], change: InventoryChange) -> Iterator[Event]:
    """One a thing that shows; `known` is brought up to date."""

    def event(word: str, entry: Entry, message: str) -> Event:
        return Event(
            at=change.at,
            hypervisor=hypervisor,
            event=word,
            kind=_KINDS[type(entry)],
            name=entry.name,
            message=message,
        )

    for moref in change.gone:
        lost = known.pop(moref, None)
        if lost is not None:
            yield event("gone", lost, "is gone")
    for entry in change.entries:
        said = differences(known.get(entry.id), entry)
        known[entry.id] = entry
        if said:
            yield event("changed", entry, "; ".join(said))
