"""A vCenter server, or one ESXi host, through its SOAP API: what VM snapshots need of it.

Sources: the vSphere Web Services API reference (VirtualMachine, VirtualMachineSnapshot, Task,
PropertyCollector). The API of vSphere 6.5 is spoken, which all later servers understand; it has
CreateSnapshotEx_Task. Nothing of this has met a real ESXi: see docs/howto/quiesce-hypervisors.md.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import ssl
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from http.client import HTTPException
from types import TracebackType
from typing import Any, Self

from pyVmomi import SoapStubAdapter, vim, vmodl

from offload.configs.hypervisors import VsphereConfig
from offload.errors import (
    ConfigError,
    NotFoundError,
    OffloadError,
    PrivilegeError,
    UnavailableError,
)
from offload.secret_file import read_secret

_VERSION = "vim.version.version11"  # 6.5
_CALL_S = 30  # of one request; longer than a wait for changes
_WAIT_S = 10  # of one wait for changes
_RETRY_S = 0.5
_PAGE = 500  # virtual machines in one answer
_CREATE = "VirtualMachine.createSnapshot"  # how recentTask names it, Ex or not


class TaskLateError(UnavailableError):
    """A task has not ended in time. It goes on at the server: what it makes may appear later."""

    code = "vsphere-late"


class _PinnedContext(ssl.SSLContext):
    """Trusts one certificate, by its SHA-256, on each connection anew, and no authority.

    pyVmomi's own `thumbprint` looks at the first connection alone.
    """

    sha256 = b""

    def wrap_socket(self, *args: Any, **more: Any) -> ssl.SSLSocket:
        """As of SSLContext; raises SSLCertVerificationError for another certificate."""
        made = super().wrap_socket(*args, **more)
        found = hashlib.sha256(made.getpeercert(binary_form=True) or b"").digest()
        if found != self.sha256:
            made.close()
            raise ssl.SSLCertVerificationError(
                f"its certificate has the thumbprint {found.hex(':').upper()}"
            )
        return made


def _tls(config: VsphereConfig) -> ssl.SSLContext:
    if config.thumbprint is None:
        try:
            return ssl.create_default_context(cafile=config.certificates)
        except OSError as error:
            raise ConfigError(
                f"cannot read the authorities in {config.certificates}: {error}",
                code="vsphere-certificate",
            ) from error
    context = _PinnedContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE  # the thumbprint is looked at instead
    context.sha256 = bytes.fromhex(config.thumbprint.replace(":", ""))
    return context


class Vsphere:
    """A session, logged in until `close`. One thread at a time."""

    def __init__(self, config: VsphereConfig) -> None:
        """Raises ConfigError (`secret-…`, `vsphere-certificate`, `vsphere-login`),
        UnavailableError (`vsphere-unavailable`)."""
        password = read_secret(config.password_file, f"password of {config.server}")
        self.server = config.server
        self._stub = SoapStubAdapter(
            host=config.server,
            port=config.port,
            version=_VERSION,
            sslContext=_tls(config),
            httpConnectionTimeout=_CALL_S,
        )
        try:
            with self.translated(f"{config.server} does not let us in"):
                self._service: Any = vim.ServiceInstance("ServiceInstance", self._stub)
                self._content: Any = self._service.RetrieveContent()
                sessions: Any = self._content.sessionManager
                sessions.Login(config.user, password.get_secret_value(), None)
        except BaseException:
            self._stub.DropConnections()
            raise

    def close(self) -> None:
        """Log out. Never raises."""
        with contextlib.suppress(OffloadError), self.translated("logout"):
            self._content.sessionManager.Logout()
        self._stub.DropConnections()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def clock(self) -> datetime:
        """The server's time."""
        with self.translated(f"the time of {self.server}"):
            now: datetime = self._service.CurrentTime()
            return now

    # -- virtual machines ------------------------------------------------------------------------

    def find_vm(self, wanted: str) -> Any:
        """The virtual machine of this name, or instance UUID.

        Not by the server's own search: copies share UUIDs, and it would give any of them. Raises
        NotFoundError (`unknown-vm`, `ambiguous-vm`).
        """
        with self.translated(f"the VM {wanted}"):
            found = [
                vm
                for vm, name, instance_uuid in self._all_vms()
                if wanted == name or wanted.lower() == instance_uuid.lower()
            ]
        if not found:
            raise NotFoundError(
                f"{self.server} has no VM {wanted} that this user may see", code="unknown-vm"
            )
        if len(found) > 1:
            raise NotFoundError(
                f"{self.server} has {len(found)} VMs {wanted}",
                code="ambiguous-vm",
                hint="name it by its instance UUID, if that is not the same too",
            )
        return found[0]

    def vm(self, moref: str) -> Any:
        """The virtual machine of a reference that `find_vm` gave once (its `_moId`)."""
        return self.ref(vim.VirtualMachine, moref)

    def ref(self, kind: Any, moref: str) -> Any:
        """A managed object by its reference, which outlives sessions."""
        return kind(moref, self._stub)

    @property
    def content(self) -> Any:
        """The service's managers (`ServiceContent`)."""
        return self._content

    def _all_vms(self) -> Iterator[tuple[Any, str, str]]:
        """Reference, name, instance UUID. Templates have no writers."""
        view = self._content.viewManager.CreateContainerView(
            self._content.rootFolder, [vim.VirtualMachine], recursive=True
        )
        try:
            for found in self._pages(view):
                fields = {p.name: p.val for p in found.propSet}
                if not fields.get("config.template", False):
                    yield found.obj, fields.get("name", ""), fields.get("config.instanceUuid", "")
        finally:
            view.DestroyView()

    def _pages(self, view: Any) -> Iterator[Any]:
        collector = vmodl.query.PropertyCollector
        wanted = collector.FilterSpec(
            objectSet=[
                collector.ObjectSpec(
                    obj=view,
                    skip=True,
                    selectSet=[
                        collector.TraversalSpec(
                            name="view", type=vim.view.ContainerView, path="view", skip=False
                        )
                    ],
                )
            ],
            propSet=[
                collector.PropertySpec(
                    type=vim.VirtualMachine,
                    pathSet=["name", "config.instanceUuid", "config.template"],
                )
            ],
        )
        options = collector.RetrieveOptions(maxObjects=_PAGE)
        page = self._content.propertyCollector.RetrievePropertiesEx([wanted], options)
        while page is not None:
            yield from page.objects
            if not page.token:
                return
            page = self._content.propertyCollector.ContinueRetrievePropertiesEx(page.token)

    # -- tasks -----------------------------------------------------------------------------------

    def wait(self, task: Any, until: float, what: str) -> Any:
        """The result of a task, once it has ended, before `until` (of `time.monotonic`).

        Raises TaskLateError, and what the task failed with.
        """
        with self.translated(what), self._watching(task) as look:
            state: dict[str, Any] = {}
            while state.get("info.state") not in ("success", "error"):
                left = until - time.monotonic()
                if left <= 0:
                    raise TaskLateError(f"{what}: the server has not finished in time")
                state.update(look(min(left, _WAIT_S)))
            if state["info.state"] == "error":
                raise state["info.error"]
            return state.get("info.result")

    @contextlib.contextmanager
    def _watching(self, task: Any) -> Iterator[Callable[[float], dict[str, Any]]]:
        """What has changed of a task, waiting for it for so many seconds."""
        collector = self._content.propertyCollector.CreatePropertyCollector()
        kinds = vmodl.query.PropertyCollector
        collector.CreateFilter(
            kinds.FilterSpec(
                objectSet=[kinds.ObjectSpec(obj=task)],
                propSet=[
                    kinds.PropertySpec(
                        type=vim.Task, pathSet=["info.state", "info.error", "info.result"]
                    )
                ],
            ),
            partialUpdates=False,
        )
        version = ""

        def look(patience_s: float) -> dict[str, Any]:
            nonlocal version
            whole_s = math.floor(patience_s)
            updates = collector.WaitForUpdatesEx(version, kinds.WaitOptions(maxWaitSeconds=whole_s))
            if updates is None:
                if whole_s == 0:
                    time.sleep(min(patience_s, 0.05))
                return {}
            version = updates.version
            return {
                change.name: change.val
                for changed in updates.filterSet
                for entry in changed.objectSet
                for change in entry.changeSet
            }

        try:
            yield look
        finally:
            with contextlib.suppress(vmodl.MethodFault, OSError, HTTPException):
                collector.DestroyPropertyCollector()

    # -- snapshots -------------------------------------------------------------------------------

    def create_quiesced(self, vm: Any, name: str, description: str, until: float) -> Any:
        """A snapshot without memory, the guest's file systems quiesced by VMware Tools; its entry
        in the tree of snapshots.

        A VM that is busy with another task is tried again until then. Raises UnavailableError
        (`quiesce-failed`, `vsphere-late`: the snapshot may appear later).
        """
        what = f"a quiesced snapshot of VM {vm.name}"
        while True:
            try:
                with self.translated(what):
                    task = vm.CreateSnapshotEx_Task(
                        name=name,
                        description=description,
                        memory=False,
                        quiesceSpec=_quiesce_spec(vm.guest.guestFamily),
                    )
                self.wait(task, until, what)
                break
            except UnavailableError as error:
                busy = isinstance(error.__cause__, vim.fault.TaskInProgress)
                if not busy or time.monotonic() + _RETRY_S > until:
                    raise
                time.sleep(_RETRY_S)
        return next(iter(self.snapshots(vm, name)), None)

    def snapshots(self, vm: Any, name: str) -> list[Any]:
        """The entries of this name in all branches of the VM's tree."""
        with self.translated("the snapshots of a VM"):
            return [entry for entry in all_snapshots(vm.snapshot) if entry.name == name]

    def remove_snapshot(self, vm: Any, name: str, until: float) -> bool:
        """Remove the snapshot of this name, wait until its delta is merged; whether there was one.

        Waits for a creation that is still under way first: what it makes may be ours. Idempotent.
        Raises UnavailableError; TaskLateError: the server goes on.
        """
        try:
            self._await_creations(vm, until)
            found = self.snapshots(vm, name)
            for entry in found:
                what = f"the removal of the snapshot {name}"
                with self.translated(what):
                    task = entry.snapshot.RemoveSnapshot_Task(
                        removeChildren=False, consolidate=True
                    )
                self.wait(task, until, what)
        except NotFoundError:  # the VM, or the snapshot, went meanwhile
            return False
        return bool(found)

    def _await_creations(self, vm: Any, until: float) -> None:
        with self.translated("the tasks of a VM"):
            tasks = [task for task in vm.recentTask if _creates(task)]
        for task in tasks:
            try:
                self.wait(task, until, "a snapshot that is being created")
            except TaskLateError:
                raise
            except UnavailableError:  # it has failed: there is nothing of it
                continue

    def consolidate(self, vm: Any, until: float) -> None:
        """Merge deltas without a snapshot, where the server says that there are some."""
        with self.translated("the disks of a VM"):
            needed = vm.runtime.consolidationNeeded
            task = vm.ConsolidateVMDisks_Task() if needed else None
        if task is not None:
            self.wait(task, until, "the consolidation of a VM's disks")

    # -- errors ----------------------------------------------------------------------------------

    @contextlib.contextmanager
    def translated(self, what: str) -> Iterator[None]:
        """pyVmomi's errors as ours."""
        try:
            yield
        except ssl.SSLCertVerificationError as error:
            raise ConfigError(
                f"{self.server} is not who it should be: {error}",
                code="vsphere-certificate",
                hint="certificates, or thumbprint, of its table in [hypervisors]",
            ) from error
        except (OSError, HTTPException) as error:
            raise UnavailableError(
                f"{self.server} does not answer: {error}", code="vsphere-unavailable"
            ) from error
        except vmodl.MethodFault as error:
            raise _error(error, what) from error


