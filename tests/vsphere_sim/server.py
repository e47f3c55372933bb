"""A simulated vCenter on a port of loopback, with a certificate of its own."""

from __future__ import annotations

import hashlib
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from offload.testing.certificates import make_authority, write_private, write_server
from tests.vsphere_sim.model import Model
from tests.vsphere_sim.soap import served

USER = "offload@vsphere.local"
PASSWORD = "correct horse battery staple"


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
def running_vcenter(folder: Path) -> Iterator[Vcenter]:
    """Started with an empty inventory, ended with the block."""
    authority = make_authority()
    write_server(folder, authority)
    write_private(folder / "password", PASSWORD.encode() + b"\n")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "server-cert.pem", folder / "server-key.pem")
    der = ssl.PEM_cert_to_DER_cert((folder / "server-cert.pem").read_text())
    model = Model(USER, PASSWORD)
    with served(model, context) as port:
        yield Vcenter(
            model=model,
            port=port,
            folder=folder,
            thumbprint=hashlib.sha256(der).digest().hex(":").upper(),
        )
