"""A simulated vCenter on a port of loopback, with a certificate of its own."""

from __future__ import annotations

import hashlib
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from offload.testing.certificates import Issued, make_authority, write_private, write_server
from tests.vsphere_sim.model import Model
from tests.vsphere_sim.soap import served

USER = "offload@vsphere.local"
PASSWORD = "correct horse battery staple"  # of a server on loopback, for a test


@dataclass(frozen=True, slots=True, kw_only=True)
class Vcenter:
    """A running one. `folder` has `ca-cert.pem`, its authority, and `password`."""

    model: Model
    port: int
    folder: Path
    thumbprint: str  # of its certificate, as the configuration wants it

    def table(self, **changed: Any) -> dict[str, Any]:
        """`[hypervisors.NAME]`, with changes; a None is left out."""
        plain = {
            "kind": "vsphere",
            "server": "127.0.0.1",
            "port": self.port,
            "user": USER,
            "password_file": str(self.folder / "password"),
            "certificates": str(self.folder / "ca-cert.pem"),
        }
        return {k: v for k, v in {**plain, **changed}.items() if v is not None}


@contextmanager
def running_vcenter(
    folder: Path, *, port: int = 0, certificate: Issued | None = None
) -> Iterator[Vcenter]:
    """Started with an empty inventory, ended with the block: its hosts log out. `port` 0: any that
    is free; `certificate`: another than a good one for 127.0.0.1, by any authority."""
    write_server(folder, make_authority(), certificate)
    write_private(folder / "password", PASSWORD.encode() + b"\n")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "server-cert.pem", folder / "server-key.pem")
    der = ssl.PEM_cert_to_DER_cert((folder / "server-cert.pem").read_text())
    model = Model(USER, PASSWORD)
    try:
        with served(model, context, port) as bound:
            yield Vcenter(
                model=model,
                port=bound,
                folder=folder,
                thumbprint=hashlib.sha256(der).digest().hex(":").upper(),
            )
    finally:
        model.close()
