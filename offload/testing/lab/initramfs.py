"""The guest's kernel, and its initramfs: busybox, `init`, and the modules that reach the root."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from offload.errors import UnavailableError
from offload.run import require_program, run

_HERE = Path(__file__).parent
_MODULES = (
    "virtio_pci", "virtio_net", "virtio_blk", "virtio_console", "9p", "9pnet_virtio", "overlay",
)  # fmt: skip
_FOLDERS = ("bin", "cow", "dev", "lower", "modules", "new", "proc", "sys", "whole")
_ALL_MODULES = Path("/lib/modules")
_HIDDEN = (Path("/run"), Path("/tmp"))  # noqa: S108 - where the guest has file systems of its own


def find_kernel(boot: Path = Path("/boot"), modules: Path = _ALL_MODULES) -> Path:
    """The newest stock kernel: with its modules, SCSI targets among them.

    UnavailableError naming the package where there is none, or none may be read.
    """
    fitting = [
        path
        for path in boot.glob("vmlinuz-*")
        if (modules / _version(path) / "kernel/drivers/target").is_dir()
        and os.access(path, os.R_OK)
    ]
    if not fitting:
        raise UnavailableError(
            f"the lab guest needs a kernel in {boot}, readable, with all its modules",
            code="kernel-missing",
            hint="install it: apt-get install linux-image-amd64 (not the cloud kernel)",
        )
    return max(fitting, key=lambda path: [int(n) for n in re.findall(r"\d+", path.name)])


def _version(kernel: Path) -> str:
    return kernel.name.removeprefix("vmlinuz-")


def hidden_folders(paths: Sequence[Path]) -> list[Path]:
    """Of these folders, those that lie where the guest has a fresh file system."""
    both = {form for path in paths for form in (path.absolute(), path.resolve())}
    return sorted(p for p in both if any(p.is_relative_to(h) for h in _HIDDEN))


def build(
    target: Path, kernel: Path, *, settings: Mapping[str, str], visible: Sequence[Path]
) -> None:
    """Write the initramfs. `settings` become the environment of `start`.

    Folders of `visible` are seen in the guest although /run and /tmp are its own.
    """
    busybox = Path(require_program("busybox", "busybox-static"))
    modules = with_dependencies(kernel, _MODULES)
    exports = [f"export {k}={shlex.quote(v)}\n" for k, v in settings.items()]
    files: list[tuple[str, int, bytes]] = [(name, 0o040755, b"") for name in _FOLDERS]
    files += [(f"modules/{path.name}", 0o100644, path.read_bytes()) for path in modules]
    files += [
        ("bin/busybox", 0o100755, busybox.read_bytes()),
        ("init", 0o100755, (_HERE / "init").read_bytes()),
        ("modules/order", 0o100644, "".join(f"{p.name}\n" for p in modules).encode()),
        ("visible", 0o100644, b"".join(os.fsencode(path) + b"\n" for path in visible)),
        ("settings", 0o100644, "".join(exports).encode()),
    ]
    target.write_bytes(cpio(files))


def with_dependencies(kernel: Path, names: Sequence[str]) -> list[Path]:
    """Files of the modules, each after those that it needs, as modprobe says."""
    modprobe = require_program("modprobe", "kmod")
    found: dict[Path, None] = {}
    for name in names:
        said = run([modprobe, "-S", _version(kernel), "--show-depends", name]).stdout
        for line in said.splitlines():
            word, _, rest = line.partition(" ")
            if word == "insmod":  # the other word is `builtin`
                found[Path(rest.split()[0])] = None
    return list(found)


def cpio(files: Sequence[tuple[str, int, bytes]]) -> bytes:
    """An archive of (name, mode, content) in the "newc" format.

    Documentation/driver-api/early-userspace/buffer-format.rst of the Linux sources.
    """
    archive = bytearray()
    for number, (name, mode, content) in enumerate((*files, ("TRAILER!!!", 0, b"")), start=1):
        path = os.fsencode(name) + b"\0"
        fields = (number, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(path), 0)
        archive += b"070701" + b"".join(b"%08x" % field for field in fields) + path
        archive += b"\0" * (-len(archive) % 4) + content
        archive += b"\0" * (-len(archive) % 4)
    return bytes(archive)
