"""`make demo`: snapshot, TimeViews, backups and restore, on real data, with nothing prepared."""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from demo import leftovers
from demo.ground import running_writer
from demo.guest import Guest
from demo.plain import PlainGround
from demo.pool import PoolGround
from demo.screen import DemoError, Screen, print_table
from demo.story import Story, prove
from offload.errors import OffloadError
from offload.filesystem import mount_of
from offload.quantity import show_seconds, show_size
from offload.run import ProgramError

_ROOT = Path(__file__).resolve().parents[1]
_NEEDED_BYTES = 3 << 30
_PATH_MAX = 60  # bytes: the sockets of TimeViews lie below, and have at most 107
_UNSUITED = ("9p", "nfs", "nfs4", "cifs", "fuse.sshfs", "vboxsf")  # no loop devices on these


def choose_folder(wanted: Path | None) -> tuple[Path, str]:
    """The work folder, and why it is not in the checkout. DemoError if none will do."""
    if wanted is not None:
        _check_path(wanted.absolute())
        return wanted.absolute(), ""
    here = _ROOT / "demo-work"
    reason = _unsuited(here)
    if not reason:
        return here, ""
    other = Path(tempfile.gettempdir(), f"offload-demo-{os.geteuid()}")
    if worse := _unsuited(other):
        raise DemoError(f"{here}: {reason}; {other}: {worse}", hint="choose a folder with --work")
    return other, reason


def _check_path(folder: Path) -> None:
    if len(os.fsencode(folder)) > _PATH_MAX:
        raise DemoError(
            f"{folder} is too long a path for the sockets below it",
            hint=f"choose one of at most {_PATH_MAX} bytes",
        )
    if not folder.parent.is_dir():
        raise DemoError(f"there is no folder {folder.parent}")


