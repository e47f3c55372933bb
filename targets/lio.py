"""The `lio` target: views over iSCSI, served by the Linux kernel.

A view is a target (an IQN) of its own with one portal group, one LUN (number 0) and one backstore
(iblock) on a block device (`lio_device.py`). All of it is configuration in the kernel, without a
process of ours; it goes with a reboot, or when the administrator clears LIO, and is made again from
the catalog by `offload recover`. LIO's own saved configuration is never written; what was restored
from one under a view's names is removed before the view is exported.

CHAP secrets go into configfs, where root alone can read them.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from offload import iqn, iscsi, procs
from offload.errors import BusyError, CleanupError, ConfigError, NotFoundError, UnavailableError
from offload.instance import Instance
from offload.iscsi import Chap
from offload.model import Exposure, Qcow2Source, RawSource
from offload.target import Client, Endpoint, ExportRequest
from targets import backing, lio_build, lio_device, lio_kernel, lio_state, listen


class LioTarget:
    """Presents views over iSCSI by the kernel's own target. Needs root."""

    name = "lio"

    def __init__(self, instance: Instance) -> None:
        self._config = instance.config.iscsi
        self._instance = instance.id

    def check(self, exposure: Exposure) -> Exposure:
        """Fill in what was left open, refuse what cannot be served; see `offload.target`.

        Raises what `iscsi.resolve`, `listen.parse_address`, `lio_kernel.check` and
        `listen.check_tcp` raise, and ConfigError (`chap-unfit`).
        """
        found = iscsi.resolve(self._config, exposure)
        found = replace(found, address=str(listen.parse_address(found.address)))
        _check_chap(iscsi.load_chap(self._config))
        lio_kernel.check()
        _check_portal(found)
        return found

    def export(self, request: ExportRequest) -> Endpoint:
        """Present the image; see `offload.target`.

        Raises what `check` raises, NotFoundError (`source-missing`), IntegrityError
        (`size-mismatch`), UsageError (`partial-sector`), UnavailableError (`module-missing`,
        `lio-failed`, and those of the device below).
        """
        exposure = self.check(request.exposure)
        source = request.source
        if isinstance(source, RawSource | Qcow2Source) and not source.path.exists():
            raise NotFoundError(f"there is no {source.path}", code="source-missing")
        lio_kernel.load()
        try:
            request.run_dir.mkdir(parents=True, mode=0o700)
        except FileExistsError:
            raise BusyError(
                f"the folder {request.run_dir} belongs to another view", code="view-exists"
            ) from None
        try:
            with ExitStack() as steps:  # what somebody has restored under our names
                self._end(request.view_id, steps)
            return self._serve(request, exposure)
        except BaseException:
            self.withdraw(request.run_dir, {})
            raise

    def withdraw(self, run_dir: Path, server: Mapping[str, str]) -> None:
        """End sessions, target, backstore, device and the server below. Raises CleanupError."""
        with ExitStack() as steps:
            steps.callback(_remove, run_dir)
            steps.callback(backing.close, run_dir, server)
            self._end(run_dir.name, steps)

    def alive(self, run_dir: Path, server: Mapping[str, str]) -> bool:
        """Whether target, LUN, backstore and the device under it are there, and ours."""
        name = self._name(run_dir.name)
        portal = iscsi.portal(server.get("address", ""), int(server.get("port", 0)))
        identity = iscsi.identity(run_dir.name)
        return (
            server.get("boot") == procs.boot_id()
            and any(
                lio_state.serves(server.get("iqn", ""), portal, store, identity)
                and lio_device.alive(server, name.object, lio_state.device_number(store))
                for store in lio_state.backstores(name)
            )
            and backing.alive(run_dir, server)
        )

    def clients(self, run_dir: Path, server: Mapping[str, str]) -> list[Client]:  # noqa: ARG002
        """Who is logged in now."""
        if "iqn" not in server:
            return []
        return lio_state.clients(server["iqn"], server["address"], int(server["port"]))

    def monitor(self, run_dir: Path) -> Path:
        """The QMP socket of the daemon behind a writable view; see `offload.target.Movable`."""
        return backing.monitor(run_dir)

    def settled(self, server: Mapping[str, str]) -> dict[str, str]:
        """The record without what served the source."""
        return backing.settled(server)

    def end_source(self, run_dir: Path) -> None:
        """End what served the source."""
        backing.end_source(run_dir)

    def _name(self, view_id: str) -> lio_state.Name:
        return lio_state.Name(instance=self._instance, view=view_id)

    def _serve(self, request: ExportRequest, exposure: Exposure) -> Endpoint:
        name = self._name(request.view_id)
        target = iqn.view_iqn(
            self._config.iqn_prefix, self._instance, request.name, request.view_id
        )
        with lio_device.opened(request, name.object) as device:
            lio_build.build(
                lio_build.Plan(
                    name=name.object,
                    iqn=target,
                    device=device.path,
                    identity=iscsi.identity(request.view_id),
                    exposure=exposure,
                    chap=iscsi.load_chap(self._config),
                    writable=request.writable,
                )
            )
        server = {
            "iqn": target,
            "address": exposure.address,
            "port": str(exposure.port),
            "boot": procs.boot_id(),
            **device.to_strings(),
        }
        if not self.alive(request.run_dir, server):
            raise UnavailableError(
                f"LIO does not serve view {request.name} as it was told to",
                code="lio-failed",
                hint="the kernel says why: dmesg",
            )
        return Endpoint(uri=iscsi.uri(exposure, target, lio_state.LUN), server=server)

    def _end(self, view_id: str, steps: ExitStack) -> None:
        """Everything in the kernel that bears this view's names.

        The NBD device goes first: the end of a session waits for its requests, and those on a
        server that hangs would take their time. Nothing is lost by it: LIO holds no write back.
        """
        name = self._name(view_id)
        steps.callback(lio_build.remove, name)
        steps.callback(lio_device.detach, name.object)


def _check_chap(chap: Chap | None) -> None:
    """LIO takes the word NULL for no secret, and rtslib cuts blanks off."""
    if chap is None:
        return
    texts = {
        "user": chap.user,
        "secret": chap.secret.get_secret_value(),
        "mutual user": chap.mutual_user or "",
        "mutual secret": chap.mutual_secret.get_secret_value() if chap.mutual_secret else "",
    }
    for what, text in texts.items():
        if text.startswith("NULL") or text != text.strip():
            raise ConfigError(
                f"the CHAP {what} begins with NULL, or begins or ends with a blank: LIO cannot "
                "take that",
                code="chap-unfit",
                hint="choose another one",
            )


def _check_portal(exposure: Exposure) -> None:
    """A portal that LIO has already is shared; the port of anybody else's is taken."""
    where = iscsi.portal(exposure.address, exposure.port or 0)
    if where in lio_state.portals():
        return
    try:
        listen.check_tcp(exposure.address, exposure.port, ())
    except UnavailableError as error:
        if error.code != "port-taken":
            raise
        if where not in lio_state.portals():  # by now another process may have made it
            raise lio_build.port_taken(where) from error


def _remove(run_dir: Path) -> None:
    """The folder and its files; it has no folders, and whatever has is not a view's."""
    try:
        for path in list(run_dir.iterdir()):
            path.unlink(missing_ok=True)
        run_dir.rmdir()
    except FileNotFoundError:
        return
    except OSError as error:
        raise CleanupError(
            f"cannot remove {error.filename or run_dir}: {error.strerror}", code="cleanup"
        ) from error
