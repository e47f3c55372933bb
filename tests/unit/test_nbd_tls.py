"""Certificates and keys of NBD over TLS are looked at before anything is served."""

from __future__ import annotations

import base64
import os
import ssl
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519

from offload import nbd_tls
from offload.configs.targets import NbdConfig
from offload.errors import ConfigError
from offload.testing import certificates
from offload.testing.certificates import Issued, Wanted, issue, make_authority, write_private


@pytest.fixture(scope="module")
def authority() -> Issued:
    return make_authority()


@pytest.fixture
def folder(tmp_path: Path, authority: Issued) -> Path:
    return certificates.write_server(tmp_path / "tls", authority)


def load(folder: Path, *, verify_clients: bool = True) -> nbd_tls.Certificates:
    config = NbdConfig(certificates=folder, verify_clients=verify_clients)
    found = nbd_tls.load(config, "certificates")
    assert isinstance(found, nbd_tls.Certificates)
    return found


def load_keys(path: Path) -> nbd_tls.PreSharedKeys:
    found = nbd_tls.load(NbdConfig(psk=path), "psk")
    assert isinstance(found, nbd_tls.PreSharedKeys)
    return found


# -- certificates -----------------------------------------------------------------------------


def test_certificates_that_fit_tell_names_and_end(folder: Path) -> None:
    found = load(folder)
    pem = (folder / "server-cert.pem").read_text()
    assert found.server == ssl.PEM_cert_to_DER_cert(pem)
    assert found.names == ("127.0.0.1", "::1", "localhost")
    assert found.verify_clients
    assert 29 <= (found.expires_at - datetime.now(UTC)).days <= 30


def test_certificates_through_an_intermediate_and_links_are_good(
    tmp_path: Path, authority: Issued
) -> None:
    between = issue("between", Wanted(names=(), authority=True), authority)
    server = issue("server", Wanted(), between)
    folder = certificates.write_server(tmp_path / "live", authority, server)
    chain = server.certificate_pem + between.certificate_pem
    (folder / "server-cert.pem").write_bytes(chain)
    linked = tmp_path / "tls"
    linked.mkdir()
    for entry in folder.iterdir():
        (linked / entry.name).symlink_to(entry)
    assert load(linked).names
    (folder / "server-cert.pem").write_bytes(server.certificate_pem)
    with pytest.raises(ConfigError) as caught:
        load(linked)
    assert caught.value.code == "certificate-mismatch"


def test_certificate_with_a_key_as_gnutls_writes_it_is_good(
    tmp_path: Path, authority: Issued
) -> None:
    """A zero before the number where its highest bit is set, in ECPrivateKey of RFC 5915."""
    server = issue("server", Wanted(), authority)
    folder = certificates.write_server(tmp_path / "tls", authority, server)
    usual = server.key.private_bytes(
        serialization.Encoding.DER,
        serialization.PrivateFormat.TraditionalOpenSSL,
        serialization.NoEncryption(),
    )
    # SEQUENCE, INTEGER 1, OCTET STRING: each length grows by one
    assert (usual[0], usual[2:7]) == (0x30, b"\x02\x01\x01\x04\x20")
    padded = bytes([0x30, usual[1] + 1, *b"\x02\x01\x01\x04\x21\x00"]) + usual[7:]
    text = base64.encodebytes(padded).decode()
    pem = f"-----BEGIN EC PRIVATE KEY-----\n{text}-----END EC PRIVATE KEY-----\n"
    write_private(folder / "server-key.pem", pem.encode())
    assert load(folder).names


def test_certificate_that_is_its_own_authority_is_good(tmp_path: Path) -> None:
    alone = issue("server", Wanted())
    assert load(certificates.write_server(tmp_path / "tls", alone, alone)).names


def test_certificate_without_alternative_names_tells_its_common_name(
    tmp_path: Path, authority: Issued
) -> None:
    server = issue("backup.example", Wanted(names=()), authority)
    folder = certificates.write_server(tmp_path / "tls", authority, server)
    assert load(folder).names == ("backup.example",)


