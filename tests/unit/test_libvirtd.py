"""libvirt's addresses and errors, without a daemon."""

from __future__ import annotations

import sys
from pathlib import Path

import libvirt
import pytest

from offload import libvirtd, run
from offload.errors import NotFoundError, OffloadError, PrivilegeError, UnavailableError
from offload.libvirtd import DomainGoneError, Libvirt


@pytest.mark.parametrize(
    ("uri", "asked_for"),
    [
        ("qemu:///system", "qemu:///system"),
        ("qemu+tls://kvm1/system", "qemu+tls://kvm1/system"),
        ("qemu+ssh://root@kvm1/system", "qemu+ssh://root@kvm1/system?no_tty=1"),
        ("qemu+ssh://kvm1/system?keyfile=/k", "qemu+ssh://kvm1/system?keyfile=/k&no_tty=1"),
        ("qemu+ssh://kvm1/system?no_tty=1", "qemu+ssh://kvm1/system?no_tty=1"),
    ],
)
def test_uri_over_ssh_asks_no_terminal(uri: str, asked_for: str) -> None:
    assert libvirtd._without_questions(uri) == asked_for


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (libvirt.VIR_ERR_NO_DOMAIN, NotFoundError),
        (libvirt.VIR_ERR_AUTH_FAILED, PrivilegeError),
        (libvirt.VIR_ERR_ACCESS_DENIED, PrivilegeError),
        (libvirt.VIR_ERR_OPERATION_INVALID, DomainGoneError),
        (libvirt.VIR_ERR_AGENT_UNRESPONSIVE, UnavailableError),
        (libvirt.VIR_ERR_INTERNAL_ERROR, UnavailableError),
    ],
)
def test_error_of_libvirt_is_one_of_ours(number: int, kind: type[OffloadError]) -> None:
    error = libvirt.libvirtError("")
    error.err = (number, 0, "it said so", 0, "", "", "", 0, 0)
    made = libvirtd._error(error, "domain shop")
    assert type(made) is kind
    assert "domain shop" in made.message


def test_domains_of_another_driver_are_found_without_an_agent() -> None:
    """libvirt's own `test` driver has a domain, and no guest in it."""
    with Libvirt("test:///default") as link:
        domain = link.domain("test")
        assert domain.state() is libvirtd.DomainState.RUNNING
        assert link.domain(domain.uuid).name == "test"
        with pytest.raises(OffloadError):
            domain.frozen()
        with pytest.raises(NotFoundError, match="has no domain nothing"):
            link.domain("nothing")


SIDE_BY_SIDE = """
import threading
from concurrent.futures import ThreadPoolExecutor
from offload.libvirtd import Libvirt

with ThreadPoolExecutor(8) as crew:
    list(crew.map(lambda _: Libvirt("test:///default").close(), range(8)))
print([thread.name for thread in threading.enumerate()].count("libvirt events"))
"""


def test_connections_made_side_by_side_share_one_thread_for_events() -> None:
    root = str(Path(__file__).parents[2])
    done = run.run([sys.executable, "-c", SIDE_BY_SIDE], env={"PYTHONPATH": root})
    assert done.stdout == "1\n"
