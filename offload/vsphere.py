"""A vCenter server, or one ESXi host, through its SOAP API: a session, properties, tasks.

Sources: the vSphere Web Services API reference (ServiceInstance, PropertyCollector, Task). The API
of vSphere 6.5 is spoken, which all later servers understand. Nothing of this has met a real ESXi:
see docs/howto/quiesce-hypervisors.md.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import ssl
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from http.client import HTTPException, HTTPSConnection
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
_PAGE = 500  # objects in one answer
_IDENTITY = ("name", "config.instanceUuid", "config.uuid", "config.template")
MARK = "offload.island"  # key in a placeholder's extraConfig; value INSTANCE/ISLAND


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
                f"its certificate has the thumbprint {found.hex(':').upper()}, "
                f"not {self.sha256.hex(':').upper()}"
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

    def __init__(self, config: VsphereConfig, *, call_s: float = _CALL_S) -> None:
        """`call_s`: how long one call may take. Raises ConfigError (`secret-…`,
        `vsphere-certificate`, `vsphere-login`), UnavailableError (`vsphere-unavailable`)."""
        password = read_secret(config.password_file, f"password of {config.server}")
        self.server = config.server
        self._port = config.port
        self._context = _tls(config)
        self.stub = SoapStubAdapter(
            host=config.server,
            port=config.port,
            version=_VERSION,
            sslContext=self._context,
            httpConnectionTimeout=call_s,
        )
        try:
            with self.translated(f"{config.server} does not let us in"):
                self._service: Any = vim.ServiceInstance("ServiceInstance", self.stub)
                self.content: Any = self._service.RetrieveContent()
                sessions: Any = self.content.sessionManager
                entered: Any = sessions.Login(config.user, password.get_secret_value(), None)
                self._session_key: str = entered.key
        except BaseException:
            self.stub.DropConnections()
            raise

    def close(self) -> None:
        """Log out. Never raises."""
        with contextlib.suppress(OffloadError), self.translated("logout"):
            self.content.sessionManager.Logout()
        self.stub.DropConnections()

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

    @property
    def is_vcenter(self) -> bool:
        """Else it is one ESXi host."""
        return bool(self.content.about.apiType == "VirtualCenter")

    def connection(self) -> HTTPSConnection:
        """Another connection to the same server, under the same rules of trust; not open yet."""
        return HTTPSConnection(self.server, self._port, context=self._context, timeout=_CALL_S)

    # -- properties ------------------------------------------------------------------------------

    def read(self, managed: Any, *paths: str) -> dict[str, Any]:
        """These properties of one object, in one call; those that are unset are left out."""
        kinds = vmodl.query.PropertyCollector
        wanted = kinds.FilterSpec(
            objectSet=[kinds.ObjectSpec(obj=managed)],
            propSet=[kinds.PropertySpec(type=type(managed), pathSet=list(paths))],
        )
        found = self.content.propertyCollector.RetrievePropertiesEx(
            [wanted], kinds.RetrieveOptions(maxObjects=1)
        )
        if found is None or not found.objects:
            raise vmodl.fault.ManagedObjectNotFound(obj=managed)
        return values_of(found.objects[0])

    def collect(self, kind: Any, paths: Sequence[str]) -> Iterator[tuple[Any, dict[str, Any]]]:
        """All objects of a kind that this user may see, with these properties; in pages."""
        view = self.view([kind])
        wanted = view_filter(view, {kind: paths})
        kinds = vmodl.query.PropertyCollector
        collector = self.content.propertyCollector
        try:
            page = collector.RetrievePropertiesEx([wanted], kinds.RetrieveOptions(maxObjects=_PAGE))
            while page is not None:
                for found in page.objects:
                    yield found.obj, values_of(found)
                if not page.token:
                    return
                page = collector.ContinueRetrievePropertiesEx(page.token)
        finally:
            with contextlib.suppress(vmodl.MethodFault, OSError, HTTPException):
                view.DestroyView()

    def view(self, kinds: Sequence[Any]) -> Any:
        """A view of all objects of these kinds; it goes with the session."""
        return self.content.viewManager.CreateContainerView(
            self.content.rootFolder, list(kinds), recursive=True
        )

    def lacking(self, managed: Any, privileges: Sequence[str]) -> list[str]:
        """Which of these privileges this user has not on an object."""
        held = self.content.authorizationManager.HasPrivilegeOnEntity(
            entity=managed, sessionId=self._session_key, privId=list(privileges)
        )
        return [name for name, has in zip(privileges, held, strict=True) if not has]

    # -- virtual machines ------------------------------------------------------------------------

    def find_vm(self, wanted: str) -> Any:
        """The virtual machine of this name, instance UUID or BIOS UUID; no template, for those have
        no writers, and no placeholder of ours.

        Not by the server's own search: copies share UUIDs, and it would give any of them. Raises
        NotFoundError (`unknown-vm`, `ambiguous-vm`).
        """
        plain = wanted.lower()
        with self.translated(f"the VM {wanted}"):
            hits = [
                (vm, fields)
                for vm, fields in self.collect(vim.VirtualMachine, _IDENTITY)
                if not fields.get("config.template", False)
                and (
                    wanted == fields.get("name")
                    or plain == fields.get("config.instanceUuid", "").lower()
                    or plain == fields.get("config.uuid", "").lower()
                )
            ]
            found = [
                (vm, fields.get("config.instanceUuid", ""))
                for vm, fields in hits
                if not self.island_of(vm)
            ]
        exact = [vm for vm, number in found if number.lower() == plain]
        if len(found) == 1 or len(exact) == 1:
            return exact[0] if exact else found[0][0]
        if not found:
            raise NotFoundError(
                f"{self.server} has no VM {wanted} that this user may see", code="unknown-vm"
            )
        numbers = ", ".join(sorted(number for _, number in found))
        raise NotFoundError(
            f"{self.server} has {len(found)} VMs {wanted}",
            code="ambiguous-vm",
            hint=f"name it by its instance UUID, if that is not the same too: {numbers}",
        )

    def island_of(self, vm: Any) -> str:
        """The island that a placeholder of ours belongs to, by its mark; "" of all others."""
        path = "config.extraConfig"
        return mark_in(self.read(vm, path).get(path) or ()).rpartition("/")[2]

    def vm(self, moref: str) -> Any:
        """The virtual machine of a reference that `find_vm` gave once (its `_moId`)."""
        return vim.VirtualMachine(moref, self.stub)

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
        collector = self.content.propertyCollector.CreatePropertyCollector()
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


def mark_in(options: Sequence[Any]) -> str:
    """The mark of a placeholder of ours in a VM's extraConfig, "" where there is none."""
    return next((str(option.value) for option in options if option.key == MARK), "")