def _expired(folder: Path, authority: Issued) -> None:
    server = issue("server", Wanted(days=(-9, -1)), authority)
    certificates.write_server(folder, authority, server)


def _not_yet(folder: Path, authority: Issued) -> None:
    server = issue("server", Wanted(days=(1, 9)), authority)
    certificates.write_server(folder, authority, server)


def _authority_expired(folder: Path, authority: Issued) -> None:
    old = make_authority(days=(-9, -1))
    certificates.write_server(folder, old, issue("server", Wanted(), old))


def _authority_of_others(folder: Path, authority: Issued) -> None:
    (folder / "ca-cert.pem").write_bytes(make_authority("other").certificate_pem)


def _authority_of_the_same_name(folder: Path, authority: Issued) -> None:
    (folder / "ca-cert.pem").write_bytes(make_authority().certificate_pem)


def _key_of_another(folder: Path, authority: Issued) -> None:
    other = issue("server", Wanted(), authority)
    write_private(folder / "server-key.pem", other.key_pem)


def _key_of_another_kind(folder: Path, authority: Issued) -> None:
    pem = ed25519.Ed25519PrivateKey.generate().private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    write_private(folder / "server-key.pem", pem)


def _key_encrypted(folder: Path, authority: Issued) -> None:
    key = issue("server", Wanted(), authority).key
    pem = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(b"word"),
    )
    write_private(folder / "server-key.pem", pem)


def _key_for_all(folder: Path, authority: Issued) -> None:
    (folder / "server-key.pem").chmod(0o644)


def _folder_for_all(folder: Path, authority: Issued) -> None:
    folder.chmod(0o777)


def _no_folder(folder: Path, authority: Issued) -> None:
    folder.rename(folder.with_name("elsewhere"))


def _a_file(folder: Path, authority: Issued) -> None:
    _no_folder(folder, authority)
    folder.touch()


def _revoked(folder: Path, authority: Issued) -> None:
    server = issue("server", Wanted(), authority)
    certificates.write_server(folder, authority, server)
    listed = certificates.revoke(authority, [server.certificate.serial_number], days=(-1, 1))
    (folder / "ca-crl.pem").write_bytes(listed)


def _revocations_outdated(folder: Path, authority: Issued) -> None:
    (folder / "ca-crl.pem").write_bytes(certificates.revoke(authority, [], days=(-9, -1)))


def _without(name: str) -> Callable[[Path, Issued], None]:
    return lambda folder, _: (folder / name).unlink()


def _garbage(name: str) -> Callable[[Path, Issued], None]:
    return lambda folder, _: write_private(folder / name, os.urandom(100))


@pytest.mark.parametrize(
    ("damage", "code", "named"),
    [
        (_no_folder, "tls-file-missing", "tls"),
        (_a_file, "tls-file-missing", "tls"),
        (_folder_for_all, "secret-unsafe", "tls"),
        (_without("ca-cert.pem"), "tls-file-missing", "ca-cert.pem"),
        (_without("server-cert.pem"), "tls-file-missing", "server-cert.pem"),
        (_without("server-key.pem"), "tls-file-missing", "server-key.pem"),
        (_garbage("ca-cert.pem"), "certificate-invalid", "ca-cert.pem"),
        (_garbage("server-cert.pem"), "certificate-invalid", "server-cert.pem"),
        (_garbage("server-key.pem"), "certificate-invalid", "server-key.pem"),
        (_garbage("ca-crl.pem"), "certificate-invalid", "ca-crl.pem"),
        (_expired, "certificate-expired", "server-cert.pem"),
        (_not_yet, "certificate-expired", "server-cert.pem"),
        (_authority_expired, "certificate-expired", "ca-cert.pem"),
        (_authority_of_others, "certificate-mismatch", "ca-cert.pem"),
        (_authority_of_the_same_name, "certificate-mismatch", "ca-cert.pem"),
        (_key_of_another, "certificate-mismatch", "server-key.pem"),
        (_key_of_another_kind, "certificate-mismatch", "server-key.pem"),
        (_key_encrypted, "certificate-invalid", "server-key.pem"),
        (_key_for_all, "secret-unsafe", "server-key.pem"),
        (_revoked, "certificate-invalid", "server-cert.pem"),
        (_revocations_outdated, "certificate-expired", "ca-crl.pem"),
    ],
)
def test_certificates_that_do_not_fit_are_one_error_that_names_the_file(
    folder: Path,
    authority: Issued,
    damage: Callable[[Path, Issued], None],
    code: str,
    named: str,
) -> None:
    damage(folder, authority)
    with pytest.raises(ConfigError) as caught:
        load(folder)
    assert caught.value.code == code
    assert str(folder.parent) in caught.value.message
    assert named in caught.value.message


