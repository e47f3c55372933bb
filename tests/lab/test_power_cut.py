"""The power goes while a client writes to a view: what was acknowledged is there afterwards."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from offload.testing.lab.guest import Guest

MIB = 1 << 20
ENOUGH = 60

# What runs in the guest. A write has its number's pattern, in a place of its own; the sizes are
# parts of clusters of an overlay, whole ones, and one and a half.
SCRIPT = """
import random
import sys
from pathlib import Path
import nbd
from offload.services import mount
from offload.services.context import open_context
from offload.services.recover import recover

SIZE = 32 << 20
PLACE = 128 << 10
ORDER = random.Random(1).sample(range(SIZE // PLACE), SIZE // PLACE)

def write_of(number):
    offset = ORDER[number] * PLACE + 512 * (number % 7)
    return offset, random.Random(number).randbytes((512, 4096, 65536, 98304)[number % 4])

def connected(context):
    client = nbd.NBD()
    (status,) = mount.views(context)
    client.connect_uri(status.view.uri)
    return client

with open_context(Path("/data/offload.toml")) as context:
    match sys.argv[1:]:
        case ["write"]:
            mount.mount(context, ["shop"], mount.MountOptions(writable=True))
            client = connected(context)
            # never synced: it shows that the power really goes
            Path("/data/control").write_bytes(b"c" * (1 << 20))
            for number in range(len(ORDER)):
                offset, data = write_of(number)
                client.pwrite(data, offset)
                print(number, flush=True)
        case ["read", count]:
            print(recover(context).warnings)
            shown = bytearray(Path("/data/db.raw").read_bytes())
            client = connected(context)
            for number in range(int(count)):
                offset, data = write_of(number)
                assert client.pread(len(data), offset) == data, f"write {number} is lost"
                shown[offset : offset + len(data)] = data
            in_flight = ORDER[int(count)]
            for place in set(ORDER) - {in_flight}:
                begin = place * PLACE
                found = client.pread(PLACE, begin)
                assert found == shown[begin : begin + PLACE], f"place {place} is damaged"
            print("as it was")
"""

CONFIG = """
state_dir = "/data/state"
runtime_dir = "/run/offload"
[pool]
min_free = "0%"
[overlays]
limit = "100MiB"
min_free = "1MiB"
[volumes.db]
provider = "device"
path = "/data/db.raw"
[groups.shop]
volumes = ["db"]
atomic = "record"
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_view_power_cut_under_a_writer_keeps_all_that_was_acknowledged(
    fresh_guest: Guest, tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    disk = tmp_path / "disk.raw"
    with disk.open("xb") as out:
        out.truncate(512 * MIB)
    device = fresh_guest.attach(disk)
    fresh_guest.shell(
        f"""mkfs.ext4 -q {device}; mkdir /data; mount {device} /data
        head -c 32M /dev/urandom > /data/db.raw; cat > /data/offload.toml; sync""",
        stdin=CONFIG.encode(),
    )
    root = str(pytestconfig.rootpath)
    writer = fresh_guest.start([sys.executable, "-c", SCRIPT, "write"], cwd=root)
    acknowledged = 0
    for line in writer.lines(time.monotonic() + 120):
        acknowledged = int(line) + 1
        if acknowledged == ENOUGH:
            break
    assert acknowledged == ENOUGH, f"{writer.failure} {writer.stderr.decode()}"
    fresh_guest.reboot()
    written = len(writer.stdout.split())
    assert ENOUGH <= written < 256  # it was still at it

    fresh_guest.shell(f"mkdir /data; mount {device} /data")
    control = fresh_guest.shell("cat /data/control || true").stdout
    assert control != b"c" * MIB
    read = [sys.executable, "-c", SCRIPT, "read", str(written)]
    said = fresh_guest.run(read, cwd=root, timeout_s=180)
    assert said.text.endswith("as it was\n")
    overlay = fresh_guest.shell("qemu-img check -U /data/state/overlays/*.qcow2", check=False)
    assert overlay.status in {0, 3}, overlay.text  # 3: a cluster that nothing names
