"""A guest whose root file system is a disk of its own, wherever that is: a view, say.

It writes, checks what it wrote, says so on its console, and ends when it is told to, with the sum
of its whole disk. Kernel and initramfs are given to QEMU; everything else it reads from the disk.
"""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from offload import run
from offload.errors import UnavailableError
from offload.testing.lab import initramfs

_MODULES = ("virtio_pci", "virtio_blk", "ext4")

# Process 1 of the initramfs: to the disk.
_START = """#!/bin/busybox sh
/bin/busybox mount -t devtmpfs dev /dev
while read -r file; do /bin/busybox insmod /modules/$file; done < /modules/order
until /bin/busybox mount -t ext4 /dev/vda /new 2>/dev/null; do /bin/busybox sleep 0.1; done
/bin/busybox mount -t devtmpfs dev /new/dev
exec /bin/busybox switch_root /new /bin/busybox sh /init
"""

# Process 1 of the disk. What was written is read back from the disk, not from memory.
_INIT = """
export PATH=/bin
/bin/busybox mkdir -p /proc
/bin/busybox mount -t proc proc /proc
/bin/busybox --install -s /bin
cat /lib/* | md5sum > /dev/null
echo "guest up"
( read -r word; touch /stop ) < /dev/ttyS0 &
round=0
while [ ! -e /stop ]; do
    round=$((round + 1))
    file=/data/$((round % 12))
    dd if=/dev/urandom of=$file bs=32k count=4 conv=fsync 2> /dev/null
    md5sum $file > $file.sum
    sync
    echo 3 > /proc/sys/vm/drop_caches
    md5sum -c -s /data/*.sum || echo "guest damaged in round $round"
    echo "guest round $round"
done
rm /stop
sync
mount -o remount,ro /
echo 3 > /proc/sys/vm/drop_caches
echo "guest disk $(md5sum < /dev/vda)"
poweroff -f
"""


def make_disk(path: Path, work: Path, size_bytes: int, filler_bytes: int) -> None:
    """An ext4 file system with what the guest is, some that it reads at its boot, and
    `filler_bytes` of random files that it never looks at."""
    root = work / "root"
    for name in ("bin", "dev", "proc", "data", "lib", "srv"):
        (root / name).mkdir(parents=True)
    busybox = Path(run.require_program("busybox", "busybox-static"))
    (root / "bin/busybox").write_bytes(busybox.read_bytes())
    (root / "bin/busybox").chmod(0o755)
    (root / "init").write_text(_INIT)
    (root / "lib/read").write_bytes(os.urandom(1 << 20))
    for number in range(filler_bytes >> 20):
        (root / f"srv/{number}").write_bytes(os.urandom(1 << 20))
    with path.open("xb") as out:
        out.truncate(size_bytes)
    program = run.require_program("mke2fs", "e2fsprogs")
    run.run([program, "-q", "-t", "ext4", "-b", "4096", "-d", str(root), str(path)])


class DiskGuest:
    """A running guest on the NBD export of a unix socket. End it with `end`, or leave the block."""

    def __init__(self, socket: Path, folder: Path) -> None:
        kernel = initramfs.find_kernel()
        ram = folder / "disk-initramfs"
        build_initramfs(ram, kernel)
        disk = f"driver=nbd,node-name=disk,server.type=unix,server.path={socket}"
        argv = [
            run.require_program("qemu-system-x86_64", "qemu-system-x86"),
            "-nodefaults", "-display", "none", "-no-reboot", "-machine", "pc",
            "-accel", "tcg", "-m", "256", "-kernel", str(kernel), "-initrd", str(ram),
            "-append", "console=ttyS0 quiet panic=-1 mitigations=off no_timer_check nowatchdog",
            "-blockdev", disk, "-device", "virtio-blk-pci,drive=disk", "-serial", "stdio",
        ]  # fmt: skip
        self.lines: list[str] = []
        self._said = threading.Condition()
        read, self._console = os.pipe()
        self._process = run.spawn(argv, stdin=read)
        os.close(read)
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def _listen(self) -> None:
        assert self._process.stdout is not None  # noqa: S101 - spawn makes a pipe
        for line in self._process.stdout:
            with self._said:
                self.lines.append(line.decode("utf-8", "replace").strip())
                self._said.notify_all()
        with self._said:
            self._said.notify_all()

    def wait_for(self, words: str, timeout_s: float = 180) -> str:
        """The first line with these words. UnavailableError with the console if none comes."""
        until = time.monotonic() + timeout_s
        with self._said:
            while True:
                for line in self.lines:
                    if words in line:
                        return line
                if not self._thread.is_alive() or not self._said.wait(until - time.monotonic()):
                    said = "\n".join(self.lines[-30:])
                    raise UnavailableError(f"the guest never said '{words}': {said}")

    @property
    def rounds(self) -> int:
        """How often it has written and checked."""
        with self._said:
            return sum("guest round" in line for line in self.lines)

    def wait_rounds(self, more: int) -> None:
        """Until it has done so many more."""
        self.wait_for(f"guest round {self.rounds + more}")

    def end(self) -> str:
        """Tell it to end, and wait: the MD5 of its disk as it sees it."""
        os.write(self._console, b"end\n")
        line = self.wait_for("guest disk", 240)
        self._process.wait(60)
        return line.split()[2]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.kill()
        self._process.wait()
        self._thread.join()
        os.close(self._console)


def build_initramfs(target: Path, kernel: Path, *more_modules: str) -> None:
    """One that goes on with `/init` of the first virtio disk."""
    busybox = Path(run.require_program("busybox", "busybox-static"))
    modules = initramfs.with_dependencies(kernel, (*_MODULES, *more_modules))
    files = [(name, 0o040755, b"") for name in ("bin", "dev", "modules", "new")]
    files += [(f"modules/{path.name}", 0o100644, path.read_bytes()) for path in modules]
    files += [
        ("bin/busybox", 0o100755, busybox.read_bytes()),
        ("init", 0o100755, _START.encode()),
        ("modules/order", 0o100644, "".join(f"{p.name}\n" for p in modules).encode()),
    ]
    target.write_bytes(initramfs.cpio(files))