def all_snapshots(info: Any) -> Iterator[Any]:
    """All entries of a VM's `snapshot`, which is None where it has none."""
    todo = list(info.rootSnapshotList) if info is not None else []
    while todo:
        entry = todo.pop()
        yield entry
        todo += entry.childSnapshotList


def _quiesce_spec(family: str | None) -> Any:
    """Windows: by VSS with the writers of its applications; a copy backup, so that no application
    takes it for its own (VSS_BT_COPY of vss.h). Never less than that: it fails instead."""
    if family == "windowsGuest":
        return vim.vm.WindowsQuiesceSpec(
            vssBackupType=5,
            vssBackupContext="ctx_backup",
            vssBootableSystemState=True,
            vssPartialFileSupport=False,
        )
    return vim.vm.GuestQuiesceSpec()


def _creates(task: Any) -> bool:
    """Of a task that may be gone already."""
    try:
        return task.info.descriptionId == _CREATE and task.info.state in ("queued", "running")
    except vmodl.fault.ManagedObjectNotFound:
        return False


def _error(fault: Any, what: str) -> OffloadError:
    """A fault of the API as an error of ours."""
    said = fault.msg or type(fault).__name__.rpartition(".")[2]
    if isinstance(fault, vim.fault.InvalidLogin):
        return ConfigError(
            f"{what}: the user or the password is wrong",
            code="vsphere-login",
            hint="user and password_file of its table in [hypervisors]",
        )
    if isinstance(fault, vim.fault.NotAuthenticated):  # a NoPermission too
        return UnavailableError(f"{what}: the session has expired", code="vsphere-session")
    if isinstance(fault, vim.fault.NoPermission):
        return PrivilegeError(
            f"{what}: this user lacks the privilege {fault.privilegeId}", code="vsphere-privilege"
        )
    if isinstance(fault, vmodl.fault.ManagedObjectNotFound):
        return NotFoundError(f"{what}: it is not there any more", code="unknown-vm")
    if isinstance(fault, vim.fault.RestrictedVersion):
        return PrivilegeError(
            f"{what}: the API of a free ESXi is read-only", code="vsphere-read-only"
        )
    if isinstance(fault, vim.fault.SnapshotFault):
        return UnavailableError(f"{what} failed: {said}", code="quiesce-failed")
    return UnavailableError(f"{what}: {said}", code="vsphere-failed")
