"""The contract suites of snapshot providers. Subclass one and give it its fixtures.

`SnapshotProviderContract` is for providers that make snapshots, `LiveProviderContract`, a part of
it, for those that only show the live volume.

class TestMyProvider(SnapshotProviderContract):
    @pytest.fixture
    def provider(self) -> SnapshotProvider: ...     # constructed with INSTANCE
    @pytest.fixture
    def volumes(self) -> tuple[Volume, ...]: ...    # two fresh ones, 4 MiB or larger, of one pool
    def write(self, volume, offset, data): ...      # as a production host does
"""
# ruff: noqa: S101 - assertions are what a test suite is made of

from __future__ import annotations

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest

from offload import compose
from offload.errors import NotFoundError, OffloadError
from offload.extents import normalize
from offload.model import Instant, Snapshot, Volume
from offload.snapshot import Plan, SnapshotProvider

INSTANCE = "icontract00"  # of the provider under test
_BLOCK = 64 << 10
_MANY = 255


@contextmanager
def taken(
    provider: SnapshotProvider, timemark: str, *volumes: Volume
) -> Iterator[tuple[Snapshot, ...]]:
    """A settled TimeMark, deleted at the end."""
    plan = provider.plan(timemark, volumes)
    try:
        provider.prepare(plan)
        snapshots = provider.snapshot(plan)
        provider.settle(snapshots)
        yield snapshots
    finally:
        for ref in plan.refs:
            provider.delete(dict(ref))


