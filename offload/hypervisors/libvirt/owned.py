"""Domains that are ours, by their metadata."""

from __future__ import annotations

from offload.errors import NotFoundError
from offload.hypervisors.libvirt import domain_xml
from offload.hypervisors.libvirt.domain_xml import Mark
from offload.libvirtd import Domain, Libvirt


def owned(link: Libvirt, instance: str) -> list[tuple[Domain, Mark]]:
    """All domains that this instance has made."""
    with link.translated("cannot list its domains"):
        domains = [Domain(link, handle) for handle in link.connection.listAllDomains(0)]
    marks = [(domain, mark_of(link, domain)) for domain in domains]
    return [(d, mark) for d, mark in marks if mark is not None and mark.instance == instance]


def mark_of(link: Libvirt, domain: Domain) -> Mark | None:
    """None also where it has gone since it was listed."""
    try:
        with link.about(domain.name):
            text = domain.handle.XMLDesc(0)
    except NotFoundError:
        return None
    return domain_xml.mark_of(domain_xml.parse(text))


def undefine(link: Libvirt, domain: Domain) -> None:
    """Take a domain that is off from the host's list, with all that libvirt keeps for it: saved
    memory, snapshots and checkpoints (of them what they are called), firmware variables. Its disks
    stay. Idempotent."""
    api = link.api
    flags = (
        api.VIR_DOMAIN_UNDEFINE_MANAGED_SAVE
        | api.VIR_DOMAIN_UNDEFINE_SNAPSHOTS_METADATA
        | api.VIR_DOMAIN_UNDEFINE_CHECKPOINTS_METADATA
        | api.VIR_DOMAIN_UNDEFINE_NVRAM
    )
    try:
        with link.about(domain.name):
            domain.handle.undefineFlags(flags)
    except NotFoundError:
        return
