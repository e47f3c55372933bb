"""`[backup_hosts.NAME]` of a vSphere: an ESXi host on which placeholders stand.

Nothing of this has met a real ESXi: it is tested against a simulator whose hosts really log in to
the views (docs/howto/placeholders.md says what that proves).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from pyVmomi import vim

from offload import iscsi
from offload.configs.hypervisors import BackupHostConfig, VsphereConfig
from offload.errors import BusyError, CleanupError, ConfigError, OffloadError, UnavailableError
from offload.filelock import alone_within
from offload.hypervisor import IslandRequest, Standing, Step
from offload.hypervisors.vsphere import preflight, recreate
from offload.hypervisors.vsphere.attaching import Attaching
from offload.hypervisors.vsphere.building import Building
from offload.hypervisors.vsphere.dismantle import Seen, dismantle
from offload.hypervisors.vsphere.hosts import Host, find_adapter, find_host
from offload.hypervisors.vsphere.link import Link
from offload.hypervisors.vsphere.properties import read_each
from offload.hypervisors.vsphere.record import Record, record_of
from offload.hypervisors.vsphere.register import find_folder, placeholder_names, vms_in
from offload.instance import Instance
from offload.island import Placeholder
from offload.machine import Machine
from offload.model import Exposure
from offload.vsphere import Vsphere

_LOCK_S = 1800.0  # other mounts on this host, each of which has its deadlines


class VsphereBackupHost:
    """Builds islands on one ESXi host. See `offload.hypervisor.BackupHost`."""

    kind = "vsphere"

    def __init__(self, name: str, config: BackupHostConfig, instance: Instance) -> None:
        self.name = name
        self._config = config
        self._instance = instance

    # -- before ----------------------------------------------------------------------------------

    def export(self) -> tuple[str, Exposure, bool]:
        """Writable: a resignature writes. For the initiator of this host alone."""
        with self._link() as link:
            adapter = link.do(lambda v: find_adapter(v, find_host(v, self._config), self._config))
        exposure = Exposure(address=self._config.address or "", initiators=(adapter.iqn,))
        return self._config.target or "lio", exposure, True

    def check(self) -> list[str]:
        """See `offload.hypervisor`. Raises ConfigError (`vsphere-login`, `no-software-iscsi` …),
        NotFoundError (`unknown-host`), UnavailableError (`host-disconnected`,
        `host-in-maintenance`), PrivilegeError (`vsphere-privilege`, `vsphere-read-only`)."""
        if self._config.target == "nbd":
            raise ConfigError(
                f"backup_hosts.{self.name}: vSphere knows no NBD",
                code="target-unfit",
                hint="target = 'lio' or 'tgt'",
            )
        with self._link() as link:
            host = link.do(self._look_at_host)
        if host.cluster:
            warning = (
                f"host {host.name} belongs to cluster {host.cluster}: DRS may move placeholders, "
                "and HA may hold on to their datastores; a standalone host is better"
            )
            return [warning]
        return []

    def _look_at_host(self, vsphere: Vsphere) -> Host:
        host = find_host(vsphere, self._config)
        host.check_usable()
        preflight.check_licence(vsphere)
        find_adapter(vsphere, host, self._config)
        preflight.check_privileges(vsphere, host)
        return host

    def refuse(self, request: IslandRequest) -> list[str]:
        """See `offload.hypervisor`. Raises PolicyError (`no-placeholder`), BusyError
        (`name-taken`)."""
        preflight.refuse_machines(request)
        names = set(self._names(request).values())
        with self._link() as link:
            taken = sorted(names & link.do(self._standing_names))
        if taken:
            raise BusyError(
                f"there is a VM {', '.join(taken)} in the folder {self._config.folder} already",
                code="name-taken",
                hint="unmount its island, or give the backup host another prefix",
            )
        return preflight.warnings_of(request)

    def _standing_names(self, vsphere: Vsphere) -> set[str]:
        folder = find_folder(vsphere, find_host(vsphere, self._config), self._config.folder)
        return set(vms_in(vsphere, folder).values()) if folder is not None else set()

    def _names(self, request: IslandRequest) -> dict[str, str]:
        return placeholder_names(self._config.prefix, request.machines)

    # -- islands ---------------------------------------------------------------------------------

    def plan(self, request: IslandRequest) -> dict[str, str]:
        """See `offload.hypervisor`."""
        with self._link() as link:
            host = link.do(lambda vsphere: find_host(vsphere, self._config))
            adapter = link.do(lambda vsphere: find_adapter(vsphere, host, self._config))
        return record_of(
            request,
            self._instance,
            host=host.name,
            adapter=adapter.device,
            folder=self._config.folder,
        ).to_strings()

    def build(
        self, request: IslandRequest, record: Mapping[str, str], step: Step
    ) -> tuple[Placeholder, ...]:
        """See `offload.hypervisor`. Raises UnavailableError (`lun-missing`, `vmfs-missing`,
        `extent-missing`, `datastore-missing` …), NotFoundError (`vm-not-in-copy`), BusyError
        (`name-taken`, `host-busy`)."""
        known = Record.from_strings(record)
        chap = iscsi.load_chap(self._instance.config.iscsi)
        with self._link() as link:
            host = link.do(lambda vsphere: find_host(vsphere, self._config))
            host.check_usable()
            attaching = Attaching(link, host, known, request.name, self._config.timeout_s)
            building = Building(attaching, request, self._names(request))
            with self._alone(host.name):
                attaching.attach(building.expected(), chap, step)
            return building.populate(step)

    def take_down(self, record: Mapping[str, str], step: Step) -> None:
        """See `offload.hypervisor`. Raises CleanupError (`placeholder-runs`, `datastore-busy`,
        `island-stays` …)."""
        known = Record.from_strings(record)
        seen = Seen(self._instance.state_dir / "islands" / known.island)
        config = self._config.model_copy(update={"host": known.host})
        try:
            with self._link() as link, self._alone(known.host):
                host = link.do(lambda vsphere: find_host(vsphere, config))
                dismantle(link, host, known, seen, step, timeout_s=self._config.timeout_s)
        except CleanupError:
            raise
        except OffloadError as error:
            raise CleanupError(
                f"the island on host {known.host} could not be taken down: {error.message}",
                code="island-stays",
                hint=error.hint or "mend the cause and run: offload recover",
            ) from error

    def look(
        self, record: Mapping[str, str], placeholders: Sequence[Placeholder]
    ) -> list[Standing]:
        """See `offload.hypervisor`."""
        known = Record.from_strings(record)

        def read(vsphere: Vsphere) -> dict[str, dict[str, object]]:
            with vsphere.translated(f"the placeholders on host {known.host}"):
                return read_each(
                    vsphere,
                    [vim.VirtualMachine(p.id, vsphere.stub) for p in placeholders],
                    "name",
                    "runtime.powerState",
                    "runtime.connectionState",
                )

        with self._link() as link:
            found = link.do(read)
        return [_standing(placeholder, found.get(placeholder.id)) for placeholder in placeholders]

    # -- a real VM -------------------------------------------------------------------------------

    def check_create(self, machine: Machine, disks: Mapping[str, str], name: str) -> list[str]:
        """See `offload.hypervisor`. The disks come as TimeViews of the VM's datastores."""
        warnings = self.check()
        recreate.refuse(machine)
        with self._link() as link:
            if name in link.do(lambda v: recreate.taken_names(v, find_host(v, self._config))):
                raise BusyError(
                    f"there is a VM {name} already",
                    code="name-taken",
                    hint="choose another: --name",
                )
        left = [disk.label or disk.name for disk in machine.disks if disk.name not in disks]
        return [*warnings, *(f"left out: {label}" for label in left)]

    def create(
        self, machine: Machine, disks: Mapping[str, str], name: str, mark: str, step: Step
    ) -> str:
        """See `offload.hypervisor`. The datastores stand as long as the VM does."""
        place = self._restored(mark)
        with self._link() as link:
            host = link.do(lambda vsphere: find_host(vsphere, self._config))
            host.check_usable()
            adapter = link.do(lambda vsphere: find_adapter(vsphere, host, self._config))
            record = recreate.record_of(
                disks.values(),
                self._instance,
                mark=mark,
                host=host.name,
                adapter=adapter.device,
                target=self._config.target or "lio",
            )
            recreate.keep(place, record)
            step("recorded")
            attaching = Attaching(link, host, record, name, self._config.timeout_s)
            with self._alone(host.name):
                chap = iscsi.load_chap(self._instance.config.iscsi)
                attaching.attach({lun.names[0] for lun in record.luns}, chap, step)
            return recreate.register_vm(attaching, machine, disks, name, step)

    def destroy(self, mark: str) -> None:
        """See `offload.hypervisor`. Its datastores go from the host, too."""
        place = self._restored(mark)
        record = recreate.kept(place)
        if record is not None:
            self.take_down(record.to_strings(), lambda _name: None)
            place.unlink(missing_ok=True)

    def _restored(self, mark: str) -> Path:
        return self._instance.state_dir / "islands" / f"{mark}.vm"

    # -- sessions --------------------------------------------------------------------------------

    def _link(self) -> Link:
        known = self._instance.config.hypervisor(self._config.hypervisor)
        if not isinstance(known, VsphereConfig):
            raise ConfigError(f"[hypervisors.{self._config.hypervisor}] is not of kind vsphere")
        return Link(known, patience_s=self._config.timeout_s)

    @contextmanager
    def _alone(self, host: str) -> Iterator[None]:
        """One at a time changes the storage of a host; storage calls block each other there."""
        text = f"{self._config.hypervisor} {host}"
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        path = Path(self._instance.runtime_dir.parent, f"host-{digest}.lock")
        with ExitStack() as stack:
            try:
                stack.enter_context(alone_within(path, _LOCK_S))
            except TimeoutError as error:
                raise BusyError(
                    f"another mount or unmount works on host {host} for {_LOCK_S:g} s now",
                    code="host-busy",
                ) from error
            except OSError as error:
                raise UnavailableError(f"cannot lock {path}: {error.strerror}") from error
            yield


def _standing(placeholder: Placeholder, found: Mapping[str, object] | None) -> Standing:
    if found is None:
        return Standing(
            placeholder=placeholder.id,
            there=False,
            problem="it is not registered any more",
            do="make it anew: offload placeholder refresh, or unmount the island",
        )
    power, problem, do = "off", "", ""
    if str(found.get("runtime.powerState")) != "poweredOff":
        power = "on" if str(found.get("runtime.powerState")) == "poweredOn" else "suspended"
        problem, do = "it runs: what it writes goes with the island", "power it off"
    elif str(found.get("runtime.connectionState")) != "connected":
        problem = f"its host shows it as {found.get('runtime.connectionState')}"
        do = "does the host reach the views? offload recover serves them again"
    elif found.get("name") != placeholder.name:
        problem, do = f"it was renamed to {found.get('name')}", "rename it back, or refresh it"
    return Standing(placeholder=placeholder.id, there=True, power=power, problem=problem, do=do)
