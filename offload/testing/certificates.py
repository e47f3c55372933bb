"""Certificates and pre-shared keys for tests of NBD over TLS."""

from __future__ import annotations

import ipaddress
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

_DAY = timedelta(days=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Issued:
    """A certificate and its private key."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    @property
    def certificate_pem(self) -> bytes:
        """As in `*-cert.pem`."""
        return self.certificate.public_bytes(serialization.Encoding.PEM)

    @property
    def key_pem(self) -> bytes:
        """As in `*-key.pem`, not encrypted."""
        return self.key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What a certificate is for, and from and until which day counted from today."""

    names: tuple[str, ...] = ("127.0.0.1", "::1", "localhost")  # none: a client's, or an authority
    authority: bool = False
    days: tuple[float, float] = (-1, 30)


def issue(name: str, wanted: Wanted, by: Issued | None = None) -> Issued:
    """A certificate by an authority, or by itself."""
    key = ec.generate_private_key(ec.SECP256R1())
    issuer = _name(name) if by is None else by.certificate.subject
    made = _certificate(name, key, issuer, key if by is None else by.key, wanted)
    return Issued(certificate=made, key=key)


def make_authority(name: str = "authority", *, days: tuple[float, float] = (-1, 30)) -> Issued:
    """One that others can be issued by."""
    return issue(name, Wanted(names=(), authority=True, days=days))


def write_server(folder: Path, authority: Issued, server: Issued | None = None) -> Path:
    """The folder that a server wants; without `server` one for loopback is issued."""
    server = server or issue("server", Wanted(), authority)
    return _write(folder, authority, server, "server")


def write_client(folder: Path, authority: Issued, client: Issued | None = None) -> Path:
    """The folder that a client wants."""
    client = client or issue("client", Wanted(names=()), authority)
    return _write(folder, authority, client, "client")


def write_keys(path: Path, users: Sequence[str]) -> Path:
    """A file of pre-shared keys."""
    lines = [f"{user}:{secrets.token_hex(32)}\n" for user in users]
    write_private(path, "".join(lines).encode())
    return path


def revoke(authority: Issued, serials: Sequence[int], *, days: tuple[float, float]) -> bytes:
    """A list of revoked certificates, in PEM."""
    now = datetime.now(UTC)
    made = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(authority.certificate.subject)
        .last_update(now + days[0] * _DAY)
        .next_update(now + days[1] * _DAY)
    )
    for serial in serials:
        entry = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(now)
        made = made.add_revoked_certificate(entry.build())
    return made.sign(authority.key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def write_private(path: Path, content: bytes) -> None:
    """A file that only its owner may read."""
    path.touch(mode=0o600)
    path.write_bytes(content)
    path.chmod(0o600)


def _write(folder: Path, authority: Issued, issued: Issued, role: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True, mode=0o755)
    (folder / "ca-cert.pem").write_bytes(authority.certificate_pem)
    (folder / f"{role}-cert.pem").write_bytes(issued.certificate_pem)
    write_private(folder / f"{role}-key.pem", issued.key_pem)
    return folder


def _certificate(
    name: str,
    key: ec.EllipticCurvePrivateKey,
    issuer: x509.Name,
    issuer_key: ec.EllipticCurvePrivateKey,
    wanted: Wanted,
) -> x509.Certificate:
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(_name(name))
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + wanted.days[0] * _DAY)
        .not_valid_after(now + wanted.days[1] * _DAY)
        .add_extension(x509.BasicConstraints(ca=wanted.authority, path_length=None), critical=True)
    )
    if not wanted.authority:
        use = ExtendedKeyUsageOID.SERVER_AUTH if wanted.names else ExtendedKeyUsageOID.CLIENT_AUTH
        made = made.add_extension(x509.ExtendedKeyUsage([use]), critical=False)
    if wanted.names:
        names = x509.SubjectAlternativeName([_alternative(text) for text in wanted.names])
        made = made.add_extension(names, critical=False)
    return made.sign(issuer_key, hashes.SHA256())


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _alternative(text: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(text))
    except ValueError:
        return x509.DNSName(text)