def test_certificates_revocations_of_others_are_good(folder: Path, authority: Issued) -> None:
    listed = certificates.revoke(authority, [1, 2, 3], days=(-1, 1))
    (folder / "ca-crl.pem").write_bytes(listed)
    assert load(folder).names


@pytest.mark.parametrize("kind", ["certificates", "psk"])
def test_tls_without_configuration_says_which_key_is_missing(kind: str) -> None:
    with pytest.raises(ConfigError) as caught:
        nbd_tls.load(NbdConfig(), kind)
    assert caught.value.code == "tls-unconfigured"
    assert kind in caught.value.hint


# -- pre-shared keys --------------------------------------------------------------------------


def test_keys_tell_their_users_in_order(tmp_path: Path) -> None:
    path = certificates.write_keys(tmp_path / "keys.psk", ["alice", "bob@example"])
    assert load_keys(path).users == ("alice", "bob@example")


SECRET = "0123456789abcdef" * 4


@pytest.mark.parametrize(
    ("content", "code", "what"),
    [
        ("", "psk-invalid", "empty"),
        ("\n\n", "psk-invalid", "empty"),
        (f"alice {SECRET}\n", "psk-invalid", "line 1"),
        (f"alice:{SECRET}\nbob:{SECRET}x\n", "psk-invalid", "line 2"),
        (f"alice:{SECRET}\r\n", "psk-invalid", "line 1"),
        (f"#616c:{SECRET}\n", "psk-invalid", "line 1"),
        (f":{SECRET}\n", "psk-invalid", "line 1"),
        ("alice:0123456789abcdef\n", "psk-invalid", "16 bytes"),
        (f"alice:{SECRET}\nalice:{SECRET[::-1]}\n", "psk-invalid", "line 2"),
        (f"al\udcffce:{SECRET}\n", "psk-invalid", "no text"),
    ],
)
def test_keys_that_no_client_could_use_are_refused_without_showing_them(
    tmp_path: Path, content: str, code: str, what: str
) -> None:
    path = tmp_path / "keys.psk"
    write_private(path, content.encode("utf-8", "surrogateescape"))
    with pytest.raises(ConfigError) as caught:
        load_keys(path)
    assert caught.value.code == code
    assert what in caught.value.message
    assert SECRET[:16] not in caught.value.message + caught.value.hint


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660])
def test_keys_that_others_may_read_are_refused(tmp_path: Path, mode: int) -> None:
    path = certificates.write_keys(tmp_path / "keys.psk", ["alice"])
    path.chmod(mode)
    with pytest.raises(ConfigError) as caught:
        load_keys(path)
    assert caught.value.code == "secret-unsafe"


def test_keys_file_that_is_missing_or_no_file_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "gone", tmp_path):
        with pytest.raises(ConfigError) as caught:
            load_keys(path)
        assert caught.value.code in {"tls-file-missing", "secret-unsafe"}
