"""`offload inventory`, and the following of changes, against the vSphere simulator."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import libvirt
import pytest
import tomli_w
from pyVmomi import vim

from offload.cli.main import run
from offload.errors import ConfigError
from offload.services import inventory as service
from offload.services.context import Context, open_context
from offload.testing.libvirt_host import LibvirtHost
from tests.vsphere_sim.server import Vcenter, running_vcenter
from tests.vsphere_sim.vms import DiskPlan, VmPlan

pytestmark = pytest.mark.timeout(120)

LUN1, LUN2 = (f"naa.6001405{n:025x}" for n in (1, 2))


@pytest.fixture
def vcenter(tmp_path: Path) -> Iterator[Vcenter]:
    with running_vcenter(tmp_path / "vcenter") as started:
        model = started.model
        for host in ("esx1", "esx2"):
            model.hosts.add(host)
        model.datastores.add("ds1", luns=[LUN1])
        model.datastores.add("ds2", luns=[LUN2])
        web = VmPlan(
            name="web", instance_uuid="5001-web", folder="web", host="esx1",
            disks=(DiskPlan(), DiskPlan(datastore="ds2", mode="independent_persistent")),
        )  # fmt: skip
        model.tags.attach("backup:nightly", model.add_vm(web))
        model.add_vm(VmPlan(name="db", instance_uuid="5001-db", host="esx2", power="poweredOff"))
        model.add_vm(VmPlan(name="golden", instance_uuid="5001-g", template=True))
        yield started


@pytest.fixture
def config(vcenter: Vcenter, tmp_path: Path) -> Path:
    path = tmp_path / "offload.toml"
    tables = {
        "state_dir": str(tmp_path / "state"),
        "runtime_dir": str(tmp_path / "run"),
        "volumes": {"shop": {"provider": "copy", "path": str(tmp_path / "lun1"), "lun": LUN1}},
        "hypervisors": {"vc": vcenter.table()},
    }
    path.write_text(tomli_w.dumps(tables))
    path.chmod(0o600)
    return path


Offload = Callable[..., str]


@pytest.fixture
def offload(config: Path, capsys: pytest.CaptureFixture[str]) -> Offload:
    """stdout of a command that succeeds; stderr of one that fails with `code`."""

    def command(*words: str, code: int = 0) -> str:
        assert run(["--config", str(config), *words]) == code
        said = capsys.readouterr()
        return said.out if code == 0 else said.err

    return command


@pytest.fixture
def context(config: Path) -> Iterator[Context]:
    with open_context(config) as opened:
        yield opened


# -- the commands ----------------------------------------------------------------------------------


def test_inventory_is_read_and_then_shown_without_the_server(
    offload: Offload, vcenter: Vcenter
) -> None:
    counts = json.loads(offload("inventory", "refresh", "--json"))
    assert counts[0]["vms"] == 3
    vcenter.model.calls.clear()
    rows = {vm["name"]: vm for vm in json.loads(offload("inventory", "list", "--json"))}
    assert rows["web"]["tags"] == ["backup:nightly"]
    assert rows["db"]["power"] == "off"
    text = offload("inventory", "list")
    assert "golden (template)" in text
    assert "/DC0/vm/web" in text
    assert vcenter.model.calls == []


@pytest.mark.parametrize(
    ("chosen", "names"),
    [
        (["--tag", "backup:nightly"], ["web"]),
        (["--folder", "/DC0/vm/web"], ["web"]),
        (["--folder", "/DC0/vm"], ["db", "golden", "web"]),
        (["--folder", "/DC0/vm/we"], []),
        (["--datastore", "ds2"], ["web"]),
        (["--host", "esx2", "--folder", "/DC0"], ["db"]),
    ],
)
def test_inventory_list_shows_what_is_chosen(
    chosen: list[str], names: list[str], offload: Offload
) -> None:
    offload("inventory", "refresh")
    rows = json.loads(offload("inventory", "list", "--json", *chosen))
    assert sorted(vm["name"] for vm in rows) == names


def test_inventory_show_names_the_volumes_behind_disks(offload: Offload) -> None:
    offload("inventory", "refresh")
    shown = json.loads(offload("inventory", "show", "web", "--json"))
    assert shown["volumes"] == {"scsi0:0": ["shop"], "scsi0:1": []}
    text = offload("inventory", "show", "5001-WEB")
    assert LUN2 in text
    assert "independent" in text


def test_inventory_of_datastores_and_hosts_is_listed(offload: Offload) -> None:
    offload("inventory", "refresh")
    assert LUN1 in offload("inventory", "list", "--kind", "datastores")
    assert "connected" in offload("inventory", "list", "--kind", "hosts")
    assert "--kind vms only" in offload(
        "inventory", "list", "--kind", "hosts", "--tag", "a:b", code=2
    )


@pytest.mark.parametrize(
    ("by", "where"),
    [
        ("folder", ["DC0/", "vm/", "web/", "web"]),
        ("host", ["esx1", "web"]),
        ("datastore", ["ds2", "web"]),
        ("tag", ["backup:nightly", "web"]),
    ],
)
def test_inventory_tree_has_vms_below_what_was_asked_for(
    by: str, where: list[str], offload: Offload
) -> None:
    offload("inventory", "refresh")
    below: Any = json.loads(offload("inventory", "tree", "--by", by, "--json"))["vc"]
    for name in where:
        below = below[name]
    assert below == "on"
    assert "db  off" in offload("inventory", "tree", "--by", by)


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("list",), 4, "offload inventory refresh vc"),
        (("show", "web"), 4, "never read"),
        (("refresh", "kvm"), 4, "no hypervisor 'kvm'"),
    ],
)
def test_inventory_that_is_not_there_says_what_to_do(
    words: tuple[str, ...], code: int, said: str, offload: Offload
) -> None:
    assert said in offload("inventory", *words, code=code)


def test_inventory_show_of_a_name_that_two_have_is_refused(
    offload: Offload, vcenter: Vcenter
) -> None:
    vcenter.model.add_vm(VmPlan(name="web", instance_uuid="5001-two", folder="other"))
    offload("inventory", "refresh")
    assert "5001-two, 5001-web" in offload("inventory", "show", "web", code=4)
    assert "no VM 'wbe'" in offload("inventory", "show", "wbe", code=4)


def test_inventory_without_hypervisors_is_refused(config: Path, context: Context) -> None:
    bare = context.instance.config.model_copy(update={"hypervisors": {}})
    with pytest.raises(ConfigError) as refused:
        service.names(_with(context, bare), None)
    assert refused.value.code == "no-hypervisor"


def _with(context: Context, config: Any) -> Context:
    from dataclasses import replace

    return replace(context, instance=replace(context.instance, config=config))


def test_page_has_commands_that_work(offload: Offload) -> None:
    page = (Path(__file__).parents[2] / "docs" / "howto" / "inventory.md").read_text()
    lines = re.findall(r"^offload (inventory .*)$", page, re.MULTILINE)
    ended = [line.split() for line in lines if "--follow" not in line]
    assert len(ended) == len(lines) - 1
    for words in ended:
        assert offload(*words)


# -- following -------------------------------------------------------------------------------------


def test_changes_are_told_and_kept(context: Context, vcenter: Vcenter) -> None:
    model = vcenter.model
    vms = {o.properties["name"]: o for o in model.objects.values() if "config" in o.properties}
    events = service.follow(context, "vc")
    first = next(events)
    assert (first.event, first.message) == ("read", "3 VMs, 2 datastores, 2 hosts")
    model.events.vmotion(vms["web"], "esx2")
    moved = next(events)
    assert (moved.event, moved.kind, moved.name) == ("changed", "vm", "web")
    assert moved.message == "host: esx1 → esx2"
    model.set_power(vms["db"], "poweredOn")
    assert next(events).message == "power: off → on"
    model.forget(vms["db"])
    assert (next(events).event, service.last(context, "vc").vms[-1].host) == ("gone", "esx2")
    assert [vm.name for vm in service.last(context, "vc").vms] == ["golden", "web"]
    events.close()  # type: ignore[attr-defined]
    assert model.sessions == 0


def test_server_that_is_away_is_told_and_tried_again(
    context: Context, vcenter: Vcenter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "_PAUSE_S", 0.0)
    model = vcenter.model
    events = service.follow(context, "vc")
    next(events)
    away = vim.fault.HostConnectFault()
    model.weather.fault = lambda method: away if method == "Login" else None
    model.end_sessions()
    assert next(events).event == "lost"
    model.hosts.set_state("esx1", maintenance=True)
    model.weather.fault = lambda _method: None
    told = next(event for event in events if event.event != "lost")
    assert told.message == "state: connected → maintenance"


# -- libvirt ---------------------------------------------------------------------------------------

BARE = """
<domain type='qemu'>
  <name>bare</name><memory unit='MiB'>32</memory>
  <os><type arch='x86_64' machine='pc'>hvm</type></os>
  <devices>
    <disk type='file' device='disk'>
      <driver name='qemu' type='raw'/><source file='{disk}'/><target dev='vda' bus='virtio'/>
    </disk>
    <memballoon model='none'/>
  </devices>
