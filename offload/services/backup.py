"""Image backups: a TimeMark (or any origin) into a store, whole or by what changed.

The commit point is the manifest. What a crash leaves at each step:

| killed | in the store | recovery |
| --- | --- | --- |
| while packs are written | packs and temporary files that bear the backup's id | removed |
| after packs, before the index object | the same | removed |
| after the index object | the same, and the index object | stay: see below |
| after the manifest | a finished backup | kept, and entered in the catalog; see below |

A pin says in the store that the backup is being written (`offload/engine/writing.py`); it is there
from before all of this to after it, and recovery removes it last. A backup that a prune has given
up meanwhile is taken back by its writer, or by recovery.

Once the index object is out, other writers find the chunks it names and build on them, so that
their finished backups may need packs of one that never finished. Only prune, which marks what is in
use, may tell; until then they cost space and nothing else.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime

from offload import __version__, compose
from offload.catalog.store import Catalog
from offload.engine.damage import known_damage
from offload.engine.packwriter import PackWriter
from offload.engine.repository import Repository
from offload.engine.retention_lock import Built, lock_references
from offload.engine.tree import TreeReader
from offload.engine.trust import sample_unchanged
from offload.engine.writeimage import Counts, Job, write_image
from offload.engine.writing import REFERENCES_LOST, settle_dead, writing
from offload.errors import BusyError, NotFoundError, OffloadError, UnavailableError, UsageError
from offload.extents import Ranges, normalize, total
from offload.format import layout
from offload.format.manifest import Manifest, decode_manifest, encode_manifest, manifest_hash
from offload.holds import hold_timemark
from offload.ids import new_id
from offload.image import Image
from offload.instance import Instance
from offload.journal import Operation, step
from offload.machine import Machine
from offload.model import (
    Backup,
    BackupId,
    Consistency,
    ExtentKind,
    ImageRecord,
    Instant,
    Snapshot,
    TimeMark,
)
from offload.origin import Origin, OriginKind, parse_origin
from offload.progress import NoProgress, Progress
from offload.quantity import Watermark
from offload.services import director, machines, points, stores, timemark
from offload.services.context import Context
from offload.services.undo import dump
from offload.snapshot import HoldsForChanged


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageReport:
    """One volume of a backup run. Sizes in bytes."""

    volume: str
    size_bytes: int
    looked_at_bytes: int  # in data extents, or in changed extents
    read_bytes: int
    new_bytes: int  # before compression
    stored_bytes: int  # compressed, with record headers
    mode: str
    reason: str
    alarm: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class BackupReport:
    """What a backup run did."""

    backup: Backup
    images: tuple[ImageReport, ...]
    seconds: float
    read_bytes: int
    stored_bytes: int
    parent_kept: bool  # whether the TimeMark stays on the array as the parent of the next one
    alarms: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Input:
    """One volume to back up."""

    volume: str
    image: Image
    identity: str
    snapshot: Snapshot | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Parent:
    """What an image is compared with. `changed` None: everything has to be read. `bad`: chunks of
    it that cannot be read; what they hit counts as changed."""

    backup: str
    tree: TreeReader | None
    changed: Ranges | None
    reason: str
    bad: frozenset[bytes] = frozenset()


def backup(
    ctx: Context,
    what: str,
    store: str | None = None,
    progress: Progress | None = None,
    *,
    tags: Sequence[str] = (),
) -> BackupReport:
    """Back up a group (a fresh TimeMark), or an origin that exists already. `tags` are for keep
    rules, and stand in the manifest.

    Raises what TimeMarks, providers and stores raise. IntegrityError is *not* raised for change
    tracking that proved wrong: the volume is then compared in full and `alarms` says so.
    """
    origin = parse_origin(what)
    name = _choose_store(ctx, origin, store)
    began = time.monotonic()
    with ExitStack() as stack:
        op = stack.enter_context(ctx.journal.operation("backup", what))
        repository = stack.enter_context(stores.opened(ctx, name, exclusive=False))
        mark: TimeMark | None = None
        # Undone last: once the parent links have moved, those that were parents go.
        op.intend("parents", "delete-unused", {"ids": dump(_parents_in(ctx, name))})
        if origin.kind is OriginKind.GROUP:
            fresh = new_id()
            op.intend("timemark", "delete-unused", {"ids": dump([fresh])})
            options = director.CreateOptions(purpose="backup", id=fresh)
            mark = director.create(ctx, origin.id, options, progress)
            op.done("timemark")
        elif origin.kind is OriginKind.TIMEMARK:
            mark = ctx.catalog.timemark(origin.id)
        if mark is not None:
            stack.enter_context(hold_timemark(ctx.instance, mark.id))
        with ExitStack() as images:  # closed before the old parent goes: some share its file
            inputs = list(_inputs(ctx, origin, mark, images))
            run = _Run(ctx, op, repository, name, progress or NoProgress())
            done = run.write(inputs, replace(_description(ctx, origin, mark), tags=tuple(tags)))
        ctx.catalog.add_backup(done)
        op.done("catalog")
        old = _parents_in(ctx, name)
        run.link_parents(inputs, mark)
        step("backup.parents.linked")
        for gone in old:
            timemark.delete_if_unused(ctx, gone)
    return run.report(done, time.monotonic() - began, mark is not None)


def _parents_in(ctx: Context, store: str) -> list[str]:
    """TimeMarks that are parents in a store now."""
    links = ctx.catalog.parents()
    return list(dict.fromkeys(link.timemark for link in links if link.store == store))


def _choose_store(ctx: Context, origin: Origin, store: str | None) -> str:
    config = ctx.instance.config
    if store is None and origin.kind is OriginKind.GROUP:
        store = config.group(origin.id).store
    if store is None and len(config.stores) == 1:
        store = next(iter(config.stores))
    if store is None:
        raise UsageError(
            "no store chosen",
            code="no-store",
            hint=f"give --store with one of: {', '.join(sorted(config.stores)) or '(none yet)'}",
        )
    config.store(store)
    return store


def _inputs(
    ctx: Context, origin: Origin, mark: TimeMark | None, stack: ExitStack
) -> Iterator[_Input]:
    """Open what is to be read."""
    if mark is None:
        found = points.of_backup(ctx, origin)
    else:
        found = points.of_timemark(ctx, replace(origin, kind=OriginKind.TIMEMARK, id=mark.id))
    for point in found:
        image = compose.open_image(point.source)
        stack.callback(image.close)
        yield _Input(
            volume=point.volume, image=image, identity=point.identity, snapshot=point.snapshot
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Description:
    """What the manifest says beside the images."""

    group: str
    created_at: datetime
    timemark: str
    consistency: Consistency
    instant: Instant
    report: Mapping[str, object]
    machines: tuple[Machine, ...]
    tags: tuple[str, ...] = ()


def _description(ctx: Context, origin: Origin, mark: TimeMark | None) -> _Description:
    if mark is not None:
        report = json.loads(json.dumps(asdict(replace(mark, machines=())), default=str))
        del report["machines"]  # they have a place of their own
        return _Description(
            group=mark.group, created_at=mark.created_at, timemark=mark.id,
            consistency=mark.consistency, instant=mark.instant, report=report,
            machines=mark.machines,
        )  # fmt: skip
    known = ctx.catalog.backup(origin.id)
    return _Description(
        group=known.group, created_at=known.created_at, timemark=known.timemark,
        consistency=known.consistency, instant=known.instant,
        report={"copied_from": f"{known.store}/{known.id}"},
        machines=machines.machines_of(ctx, origin),
    )  # fmt: skip


class _Run:
    """One backup being written."""

    def __init__(
        self,
        ctx: Context,
        op: Operation,
        repository: Repository,
        store: str,
        progress: Progress,
    ) -> None:
        self.ctx = ctx
        self.op = op
        self.repository = repository
        self.store = store
        self.progress = progress
        self._begin()

    def _begin(self) -> None:
        self.id = BackupId(new_id())
        self.reports: list[ImageReport] = []
        self.records: list[ImageRecord] = []
        self.trees: list[Built] = []
        self.parent: str | None = None
        self.stored_bytes = 0

    def write(self, inputs: Sequence[_Input], what: _Description) -> Backup:
        """Write it, and once again under a new id if packs went that it had built on."""
        try:
            return self._write_once("store", inputs, what)
        except UnavailableError as error:
            if error.code != REFERENCES_LOST:
                raise
            self.progress.message(f"{error.message}; it is made again")
        undo_backup(self.ctx.instance, self.ctx.catalog, self._undo)
        self._begin()
        return self._write_once("store-again", inputs, what)

    @property
    def _undo(self) -> dict[str, str]:
        spec = self.repository.store.spec.text()
        return {"store": spec, "name": self.store, "backup": self.id}

    def _write_once(self, name: str, inputs: Sequence[_Input], what: _Description) -> Backup:
        self.op.intend(name, "abort-backup", self._undo)
        with writing(self.repository, self.id) as self.writing:
            return self._write_all(inputs, what)

    def _write_all(self, inputs: Sequence[_Input], what: _Description) -> Backup:
        """Write all images, then the index object, then the manifest; then see that it stands."""
        free = Watermark.parse(self.ctx.instance.config.store(self.store).min_free)
        with PackWriter(self.repository, self.id, min_free=free) as writer:
            for entry in inputs:
                self._image(entry, writer)
            step("backup.images.written")
            self.writing.pin.look()  # not to make others build on what counts as never made
            writer.finish()
        self.stored_bytes = writer.stored_bytes
        locked = lock_references(self.repository, self.trees, writer.packs)
        if locked is not None:
            step("backup.locked")
        done = Backup(
            id=self.id,
            store=self.store,
            group=what.group,
            created_at=what.created_at,
            finished_at=datetime.now(UTC),
            timemark=what.timemark,
            consistency=what.consistency,
            instant=what.instant,
            images=tuple(self.records),
            parent=self.parent,
            host=os.uname().nodename,
            alarms=tuple(r.alarm for r in self.reports if r.alarm),
            tags=tuple(sorted(set(what.tags))),
            vms=tuple(machine.name for machine in what.machines),
        )
        manifest = Manifest(
            backup=done,
            group_config=_group_config(self.ctx, what.group, [i.volume for i in self.records]),
            timemark=what.report,
            previous=newest_manifest(self.repository),
            software=f"offload {__version__}",
            machines=what.machines,
        )
        step("backup.manifest.before")
        raw = encode_manifest(manifest, self.repository.keys)
        self.repository.store.put(layout.manifest_name(self.id), [raw], retain_until=locked)
        step("backup.manifest.written")
        self.writing.confirm(writer.packs)
        step("backup.confirmed")
        return done

    def _image(self, entry: _Input, writer: PackWriter) -> None:
        parent = self._parent(entry)
        alarm, sampled = "", 0
        if parent.changed is not None and parent.tree is not None:
            found = sample_unchanged(self.repository, parent.tree, entry.image, parent.changed)
            sampled = found.read_bytes
            if found.alarm:
                alarm = f"volume {entry.volume}: {found.alarm}"
                self.progress.message(alarm)
                parent = replace(parent, changed=None, reason="change tracking proved wrong")
        if parent.tree is not None and self.parent is None:
            self.parent = parent.backup
        root, counts = self._copy(entry, parent, writer)
        self.trees.append(
            Built(
                root=root,
                size_bytes=entry.image.size_bytes,
                parent=parent.tree.root if parent.tree is not None else None,
            )
        )
        counts.read_bytes += sampled
        mode = "full" if parent.changed is None else "incremental"
        self.records.append(
            ImageRecord(
                volume=entry.volume,
                size_bytes=entry.image.size_bytes,
                sector_size=entry.image.block_size,
                identity=entry.identity,
                root=root.hex(),
                read_bytes=counts.read_bytes,
                stored_bytes=counts.stored_bytes,
                mode=mode,
                reason=parent.reason,
            )
        )
        self.reports.append(
            ImageReport(
                volume=entry.volume,
                size_bytes=entry.image.size_bytes,
                looked_at_bytes=counts.data_bytes,
                read_bytes=counts.read_bytes,
                new_bytes=counts.new_bytes,
                stored_bytes=counts.stored_bytes,
                mode=mode,
                reason=parent.reason,
                alarm=alarm,
            )
        )
        step(f"backup.image.{entry.volume}")

    def _copy(self, entry: _Input, parent: _Parent, writer: PackWriter) -> tuple[bytes, Counts]:
        self.progress.start(entry.volume, self._expected(entry.image, parent.changed))
        try:
            job = Job(
                image=entry.image,
                shape=self.repository.shape(entry.image.size_bytes),
                parent=parent.tree,
                changed=parent.changed,
                bad=parent.bad,
                advance=lambda count: self._advance(entry.volume, count),
            )
            return write_image(job, writer)
        finally:
            self.progress.finish(entry.volume)

    def _advance(self, volume: str, count: int) -> None:
        self.writing.pin.check()
        self.progress.advance(volume, count)

    def _expected(self, image: Image, changed: Ranges | None) -> int | None:
        """The bytes that will be looked at; what nobody sees is not worth listing all extents."""
        if changed is not None:
            return total(changed)
        if isinstance(self.progress, NoProgress):
            return None
        return sum(
            e.length for e in image.extents(0, image.size_bytes) if e.kind is ExtentKind.DATA
        )

    # -- the parent ------------------------------------------------------------------------------

    def _parent(self, entry: _Input) -> _Parent:
        """What to compare with, and what the storage says has changed since."""
        link = self.ctx.catalog.parent(self.store, entry.volume)
        known = (self._backup_of(link.backup) if link else None) or self._last_backup(entry.volume)
        if link is not None and (known is None or known.id != link.backup):
            link = None  # its backup has gone: the TimeMark is not what `known` shows
        if known is None:
            return _no_parent("first backup of this volume in this store")
        record = known.image(entry.volume)
        if record is None or record.size_bytes != entry.image.size_bytes:
            return _no_parent("the volume has another size than in the parent backup")
        if record.identity != entry.identity and entry.snapshot is not None:
            return _no_parent("the volume was made anew since the parent backup")
        shape = self.repository.shape(record.size_bytes)
        tree = TreeReader(self.repository, bytes.fromhex(record.root), shape)
        hurt = known_damage(self.repository, record)
        if hurt.pages:
            return _no_parent("the parent backup is damaged: its tree cannot be read")
        with ExitStack() as stack:
            older = self._parent_snapshot(link.timemark if link else None, entry, stack)
            if older is None or entry.snapshot is None:
                reason = "the parent's TimeMark is gone from the storage: all data was read"
                return _Parent(
                    backup=known.id, tree=tree, changed=None, reason=reason, bad=hurt.ids
                )
            changed = self._changed(older, entry.snapshot)
        reason = "" if changed is not None else "the storage cannot say what changed"
        if changed is not None:
            changed = normalize([*changed, *hurt.ranges])
        return _Parent(backup=known.id, tree=tree, changed=changed, reason=reason, bad=hurt.ids)

    def _changed(self, older: Snapshot, newer: Snapshot) -> Ranges | None:
        provider = compose.snapshot_provider(newer.provider, self.ctx.instance.id)
        if isinstance(provider, HoldsForChanged):
            held = {"provider": newer.provider, "held": dump(provider.changed_undo(newer))}
            self.op.intend(f"changed-{newer.volume}", "release-changed", held)
        changed = provider.changed(older, newer)
        step("backup.changed.known")
        return changed

    def _last_backup(self, volume: str) -> Backup | None:
        """The newest backup in this store that has the volume, from the catalog."""
        for known in reversed(self.ctx.catalog.backups(store=self.store)):
            if known.image(volume) is not None:
                return self._backup_of(known.id)
        return None

    def _backup_of(self, backup_id: str) -> Backup | None:
        """A backup as the store has it, pinned, or None where it has it no longer."""
        return self.writing.parent(backup_id, self.store)

    def _parent_snapshot(
        self, mark: str | None, entry: _Input, stack: ExitStack
    ) -> Snapshot | None:
        """The parent's snapshot of the volume, held on `stack`; None where it is gone or going."""
        if mark is None or entry.snapshot is None:
            return None
        try:
            stack.enter_context(hold_timemark(self.ctx.instance, mark))
            older = self.ctx.catalog.timemark(mark).snapshot(entry.volume)
        except (NotFoundError, BusyError):
            return None
        if older is None or older.provider != entry.snapshot.provider:
            return None
        provider = compose.snapshot_provider(older.provider, self.ctx.instance.id)
        return older if provider.exists(dict(older.ref)) else None

    def link_parents(self, inputs: Sequence[_Input], mark: TimeMark | None) -> None:
        """Make this the parent of the next incremental."""
        for entry in inputs:
            if mark is not None and entry.snapshot is not None:
                self.ctx.catalog.set_parent(self.store, entry.volume, mark.id, self.id)

    def report(self, done: Backup, seconds: float, has_mark: bool) -> BackupReport:
        """The run's report."""
        return BackupReport(
            backup=done,
            images=tuple(self.reports),
            seconds=seconds,
            read_bytes=sum(r.read_bytes for r in self.reports),
            stored_bytes=self.stored_bytes,
            parent_kept=has_mark,
            alarms=done.alarms,
        )


