"""What is never frozen."""

from __future__ import annotations

import uuid
from pathlib import Path

import pytest

from offload import mountinfo, procs
from offload.errors import PolicyError
from offload.instance import Instance
from offload.quiescers import ourselves
from offload.quiescers.ourselves import Facts, Machine, agent_facts
from offload.testing.instances import make_instance

UUID = "4c4c4544-0034-4a10-8052-c4c04f4d3632"
HERE = Machine(macs=frozenset({"52:54:00:aa:bb:cc"}), uuid=UUID, boot_id="b1")
TABLE = r"""27 1 254:0 / / rw - ext4 /dev/vda rw
30 27 0:40 / /nfs4 rw - nfs4 nas.example.com:/export rw,vers=4.2,addr=10.0.0.5,clientaddr=10.0.0.9
31 27 0:41 / /nfs6 rw - nfs4 [fd00::5]:/export rw,vers=4.2
32 27 0:42 / /cifs rw - cifs //Filer.example.com/backup rw,addr=10.0.0.6
33 27 0:43 / /ceph rw - ceph 10.0.1.1:6789,10.0.1.2:6789:/vol rw,name=admin
34 27 0:44 / /ceph2 rw - ceph admin@d0.fs=/vol rw,mon_addr=10.0.2.1:6789/10.0.2.2:3300
35 27 0:45 / /sshfs rw - fuse.sshfs backup@box.example.com:/data rw
36 27 0:46 / /p9 rw - 9p 10.0.0.7 rw,trans=tcp,version=9p2000.L
37 27 0:47 / /p9local rw - 9p root rw,trans=virtio
38 27 0:48 / /tmpfs rw - tmpfs none rw
"""


def table() -> list[mountinfo.MountPoint]:
    return mountinfo._parse(TABLE)


def instance(folder: Path, **tables: object) -> Instance:
    return make_instance(folder, tables)


def no_names(server: str) -> frozenset[str]:
    """As a resolver without DNS: addresses only."""
    return ourselves._addresses([server])


def check(facts: Facts, on: Instance) -> None:
    ourselves.check("shop", facts, on, machine=HERE, table=table(), resolve=no_names)


@pytest.mark.parametrize(
    "facts",
    [
        Facts(boot_id="b1"),
        Facts(macs=frozenset({"52-54-00-AA-BB-CC"})),
        Facts(uuids=frozenset({UUID.upper()})),
        Facts(uuids=frozenset({str(uuid.UUID(bytes_le=uuid.UUID(UUID).bytes))})),
    ],
    ids=["boot", "mac", "uuid", "uuid-swapped"],
)
def test_check_of_this_very_machine_is_refused(facts: Facts, tmp_path: Path) -> None:
    with pytest.raises(PolicyError) as refused:
        check(facts, instance(tmp_path))
    assert refused.value.code == "would-freeze-ourselves"
    assert "VM shop" in refused.value.message


def test_check_of_another_machine_passes(tmp_path: Path) -> None:
    facts = Facts(
        macs=frozenset({"52:54:00:aa:bb:cd", ""}),
        addresses=frozenset({"10.9.9.9", "127.0.0.1"}),
        uuids=frozenset({str(uuid.uuid4()), "", "not-a-uuid"}),
        boot_id="b2",
        host_name="shop",
    )
    check(facts, instance(tmp_path, stores={"main": {"kind": "disk", "path": "/nfs4/store"}}))


def test_check_without_facts_passes(tmp_path: Path) -> None:
    check(Facts(), instance(tmp_path, stores={"main": {"kind": "disk", "path": "/nfs4/store"}}))


def test_uuid_that_nobody_set_is_no_machine() -> None:
    blank = "00000000-0000-0000-0000-000000000000"
    machine = Machine(macs=frozenset(), uuid=blank, boot_id="b1")
    assert not ourselves._same_machine(Facts(uuids=frozenset({blank})), machine)


@pytest.mark.parametrize(
    ("place", "address"),
    [
        ("/nfs4/a", "10.0.0.5"),
        ("/nfs6/a", "FD00:0::5"),
        ("/cifs/a", "10.0.0.6"),
        ("/ceph/a", "10.0.1.2"),
        ("/ceph2/a", "10.0.2.2"),
        ("/p9/a", "::ffff:10.0.0.7"),
    ],
)
def test_check_of_the_server_of_a_store_is_refused(
    place: str, address: str, tmp_path: Path
) -> None:
    on = instance(tmp_path, stores={"main": {"kind": "disk", "path": place}})
    with pytest.raises(PolicyError, match=f"the store main \\({place}\\) is on"):
        check(Facts(addresses=frozenset({address})), on)
    check(Facts(addresses=frozenset({"10.0.0.200"})), on)


@pytest.mark.parametrize("kind", ["state_dir", "runtime_dir", "path", "snapshot_dir"])
def test_check_of_the_server_of_a_folder_of_ours_is_refused(kind: str, tmp_path: Path) -> None:
    base = make_instance(tmp_path)
    volume: dict[str, object] = {"provider": "reflink", "path": "/tmpfs/a.raw"}
    if kind.endswith("_dir") and kind != "snapshot_dir":
        on = Instance(
            config=base.config,
            config_path=None,
            state_dir=Path("/nfs4/s") if kind == "state_dir" else base.state_dir,
            runtime_dir=Path("/nfs4/r") if kind == "runtime_dir" else base.runtime_dir,
            id=base.id,
        )
    else:
        on = instance(tmp_path, volumes={"db": {**volume, kind: "/nfs4/x"}})
    with pytest.raises(PolicyError, match="10\\.0\\.0\\.5"):
        check(Facts(addresses=frozenset({"10.0.0.5"})), on)


