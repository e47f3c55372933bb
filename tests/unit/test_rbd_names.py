"""Names of RBD images, refs of their snapshots, and how the configuration names them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from offload.ceph import ImageName, Login, Space, space_of
from offload.config import load_config
from offload.errors import ConfigError, PolicyError
from offload.snapshot_ref import ref_key
from offload.snapshots.rbd_refs import Place, kind_of, name_of, place_of

INSTANCE = "iabc"
GOOD = """
[volumes.db]
provider = "rbd"
image = "vms/db.disk-1"
"""


def place(*, grouped: bool = False) -> Place:
    return Place(
        login=Login(conf=Path("/etc/ceph/ceph.conf"), user="client.a"),
        cluster="f0-1",
        pool=3,
        namespace="ns",
        image="10ab",
        shown="vms/ns/db",
        name=name_of(INSTANCE, "t1"),
        grouped=grouped,
    )


# -- images -----------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["vms/db", "vms/ns/db", "a.b/c_d"])
def test_image_name_through_its_device_is_the_same(text: str) -> None:
    name = ImageName.parse(text)
    assert str(name) == text
    assert name.device == Path("/dev/rbd") / text
    assert ImageName.of_device(name.device) == name


@pytest.mark.parametrize("text", ["", "db", "vms/", "/db", "a/b/c/d", "vms/db@snap", "vms/d b"])
def test_image_name_of_another_form_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="pool/image"):
        ImageName.parse(text)


@pytest.mark.parametrize("path", ["/srv/db.raw", "/dev/rbd", "/dev/rbd/vms", "/dev/rbd0"])
def test_image_name_of_another_path_is_refused(path: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ImageName.of_device(Path(path))
    assert caught.value.code == "not-an-image"


# -- refs -------------------------------------------------------------------------------------


@pytest.mark.parametrize("grouped", [False, True])
def test_ref_through_json_is_the_same_place(grouped: bool) -> None:
    ref = place(grouped=grouped).to_ref()
    assert place_of(json.loads(json.dumps(ref)), INSTANCE) == place(grouped=grouped)


def test_ref_key_of_a_snapshot_survives_another_user_and_another_name() -> None:
    moved = {**place().to_ref(), "hint_conf": "/c", "hint_user": "client.b", "hint_image": "vms/x"}
    assert ref_key(moved) == ref_key(place().to_ref())
    assert ref_key(moved) != ref_key({**moved, "image": "10ac"})
    assert ref_key(place(grouped=True).to_ref()) != ref_key(place().to_ref())


@pytest.mark.parametrize(
    "change",
    [
        {"snapshot": "offload.iother.t1"},
        {"snapshot": "offload.iabc.t1.base"},
        {"snapshot": "offload.iabc."},
        {"snapshot": "daily"},
        {"snapshot": ""},
        {"pool": "vms"},
    ],
)
def test_place_of_a_ref_that_is_not_ours_is_refused(change: dict[str, str]) -> None:
    with pytest.raises(PolicyError) as caught:
        place_of({**place().to_ref(), **change}, INSTANCE)
    assert caught.value.code == "foreign-snapshot"


@pytest.mark.parametrize("missing", ["cluster", "pool", "namespace", "image", "snapshot"])
def test_place_of_a_ref_with_a_part_missing_is_refused(missing: str) -> None:
    ref = place().to_ref()
    del ref[missing]
    with pytest.raises(PolicyError):
        place_of(ref, INSTANCE)


def test_kind_of_a_name_tells_ours_and_what_it_is() -> None:
    assert kind_of("offload.iabc.t1", INSTANCE) == ("offload.iabc.t1", False)
    assert kind_of("offload.iabc.t1.base", INSTANCE) == ("offload.iabc.t1", True)
    assert kind_of("offload.iabc.t1.other", INSTANCE) is None
    assert kind_of("offload.iabcd.t1", INSTANCE) is None
    assert kind_of("xoffload.iabc.t1", INSTANCE) is None


# -- space ------------------------------------------------------------------------------------


def test_space_of_a_pool_is_what_its_clients_may_write() -> None:
    pools = [{"id": 3, "stats": {"stored": 30, "max_avail": 70, "bytes_used": 90}}]
    answer = {"stats": {"total_bytes": 1000}, "pools": pools}
    assert space_of(answer, 3) == Space(size_bytes=100, free_bytes=70)
    assert space_of(answer, 4) is None


def test_space_of_a_cluster_without_a_manager_is_unknown() -> None:
    pools = [{"id": 3, "stats": {"stored": 0, "max_avail": 0}}]
    assert space_of({"stats": {"total_bytes": 0}, "pools": pools}, 3) is None


# -- configuration ----------------------------------------------------------------------------


def write(folder: Path, text: str) -> Path:
    path = folder / "offload.toml"
    path.write_text(text)
    path.chmod(0o600)
    return path


def test_config_of_an_image_names_where_the_kernel_would_show_it(tmp_path: Path) -> None:
    more = 'conf = "/etc/ceph/site.conf"\nuser = "client.offload"\n'
    volume = load_config(write(tmp_path, GOOD + more)).volume("db")
    assert volume.path == Path("/dev/rbd/vms/db.disk-1")
    assert volume.conf == Path("/etc/ceph/site.conf")
    assert volume.user == "client.offload"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (GOOD.replace("image", "path").replace("vms", "/vms"), ["volumes.db", "image"]),
        (GOOD + 'path = "/dev/rbd0"\n', ["volumes.db", "no path"]),
        (GOOD.replace("vms/", ""), ["volumes.db.image", "pool/image", "db.disk-1"]),
        (GOOD + 'user = "offload"\n', ["volumes.db.user", "client.NAME", "offload"]),
        (GOOD + 'conf = "ceph.conf"\n', ["volumes.db.conf", "absolute"]),
        (GOOD.replace('"rbd"', '"reflink"'), ["volumes.db", "needs path"]),
        (
            '[volumes.db]\nprovider = "reflink"\npath = "/p"\nuser = "client.x"\n',
            ["volumes.db", "user goes with provider 'rbd'"],
        ),
    ],
)
def test_config_of_a_wrong_image_says_what_is_wrong(
    tmp_path: Path, text: str, words: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, text))
    for word in words:
        assert word in caught.value.message