def _no_parent(reason: str) -> _Parent:
    return _Parent(backup="", tree=None, changed=None, reason=reason)


def _group_config(ctx: Context, group: str, images: Sequence[str]) -> dict[str, object]:
    """The group's part of the configuration, so that a bare machine can go on from the store.
    `images`: volumes of the backup, which the group may have looked up."""
    config = ctx.instance.config
    if group not in config.groups:
        return {}
    entry = config.groups[group]
    names = [name for name in (*entry.volumes, *images) if name in config.volumes]
    found: dict[str, object] = {
        "groups": {group: entry.model_dump(mode="json", exclude_defaults=True)},
        "volumes": {
            name: config.volumes[name].model_dump(mode="json", exclude_defaults=True)
            for name in dict.fromkeys(names)
        },
    }
    if entry.hypervisor is not None:
        asked = config.hypervisor(entry.hypervisor)
        found["hypervisors"] = {
            entry.hypervisor: asked.model_dump(mode="json", exclude_defaults=True)
        }
    return found


def newest_manifest(repository: Repository) -> str | None:
    """The hash of the newest manifest of the store, by the store's clock: the head of the chain.

    One is read, not all: a store has a thousand, and on S3 each is a request.
    """
    known = sorted(repository.store.infos(layout.MANIFESTS), key=lambda i: (i.modified, i.name))
    for info in reversed(known):
        try:
            raw = repository.store.get(info.name)
        except NotFoundError:
            continue  # deleted a moment ago
        try:
            decode_manifest(info.name, raw, repository.keys, "")
        except OffloadError:
            continue  # a damaged manifest is `verify`'s to report; it cannot be the head
        return manifest_hash(raw)
    return None


# -- the end of a backup -----------------------------------------------------------------------


def undo_changed(instance: Instance, catalog: Catalog, args: Mapping[str, str]) -> None:  # noqa: ARG001
    """Let go of what the storage held while it was asked what changed."""
    provider = compose.snapshot_provider(args["provider"], instance.id)
    if isinstance(provider, HoldsForChanged):
        provider.release_changed(json.loads(args["held"]))


def undo_backup(instance: Instance, catalog: Catalog, args: Mapping[str, str]) -> None:
    """Take back an unfinished backup; one whose manifest is out is kept and entered, unless a prune
    has given it up. Its pin goes last."""
    store = compose.open_store(args["store"])
    try:
        ident = args["backup"]
        name = layout.manifest_name(ident)
        with closing(Repository.open(store, instance.cache_dir)) as repository:
            if settle_dead(repository, ident):
                done = decode_manifest(name, store.get(name), repository.keys, args["name"])
                stores.adopt(catalog, [done.backup])
            stores.remove_unfinished(repository, ident)
    finally:
        store.close()