class LiveProviderContract(ABC):
    """What every provider does, also one that makes no snapshots."""

    makes_snapshots = False

    @abstractmethod
    def write(self, volume: Volume, offset: int, data: bytes) -> None:
        """Write to the volume as its production host does, through to the storage."""

    def read(self, provider: SnapshotProvider, snapshot: Snapshot, at: int, length: int) -> bytes:
        """Bytes of a snapshot, the way that backups read it."""
        image = compose.open_image(provider.source(snapshot))
        try:
            return image.pread(at, length)
        finally:
            image.close()

    def test_inspect_tells_size_sector_size_and_a_steady_identity(
        self, provider: SnapshotProvider, volumes: tuple[Volume, ...]
    ) -> None:
        """And a pool that has the space it asks for, where it uses one."""
        state = provider.inspect(volumes[0])
        assert state.size_bytes >= 4 << 20
        assert state.sector_size in {512, 4096}
        assert state.estimate_s >= 0
        assert state.identity
        assert state.identity == provider.inspect(volumes[0]).identity
        assert state.identity != provider.inspect(volumes[1]).identity
        if state.needed_bytes:
            assert state.pool
            assert 0 < state.pool_free_bytes <= state.pool_size_bytes

    def test_inspect_missing_volume_is_not_found(
        self, provider: SnapshotProvider, volumes: tuple[Volume, ...]
    ) -> None:
        """By the code that the command line documents."""
        gone = replace(volumes[0], path=volumes[0].path.with_name("no-such-volume"))
        with pytest.raises(NotFoundError) as found:
            provider.inspect(gone)
        assert found.value.code == "volume-missing"

    def test_plan_names_each_snapshot_and_changes_nothing(
        self, provider: SnapshotProvider, volumes: tuple[Volume, ...]
    ) -> None:
        """A ref goes through JSON and comes back equal."""
        plan = provider.plan("tplan00000", volumes)
        assert plan.volumes == volumes
        assert len(plan.refs) == len(volumes)
        assert all(json.loads(json.dumps(ref)) == ref for ref in plan.refs)
        assert provider.plan("tplan00000", volumes) == plan
        assert provider.leftovers(volumes) == []
        if self.makes_snapshots:
            assert not any(provider.exists(ref) for ref in plan.refs)
            assert len({json.dumps(ref, sort_keys=True) for ref in plan.refs}) == len(volumes)
        assert plan.instant_alone is not Instant.HELD  # that is the director's to say

    def test_snapshot_shows_the_volume(
        self, provider: SnapshotProvider, volumes: tuple[Volume, ...]
    ) -> None:
        """Of each volume its own bytes, size and identity, at the refs of the plan."""
        content = [os.urandom(_BLOCK) for _ in volumes]
        for volume, data in zip(volumes, content, strict=True):
            self.write(volume, _BLOCK, data)
        with taken(provider, "tshows0000", *volumes) as snapshots:
            refs = provider.plan("tshows0000", volumes).refs
            for snapshot, volume, data, ref in zip(snapshots, volumes, content, refs, strict=True):
                state = provider.inspect(volume)
                assert snapshot.volume == volume.name
                assert snapshot.provider == provider.name
                assert snapshot.ref == ref
                assert snapshot.size_bytes == state.size_bytes
                assert snapshot.sector_size == state.sector_size
                assert snapshot.identity == state.identity
                assert provider.exists(ref)
                assert self.read(provider, snapshot, _BLOCK, _BLOCK) == data

    def test_prepare_twice_is_like_once(
        self, provider: SnapshotProvider, volumes: tuple[Volume, ...]
    ) -> None:
        """A retried TimeMark."""
        plan = provider.plan("ttwice0000", volumes)
        provider.prepare(plan)
        with taken(provider, "ttwice0000", *volumes) as snapshots:
            assert len(snapshots) == len(volumes)

    def test_snapshot_one_volume_fails_none_is_left(
        self, provider: SnapshotProvider, volumes: tuple[Volume, ...]
    ) -> None:
        """All or none; what prepare made goes with the refs."""
        plan = provider.plan("tfails0000", volumes)
        provider.prepare(plan)
        gone = replace(volumes[1], path=volumes[1].path.with_name("no-such-volume"))
        broken = replace(plan, volumes=(volumes[0], gone), instant_alone=Instant.NONE)
        with pytest.raises(OffloadError):
            provider.snapshot(broken)
        if self.makes_snapshots:
            assert not any(provider.exists(ref) for ref in plan.refs)
        self._delete_all(provider, plan)
        assert provider.leftovers(volumes) == []

    def test_delete_may_be_repeated_and_leaves_the_volume(
        self, provider: SnapshotProvider, volumes: tuple[Volume, ...]
    ) -> None:
        """Whole, prepared only, never begun: all the same to delete."""
        data = os.urandom(_BLOCK)
        self.write(volumes[0], 0, data)
        with taken(provider, "tdelete000", *volumes):
            pass
        plan = provider.plan("tdelete000", volumes)
        self._delete_all(provider, plan)
        provider.prepare(plan)
        self._delete_all(provider, plan)
        self._delete_all(provider, plan)
        assert provider.leftovers(volumes) == []
        with taken(provider, "tafter0000", volumes[0]) as (snapshot,):
            assert self.read(provider, snapshot, 0, _BLOCK) == data

    def test_leftovers_prepared_only_are_deleted_by_their_refs(
        self, provider: SnapshotProvider, volumes: tuple[Volume, ...]
    ) -> None:
        """A process that died before its first snapshot."""
        provider.prepare(provider.plan("tdied00000", volumes))
        for ref in provider.leftovers(volumes):
            provider.delete(ref)
        assert provider.leftovers(volumes) == []

    def test_changed_names_what_was_written_or_is_unknown(
        self, provider: SnapshotProvider, volumes: tuple[Volume, ...]
    ) -> None:
        """Never too little; in normal form."""
        volume = volumes[0]
        self.write(volume, 0, os.urandom(16 * _BLOCK))
        with taken(provider, "tolder0000", volume) as (older,):
            self.write(volume, 3 * _BLOCK, os.urandom(4096))
            self.write(volume, 9 * _BLOCK, os.urandom(_BLOCK))
            with taken(provider, "tnewer0000", volume) as (newer,):
                changed = provider.changed(older, newer)
                if changed is None:
                    return
                assert changed == normalize(changed)
                assert all(0 <= a < b <= newer.size_bytes for a, b in changed)
                for start, end in [(3 * _BLOCK, 3 * _BLOCK + 4096), (9 * _BLOCK, 10 * _BLOCK)]:
                    assert any(a <= start and end <= b for a, b in changed)
                assert provider.changed(newer, newer) == []

    def test_changed_of_another_identity_or_size_is_unknown(
        self, provider: SnapshotProvider, volumes: tuple[Volume, ...]
    ) -> None:
        """A re-made or a resized volume is no continuation of the old one."""
        with taken(provider, "tother0000", volumes[0]) as (snapshot,):
            assert provider.changed(replace(snapshot, identity="another"), snapshot) is None
            smaller = replace(snapshot, size_bytes=snapshot.size_bytes - 512)
            assert provider.changed(smaller, snapshot) is None

    def _delete_all(self, provider: SnapshotProvider, plan: Plan) -> None:
        for ref in plan.refs:
            provider.delete(dict(ref))
            if self.makes_snapshots:
                assert not provider.exists(dict(ref))


