"""Makes and removes a view's objects in LIO, through rtslib. Nothing else in LIO is touched.

rtslib's errors end here. It keeps backstores under numbers from 0 to 2**20 - 1, which it picks
without regard to other processes; ours have higher ones, made of the view's name, so that neither
targetcli nor another `offload` meets them.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from offload.errors import CleanupError, OffloadError, UnavailableError
from offload.iscsi import Chap, Identity, identity, portal
from offload.model import Exposure
from targets import lio_kernel, lio_state

_OWN_NUMBERS = 1 << 20
_TRIES = 100

# What a read-only LUN does not offer: to write by copying, by comparing, by discarding.
_READ_ONLY = {"emulate_3pc": 0, "emulate_caw": 0, "emulate_tpu": 0, "emulate_tpws": 0}
_DISCARDING = {"emulate_tpu": 1, "emulate_tpws": 1}


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is to be made."""

    name: str  # of the backstore
    iqn: str
    device: str
    identity: Identity
    exposure: Exposure
    chap: Chap | None
    writable: bool

    @property
    def portal(self) -> str:
        """As configfs names it."""
        return portal(self.exposure.address, self.exposure.port or 0)


def build(plan: Plan) -> None:
    """Make backstore, target, LUN, ACLs, portal, and let initiators in.

    Raises UnavailableError (`lio-failed`, `port-taken`). What an error leaves is for `remove`.
    """
    with _library(plan.iqn) as lio:
        store = _backstore(lio, plan)
        group = lio.TPG(lio.Target(_fabric(lio), plan.iqn, mode="create"), lio_state.TAG, "create")
        for attribute, value in _group_attributes(plan).items():
            group.set_attribute(attribute, value)
        # a session whose connection broke is over: without connection recovery it cannot go on
        group.set_parameter("DefaultTime2Retain", 0)
        lio.LUN(group, lio_state.LUN, storage_object=store, alias=plan.name)
        if plan.exposure.initiators:
            _allow(lio, group, plan)
        elif plan.chap is not None:
            _authenticate(group, plan.chap)
        _listen(lio, group, plan)
        group.enable = True


def remove(name: lio_state.Name) -> None:
    """End the view's sessions and remove its target and backstore. Idempotent.

    Raises CleanupError.
    """
    iqns, stores = lio_state.iqns(name), lio_state.backstores(name)
    if not iqns and not stores:
        return
    try:
        with _library(name.object) as lio:
            for iqn in iqns:
                lio.Target(_fabric(lio), iqn, mode="lookup").delete()
            for store in stores:
                _delete(lio, store)
    except UnavailableError as error:
        raise CleanupError(
            f"cannot remove {name.object} from LIO: {error.message}",
            code="cleanup",
            hint=error.hint,
        ) from error
    _forget_reservations(name)


def _fabric(lio: Any) -> Any:
    fabric = lio.FabricModule("iscsi")
    # rtslib wants two dots in an IQN; names are checked already, by RFC 7143
    fabric.wwn_types = ("free",)
    return fabric


def _backstore(lio: Any, plan: Plan) -> Any:
    store = lio.BlockStorageObject(
        plan.name,
        dev=plan.device,
        wwn=plan.identity.serial,
        readonly=not plan.writable,
        index=_free_number(plan.name),
    )
    for attribute, value in (
        ("vendor_id", plan.identity.vendor),
        ("product_id", plan.identity.product),
        ("revision", plan.identity.revision),
    ):
        Path(store.path, "wwn", attribute).write_text(value)
    for attribute, number in _store_attributes(plan).items():
        store.set_attribute(attribute, number)
    return store


def _free_number(name: str) -> int:
    """A number for a backstore that nobody has."""
    first = _OWN_NUMBERS + int.from_bytes(hashlib.sha256(name.encode()).digest()[:3], "big")
    for number in range(first, first + _TRIES):
        if not (lio_state.TARGET / "core" / f"iblock_{number}").exists():
            return number
    raise UnavailableError(f"LIO has no free number for {name}", code="lio-failed")


def _store_attributes(plan: Plan) -> dict[str, int]:
    if not plan.writable:
        return _READ_ONLY
    return _DISCARDING if _discards(plan.device) else {}


