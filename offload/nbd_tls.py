"""What TLS of NBD needs on the server's side: certificates, or pre-shared keys.

Both are looked at before anything is served: nbdkit itself starts with an expired certificate, and
with a file of keys in which no line can be used, and only its clients would find out.

Sources: nbdkit-tls(1) for the files' names; psktool(1) of GnuTLS for the format of the keys, a line
`USER:HEX` each.
"""

from __future__ import annotations

import ipaddress
import os
import re
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from offload.configs.targets import NbdConfig
from offload.errors import ConfigError
from offload.secret_file import check_private

if TYPE_CHECKING:
    import ssl

    from cryptography import x509

AUTHORITY = "ca-cert.pem"
CERTIFICATE = "server-cert.pem"
KEY = "server-key.pem"
REVOKED = "ca-crl.pem"  # optional

_MAX_BYTES = 1 << 20
_RENEW = timedelta(days=30)
_PSK_MIN_BYTES = 16  # 128 bits: a shorter one can be guessed from a recorded handshake
_MANUAL = "see docs/howto/nbd-over-the-network.md"
# GnuTLS takes a user that begins with '#' for hexadecimal, libnbd takes it as it stands.
_PSK_LINE = re.compile(r"(?P<user>[^:#\s][^:\s]*):(?P<key>(?:[0-9a-fA-F]{2})+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Certificates:
    """X.509 certificates in a folder. `names`: DNS names and addresses that the server's bears."""

    folder: Path
    verify_clients: bool
    server: bytes  # DER
    names: tuple[str, ...]
    expires_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class PreSharedKeys:
    """Keys of users in a file."""

    path: Path
    users: tuple[str, ...]


Tls = Certificates | PreSharedKeys


def load(config: NbdConfig, kind: str) -> Tls:
    """What is configured for TLS with `certificates` or `psk`, checked.

    Raises ConfigError (`tls-unconfigured`, `tls-file-missing`, `secret-unsafe`,
    `certificate-invalid`, `certificate-expired`, `certificate-mismatch`, `psk-invalid`).
    """
    place = config.certificates if kind == "certificates" else config.psk
    if place is None:
        what = "a folder of certificates" if kind == "certificates" else "a file of keys"
        raise ConfigError(
            f"TLS with {kind} needs {what}",
            code="tls-unconfigured",
            hint=f"set {kind} in [nbd]; {_MANUAL}",
        )
    if kind == "certificates":
        return _load_certificates(place, verify_clients=config.verify_clients)
    return _load_keys(place)


def describe(tls: Tls) -> str:
    """Where it is, and for whom."""
    if isinstance(tls, PreSharedKeys):
        return f"{tls.path}: {len(tls.users)} user" + ("s" if len(tls.users) > 1 else "")
    names = ", ".join(tls.names) or "nobody"
    return f"{tls.folder}: for {names}, until {tls.expires_at:%Y-%m-%d}"


def advice(tls: Tls, address: str, now: datetime) -> str:
    """What should be done before clients find out; nothing where all is well."""
    if isinstance(tls, PreSharedKeys):
        return ""
    if tls.expires_at - now < _RENEW:
        return f"renew the certificates before {tls.expires_at:%Y-%m-%d}, then mount again"
    found = ipaddress.ip_address(address)
    if address not in tls.names and not found.is_loopback and not found.is_unspecified:
        return f"clients must use a name of the certificate: it is not for {address}"
    return ""


def client_context(tls: Certificates) -> ssl.SSLContext:
    """For a look at a server of ours: it is known by its very certificate, not by a name.

    Where clients are verified, the server's own certificate is shown: it is of the authority, and
    there is no other that this host surely has. Raises ConfigError as `load` does.
    """
    import ssl

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    if tls.verify_clients:
        _load_pair(context, tls.folder)
    return context


def _load_certificates(folder: Path, *, verify_clients: bool) -> Certificates:
    from cryptography.hazmat.primitives import serialization

    _check_folder(folder)
    authorities = _certificates(folder / AUTHORITY)
    chain = _certificates(folder / CERTIFICATE)
    _check_pair(folder)
    now = datetime.now(UTC)
    _check_time(chain, folder / CERTIFICATE, now)
    _check_time(authorities, folder / AUTHORITY, now)
    _check_issuer(folder, chain, authorities)
    _check_revoked(folder / REVOKED, chain[0], now)
    return Certificates(
        folder=folder,
        verify_clients=verify_clients,
        server=chain[0].public_bytes(serialization.Encoding.DER),
        names=_names(chain[0]),
        expires_at=min(c.not_valid_after_utc for c in (*chain, *authorities)),
    )


def _check_folder(folder: Path) -> None:
    try:
        status = folder.stat()
    except OSError as error:
        raise _missing(folder, error) from error
    if not stat.S_ISDIR(status.st_mode):
        raise ConfigError(f"{folder} is no folder", code="tls-file-missing", hint=_MANUAL)
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise ConfigError(
            f"others may put certificates into {folder}",
            code="secret-unsafe",
            hint=f"chmod go-w {folder}",
        )


def _certificates(path: Path) -> list[x509.Certificate]:
    from cryptography import x509

    try:
        return x509.load_pem_x509_certificates(_read(path))
    except ValueError as error:
        raise _invalid(path, "it holds no certificate in PEM") from error


def _check_pair(folder: Path) -> None:
    import ssl

    _read(folder / KEY, private=True)
    _load_pair(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), folder)