class SnapshotProviderContract(LiveProviderContract):
    """What every provider does that makes snapshots."""

    makes_snapshots = True

    def test_snapshot_later_writes_do_not_show(
        self, provider: SnapshotProvider, volumes: tuple[Volume, ...]
    ) -> None:
        """Neither before nor after it is settled."""
        volume = volumes[0]
        old, new = os.urandom(_BLOCK), os.urandom(_BLOCK)
        self.write(volume, 0, old)
        plan = provider.plan("tstill0000", [volume])
        provider.prepare(plan)
        (snapshot,) = provider.snapshot(plan)
        self.write(volume, 0, new)
        assert self.read(provider, snapshot, 0, _BLOCK) == old
        provider.settle([snapshot])
        self.write(volume, 0, new[::-1])
        assert self.read(provider, snapshot, 0, _BLOCK) == old
        provider.delete(dict(plan.refs[0]))

    def test_delete_one_of_two_leaves_the_other(
        self, provider: SnapshotProvider, volumes: tuple[Volume, ...]
    ) -> None:
        """Volumes of one TimeMark, and one volume of two TimeMarks."""
        data = os.urandom(_BLOCK)
        self.write(volumes[1], 0, data)
        with taken(provider, "tone000000", *volumes) as one:
            with taken(provider, "ttwo000000", *volumes):
                provider.delete(dict(one[0].ref))
                assert not provider.exists(dict(one[0].ref))
            assert self.read(provider, one[1], 0, _BLOCK) == data

    def test_leftovers_are_exactly_the_refs_of_what_is_there(
        self, provider: SnapshotProvider, volumes: tuple[Volume, ...]
    ) -> None:
        """Equal as values, so that they can be compared with those of the catalog."""
        with taken(provider, "tleft00000", *volumes) as snapshots:
            found = provider.leftovers(volumes)
            assert _keys(found) == _keys([dict(s.ref) for s in snapshots])
            assert _keys(provider.leftovers(volumes[:1])) >= _keys([dict(snapshots[0].ref)])
        assert provider.leftovers(volumes) == []

    def test_snapshots_255_of_one_volume_all_stay_readable(
        self, provider: SnapshotProvider, volumes: tuple[Volume, ...]
    ) -> None:
        """Each shows its own moment."""
        volume = volumes[0]
        made: list[Snapshot] = []
        try:
            for number in range(_MANY):
                self.write(volume, 4096, number.to_bytes(8, "big"))
                plan = provider.plan(f"tmany{number:05}", [volume])
                provider.prepare(plan)
                made.extend(provider.snapshot(plan))
            provider.settle(made[-1:])
            for number, snapshot in enumerate(made):
                assert self.read(provider, snapshot, 4096, 8) == number.to_bytes(8, "big")
            assert len(provider.leftovers([volume])) == _MANY
        finally:
            for snapshot in made:
                provider.delete(dict(snapshot.ref))
        assert provider.leftovers([volume]) == []


def _keys(refs: list[dict[str, str]]) -> set[str]:
    return {json.dumps(ref, sort_keys=True) for ref in refs}