@pytest.mark.parametrize("host", ["box", "BOX.example.com."])
def test_check_goes_by_name_where_no_address_is_known(host: str, tmp_path: Path) -> None:
    on = instance(tmp_path, stores={"main": {"kind": "disk", "path": "/sshfs/a"}})
    with pytest.raises(PolicyError, match=r"box\.example\.com"):
        check(Facts(host_name=host), on)
    check(Facts(host_name="box.example.org"), on)


def test_address_is_not_taken_for_a_name(tmp_path: Path) -> None:
    on = instance(tmp_path, stores={"main": {"kind": "disk", "path": "/p9/a"}})
    check(Facts(host_name="10"), on)


def test_check_of_the_vcenter_is_refused(tmp_path: Path) -> None:
    vcenter = {"kind": "vsphere", "server": "10.0.3.1", "user": "u", "password_file": "/p"}
    on = instance(tmp_path, hypervisors={"vc": vcenter})
    with pytest.raises(PolicyError, match=r"the hypervisor vc is on 10\.0\.3\.1"):
        check(Facts(addresses=frozenset({"10.0.3.1"})), on)


def test_check_of_the_libvirt_host_is_refused(tmp_path: Path) -> None:
    on = instance(
        tmp_path,
        hypervisors={
            "far": {"kind": "libvirt", "uri": "qemu+ssh://root@kvm1.example.com/system"},
            "near": {"kind": "libvirt"},
        },
    )
    with pytest.raises(PolicyError, match="the hypervisor far"):
        check(Facts(host_name="kvm1"), on)
    check(Facts(host_name="kvm2"), on)


def test_servers_of_local_file_systems_are_none() -> None:
    assert ourselves.servers_of(Path("/p9local/x"), table()) == frozenset()
    assert ourselves.servers_of(Path("/tmpfs/x"), table()) == frozenset()


def test_servers_of_real_places_are_read_without_error() -> None:
    for mount in mountinfo.mounts():
        ourselves.servers_of(mount.point, mountinfo.mounts())


def test_this_machine_is_refused_by_its_own_facts(tmp_path: Path) -> None:
    """Against the real /sys, /proc and mount table."""
    on = make_instance(tmp_path)
    with pytest.raises(PolicyError, match="boot id"):
        ourselves.check("here", Facts(boot_id=procs.boot_id()), on)
    ourselves.check("there", Facts(boot_id=str(uuid.uuid4())), on)


def test_this_machine_counts_real_network_cards_alone(tmp_path: Path) -> None:
    for name, mac, real in (("eth0", "52:54:00:0A:00:01", True), ("br0", "02:42:00:00:00:01", 0)):
        folder = tmp_path / "class/net" / name
        folder.mkdir(parents=True)
        (folder / "address").write_text(mac + "\n")
        if real:
            (folder / "device").mkdir()
    (tmp_path / "class/dmi/id").mkdir(parents=True)
    (tmp_path / "class/dmi/id/product_uuid").write_text(UUID + "\n")
    machine = ourselves.this_machine(tmp_path)
    assert machine.macs == {"52:54:00:0a:00:01"}
    assert machine.uuid == UUID


def test_iscsi_portals_are_those_of_the_session(tmp_path: Path) -> None:
    session = tmp_path / "devices/platform/host2/session1"
    disk = session / "target2:0:0/2:0:0:1/block/sda"
    disk.mkdir(parents=True)
    link = session / "connection1:0/iscsi_connection/connection1:0"
    link.mkdir(parents=True)
    (link / "address").write_text("10.0.4.1\n")
    (link / "persistent_address").write_text("10.0.4.2\n")
    (tmp_path / "dev/block").mkdir(parents=True)
    (tmp_path / "dev/block/8:0").symlink_to(disk)
    assert set(ourselves.iscsi_portals((8, 0), tmp_path)) == {"10.0.4.1", "10.0.4.2"}
    assert not list(ourselves.iscsi_portals((8, 16), tmp_path))


def test_agent_facts_take_what_has_the_documented_shape() -> None:
    answer = [
        {"name": "lo", "hardware-address": "00:00:00:00:00:00",
         "ip-addresses": [{"ip-address": "127.0.0.1", "ip-address-type": "ipv4", "prefix": 8}]},
        {"name": "eth0", "hardware-address": "52:54:00:AA:00:01",
         "ip-addresses": [{"ip-address": "10.0.0.5", "prefix": 24},
                          {"ip-address": "fe80::1%eth0"}, {"ip-address": 7}, "x"]},
        {"name": "tun0"}, "nonsense", {"ip-addresses": {"ip-address": "10.0.0.6"}},
    ]  # fmt: skip
    facts = agent_facts(answer, uuids=[UUID], host_name="shop")
    assert facts.macs == {"52:54:00:aa:00:01"}
    assert facts.addresses == {"10.0.0.5", "fe80::1"}
    assert facts.uuids == {UUID}
    assert agent_facts({"error": 1}) == Facts()
