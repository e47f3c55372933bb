"""Internal snapshots of qcow2 images at rest, made and deleted under QEMU's own image locks."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
from collections.abc import Sequence
from pathlib import Path

from offload import run
from offload.errors import BusyError, NotFoundError, OffloadError, UnavailableError
from offload.qmp import Qmp, QmpError, QmpGoneError

_LOCK_SIGN = "Failed to get"  # … "write" lock, shared "write" lock: QEMU block/file-posix.c
_FORMAT_SIGN = "not in qcow2 format"
_END_S = 60.0  # closing an image flushes its tables


def snapshot(images: Sequence[Path], name: str) -> None:
    """Snapshot all images or none, at one instant: a storage daemon holds the write locks of all
    of them, so nothing can write to any in between.

    The daemon dies with the calling thread. Raises BusyError (`volume-in-use`), NotFoundError
    (`volume-missing`), UnavailableError (`not-qcow2`, `qemu-failed`).
    """
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            process = run.spawn(_argv(images, theirs.fileno()), pass_fds=[theirs.fileno()])
        try:
            with Qmp(Path("qemu-storage-daemon"), _END_S, wire=ours) as qmp:
                actions = [_action(f"image{n}", name) for n in range(len(images))]
                qmp.execute("transaction", {"actions": actions})
                with contextlib.suppress(QmpGoneError):  # it may end before it answers
                    qmp.execute("quit")
            process.wait(timeout=_END_S)
        except QmpError as error:
            raise UnavailableError(
                f"cannot snapshot {images[0]}: {error.description}", code="qemu-failed"
            ) from error
        except QmpGoneError as error:
            raise _explain_end(process, images) from error
        except subprocess.TimeoutExpired as error:
            raise UnavailableError(
                f"the snapshot of {images[0]} did not end in time", code="qemu-failed"
            ) from error
        finally:
            run.terminate(process)


def _argv(images: Sequence[Path], fd: int) -> list[str]:
    daemon = run.require_program("qemu-storage-daemon", "qemu-system-common")
    argv = [run.require_program("setpriv", "util-linux"), "--pdeathsig", "TERM", daemon]
    for number, image in enumerate(images):
        file = {"driver": "file", "filename": str(image)}
        node = {"driver": "qcow2", "node-name": f"image{number}", "file": file}
        argv += ["--blockdev", json.dumps(node)]
    return [*argv, "--chardev", f"socket,id=qmp,fd={fd}", "--monitor", "chardev=qmp"]


def _action(node: str, name: str) -> dict[str, object]:
    return {"type": "blockdev-snapshot-internal-sync", "data": {"device": node, "name": name}}


def _explain_end(process: subprocess.Popen[bytes], images: Sequence[Path]) -> OffloadError:
    """Why the daemon ended before it took the order; its words name the image."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=_END_S)
    words = ""
    if process.stderr is not None and process.returncode is not None:
        words = process.stderr.read().decode("utf-8", "replace")
    named = next((image for image in images if str(image) in words), images[0])
    return explain_words(words, named)


def delete(image: Path, name: str) -> None:
    """Delete an internal snapshot. Idempotent, also where the image is gone.

    Raises BusyError (`volume-in-use`): a VM or a view has the image open.
    """
    if not image.exists():
        return
    program = run.require_program("qemu-img", "qemu-utils")
    done = run.run([program, "snapshot", "-d", name, str(image)], check=False, timeout_s=600)
    if done.status != 0 and "snapshot not found" not in done.stderr.lower():
        raise explain_words(done.stderr, image)


def explain(error: run.ProgramError, image: Path) -> OffloadError:
    """An error of a QEMU tool as one of ours."""
    return explain_words(error.stderr, image)


def explain_words(words: str, image: Path) -> OffloadError:
    """The last words of a QEMU tool about an image as an error."""
    if _LOCK_SIGN in words:
        return BusyError(
            f"{image} is open in a running QEMU, or being read by a view of it",
            code="volume-in-use",
            hint="of a running VM: set qmp_socket of the volume; of a view: unmount it first",
        )
    if os.strerror(2) in words:
        return NotFoundError(f"{image} is not there", code="volume-missing")
    if _FORMAT_SIGN in words:
        return UnavailableError(
            f"{image} is not in qcow2 format",
            code="not-qcow2",
            hint='for raw images set provider = "reflink" or "copy"',
        )
    last = words.strip().splitlines()[-1] if words.strip() else "it said nothing"
    return UnavailableError(f"QEMU's tools cannot use {image}: {last}", code="qemu-failed")