def _unsuited(folder: Path) -> str:
    """Why the work folder should not be here, or an empty text."""
    try:
        _check_path(folder)
    except DemoError as error:
        return error.message
    if not os.access(folder.parent, os.W_OK):
        return f"{folder.parent} may not be written by this user"
    with contextlib.suppress(OSError):
        fd = os.open(folder.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            kind = mount_of(fd).kind
        finally:
            os.close(fd)
        if kind in _UNSUITED:
            return f"{folder.parent} is on {kind}"
    if not folder.exists() and shutil.disk_usage(folder.parent).free < _NEEDED_BYTES:
        return f"less than {show_size(_NEEDED_BYTES)} are free on {folder.parent}"
    return ""


@contextmanager
def work_folder(folder: Path, screen: Screen) -> Iterator[None]:
    """The folder, fresh and for this run alone; whatever happens, it is taken away again."""
    with contextlib.ExitStack() as stack:
        _take(folder, stack)
        earlier = [p for p in folder.iterdir() if p.name != leftovers.MARKER]
        if earlier:
            screen.say("An earlier demonstration was interrupted: its leftovers go first.")
            leftovers.clean(folder, screen.env)
            stack.pop_all().close()
            _take(folder, stack)
        try:
            yield
        finally:
            with _undisturbed():
                leftovers.clean(folder, screen.env)


def _take(folder: Path, stack: contextlib.ExitStack) -> None:
    """Make the folder and lock its marker. A folder of somebody else's is never touched."""
    marker = folder / leftovers.MARKER
    if folder.is_symlink() or (folder.exists() and folder.stat().st_uid != os.geteuid()):
        raise DemoError(f"{folder} belongs to somebody else", hint="choose a folder with --work")
    if folder.exists() and any(folder.iterdir()) and not marker.is_file():
        raise DemoError(
            f"{folder} holds something that is not of a demonstration",
            hint="choose a folder with --work that is empty or does not exist",
        )
    folder.mkdir(mode=0o700, exist_ok=True)
    lock = stack.enter_context(marker.open("a"))
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise DemoError(f"another demonstration runs in {folder}") from error


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Cleaning up is not interrupted by a second Ctrl-C."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.signal(number, signal.SIG_IGN) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def make_ground(folder: Path, screen: Screen, *, plain: bool) -> PoolGround | PlainGround:
    """The pool if this machine lets us have one; else plain files, and why."""
    reason = "it was asked for" if plain else ""
    if not reason and os.geteuid() != 0:
        reason = "this is not root, and only root may mount file systems"
    if not reason:
        pool = PoolGround(folder)
        try:
            pool.make_pool()
        except OffloadError as error:
            said = error.stderr.splitlines()[:1] if isinstance(error, ProgramError) else []
            reason = f"no XFS pool in a file can be had here ({''.join(said) or error.message})"
            leftovers.clean(folder, screen.env)
            folder.mkdir(mode=0o700)
            (folder / leftovers.MARKER).touch()
        else:
            return pool
    screen.say(f"FALLBACK to plain image files and the provider copy: {reason}.")
    return PlainGround(folder)


def tell(story: Story) -> None:
    """The steps, in order."""
    ground, screen = story.ground, story.screen
    screen.heading("Two production volumes, full of real files")
    began = time.monotonic()
    total = ground.build()
    screen.say(ground.note)
    screen.say(f"{show_size(total)} of this machine's files in {_since(began)}.")
    config = leftovers.config_of(ground.folder)
    config.write_text(ground.config())
    config.chmod(0o600)
    screen.echo(f"cat {config}")
    print(config.read_text(), flush=True)
    screen.echo(f"export OFFLOAD_CONFIG={config}")
    with running_writer(ground, story.log, screen.env):
        screen.say("A process now writes to both volumes, all the time.")
        _work(story)
    screen.heading("All of it is taken away")
    story.take_away()
    story.prove_nothing_is_left()


def _work(story: Story) -> None:
    screen = story.screen
    screen.heading("A store, and a TimeMark of both volumes")
    screen.offload("store", "init", "main")
    mark = story.take_timemark()
    screen.heading("The TimeMark as read-only block devices over NBD (TimeViews)")
    timemark_uris = story.mount(f"timemark:{mark}", "the TimeMark")
    story.look(timemark_uris)
    story.first_byte(f"timemark:{mark}/shop-db", "a snapshot")
    screen.heading("An image backup of both volumes")
    first = story.back_up("first")
    screen.heading("The volumes change; a second backup reads and stores what changed")
    story.change()
    second = story.back_up("second")
    story.compare_backups(first["id"], second["id"])
    screen.heading("A restore, compared byte for byte")
    story.restore(second)
    screen.heading("A backup itself as block devices, and files read out of it")
    backup_uris = story.mount(f"backup:{second['id']}", "the backup")
    story.first_byte(f"backup:{second['id']}/shop-db", "a backup")
    screen.offload("views")
    story.read_inside(timemark_uris, backup_uris)


def _since(began: float) -> str:
    return show_seconds(time.monotonic() - began)


def play(args: argparse.Namespace) -> None:
    """Everything, in a work folder that is gone again afterwards."""
    began = time.monotonic()
    folder, reason = choose_folder(args.work)
    screen = Screen(leftovers.config_of(folder))
    if args.clean:
        if folder.exists():
            with work_folder(folder, screen):
                pass  # both its ends clean up
        return
    if reason:
        screen.say(f"Working in {folder}: {reason}.")
    with work_folder(folder, screen):
        story = Story(make_ground(folder, screen, plain=args.plain), screen, Guest())
        tell(story)
    prove(
        "What is left of the demonstration:",
        {
            "mounts": len(leftovers.mounts(folder)),
            "loop devices": len(leftovers.loops(folder)),
            "processes": len(leftovers.programs(folder)),
            "files": int(folder.exists()),
        },
    )
    story.note("the whole demonstration", _since(began))
    print_table("Measured:", story.figures)


def main() -> int:
    """Run it; the exit code is 0 if everything was as promised and nothing is left."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, help="the work folder (default: demo-work)")
    parser.add_argument("--plain", action="store_true", help="as if this were not root")
    parser.add_argument("--clean", action="store_true", help="only take away what a run left")
    args = parser.parse_args()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda got, _frame: sys.exit(128 + got))
    try:
        play(args)
    except KeyboardInterrupt:
        print("\ninterrupted: everything is taken away", file=sys.stderr)
        return 130
    except OffloadError as error:
        hint = f"\n  {error.hint}" if error.hint else ""
        print(f"\ndemo: {error.message}{hint}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
