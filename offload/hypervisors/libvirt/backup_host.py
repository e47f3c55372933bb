"""`[backup_hosts.NAME]` of a libvirt daemon of this machine: placeholders are shut-off domains.

| step of `build` | what is there then |
| --- | --- |
| `overlay-N-DISK` | the overlay file of one disk of the Nth VM, in `disk_dir` |
| `nvram-N` | the copy of its firmware's variables, beside it |
| `define-N` | the domain: shut off, never started by itself |

Files are called `offload.INSTANCE.ISLAND.…`, domains bear a metadata element with both
(`domain_xml`): `take_down` finds all of it by the record of `plan`, whatever was cut off.

Only a daemon of this machine: an overlay names its view by an address without TLS and without a
secret, and such a view is not offered to the network.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from offload.configs.hypervisors import BackupHostConfig, LibvirtConfig
from offload.errors import (
    BusyError,
    CleanupError,
    ConfigError,
    NotFoundError,
    OffloadError,
    PrivilegeError,
)
from offload.hypervisor import IslandRequest, Standing, Step
from offload.hypervisors.libvirt import overlay_disk, placing, preflight, restored
from offload.hypervisors.libvirt.owned import owned, undefine
from offload.instance import Instance
from offload.island import Placeholder
from offload.libvirtd import DomainState, Libvirt
from offload.machine import Machine
from offload.model import Exposure

_FOLDER = "placeholders"  # in the state folder, unless disk_dir says otherwise


class LibvirtBackupHost:
    """Where placeholders stand as domains; see `offload.hypervisor`."""

    kind = "libvirt"

    def __init__(self, name: str, entry: BackupHostConfig, instance: Instance) -> None:
        hypervisor = instance.config.hypervisor(entry.hypervisor)
        if not isinstance(hypervisor, LibvirtConfig):
            raise ConfigError(f"[hypervisors.{entry.hypervisor}] is not of kind libvirt")
        self.name = name
        self._entry = entry
        self._instance = instance
        self._uri = hypervisor.uri
        self._folder = entry.disk_dir or instance.state_dir / _FOLDER

    # -- before anything is made ---------------------------------------------------------------

    def export(self) -> tuple[str, Exposure, bool]:
        """NBD on a unix socket, or on the loopback address of the configuration; iSCSI for QEMU's
        own initiator. Read-only: the overlays take what is written.

        Raises ConfigError (`not-loopback`, `chap-in-overlay`, `remote-backup-host`).
        """
        self._check_local()
        target, address = self._entry.target or "nbd", self._entry.address
        if target == "nbd":
            if address is None:
                return target, Exposure(transport="unix"), False
            preflight.check_loopback(self.name, address)
            return target, Exposure(transport="tcp", address=address, tls="off"), False
        if self._instance.config.iscsi.chap is not None:
            raise ConfigError(
                "an overlay cannot hold the CHAP secret that a view over iSCSI would ask for",
                code="chap-in-overlay",
                hint=f"set backup_hosts.{self.name}.target = 'nbd'",
            )
        exposure = Exposure(address=address or "", initiators=(overlay_disk.INITIATOR,))
        return target, exposure, False

    def check(self) -> list[str]:
        """Raises ConfigError (`remote-backup-host`, `no-disk-dir`), PrivilegeError,
        UnavailableError (`libvirt-unavailable`)."""
        self.export()
        self._check_folder()
        with Libvirt(self._uri):
            return []

    def _check_local(self) -> None:
        if preflight.is_remote(self._uri):
            raise ConfigError(
                f"backup host {self.name}: {self._uri} is another machine, and placeholders reach "
                "their views only on the machine that serves them",
                code="remote-backup-host",
                hint="run offload on that machine too, and mount the placeholders there",
            )

    def _check_folder(self) -> None:
        if self._entry.disk_dir is None and not self._folder.exists():
            return  # `build` makes it
        if not self._folder.is_dir():
            raise ConfigError(
                f"backup host {self.name}: there is no folder {self._folder}",
                code="no-disk-dir",
                hint=f"make it: install -d -m 0700 {self._folder}; or correct "
                f"backup_hosts.{self.name}.disk_dir",
            )
        if not os.access(self._folder, os.R_OK | os.W_OK | os.X_OK):
            raise PrivilegeError(
                f"this user may not make files in {self._folder}",
                hint=f"run it as the owner, or correct backup_hosts.{self.name}.disk_dir",
            )

    def refuse(self, request: IslandRequest) -> list[str]:
        """Raises UsageError (`no-vm-instant`, `wrong-hypervisor`, `bad-name`), BusyError
        (`name-taken`), PolicyError (`no-disk-to-show`), ConfigError (`wrong-architecture`)."""
        names = preflight.names(request, self._entry.prefix)
        warnings = []
        for machine in request.machines:
            warnings += preflight.left_out(machine, request)
        with Libvirt(self._uri) as link:
            for name in names:
                _check_free(link, name)
            for machine in request.machines:
                preflight.abilities_for(link, machine)
        return warnings

    def plan(self, request: IslandRequest) -> dict[str, str]:
        """All strings; see `take_down`."""
        return {
            "uri": self._uri,
            "instance": self._instance.id,
            "island": request.id,
            "folder": str(self._folder),
        }

    # -- the island ----------------------------------------------------------------------------

    def build(
        self, request: IslandRequest, record: Mapping[str, str], step: Step
    ) -> tuple[Placeholder, ...]:
        """Raises what `refuse` raises, UnavailableError, ProgramError."""
        names = preflight.names(request, self._entry.prefix)
        site = placing.Site(
            folder=Path(record["folder"]),
            prefix=_prefix(record),
            instance=self._instance,
        )
        if self._entry.disk_dir is None:
            self._folder.mkdir(mode=0o700, exist_ok=True)
        with Libvirt(self._uri) as link:
            made = []
            for number, (machine, name) in enumerate(
                zip(request.machines, names, strict=True), start=1
            ):
                _check_free(link, name)
                place = placing.Placing(link, request, machine, site, number)
                made.append(place.build(name, step))
        return tuple(made)

    def take_down(self, record: Mapping[str, str], step: Step) -> None:
        """Raises CleanupError (`placeholder-runs`: nothing is removed then; `cleanup`)."""
        with _confirmed(record), Libvirt(record["uri"]) as link:
            marked = owned(link, record["instance"])
            found = [domain for domain, mark in marked if mark.island == record["island"]]
            running = [domain for domain in found if domain.state() is not DomainState.OFF]
            if running:
                names = ", ".join(domain.name for domain in running)
                raise CleanupError(
                    f"placeholders that were started still run: {names}",
                    code="placeholder-runs",
                    hint=f"shut them down: virsh -c {record['uri']} destroy {running[0].name}",
                )
            for domain in found:
                undefine(link, domain)
                step("undefine")
            for path in _files(record):
                path.unlink(missing_ok=True)
                step("remove-file")

    def look(
        self, record: Mapping[str, str], placeholders: Sequence[Placeholder]
    ) -> list[Standing]:
        """Each is asked for by its UUID, and its disks are opened."""
        with Libvirt(record["uri"]) as link:
            return [_standing(link, each) for each in placeholders]

    # -- VMs that were restored ------------------------------------------------------------------

    def check_create(self, machine: Machine, disks: Mapping[str, str], name: str) -> list[str]:
        """See `offload.hypervisor`. Raises BusyError (`name-taken`), UsageError (`unknown-disk`,
        `no-disk`, `wrong-hypervisor`, `bad-name`, `bad-disk`), ConfigError (`wrong-architecture`),
        UnavailableError."""
        with Libvirt(self._uri) as link:
            _check_free(link, name)
            return restored.look(link, self._order(machine, disks, name))

    def create(
        self, machine: Machine, disks: Mapping[str, str], name: str, mark: str, step: Step
    ) -> str:
        """See `offload.hypervisor`; steps: `define`, `nvram`. Raises what `check_create` raises,
        ConfigError (`socket-out-of-reach`)."""
        with Libvirt(self._uri) as link:
            _check_free(link, name)
            return restored.create(link, self._order(machine, disks, name), mark, step)

    def _order(self, machine: Machine, disks: Mapping[str, str], name: str) -> restored.Order:
        return restored.Order(
            machine=machine, disks=disks, name=name, folder=self._folder, instance=self._instance
        )

    def destroy(self, mark: str) -> None:
        """Raises CleanupError (`vm-runs`), UnavailableError."""
        with Libvirt(self._uri) as link:
            restored.destroy(link, mark, self._instance.id)


def _check_free(link: Libvirt, name: str) -> None:
    try:
        link.domain(name)
    except NotFoundError:
        return
    raise BusyError(
        f"libvirt at {link.uri} has a domain '{name}' already",
        code="name-taken",
        hint="unmount the island that it belongs to, rename it, or set another prefix for "
        "placeholders (backup_hosts.NAME.prefix)",
    )


def _prefix(record: Mapping[str, str]) -> str:
    return f"offload.{record['instance']}.{record['island']}."


def _files(record: Mapping[str, str]) -> Iterator[Path]:
    """Also those that were not whole yet."""
    folder = Path(record["folder"])
    for pattern in ("", "."):
        yield from sorted(folder.glob(f"{pattern}{_prefix(record)}*"))


@contextmanager
def _confirmed(record: Mapping[str, str]) -> Iterator[None]:
    """Whatever cannot be seen to is CleanupError: the views must stay then."""
    try:
        yield
    except CleanupError:
        raise
    except (OffloadError, OSError) as error:
        raise CleanupError(
            f"the placeholders of island {record['island']} could not be removed: {error}",
            code="cleanup",
            hint="mend the cause and run: offload recover",
        ) from error


def _standing(link: Libvirt, placeholder: Placeholder) -> Standing:
    try:
        domain = link.domain(placeholder.id)
    except NotFoundError:
        return Standing(
            placeholder=placeholder.id,
            there=False,
            problem="somebody has removed it",
            do="offload placeholder refresh, or unmount the island",
        )
    power = "off" if domain.state() is DomainState.OFF else "on"
    if power == "on":
        return Standing(
            placeholder=placeholder.id,
            there=True,
            power=power,
            problem="somebody has started it: what it writes goes when the island goes",
            do=f"virsh -c {link.uri} destroy {domain.name}",
        )
    overlays = json.loads(placeholder.record.get("overlays", "[]"))
    problem = next((said for path in overlays if (said := overlay_disk.check(path))), "")
    return Standing(
        placeholder=placeholder.id,
        there=True,
        power=power,
        problem=problem,
        do="offload recover serves its views again" if problem else "",
    )
