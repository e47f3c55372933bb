"""The main job, step by step, with the real commands; and what was measured on the way."""

from __future__ import annotations

import sqlite3
import tarfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from demo import leftovers, writer
from demo.filling import MIB
from demo.ground import VOLUMES
from demo.guest import Guest
from demo.plain import PlainGround
from demo.pool import PoolGround
from demo.screen import DemoError, Screen, print_table
from offload.images.nbd import NbdImage
from offload.quantity import show_seconds, show_size

_DATABASE, _NUMBER = "orders", "number"


@dataclass
class Story:
    """One run. Each step leaves what the next ones need."""

    ground: PoolGround | PlainGround
    screen: Screen
    guest: Guest
    figures: list[tuple[str, str]] = field(default_factory=list)

    @property
    def log(self) -> Path:
        """Where the writer notes its pauses."""
        return self.ground.folder / "writer.log"

    # -- TimeMark and views ----------------------------------------------------------------------

    def take_timemark(self) -> str:
        """One instant of both volumes, while the writer goes on."""
        began = time.monotonic()
        seconds = self.screen.offload("timemark", "create", "shop")
        self.note("timemark create", show_seconds(seconds))
        mark = self.screen.ask("timemark", "list")[-1]
        frozen = f"{mark['freeze_ms']:.0f} ms" if self.ground.one_instant else "nothing is frozen"
        self.note("  file systems frozen for", frozen)
        self.note_pause("  longest pause of the writer meanwhile", began)
        wanted = "held" if self.ground.one_instant else "none"
        if mark["instant"] != wanted:
            raise DemoError(f"the TimeMark's instant is {mark['instant']}, not {wanted}")
        return str(mark["id"])

    def mount(self, origin: str, what: str) -> list[str]:
        """Mount all volumes of an origin and read the first block; returns the addresses."""
        seconds = self.screen.offload("mount", origin)
        views = [v for v in self.screen.ask("views") if v["origin"].startswith(f"{origin}/")]
        uris = [view["uri"] for view in sorted(views, key=lambda v: VOLUMES.index(_volume(v)))]
        self.note(f"mount of {what}, {len(uris)} volumes", show_seconds(seconds))
        return uris

    def first_byte(self, origin: str, what: str) -> None:
        """From the start of the command `mount` to the first block read, of one volume."""
        began = time.monotonic()
        view = self.screen.ask("mount", origin, "--name", "first-byte")[0]
        read_blocks(view["uri"], 0, 4096)
        self.note(f"mount of {what} to first byte", show_seconds(time.monotonic() - began))
        self.screen.ask("unmount", "first-byte")

    def look(self, uris: list[str]) -> None:
        """What an NBD client sees."""
        for uri in uris:
            self.screen.program(["nbdinfo", uri])

    # -- backups ---------------------------------------------------------------------------------

    def back_up(self, what: str) -> dict[str, Any]:
        """A backup of the group; returns the backup as JSON."""
        began = time.monotonic()
        seconds = self.screen.offload("backup", "shop")
        self.note_pause(f"  longest pause of the writer during the {what} backup", began)
        made: dict[str, Any] = self.screen.ask("backup", "list")[-1]
        read, stored = _sum(made, "read_bytes"), _sum(made, "stored_bytes")
        mode = {image["mode"] for image in made["images"]}
        if self.ground.one_instant and mode != {"full" if what == "first" else "incremental"}:
            raise DemoError(f"the {what} backup is {', '.join(sorted(mode))}")
        rate = f", {show_size(read / seconds)}/s" if "full" in mode else ""
        self.note(
            f"{what} backup ({', '.join(sorted(mode))})",
            f"{show_seconds(seconds)}: {show_size(read)} read, {show_size(stored)} stored{rate}",
        )
        return made

    def change(self) -> None:
        """The volumes change."""
        written = self.ground.change()
        self.screen.say(f"{show_size(written)} are written: new files, and random 4 KiB blocks.")
        self.note("written between the backups, beside the writer", show_size(written))

    def compare_backups(self, older: str, newer: str) -> None:
        """List them, and say what differs."""
        self.screen.offload("backup", "list")
        self.screen.offload("backup", "diff", older, newer)
        found = self.screen.ask("backup", "diff", older, newer)
        changed = sum(entry["changed_bytes"] for entry in found)
        self.note("  differs between the backups", show_size(changed))

    def restore(self, made: dict[str, Any]) -> None:
        """Restore both volumes and compare them with the TimeMark that the backup shows."""
        to = self.ground.folder / "restored"
        to.mkdir()
        seconds = self.screen.offload("restore", made["id"], "--to", f"{to}/")
        size = sum(image["size_bytes"] for image in made["images"])
        data = sum(p.stat().st_blocks * 512 for p in to.iterdir())
        self.note(
            "restore of both volumes",
            f"{show_seconds(seconds)}: {show_size(size)}, {show_size(data)} of it data, "
            f"{show_size(data / seconds)}/s",
        )
        uris = self.mount(f"timemark:{made['timemark']}", "the second TimeMark")
        self.screen.say(
            "The restored images against the TimeMark, which is read through its NBD server from "
            "the production pool, so that no byte of the comparison comes from the store:"
        )
        files = sorted(to.iterdir(), key=lambda p: VOLUMES.index(p.name.removesuffix(".raw")))
        if len(files) != len(uris):
            raise DemoError(f"{len(files)} images were restored")
        seconds = sum(self.screen.compare(u, f) for u, f in zip(uris, files, strict=True))
        self.screen.say("Identical.")
        self.note("comparison with the TimeMark over NBD", f"{show_size(size / seconds)}/s")

    # -- what is inside --------------------------------------------------------------------------

    def read_inside(self, timemark: list[str], backup: list[str]) -> None:
        """Files out of the views, parsed in libguestfs's virtual machine, and what they say."""
        if self.guest.missing:
            self.screen.say(f"Left out: {self.guest.missing}.")
        elif isinstance(self.ground, PoolGround):
            self._inside_file_systems(timemark, backup)
        else:
            self._inside_ext4(backup)
        if isinstance(self.ground, PlainGround):
            self._inside_sectors(timemark, backup)

    def _inside_file_systems(self, timemark: list[str], backup: list[str]) -> None:
        out = self.ground.folder
        commands = ["run"]
        for place, (db, web) in (("timemark", ("sda1", "sdb1")), ("backup", ("sdc1", "sdd1"))):
            commands += [
                f"mount-ro /dev/{db} /",
                f"tar-out /{_DATABASE} {out}/{place}.tar",
                "umount /",
                f"mount-options ro,nouuid /dev/{web} /",
                f"download /{_NUMBER} {out}/{place}.number",
                "umount /",
            ]
        sample = self._sample("shop-web")
        commands[-1:] = [f"download {sample} {out}/sample", "umount /"]
        self._guestfish([*timemark, *backup], commands)
        self._same_sample(sample)
        for place, what in (("timemark", "first TimeMark"), ("backup", "second backup")):
            number = writer.number_in((out / f"{place}.number").read_bytes())
            self._judge(what, self._check_database(place), number)

    def _inside_ext4(self, backup: list[str]) -> None:
        out = self.ground.folder
        sample = "/new.bin"
        self._guestfish(
            backup[:1],
            ["run", "mount-ro /dev/sda1 /", f"tar-out /{_DATABASE} {out}/backup.tar",
             f"download {sample} {out}/sample"],
        )  # fmt: skip
        self.screen.say(f"{sample} came out of the backup.")
        self._check_database("backup")

    def _inside_sectors(self, timemark: list[str], backup: list[str]) -> None:
        assert isinstance(self.ground, PlainGround)  # noqa: S101 - the caller has looked
        for what, uris in (("first TimeMark", timemark), ("second backup", backup)):
            db, web = (
                writer.number_in(read_blocks(uri, self.ground.number_sector(name), 512))
                for uri, name in zip(uris, VOLUMES, strict=True)
            )
            self.screen.say(
                f"{what}: the writer's number is {db} on shop-db and {web} on shop-web. Nothing "
                "held the writer, so they need not agree; the TimeMark says instant: none."
            )

    def _guestfish(self, uris: list[str], commands: list[str]) -> None:
        done = self.guest.run(self.screen, self.ground.folder, uris, commands)
        how = "with KVM" if done.accelerated else "QEMU emulates: KVM does not work here"
        self.note("files out of views with libguestfs", f"{show_seconds(done.seconds)} ({how})")

    def _sample(self, volume: str) -> str:
        """A file of a volume that came from this machine and did not change since."""
        assert isinstance(self.ground, PoolGround)  # noqa: S101 - only it has file systems
        point = self.ground.mounts[volume]
        files = sorted(p for p in (point / "usr").rglob("*") if p.is_file())
        plain = (p for p in files if " " not in str(p) and 1000 < p.stat().st_size < MIB)
        return "/" + str(next(plain).relative_to(point))

    def _same_sample(self, sample: str) -> None:
        if (self.ground.folder / "sample").read_bytes() != Path(sample).read_bytes():
            raise DemoError(f"{sample} out of the backup differs from this machine's")
        self.screen.say(f"{sample} out of the backup equals this machine's own.")

    def _check_database(self, place: str) -> int:
        """Unpack a database that was taken out of a view, check it; returns its last number."""
        to = self.ground.folder / f"{place}-database"
        _unpack_flat(self.ground.folder / f"{place}.tar", to)
        link = sqlite3.connect(to / "orders.db")
        (verdict,) = link.execute("PRAGMA integrity_check").fetchone()
        (last, rows) = link.execute("SELECT max(number), count(*) FROM orders").fetchone()
        link.close()
        if verdict != "ok" or rows != last:
            raise DemoError(f"the database in the {place}: {verdict}, {rows} of {last} rows")
        self.screen.say(
            f"{place}: sqlite integrity_check says {verdict}, {rows} orders, none lost."
        )
        return int(last)

    def _judge(self, what: str, database: int, number: int) -> None:
        if database - number not in {0, 1}:
            raise DemoError(f"{what}: {database} on shop-db, {number} on shop-web: two instants")
        self.screen.say(
            f"{what}: the database (ext4) is at {database}, the file (XFS) at {number}: "
            "one instant of both volumes."
        )
        self.note(f"the writer's number in the {what}", f"{database} on ext4, {number} on XFS")

    # -- the end ---------------------------------------------------------------------------------

    def take_away(self) -> None:
        """Unmount, delete and free everything, with the commands for it."""
        self.screen.offload("unmount", "--all")
        backups = [entry["id"] for entry in self.screen.ask("backup", "list")]
        self.screen.offload("backup", "delete", *backups, "--yes")
        self.screen.offload("prune", "--yes")
        marks = [entry["id"] for entry in self.screen.ask("timemark", "list")]
        if marks:
            self.screen.offload("timemark", "delete", *marks, "--yes")
        self.screen.offload("status")

    def prove_nothing_is_left(self) -> None:
        """Count what is left of offload's own. DemoError unless it is nothing."""
        folder = self.ground.folder
        counts = {
            "servers of TimeViews": len(leftovers.servers(folder)),
            "sockets": len(leftovers.sockets(folder)),
            "snapshots in the pool": len(leftovers.snapshots(self.ground.pool)),
            "unfinished operations": len(leftovers.intents(folder)),
        }
        prove("What is left of the instance:", counts)

    def note(self, what: str, value: str) -> None:
        """A line of the last table."""
        self.figures.append((what, value))

    def note_pause(self, what: str, began: float) -> None:
        """The writer's longest pause since `began`."""
        pause = writer.longest_pause(self.log, began, time.monotonic())
        shown = f"under {writer.PAUSE_S * 1000:.0f} ms" if pause is None else show_seconds(pause)
        self.note(what, shown)


def prove(title: str, counts: dict[str, int]) -> None:
    """Show counts of leftovers. DemoError unless all are 0."""
    print_table(title, [(what, str(count)) for what, count in counts.items()])
    left = [what for what, count in counts.items() if count]
    if left:
        raise DemoError(f"left behind: {', '.join(left)}")


def _unpack_flat(archive: Path, to: Path) -> None:
    """The files of an archive without its folders: no path in it decides where something goes."""
    to.mkdir()
    with tarfile.open(archive) as members:
        for member in members:
            content = members.extractfile(member)
            if content is not None:
                (to / Path(member.name).name).write_bytes(content.read())


def read_blocks(uri: str, offset: int, length: int) -> bytes:
    """A few bytes of a view."""
    image = NbdImage(uri, connections=1)
    try:
        return image.pread(offset, length)
    finally:
        image.close()


def _volume(view: dict[str, Any]) -> str:
    return str(view["origin"]).rpartition("/")[2]


def _sum(made: dict[str, Any], name: str) -> int:
    return sum(image[name] for image in made["images"])
