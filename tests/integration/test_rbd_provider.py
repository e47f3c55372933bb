"""The rbd provider on a real Ceph cluster: instants, groups, what is left, what goes wrong."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import rados
import rbd

from offload.errors import (
    BusyError,
    ConfigError,
    NotFoundError,
    PolicyError,
)
from offload.model import Instant, Volume
from offload.snapshots import rbd_group, rbd_snapshots, rbd_worker
from offload.snapshots.rbd import RbdProvider
from offload.snapshots.rbd_refs import place_of
from offload.testing.ceph import POOL, RunningCeph
from offload.testing.rbd_site import INSTANCE, SIZE, RbdSite, writing

PLAIN = rbd.RBD_FEATURE_LAYERING


@pytest.fixture
def site(ceph: RunningCeph) -> Iterator[RbdSite]:
    made = RbdSite(ceph)
    yield made
    made.clear()


@pytest.fixture
def pair(site: RbdSite) -> tuple[Volume, Volume]:
    """Two images that Ceph can snapshot as a group."""
    return site.image("db"), site.image("web")


@pytest.fixture
def writer(site: RbdSite, pair: tuple[Volume, Volume]) -> Iterator[None]:
    """Somebody writes to both, all the time."""
    with writing(site.ceph, *pair):
        yield


# -- one instant ------------------------------------------------------------------------------


def test_group_snapshots_under_a_writer_are_each_one_instant(
    site: RbdSite, pair: tuple[Volume, Volume], writer: None
) -> None:
    """The second image is never ahead of the first, and never more than one write behind."""
    assert site.provider.plan("t0", pair).instant_alone is Instant.ONE
    seen = []
    for turn in range(10):
        db, web = site.take(f"t{turn}", *pair)
        one, two = site.number_of(db), site.number_of(web)
        assert one - two in {0, 1}
        seen.append(one)
        if turn % 2:
            site.provider.delete(dict(db.ref))
            site.provider.delete(dict(web.ref))
    assert seen == sorted(set(seen))
    assert len(site.groups()) == 5


def test_snapshots_one_by_one_under_a_writer_are_not_called_one_instant(
    site: RbdSite, writer: None, pair: tuple[Volume, Volume]
) -> None:
    """What they are is for whoever holds the writers to say."""
    with site.ceph.pool() as pool:
        rbd.RBD().group_create(pool, "nightly")
        rbd.Group(pool, "nightly").add_image(pool, "db")
    plan = site.provider.plan("t0", pair)
    assert plan.instant_alone is Instant.NONE
    assert plan.notes == ("not one instant by itself: vms/db is in the group nightly",)
    made = site.take("t0", *pair)
    assert all(site.provider.exists(dict(snapshot.ref)) for snapshot in made)
    with site.ceph.pool() as pool:
        assert [i["name"] for i in rbd.Group(pool, "nightly").list_images()] == ["db"]


def test_plan_of_images_that_several_may_write_to_is_not_one_instant(site: RbdSite) -> None:
    shared, locked = site.image("shared", features=PLAIN), site.image("locked")
    for volumes in ([shared], [shared, locked]):
        plan = site.provider.plan("t0", volumes)
        assert plan.instant_alone is Instant.NONE
        assert "vms/shared without exclusive-lock" in plan.notes[0]
        assert all("snapshot" in ref for ref in plan.refs)
    assert site.provider.plan("t0", [locked]).instant_alone is Instant.ONE
    made = site.take("t0", shared, locked)
    assert len(made) == 2


def test_plan_of_images_in_several_namespaces_is_not_one_instant(site: RbdSite) -> None:
    with site.ceph.pool() as pool:
        rbd.RBD().namespace_create(pool, "tenant")
    inner, outer = site.image("db", namespace="tenant"), site.image("db")
    try:
        plan = site.provider.plan("t0", [inner, outer])
        assert plan.instant_alone is Instant.NONE
        assert "several pools or namespaces" in plan.notes[0]
        site.write(inner, 0, b"inner")
        site.write(outer, 0, b"outer")
        made = site.take("t0", inner, outer)
        assert [site.read(snapshot, 0, 5) for snapshot in made] == [b"inner", b"outer"]
        assert [dict(s.ref) for s in made] == site.provider.leftovers([inner, outer])
    finally:
        site.clear()
        site.made.clear()
        with site.ceph.pool() as pool:
            rbd.RBD().namespace_remove(pool, "tenant")


def test_group_in_a_namespace_is_one_instant(site: RbdSite) -> None:
    with site.ceph.pool() as pool:
        rbd.RBD().namespace_create(pool, "tenant")
    volumes = [site.image(name, namespace="tenant") for name in ("db", "web")]
    try:
        assert site.provider.plan("t0", volumes).instant_alone is Instant.ONE
        made = site.take("t0", *volumes)
        for snapshot in made:
            assert site.provider.exists(dict(snapshot.ref))
            site.provider.delete(dict(snapshot.ref))
        assert site.provider.leftovers(volumes) == []
    finally:
        site.clear()
        site.made.clear()
        with site.ceph.pool() as pool:
            rbd.RBD().namespace_remove(pool, "tenant")


def test_plan_of_one_image_twice_is_refused(site: RbdSite, pair: tuple[Volume, Volume]) -> None:
    with pytest.raises(ConfigError) as caught:
        site.provider.plan("t0", [pair[0], replace(pair[0], name="again")])
    assert caught.value.code == "image-twice"


def test_writer_that_keeps_its_lock_makes_a_group_busy_and_leaves_nothing(
    site: RbdSite, pair: tuple[Volume, Volume]
) -> None:
    """As an image mapped with `-o exclusive`."""
    with site.open(pair[0]) as image:
        image.write(b"x", 0)
        image.lock_acquire(rbd.RBD_LOCK_MODE_EXCLUSIVE)
        with pytest.raises(BusyError) as caught:
            site.take("t0", *pair)
        image.lock_release()
    assert caught.value.code == "volume-in-use"
    assert site.is_clean(*pair)


class Cut(BaseException):
    """As if the process ended here."""


class Here:
    """The worker's work, done in this process."""

    def call(self, verb: str, **args: Any) -> Any:
        return rbd_worker.Worker(INSTANCE, lambda: None).answer(verb, args)


