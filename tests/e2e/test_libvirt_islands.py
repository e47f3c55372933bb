"""Placeholders as a user has them: production and backup host on a real libvirt daemon."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import libvirt
import pytest
from e2e_site import ROOT, Site

from offload import run
from offload.hypervisors.libvirt import domain_xml
from offload.journal import CRASH_ENV, TRACE_ENV
from offload.testing.libvirt_host import LibvirtHost

pytestmark = [pytest.mark.needs_root, pytest.mark.timeout(900)]

MIB = 1 << 20
PAGE = (ROOT / "docs" / "design" / "recovery.md").read_text(encoding="utf-8")
KILLED = -9
CONFIG = """
state_dir = "{folder}/state"
runtime_dir = "{folder}/run"
[pool]
min_free = "0%"
[volumes.db]
provider = "copy"
path = "{folder}/db.raw"
[volumes.web]
provider = "copy"
path = "{folder}/web.raw"
[groups.shop]
hypervisor = "kvm"
vms = ["db", "web"]
atomic = "record"
store = "main"
[groups.tagged]
hypervisor = "kvm"
tags = ["gold"]
atomic = "record"
[groups.held]
hypervisor = "kvm"
vms = ["db"]
consistency = "filesystem"
[groups.lost]
hypervisor = "kvm"
vms = ["web", "stray"]
[groups.none]
hypervisor = "kvm"
tags = ["nobody:has-it"]
[groups.plain]
volumes = ["db"]
[stores.main]
kind = "disk"
path = "{folder}/store"
min_free = "1MiB"
[hypervisors.kvm]
kind = "libvirt"
uri = "{uri}"
[backup_hosts.island]
hypervisor = "kvm"
disk_dir = "{folder}/placeholders"
"""
DOMAIN = """
<domain type='qemu'>
  <name>{name}</name>
  <uuid>{uuid}</uuid>
  <memory unit='MiB'>32</memory><vcpu>1</vcpu>
  <os><type arch='x86_64' machine='pc'>hvm</type></os>
  <devices>
    {disks}
    <interface type='user'><mac address='52:54:00:00:00:0{number}'/></interface>
    <memballoon model='none'/>
  </devices>
</domain>
"""
DISK = """
<disk type='file' device='disk'>
  <driver name='qemu' type='raw'/><source file='{path}'/><target dev='vd{letter}' bus='virtio'/>
