"""The `tgt` target: views over iSCSI by tgtd, in user space, without root or kernel modules.

One tgtd a portal (`targets.tgt_server`) presents all views of that portal. A view is a target of
its own, with its own name, whose LUN 1 is the image (LUN 0 is tgtd's controller). The target's
number and the identity of the disk are made of the view's id, so that they are the same from any
server, after any restart.

| in the view's folder | |
| --- | --- |
| `lun` | link to the file or block device that is presented: tgtd takes no path with a comma |
| `portal` | link to the folder of the tgtd, made before that knows of the view |
| what `targets.backing` needs | |

Nobody may log in before the ACL is set, which is the last step. Read-only is tgtd's own answer to
every write (DATA PROTECT), beneath which the file is opened read-only where its mode allows no
more (`targets.tgt_server`).
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from offload import iscsi, procs, run
from offload.errors import (
    BusyError,
    CleanupError,
    UnavailableError,
    UsageError,
)
from offload.instance import Instance
from offload.iqn import view_iqn
from offload.model import Exposure
from offload.target import Client, Endpoint, ExportRequest
from targets import backing, listen, tgt_chap
from targets.tgt_mgmt import (
    Management,
    Refusal,
    TgtGoneError,
    TgtRefusedError,
    TgtSilentError,
)
from targets.tgt_server import PortalServer

_LUN = 1
_VENDOR_BYTES = 8  # SPC-4, 7.8.6.4: a T10 id starts with the vendor
_UNIT = "lun"
_PORTAL = "portal"

# An initiator that takes no data is given up by tgtd after 20 s; meanwhile its command is alive.
_LEAVES_S = 30.0
# A command that still runs after this long hangs in what is behind the file.
_HANGS_S = 5.0


class TgtTarget:
    """Presents views over iSCSI by tgtd."""

    name = "tgt"

    def __init__(self, instance: Instance) -> None:
        self._config = instance.config.iscsi
        self._servers_dir = instance.servers_dir
        self._instance = instance.id
        self._silent: set[Path] = set()  # servers that did not answer: asked once in our life

    def check(self, exposure: Exposure) -> Exposure:
        """Refuse what cannot be served; see `offload.target`.

        Raises what `iscsi.resolve`, `listen.parse_address`, `tgt_chap.check` and
        `PortalServer.check` raise, PrivilegeError, UnavailableError (`program-missing`,
        `port-taken`, `bad-address`).
        """
        found = iscsi.resolve(self._config, exposure)
        tgt_chap.check(iscsi.load_chap(self._config))
        run.require_program("tgtd", "tgt")
        listen.parse_address(found.address)
        server = self._server(found)
        server.check()
        if not server.find():
            try:
                listen.check_tcp(server.address, server.port, ())
            except UnavailableError as error:
                if error.code != "port-taken":
                    raise
                if not server.find():  # ours may have started since we looked
                    raise server.port_taken() from error
        return replace(found, address=server.address)

    def export(self, request: ExportRequest) -> Endpoint:
        """Present the image; see `offload.target`.

        Raises what `check` and `targets.backing.open_file` raise, UsageError (`partial-sector`),
        BusyError (`chap-secret-changed`), UnavailableError (`server-failed`, `server-silent`,
        `server-denied`).
        """
        request = replace(request, exposure=self.check(request.exposure))
        size, sector = request.source.size_bytes, request.source.sector_size
        if size % sector:
            raise UsageError(
                f"view {request.name}: {size} bytes are no whole number of sectors of {sector} "
                "bytes, and iSCSI knows no other size",
                code="partial-sector",
                hint="mount it over NBD: --target nbd",
            )
        try:
            request.run_dir.mkdir(parents=True, mode=0o700)
        except FileExistsError:
            raise BusyError(
                f"the folder {request.run_dir} belongs to another view", code="view-exists"
            ) from None
        try:
            return self._serve(request)
        except BaseException:
            self.withdraw(request.run_dir, {})
            raise

    def withdraw(self, run_dir: Path, server: Mapping[str, str]) -> None:
        """Take the view off its server, with whoever is logged in, and end a server without views.

        A tgtd that does not answer is killed, if the view is known to be there: it serves nobody,
        and `remount` brings its other views back. Raises CleanupError.
        """
        known = self._known(run_dir, server)
        for place in [known] if known else PortalServer.all(self._servers_dir):
            with place.alone():
                self._take_off(place, run_dir, server, surely=known is not None)
        backing.close(run_dir, server)
        _remove(run_dir)

    def alive(self, run_dir: Path, server: Mapping[str, str]) -> bool:
        """Whether tgtd lives and answers, has this view, and what is behind it lives."""
        ref = _ref(server)
        if ref is None or not ref.alive():
            return False
        management, tid = self._asked(server), int(server["tid"])
        if management.socket in self._silent:
            return False
        try:
            there = management.targets().get(tid) == server["iqn"]
            return there and management.has_unit(tid, _LUN) and backing.alive(run_dir, server)
        except TgtGoneError:
            return False
        except TgtSilentError:
            self._silent.add(management.socket)
            return False

    def clients(self, run_dir: Path, server: Mapping[str, str]) -> list[Client]:  # noqa: ARG002
        """Who is logged in now; nobody where the server is gone.

        Raises TgtSilentError where it does not answer, TgtDeniedError.
        """
        ref = _ref(server)
        if ref is None or not ref.alive():
            return []
        try:
            found = self._asked(server).connections(int(server["tid"]))
        except TgtGoneError:
            return []
        except TgtRefusedError as error:
            if error.refusal is Refusal.NO_TARGET:
                return []
            raise
        return [Client(address=one.address, name=_printable(one.initiator)) for one in found]

    # -- one view ---------------------------------------------------------------------------------

    def _serve(self, request: ExportRequest) -> Endpoint:
        opened = backing.open_file(request)
        (request.run_dir / _UNIT).symlink_to(opened.path)
        iqn = view_iqn(self._config.iqn_prefix, self._instance, request.name, request.view_id)
        # tgtd takes 0 for a discovery
        tid = int(iscsi.identity(request.view_id).serial[: iscsi.TGT_TID_DIGITS], 16) or 1
        server = self._server(request.exposure)
        with server.alone():
            ref = server.running()  # before the view is bound to it: a silent one is not ours yet
            (request.run_dir / _PORTAL).symlink_to(server.folder)
            ref = ref or server.start()
            self._sweep(server, request.run_dir, {})
            self._present(server, request, tid, iqn)
        record = {"tid": str(tid), "iqn": iqn, "address": server.address, "port": str(server.port)}
        return Endpoint(
            uri=iscsi.uri(request.exposure, iqn, _LUN),
            server={**ref.to_strings(), **record, **opened.record},
        )

    def _present(self, server: PortalServer, request: ExportRequest, tid: int, iqn: str) -> None:
        management = server.management
        source = request.source
        management.new_target(tid, iqn)
        management.new_unit(tid, _LUN, request.run_dir / _UNIT, source.sector_size)
        management.update_unit(tid, _LUN, _attributes(request))
        _check_unit(management.unit(tid, iqn, _LUN), request)
        chap = iscsi.load_chap(self._config)
        if chap is not None:
            tgt_chap.apply(management, server.folder, tid, chap)
        if not request.exposure.initiators:
            management.allow_everybody(tid)
        for name in request.exposure.initiators:
            management.allow_initiator(tid, name)

    def _take_off(
        self, place: PortalServer, run_dir: Path, server: Mapping[str, str], *, surely: bool
    ) -> None:
        try:
            if place.running() is None:
                place.kill()
                return
            self._sweep(place, run_dir, server)
            place.end_if_idle()
        except TgtSilentError:
            if surely:
                place.kill()
        except TgtGoneError:  # it ended just now
            place.kill()

    def _sweep(self, place: PortalServer, run_dir: Path, server: Mapping[str, str]) -> None:
        """Remove the view's target, from whatever earlier attempt it is."""
        management = place.management
        for tid, iqn in management.targets().items():
            if self._is_view(iqn, run_dir.name):
                _remove_target(management, tid, run_dir, server)

    def _is_view(self, iqn: str, view_id: str) -> bool:
        """Whether a target is this view, by the part of its name that `view_iqn` makes of ids."""
        return iqn.rpartition(":")[2].split(".")[:2] == [self._instance, view_id]

    # -- its server -------------------------------------------------------------------------------

    def _server(self, exposure: Exposure) -> PortalServer:
        return PortalServer.of(self._servers_dir, exposure.address, exposure.port or 0)

    def _known(self, run_dir: Path, server: Mapping[str, str]) -> PortalServer | None:
        """The server that the view was given to, by its record or by its folder."""
        if "address" in server:
            return PortalServer.of(self._servers_dir, server["address"], int(server["port"]))
        with contextlib.suppress(OSError):
            return PortalServer.of_folder((run_dir / _PORTAL).readlink())
        return None

    def _asked(self, server: Mapping[str, str]) -> Management:
        place = PortalServer.of(self._servers_dir, server["address"], int(server["port"]))
        return place.management