def view_filter(view: Any, paths: Mapping[Any, Sequence[str]]) -> Any:
    """A FilterSpec of what a view shows: by kind, which properties."""
    kinds = vmodl.query.PropertyCollector
    through = kinds.TraversalSpec(name="view", type=vim.view.ContainerView, path="view", skip=False)
    return kinds.FilterSpec(
        objectSet=[kinds.ObjectSpec(obj=view, skip=True, selectSet=[through])],
        propSet=[
            kinds.PropertySpec(type=kind, pathSet=list(wanted)) for kind, wanted in paths.items()
        ],
    )


def values_of(found: Any) -> dict[str, Any]:
    """Of an ObjectContent. Raises what kept the server from reading one of the properties, where
    that is a privilege: half of the truth is none."""
    for missing in found.missingSet or ():
        if isinstance(missing.fault, vim.fault.NoPermission):
            raise missing.fault
    return {entry.name: entry.val for entry in found.propSet or ()}


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
            f"{what}: this user lacks the privilege {fault.privilegeId}{_on(fault.object)}",
            code="vsphere-privilege",
            hint="the privileges that are needed: docs/howto/inventory.md",
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


def _on(managed: Any) -> str:
    """Which object a fault is about; a fault need not say."""
    if managed is None:
        return ""
    kind = type(managed).__name__.rpartition(".")[2]
    return f" on {kind} {managed._moId}"  # noqa: SLF001 - its name in the API
