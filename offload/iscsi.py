"""What both iSCSI targets share: names and identities of views, portals, CHAP, who may log in."""

from __future__ import annotations

import hashlib
import ipaddress
from dataclasses import dataclass, replace

from pydantic import SecretStr

from offload.configs.targets import IscsiConfig
from offload.errors import ConfigError, UsageError
from offload.iqn import check_iqn
from offload.model import Exposure
from offload.secret_file import read_secret

VENDOR = "OFFLOAD"  # SPC-4, standard INQUIRY: 8 bytes
PRODUCT = "TimeView"  # 16 bytes
REVISION = "1"  # 4 bytes
T10_DIGITS = 28  # of the serial number in tgtd's T10 id: it takes 36 bytes, 8 for the vendor
TGT_TID_DIGITS = 7  # and in the number of its targets: an NAA id of type 3 holds 28 bits of it
CHAP_SECRET_MIN = 12  # bytes; RFC 7143, 9.2.1: 96 bits. Initiators refuse less.
CHAP_SECRET_MAX = 255


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """How a view is known to SCSI hosts: the same as long as it lives, never its origin's."""

    serial: str  # unit serial number, VPD page 80h: 32 hexadecimal digits
    vendor: str = VENDOR
    product: str = PRODUCT
    revision: str = REVISION


@dataclass(frozen=True, slots=True, kw_only=True)
class Chap:
    """The secrets of a login; none of them is ever shown."""

    user: str
    secret: SecretStr
    mutual_user: str | None = None
    mutual_secret: SecretStr | None = None


def identity(view_id: str) -> Identity:
    """The SCSI identity of a view, made of its id alone."""
    return Identity(serial=hashlib.sha256(f"offload view {view_id}".encode()).hexdigest()[:32])


def canonical_names(target: str, view_id: str) -> tuple[str, ...]:
    """How a vSphere host may name a view that this target presents, its likeliest choice first.

    It names a disk by what VPD page 83h says (vSphere Storage, "Storage device identifiers"):
    `naa.…` or `t10.…`. LIO (drivers/target/target_core_spc.c) has an NAA of type 6 that begins with
    its own 6001405 and goes on with the serial number. tgtd (usr/spc.c, update_vpd_83) makes one of
    type 6 of the last 32 characters of the T10 id, read as hexadecimal digits, 0 where it is none,
    and the type written over the first bits: of `OAD ` that leaves 6ad0; and one of type 3, local,
    of the target's and the LUN's number. Which of them ESXi takes is not tried on a real one.
    """
    serial = identity(view_id).serial
    text = f"{VENDOR:_<8}{serial[:T10_DIGITS]}"
    if target == "tgt":
        local = f"naa.3{serial[:TGT_TID_DIGITS]}{1:08x}"
        return (f"naa.6ad0{serial[:T10_DIGITS]}", local, f"t10.{text}")
    return (f"naa.6001405{serial[:25]}",)


def load_chap(config: IscsiConfig) -> Chap | None:
    """The configured CHAP secrets, None without any.

    Raises ConfigError (`secret-missing`, `secret-unsafe`, `secret-invalid`, `chap-secret-length`,
    `chap-secret-reused`).
    """
    if config.chap is None:
        return None
    secret = read_secret(config.chap.secret_file, "CHAP secret")
    _check_length(secret, str(config.chap.secret_file))
    mutual = None
    if config.chap.mutual_secret_file is not None:
        mutual = read_secret(config.chap.mutual_secret_file, "mutual CHAP secret")
        _check_length(mutual, str(config.chap.mutual_secret_file))
        if mutual.get_secret_value() == secret.get_secret_value():
            # RFC 7143, 9.2.1: otherwise a target can answer with what the initiator sent
            raise ConfigError(
                "the CHAP secret and the mutual CHAP secret are the same",
                code="chap-secret-reused",
                hint="each direction needs a secret of its own",
            )
    return Chap(
        user=config.chap.user,
        secret=secret,
        mutual_user=config.chap.mutual_user,
        mutual_secret=mutual,
    )


def resolve(config: IscsiConfig, asked: Exposure) -> Exposure:
    """Fill in what was left open and refuse what is unsafe. Whether the port can be had is the
    target's to find out.

    Raises UsageError (`bad-transport`, `bad-address`, `bad-iqn`, `not-loopback`, `tls-not-here`),
    ConfigError (`acl-for-no-one`, `chap-needed` and those of `load_chap`).
    """
    if asked.transport not in {"", "tcp"}:
        raise UsageError(
            f"iSCSI has no transport '{asked.transport}'", code="bad-transport", hint="leave it out"
        )
    if asked.tls or asked.allow:
        raise UsageError(
            "TLS and client addresses are for NBD", code="nbd-only",
            hint="iSCSI has --initiator and CHAP",
        )  # fmt: skip
    for name in asked.initiators:
        try:
            check_iqn(name)
        except ValueError as error:
            raise UsageError(str(error), code="bad-iqn") from error
    found = replace(
        asked,
        transport="tcp",
        address=asked.address or config.address,
        port=asked.port or config.port,
        initiators=asked.initiators or config.initiators,
    )
    chap = load_chap(config)
    address = _address(found.address)
    if not address.is_loopback:
        _check_network(config, found, address)
        if not found.initiators:
            raise ConfigError(
                f"nobody may log in at {found.address}: no initiators are named",
                code="acl-for-no-one",
                hint="name them in [iscsi] initiators, or with --initiator IQN",
            )
        if chap is None:
            raise ConfigError(
                f"a portal at {found.address} needs CHAP",
                code="chap-needed",
                hint="set [iscsi.chap] user and secret_file",
            )
    return found


def portal(address: str, port: int) -> str:
    """`ADDRESS:PORT`; an IPv6 address goes in brackets."""
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def uri(exposure: Exposure, iqn: str, lun: int) -> str:
    """The URI of a LUN as libiscsi and QEMU write it."""
    return f"iscsi://{portal(exposure.address, exposure.port or 3260)}/{iqn}/{lun}"


def _check_network(
    config: IscsiConfig, found: Exposure, address: ipaddress.IPv4Address | ipaddress.IPv6Address
) -> None:
    if address.is_unspecified:
        raise UsageError(
            f"{found.address} is every address of this machine",
            code="bad-address",
            hint="name the one on the storage network",
        )
    if found.insecure_network or any(
        address in ipaddress.ip_network(network) for network in config.networks
    ):
        return
    raise UsageError(
        f"{found.address} lies in no storage network: CHAP proves who logs in, it neither hides "
        "nor protects the data",
        code="not-loopback",
        hint="name the network in [iscsi] networks, use IPsec, or say --insecure-network",
    )


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    try:
        return ipaddress.ip_address(text)
    except ValueError as error:
        raise UsageError(
            f"'{text}' is no IP address", code="bad-address", hint="e.g. 127.0.0.1"
        ) from error


def _check_length(secret: SecretStr, path: str) -> None:
    length = len(secret.get_secret_value().encode())
    if not CHAP_SECRET_MIN <= length <= CHAP_SECRET_MAX:
        raise ConfigError(
            f"the CHAP secret in {path} has {length} bytes",
            code="chap-secret-length",
            hint=f"{CHAP_SECRET_MIN} to {CHAP_SECRET_MAX} bytes; some initiators take 16 at most",
        )