def _load_pair(context: ssl.SSLContext, folder: Path) -> None:
    """By OpenSSL, which also knows what is too weak; the `cryptography` package refuses every other
    key for elliptic curves that GnuTLS makes (a zero before the number)."""
    import ssl

    def ask_for_passphrase() -> NoReturn:
        raise ConfigError(
            f"the key {folder / KEY} is encrypted, and nobody is there to be asked for its "
            "passphrase",
            code="certificate-invalid",
            hint=f"openssl pkey -in {folder / KEY} -out NEWFILE",
        )

    try:
        context.load_cert_chain(folder / CERTIFICATE, folder / KEY, ask_for_passphrase)
    except ssl.SSLError as error:
        if error.reason in {"KEY_VALUES_MISMATCH", "KEY_TYPE_MISMATCH", "NO_CERTIFICATE_ASSIGNED"}:
            raise ConfigError(
                f"the key {folder / KEY} does not belong to the certificate {folder / CERTIFICATE}",
                code="certificate-mismatch",
                hint="the two come from one request: put both of them there",
            ) from error
        if error.reason is None:  # the certificate could be read before
            raise _invalid(folder / KEY, "it holds no private key in PEM") from error
        why = error.reason.lower().replace("_", " ")
        raise _invalid(folder / CERTIFICATE, f"OpenSSL says: {why}") from error


def _check_time(certificates: Sequence[x509.Certificate], path: Path, now: datetime) -> None:
    for certificate in certificates:
        begin, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
        if not begin <= now <= end:
            when = f"until {end:%Y-%m-%d %H:%M}" if now > end else f"from {begin:%Y-%m-%d %H:%M}"
            raise ConfigError(
                f"the certificate {path} is valid only {when} UTC",
                code="certificate-expired",
                hint=f"renew it; the clock of this machine says {now:%Y-%m-%d %H:%M} UTC",
            )


def _check_issuer(
    folder: Path, chain: Sequence[x509.Certificate], authorities: Sequence[x509.Certificate]
) -> None:
    """The first of the chain leads to an authority, through the others where it must."""
    subject, between = chain[0], list(chain[1:])
    while subject not in authorities and not any(_issued(subject, by) for by in authorities):
        step = next((by for by in between if _issued(subject, by)), None)
        if step is None:
            raise ConfigError(
                f"the certificate {folder / CERTIFICATE} is not of the authority "
                f"{folder / AUTHORITY}",
                code="certificate-mismatch",
                hint="put the authority that issued it there, and certificates in between behind "
                "the server's own",
            )
        between.remove(step)
        subject = step


def _issued(subject: x509.Certificate, issuer: x509.Certificate) -> bool:
    from cryptography.exceptions import InvalidSignature

    try:
        subject.verify_directly_issued_by(issuer)
    except (InvalidSignature, TypeError, ValueError):
        return False
    return True


def _check_revoked(path: Path, server: x509.Certificate, now: datetime) -> None:
    """With an outdated list GnuTLS refuses every client."""
    from cryptography import x509

    if not path.exists():
        return
    try:
        revoked = x509.load_pem_x509_crl(_read(path))
    except ValueError as error:
        raise _invalid(path, "it holds no list of revoked certificates in PEM") from error
    until = revoked.next_update_utc
    if until is not None and until < now:
        raise ConfigError(
            f"the list of revoked certificates {path} is valid only until "
            f"{until:%Y-%m-%d %H:%M} UTC",
            code="certificate-expired",
            hint="fetch a new one from the authority, or remove it",
        )
    if revoked.get_revoked_certificate_by_serial_number(server.serial_number) is not None:
        raise _invalid(path.with_name(CERTIFICATE), "its authority has revoked it")


def _names(certificate: x509.Certificate) -> tuple[str, ...]:
    from cryptography import x509

    try:
        found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        common = certificate.subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)
        return tuple(str(name.value) for name in common)
    addresses = found.get_values_for_type(x509.IPAddress)
    return (*(str(a) for a in addresses), *found.get_values_for_type(x509.DNSName))


def _load_keys(path: Path) -> PreSharedKeys:
    """No error shows what is in the file."""
    try:
        text = _read(path, private=True).decode()
    except UnicodeDecodeError as error:
        raise _no_keys(path, "it is no text") from error
    users: list[str] = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line:
            continue
        found = _PSK_LINE.fullmatch(line)
        if found is None:
            raise _no_keys(path, f"line {number} is not USER:KEY, the key in hexadecimal")
        if len(found["key"]) < 2 * _PSK_MIN_BYTES:
            raise _no_keys(path, f"the key in line {number} has under {_PSK_MIN_BYTES} bytes")
        if found["user"] in users:
            raise _no_keys(path, f"the user of line {number} has a key already")
        users.append(found["user"])
    if not users:
        raise _no_keys(path, "it is empty")
    return PreSharedKeys(path=path, users=tuple(users))


def _read(path: Path, *, private: bool = False) -> bytes:
    """A whole file. Links are followed: to where a certificate is renewed, for one."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise _missing(path, error) from error
    try:
        if private:
            check_private(fd, path, "key")
        elif not stat.S_ISREG(os.fstat(fd).st_mode):
            raise ConfigError(f"{path} is no regular file", code="tls-file-missing", hint=_MANUAL)
        raw = os.read(fd, _MAX_BYTES + 1)  # of a regular file: all of it, read(2)
    finally:
        os.close(fd)
    if len(raw) > _MAX_BYTES:
        raise _invalid(path, "it is too large")
    return raw


def _missing(path: Path, error: OSError) -> ConfigError:
    return ConfigError(
        f"cannot read {path}: {error.strerror}", code="tls-file-missing", hint=_MANUAL
    )


def _invalid(path: Path, why: str) -> ConfigError:
    return ConfigError(f"{path} is of no use: {why}", code="certificate-invalid", hint=_MANUAL)


def _no_keys(path: Path, why: str) -> ConfigError:
    return ConfigError(
        f"the file of pre-shared keys {path} is of no use: {why}",
        code="psk-invalid",
        hint=f"psktool -u USER -p {path}",
    )