def _remove_target(
    management: Management, tid: int, run_dir: Path, server: Mapping[str, str]
) -> None:
    """Hang up on everybody and remove the target; it waits for commands that still run."""
    began = time.monotonic()
    delay, closed = 0.002, False
    management.close_target(tid)
    while True:
        with contextlib.suppress(TgtRefusedError):  # one that has just left
            for one in management.connections(tid):
                management.close_connection(tid, one)
        try:
            management.delete_target(tid)
            return
        except TgtRefusedError as error:
            waits = error.refusal in {Refusal.TARGET_ACTIVE, Refusal.UNIT_ACTIVE}
            if not waits:
                raise
            if time.monotonic() > began + _LEAVES_S:
                raise CleanupError(
                    f"tgtd does not let go of target {tid}: a command still runs",
                    code="cleanup",
                    hint="try again: offload recover",
                ) from error
        if not closed and time.monotonic() > began + _HANGS_S:
            backing.close(run_dir, server)  # what hangs in there fails then
            closed = True
        time.sleep(delay)
        delay = min(2 * delay, 0.1)


def _attributes(request: ExportRequest) -> dict[str, str]:
    """Of the disk: its identity, and that nothing of it depends on the file that holds it.

    The write cache is left on, as tgtd has it: SYNCHRONIZE CACHE and FUA become fdatasync. UNMAP
    is left off: tgtd answers it with an error even where it did it (usr/sbc.c, sbc_unmap).
    """
    known = iscsi.identity(request.view_id)
    return {
        "vendor_id": known.vendor,
        "product_id": known.product,
        "product_rev": known.revision,
        "scsi_sn": known.serial,
        "scsi_id": f"{known.vendor:<{_VENDOR_BYTES}}{known.serial[: iscsi.T10_DIGITS]}",
        "lbppbe": "0",  # physical sectors as large as logical ones, whatever the file system has
        "removable": "0",
        "readonly": "0" if request.writable else "1",
    }


def _check_unit(said: Mapping[str, str], request: ExportRequest) -> None:
    """Never present something else than was asked for: tgtd ignores values that it cannot read."""
    wanted = {
        "Type": "disk",
        "SCSI SN": iscsi.identity(request.view_id).serial,
        "Block size": str(request.source.sector_size),
        "Online": "Yes",
        "Readonly": "No" if request.writable else "Yes",
        "Backing store path": str(request.run_dir / _UNIT),
    }
    wrong = {key: said.get(key, "") for key, value in wanted.items() if said.get(key) != value}
    if wrong:
        raise UnavailableError(
            f"tgtd does not keep to what was asked of it for view {request.name}: {wrong}",
            code="server-failed",
        )


def _ref(server: Mapping[str, str]) -> procs.ProcessRef | None:
    return procs.ProcessRef.from_strings({k: server.get(k, "") for k in ("pid", "start", "boot")})


def _printable(name: str) -> str:
    """What an initiator calls itself, fit for a terminal."""
    return "".join(c if c.isprintable() else "?" for c in name)


def _remove(run_dir: Path) -> None:
    """The folder and its files."""
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