# -- groups and their parts -------------------------------------------------------------------


def test_images_of_a_group_snapshot_are_free_for_other_groups(
    site: RbdSite, pair: tuple[Volume, Volume]
) -> None:
    first = site.take("t0", *pair)
    with site.ceph.pool() as pool:
        rbd.RBD().group_create(pool, "nightly")
        for volume in pair:
            rbd.Group(pool, "nightly").add_image(pool, volume.path.name)
            rbd.Group(pool, "nightly").remove_image(pool, volume.path.name)
    second = site.take("t1", *pair)
    assert all(site.provider.exists(dict(s.ref)) for s in (*first, *second))


def test_group_goes_with_its_last_part_and_not_before(
    site: RbdSite, pair: tuple[Volume, Volume]
) -> None:
    db, web = site.take("t0", *pair)
    group = f"offload.{INSTANCE}.t0"
    site.provider.delete(dict(db.ref))
    assert site.groups() == [group]
    assert site.snapshots(pair[0]) == []
    assert site.provider.leftovers(pair) == [dict(web.ref)]
    site.provider.delete(dict(web.ref))
    assert site.is_clean(*pair)


def test_delete_after_each_step_of_a_group_leaves_nothing(
    site: RbdSite, pair: tuple[Volume, Volume], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut short anywhere on the way: found by `leftovers`, and cleaned up by its refs."""
    steps: list[tuple[Any, str]] = [
        (rbd_snapshots, "take"), (rbd_group, "ensure_joined"), (rbd_group, "take"),
        (rbd_group, "leave"), (rbd_group, "remove_part"), (rbd_group, "ensure_removed"),
        (rbd_snapshots, "remove"),
    ]  # fmt: skip
    for number, (module, name) in enumerate(steps):
        real = getattr(module, name)

        def cut(*args: Any, real: Callable[..., Any] = real) -> None:
            real(*args)
            raise Cut

        with monkeypatch.context() as patch:
            patch.setattr(site.provider, "_link", Here())
            patch.setattr(site.provider, "_take_back", lambda *_: None)
            patch.setattr(module, name, cut)
            with pytest.raises(Cut):
                site.provider.delete(dict(site.take(f"cut{number}", *pair)[0].ref))
        found = site.provider.leftovers(pair)
        assert found, name
        for ref in found:
            site.provider.delete(ref)
        assert site.is_clean(*pair), name


def test_group_snapshot_that_was_not_completed_does_not_exist(
    site: RbdSite, pair: tuple[Volume, Volume]
) -> None:
    """librbd killed in between leaves a record that says so."""
    made = site.take("t0", *pair)
    assert all(site.provider.exists(dict(s.ref)) for s in made)
    _mark_incomplete(site, f"offload.{INSTANCE}.t0")
    assert not any(site.provider.exists(dict(s.ref)) for s in made)
    with pytest.raises(NotFoundError):
        site.read(made[0], 0, 1)
    for snapshot in made:
        site.provider.delete(dict(snapshot.ref))
    assert site.is_clean(*pair)


def _mark_incomplete(site: RbdSite, group: str) -> None:
    """cls_rbd: `snapshot_ID` of the group's header: version, length (6 bytes), id, name, state."""
    with site.ceph.pool() as pool:
        with rados.ReadOpCtx() as order:
            found, _ = pool.get_omap_vals_by_keys(order, (f"name_{group}",))
            pool.operate_read_op(order, "rbd_group_directory")
            header = "rbd_group_header." + next(iter(found))[1][4:].decode()
        with rados.ReadOpCtx() as order:
            found, _ = pool.get_omap_vals(order, "", "snapshot_", 10)
            pool.operate_read_op(order, header)
            ((key, value),) = list(found)
        at = 6
        for _ in range(2):  # two counted strings
            at += 4 + struct.unpack_from("<I", value, at)[0]
        assert value[at] == 1
        with rados.WriteOpCtx() as order:
            pool.set_omap(order, (key,), (value[:at] + b"\0" + value[at + 1 :],))
            pool.operate_write_op(order, header)


# -- names, ids, deletion ---------------------------------------------------------------------


def test_snapshot_of_a_renamed_image_is_still_found(
    site: RbdSite, pair: tuple[Volume, Volume]
) -> None:
    site.write(pair[0], 0, b"mine")
    made = [*site.take("t0", pair[0]), *site.take("t1", *pair)]
    with site.ceph.pool() as pool:
        rbd.RBD().rename(pool, "db", "renamed")
        rbd.RBD().create(pool, "db", SIZE)  # another image of the old name
    site.volume("renamed")
    assert [site.read(snapshot, 0, 4) for snapshot in made[:2]] == [b"mine", b"mine"]
    assert site.provider.inspect(pair[0]).identity != made[0].identity
    for snapshot in made:
        site.provider.delete(dict(snapshot.ref))
    assert site.is_clean(pair[0], replace(pair[0], path=pair[0].path.with_name("renamed")))


def test_snapshot_of_an_image_in_the_trash_is_deleted(
    site: RbdSite, pair: tuple[Volume, Volume]
) -> None:
    made = [*site.take("t0", pair[0]), *site.take("t1", *pair)]
    number = place_of(made[0].ref, INSTANCE).image
    with site.ceph.pool() as pool:
        rbd.RBD().trash_move(pool, "db")
    for snapshot in made:
        site.provider.delete(dict(snapshot.ref))
    with site.ceph.pool() as pool:
        rbd.RBD().trash_restore(pool, number, "db")
    assert site.is_clean(*pair)


def test_snapshot_of_an_image_that_is_gone_is_deleted_already(
    site: RbdSite, pair: tuple[Volume, Volume]
) -> None:
    made = site.take("t0", *pair)
    site.provider.delete(dict(made[0].ref))
    with site.ceph.pool() as pool:
        rbd.RBD().remove(pool, "db")
    for snapshot in made:
        site.provider.delete(dict(snapshot.ref))
        assert not site.provider.exists(dict(snapshot.ref))
    assert site.is_clean(pair[1])
    assert site.provider.leftovers(pair) == []
    nowhere = {**made[0].ref, "pool": "99"}
    site.provider.delete(nowhere)
    assert not site.provider.exists(nowhere)


def test_delete_protected_snapshot_is_busy_until_it_is_not(
    site: RbdSite, pair: tuple[Volume, Volume]
) -> None:
    (made,) = site.take("t0", pair[0])
    name = made.ref["snapshot"]
    with site.open(pair[0]) as image:
        image.protect_snap(name)
        with pytest.raises(BusyError) as caught:
            site.provider.delete(dict(made.ref))
        assert caught.value.code == "snapshot-in-use"
        image.unprotect_snap(name)
    site.provider.delete(dict(made.ref))
    assert site.is_clean(*pair)


def test_delete_cloned_snapshot_leaves_it_to_its_clone(
    site: RbdSite, pair: tuple[Volume, Volume]
) -> None:
    """A clone of version 2 keeps a deleted snapshot in the trash."""
    (made,) = site.take("t0", pair[0])
    handle = rados.Rados(
        name="client.admin",
        conffile=str(site.ceph.conf),
        conf={"rbd_default_clone_format": "2"},
    )
    handle.connect()
    try:
        with handle.open_ioctx(POOL) as pool:
            rbd.RBD().clone(pool, "db", made.ref["snapshot"], pool, "clone")
            site.provider.delete(dict(made.ref))
            site.provider.delete(dict(made.ref))
            assert not site.provider.exists(dict(made.ref))
            assert site.provider.leftovers(pair) == []
            assert len(site.snapshots(pair[0])) == 1
            rbd.RBD().remove(pool, "clone")
    finally:
        handle.shutdown()
    assert site.is_clean(*pair)


def test_delete_of_anything_but_ours_is_refused(site: RbdSite, pair: tuple[Volume, Volume]) -> None:
    (made,) = site.take("t0", pair[0])
    with site.open(pair[0]) as image:
        image.create_snap("daily")
    for change in ({"snapshot": "daily"}, {"snapshot": f"offload.{INSTANCE}x.t0"}):
        with pytest.raises(PolicyError):
            site.provider.delete({**made.ref, **change})
    assert RbdProvider("iother00000").leftovers(pair) == []
    assert len(site.snapshots(pair[0])) == 2