def _discards(device: str) -> bool:
    limit = Path("/sys/class/block", Path(device).name, "queue", "discard_max_bytes")
    return limit.exists() and limit.read_text().strip() != "0"


def _group_attributes(plan: Plan) -> dict[str, int]:
    """Of the portal group. "Demo mode" is LIO's word for initiators without an ACL."""
    closed = bool(plan.exposure.initiators)
    return {
        "authentication": int(plan.chap is not None),
        "generate_node_acls": int(not closed),
        "demo_mode_discovery": int(not closed),
        "demo_mode_write_protect": int(not plan.writable),
        "prod_mode_write_protect": int(not plan.writable),
    }


def _allow(lio: Any, group: Any, plan: Plan) -> None:
    for initiator in plan.exposure.initiators:
        acl = lio.NodeACL(group, initiator, mode="create")
        lio.MappedLUN(acl, lio_state.LUN, lio_state.LUN, write_protect=not plan.writable)
        if plan.chap is not None:
            _authenticate(acl, plan.chap)


def _authenticate(holder: Any, chap: Chap) -> None:
    """Hand the secrets to the kernel, for one initiator or for all of a portal group."""
    wanted = {"chap_userid": chap.user, "chap_password": chap.secret.get_secret_value()}
    if chap.mutual_user is not None and chap.mutual_secret is not None:
        wanted["chap_mutual_userid"] = chap.mutual_user
        wanted["chap_mutual_password"] = chap.mutual_secret.get_secret_value()
    for attribute, value in wanted.items():
        setattr(holder, attribute, value)
        # rtslib ignores what the kernel says of a portal group's
        if getattr(holder, attribute) != value:
            raise UnavailableError(f"LIO did not take the {attribute} of CHAP", code="lio-failed")


def _listen(lio: Any, group: Any, plan: Plan) -> None:
    address, _, port = plan.portal.rpartition(":")
    try:
        lio.NetworkPortal(group, address, int(port), mode="create")
    except lio.RTSLibError as error:
        cause = error.__context__
        if isinstance(cause, OSError) and cause.errno == errno.EADDRINUSE:
            raise port_taken(plan.portal) from error
        raise


def port_taken(where: str) -> UnavailableError:
    """The error for a portal whose port another server has, or LIO itself on all addresses."""
    return UnavailableError(
        f"the port of {where} is taken",
        code="port-taken",
        hint="choose another: --port, or [iscsi] port; see: ss -tlnp",
    )


def _delete(lio: Any, folder: Path) -> None:
    """Remove a backstore. rtslib looks through all targets for its LUNs, and stumbles over those
    that other processes remove meanwhile."""
    for _ in range(_TRIES):
        with contextlib.suppress(FileNotFoundError, lio.RTSLibNotInCFS):
            if folder.exists():
                lio.tcm.StorageObject.so_from_path(str(folder)).delete()
            return
    raise UnavailableError(f"LIO does not let go of {folder.name}", code="lio-failed")


def _forget_reservations(name: lio_state.Name) -> None:
    """The kernel keeps persistent reservations (APTPL) in a file named by the serial number."""
    path = lio_state.database() / "pr" / f"aptpl_{identity(name.view).serial}"
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise CleanupError(f"cannot remove {path}: {error.strerror}", code="cleanup") from error


@contextmanager
def _library(what: str) -> Iterator[Any]:
    """rtslib, whose errors are translated within this block."""
    lio = lio_kernel.library()
    try:
        # where rtslib keeps its files; it refuses to work without the folder
        lio_kernel.DATABASE.mkdir(exist_ok=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a dbroot that another tool has set
            lio.RTSRoot()  # sets the dbroot, which the kernel refuses once there is a backstore
            yield lio
    except OffloadError:
        raise
    except (lio.RTSLibError, OSError) as error:
        cause = error.__context__ if isinstance(error.__context__, OSError) else None
        reason = f"{error}" + (f": {cause.strerror}" if cause else "")
        raise UnavailableError(
            f"LIO refused {what}: {reason}", code="lio-failed", hint="the kernel says why: dmesg"
        ) from error