</domain>
"""


@pytest.mark.needs_root
def test_inventory_of_libvirt_is_shown_and_followed_by_the_same_commands(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    disk = tmp_path / "bare.raw"
    disk.write_bytes(bytes(1 << 20))
    config = tmp_path / "offload.toml"
    with (
        tempfile.TemporaryDirectory(prefix="ol-") as short,
        LibvirtHost(Path(short)).running() as host,
    ):
        tables = {
            "state_dir": str(tmp_path / "state"),
            "runtime_dir": str(tmp_path / "run"),
            "volumes": {"bare": {"provider": "copy", "path": str(disk)}},
            "hypervisors": {"kvm": {"kind": "libvirt", "uri": host.uri}},
        }
        config.write_text(tomli_w.dumps(tables))
        config.chmod(0o600)
        with open_context(config) as context:
            events = service.follow(context, "kvm")
            assert next(events).message.startswith("0 VMs")
            connection = libvirt.open(host.uri)
            connection.defineXML(BARE.format(disk=disk))
            connection.close()
            new = next(event for event in events if event.kind == "vm")
            assert (new.name, new.message) == ("bare", "is new")
            events.close()  # type: ignore[attr-defined]
        words = ["--config", str(config), "--json", "inventory"]
        assert run([*words, "refresh"]) == 0
        capsys.readouterr()
        assert run([*words, "show", "bare"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["disks"][0]["path"] == str(disk)
    assert shown["volumes"] == {"vda": ["bare"]}