</disk>
"""
UUIDS = {
    "db": "5c5f3c0a-93ad-4a5c-8d5c-2f0a6f1b7e11",
    "web": "5c5f3c0a-93ad-4a5c-8d5c-2f0a6f1b7e12",
    "stray": "5c5f3c0a-93ad-4a5c-8d5c-2f0a6f1b7e13",
}


@dataclass
class Kvm(Site):
    """A site whose VMs are domains, shut off."""

    connection: Any = None

    def define(self, name: str, *files: str) -> None:
        """A domain with these files as its disks; one that is there is changed."""
        disks = "".join(
            DISK.format(path=self.folder / file, letter=letter)
            for letter, file in zip("abc", files, strict=False)
        )
        number = list(UUIDS).index(name)
        text = DOMAIN.format(name=name, uuid=UUIDS[name], disks=disks, number=number)
        self.connection.defineXML(text)

    def domains(self) -> set[str]:
        """What libvirt has beside production."""
        return {domain.name() for domain in self.connection.listAllDomains()} - set(UUIDS)

    def files(self) -> list[Path]:
        """Of placeholders."""
        return sorted((self.folder / "placeholders").iterdir())

    def clean(self) -> bool:
        """Whether nothing is left of any island."""
        with self.context() as ctx:
            kept = ctx.catalog.islands(), ctx.catalog.views(), ctx.catalog.timemarks()
        there = self.domains(), self.files(), self.servers(), self.run_files(), self.snapshots()
        return not any((*kept, *there, self.journal_files()))


@pytest.fixture(scope="module")
def kvm() -> Iterator[Kvm]:
    folder = Path(tempfile.mkdtemp(prefix="ofl-"))
    for name in ("placeholders", "d"):
        (folder / name).mkdir()
    with LibvirtHost(folder / "d").running() as daemon:
        made = Kvm(
            folder=folder,
            pool=folder,
            config=folder / "offload.toml",
            connection=libvirt.open(daemon.uri),
        )
        made.config.write_text(CONFIG.format(folder=folder, uri=daemon.uri))
        made.config.chmod(0o600)
        for name in ("db", "web", "stray"):
            (folder / f"{name}.raw").write_bytes(name.encode().ljust(8) * (MIB // 8))
            made.define(name, f"{name}.raw")
        made.ok("store", "init", "main")
        yield made
        made.run("unmount", "--all", "--force")
        made.connection.close()
    shutil.rmtree(folder)


@pytest.fixture
def site(kvm: Kvm) -> Iterator[Kvm]:
    """Nothing stands before a test, nor after it."""
    yield kvm
    for name in ("db", "web", "stray"):
        kvm.define(name, f"{name}.raw")
    for domain in kvm.connection.listAllDomains(libvirt.VIR_CONNECT_LIST_DOMAINS_ACTIVE):
        domain.destroy()
    kvm.ok("unmount", "--all", "--force")
    for mark in kvm.ask("timemark", "list"):
        kvm.ok("timemark", "delete", mark["id"], "--yes")
    assert kvm.clean()


def content(site: Kvm, placeholder: str) -> bytes:
    """What whoever backs a placeholder up reads as its first disk."""
    text = site.connection.lookupByName(placeholder).XMLDesc()
    overlay = text.partition("<source file='")[2].partition("'")[0]
    raw = site.folder / "read.raw"
    run.run(["qemu-img", "convert", "-O", "raw", overlay, str(raw)])
    found = raw.read_bytes()
    raw.unlink()
    return found


def test_placeholders_from_mount_to_unmount(site: Kvm) -> None:
    said = site.ok("mount", "shop", "--placeholder", "--host", "island")
    assert "shop-island" in said
    assert "backup-web" in said
    assert "offload placeholder refresh shop-island" in said
    assert site.domains() == {"backup-db", "backup-web"}
    before = (site.folder / "web.raw").read_bytes()
    (site.folder / "web.raw").write_bytes(before[::-1])  # production goes on
    assert content(site, "backup-web") == before

    (listed,) = site.ask("placeholder", "list")
    assert [p["standing"]["power"] for p in listed["placeholders"]] == ["off", "off"]
    assert listed["state"] == "standing"
    assert site.ask("placeholder", "check")["findings"] == []
    assert site.ask("status")["islands"][0]["placeholders"] == 2
    refused = site.refused("unmount", "shop-island-web", "--force")
    assert (refused["code"], refused["status"]) == ("view-in-island", 5)

    (fresh,) = site.ask("placeholder", "refresh", "shop-island")
    assert fresh["origin"] != listed["origin"]
    assert site.domains() == {"backup-db", "backup-web"}
    assert content(site, "backup-web") == before[::-1]
    (site.folder / "web.raw").write_bytes(before)
    said = site.ok("unmount", "shop-island")
    assert "taken down shop-island on island" in said
    assert site.clean()


def test_placeholders_that_drifted_are_named_with_what_to_do(site: Kvm) -> None:
    site.ok("mount", "shop", "--placeholder")
    site.define("db", "db.raw", "stray.raw")
    site.connection.lookupByName("web").undefine()
    site.connection.lookupByName("backup-db").create()  # as somebody might
    done = site.run("--json", "placeholder", "check", "shop-island")
    assert done.status == 9
    assert json.loads(done.stderr)["code"] == "placeholder-drift"
    found = {f["placeholder"]: f["what"] for f in reversed(json.loads(done.stdout)["findings"])}
    said = " ".join(f["what"] for f in json.loads(done.stdout)["findings"])
    assert "disk vdb of 1.0 MiB was added" in said
    assert found["backup-web"] == "VM web is gone from kvm"
    assert "somebody has started it" in found["backup-db"]

    assert site.refused("unmount", "shop-island")["code"] == "view-busy"
    refused = site.refused("unmount", "shop-island", "--force")
    assert refused["code"] == "placeholder-runs"
    assert [view["alive"] for view in site.ask("views")] == [True, True]
    assert site.ask("status")["islands"][0]["state"] == "going"
    site.connection.lookupByName("backup-db").destroy()
    assert site.ask("recover")["taken_down"] == ["shop-island"]
    assert site.clean()


def test_two_islands_stand_at_once_and_go_one_by_one(site: Kvm) -> None:
    site.ok("mount", "shop", "--placeholder", "--vm", "db", "--name", "one")
    site.ok("mount", "shop", "--placeholder", "--vm", "web", "--name", "two")
    assert site.domains() == {"backup-db", "backup-web"}
    site.ok("unmount", "one")
    assert site.domains() == {"backup-web"}
    assert [entry["name"] for entry in site.ask("placeholder", "list")] == ["two"]
    site.ok("unmount", "--group", "shop")
    assert site.clean()


def test_islands_are_made_and_taken_away_at_the_same_time(site: Kvm) -> None:
    def at_once(*commands: tuple[str, ...]) -> list[run.Completed]:
        with ThreadPoolExecutor(max_workers=len(commands)) as crew:
            return list(crew.map(lambda words: site.run(*words), commands))

    made = at_once(*(("mount", "shop", "--placeholder", "--vm", name) for name in ("db", "web")))
    assert [done.status for done in made] == [0, 0], [done.stderr for done in made]
    names = [entry["name"] for entry in site.ask("placeholder", "list")]
    assert len(names) == 2
    gone = at_once(*(("unmount", name) for name in (*names, *names)))
    assert 0 in {done.status for done in gone}
    assert "Traceback" not in "".join(done.stderr for done in gone)
    site.ok("recover")
    assert site.clean()


def test_placeholders_of_a_backup_show_it(site: Kvm) -> None:
    made = site.ask("backup", "shop")["id"]
    for mark in site.ask("timemark", "list"):
        site.ok("timemark", "delete", mark["id"], "--yes")
    before = (site.folder / "db.raw").read_bytes()
    island = site.ask("mount", f"backup:{made}", "--placeholder")
    assert island["origin"] == f"backup:{made}"
    assert site.domains() == {"backup-db", "backup-web"}
    assert content(site, "backup-db") == before


def test_group_chosen_by_a_tag_follows_it(site: Kvm) -> None:
    refused = site.refused("backup", "tagged", "--store", "main")
    assert refused["code"] == "nothing-chosen"
    web = site.connection.lookupByName("web")
    tags = "<tags><tag>gold</tag></tags>"
    uri = domain_xml.TAGS
    web.setMetadata(libvirt.VIR_DOMAIN_METADATA_ELEMENT, tags, "offload", uri, 0)
    mark = site.ask("timemark", "create", "tagged")
    assert [snapshot["volume"] for snapshot in mark["snapshots"]] == ["web"]
    assert [machine["name"] for machine in mark["machines"]] == ["web"]


@pytest.mark.parametrize(
    ("words", "code", "status"),
    [
        (["shop", "--host", "nohost"], "unknown-backup-host", 4),
        (["shop", "--vm", "nobody"], "unknown-vm", 4),
        (["shop", "--name", "Not A Name"], "bad-name", 2),
        (["shop", "--shows", "vm"], "no-vm-image", 2),
        (["shop", "plain"], "usage", 2),
        (["shop", "--tcp"], "usage", 2),
        (["shop/db"], "bad-origin", 2),
        (["plain"], "group-without-vms", 9),
        (["none"], "nothing-chosen", 9),
        (["lost"], "disk-without-volume", 9),
        (["timemark:zzzz"], "unknown-timemark", 4),
    ],
)
def test_placeholders_that_cannot_be_are_refused_in_a_line(
    site: Kvm, words: list[str], code: str, status: int
) -> None:
    refused = site.refused("mount", *words, "--placeholder")
    assert (refused["code"], refused["status"]) == (code, status)
    assert site.clean()


def test_name_that_the_host_has_already_is_refused_before_the_timemark(site: Kvm) -> None:
    site.ok("mount", "shop", "--placeholder", "--vm", "db")
    refused = site.refused("mount", "shop", "--placeholder", "--name", "second")
    assert refused["code"] == "name-taken"
    assert len(site.ask("timemark", "list")) == 1


def test_chosen_vm_is_quiesced_by_its_hypervisor(site: Kvm) -> None:
    """Nobody knows how it was shut down, so its image may be what a power cut leaves."""
    refused = site.refused("timemark", "create", "held")
    assert refused["code"] == "consistency-not-reached"
    assert "VM db reached crash consistency only" in refused["message"]
    assert site.clean()


def test_option_of_placeholders_alone_is_refused(site: Kvm) -> None:
    assert site.refused("mount", "shop", "--host", "island")["code"] == "usage"


# -- kill -9 ---------------------------------------------------------------------------------------


def steps_of(site: Kvm, *words: str) -> list[str]:
    trace = site.folder / "trace"
    trace.unlink(missing_ok=True)
    site.ok(*words, **{TRACE_ENV: str(trace)})
    return list(dict.fromkeys(trace.read_text().split()))


def general(step: str) -> str:
    """As docs/design/recovery.md has it."""
    step = re.sub(r"-\d+(?=\.)", "-N", step)
    return re.sub(r"^(island\.(build|down))\..*", r"\1.STEP", step)


def kill_at(site: Kvm, step: str, *words: str) -> None:
    done = site.run(*words, **{CRASH_ENV: step})
    assert done.status == KILLED, f"{words} did not reach {step}: {done.stdout}{done.stderr}"


def test_mount_killed_at_each_step_leaves_nothing(site: Kvm) -> None:
    words = ("mount", "shop", "--placeholder", "--vm", "web")
    steps = [step for step in steps_of(site, *words) if step.startswith("island.")]
    assert {"island.placeholders.intended", "island.known.done", "island.standing.done"} <= set(
        steps
    )
    assert any(step.startswith("island.build.define") for step in steps)
    site.ok("unmount", "--all")
    assert [step for step in steps if f"`{general(step)}`" not in PAGE] == []
    for step in steps:
        kill_at(site, step, *words)
        site.ok("recover")
        if step == "island.commit.after":
            assert site.domains() == {"backup-web"}
            site.ok("unmount", "--all")
        assert site.clean(), step


def test_unmount_killed_at_each_step_is_finished(site: Kvm) -> None:
    words = ("mount", "shop", "--placeholder", "--vm", "web")
    site.ok(*words)
    steps = [
        step
        for step in steps_of(site, "unmount", "shop-island")
        if step.startswith(("unmount.", "island."))  # others have walks of their own
    ]
    assert {"unmount.going.done", "island.down.undefine", "unmount.island.done"} <= set(steps)
    assert [step for step in steps if f"`{general(step)}`" not in PAGE] == []
    for step in steps:
        if not site.domains():
            site.ok(*words)
        kill_at(site, step, "unmount", "shop-island")
        site.ok("recover")
        if site.domains():  # that it goes was not known yet
            assert step == "unmount.begin" or "intended" in step, step
            assert site.ask("placeholder", "check")["findings"] == []
        else:
            assert site.clean(), step
