"""Ten thousand VMs: what it costs to read them, to show them, to keep them current.

The server is the simulator of the tests, in this process; what is measured are processes of
`offload`. Its answers are as long as a real vCenter's: each VM has all the devices that a VM has.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pyVmomi import vim

from bench.ground import MIB, OFFLOAD
from bench.measure import BenchError, once, percentile
from bench.report import Table
from offload import run
from tests.vsphere_sim.server import Vcenter, running_vcenter
from tests.vsphere_sim.vms import DiskPlan, VmPlan

VMS, HOSTS, STORES, FOLDERS = 10_000, 64, 100, 200
_UPDATES = 20  # vMotions, one after another

_CONFIG = """
state_dir = "{folder}/state"
runtime_dir = "{folder}/run"
[hypervisors.vc]
{vc}
"""


def measure(rounds: int) -> Table:
    """All of it."""
    table = Table(
        f"Inventory of {VMS:,} VMs with two disks each ({HOSTS} hosts, {STORES} datastores)",
        ("what", "seconds", "CPU s of ours", "peak memory", "goal"),
    )
    with tempfile.TemporaryDirectory(prefix="inventory") as name, _many(Path(name)) as vcenter:
        config = Path(name) / "offload.toml"
        table_of = "\n".join(f"{k} = {json.dumps(v)}" for k, v in vcenter.table().items())
        config.write_text(_CONFIG.format(folder=name, vc=table_of))
        config.chmod(0o600)
        vcenter.model.calls.clear()
        samples = [once([*_argv(config), "refresh"]) for _ in range(rounds)]
        calls = len(vcenter.model.calls) // rounds
        read = sorted(samples, key=lambda sample: sample.cpu_seconds)[len(samples) // 2]
        table.add(
            f"`inventory refresh`, whole ({calls} calls)",
            f"{read.seconds:.1f}",
            f"{read.cpu_seconds:.1f}",
            _mib(max(sample.peak_bytes for sample in samples)),
            "≤ 30 CPU s, ≤ 300 MiB",
        )
        shown = min(
            (once([*_argv(config), "list"]) for _ in range(rounds)), key=lambda s: s.seconds
        )
        table.add(
            "`inventory list`, from the catalog", f"{shown.seconds:.1f}",
            f"{shown.cpu_seconds:.1f}", _mib(shown.peak_bytes), "≤ 2 s",
        )  # fmt: skip
        seen, peak = _followed(config, vcenter)
        table.add(
            "a vMotion, until `refresh --follow` shows it, p50 / max",
            f"{percentile(seen, 50):.2f} / {max(seen):.2f}",
            "", _mib(peak), "≤ 300 MiB",
        )  # fmt: skip
    table.notes.append(
        "Against the simulator, on the same cores: seconds are of both, CPU seconds of `offload` "
        "alone. No vCenter was there."
    )
    return table


def _argv(config: Path) -> list[str]:
    return [OFFLOAD, "--config", str(config), "inventory"]


def _mib(count_bytes: int) -> str:
    return f"{count_bytes / MIB:.0f} MiB"


@contextmanager
def _many(folder: Path) -> Iterator[Vcenter]:
    with running_vcenter(folder / "vcenter") as vcenter:
        model = vcenter.model
        for number in range(HOSTS):
            model.hosts.add(f"esx{number:02}", cluster=f"cluster{number // 16}")
        for number in range(STORES):
            model.datastores.add(f"ds{number:02}", luns=[f"naa.600a0980{number:024x}"])
        usual = _usual_devices()
        for number in range(VMS):
            store = f"ds{number % STORES:02}"
            vm = model.add_vm(
                VmPlan(
                    name=f"vm{number:05}",
                    instance_uuid=f"5023{number:04x}-1111-4222-8333-{number:012x}",
                    bios_uuid=f"4223{number:04x}-1111-4222-8333-{number:012x}",
                    host=f"esx{number % HOSTS:02}",
                    datastore=store,
                    folder=f"team{number % FOLDERS // 10:02}/app{number % FOLDERS:03}",
                    disks=(DiskPlan(), DiskPlan()),
                )
            )
            hardware = vm.properties["config"].hardware
            hardware.device = [*usual, *hardware.device]
        yield vcenter


def _usual_devices() -> list[Any]:
    """What a VM has besides disks and cards, by the defaults of vSphere 8."""
    kinds = vim.vm.device
    about = vim.Description(label="A device of a VM", summary="What it is, in a few words")
    return [
        kinds.VirtualIDEController(key=200, busNumber=0, deviceInfo=about),
        kinds.VirtualIDEController(key=201, busNumber=1, deviceInfo=about),
        kinds.VirtualPS2Controller(key=300, busNumber=0, device=[600, 700], deviceInfo=about),
        kinds.VirtualPCIController(
            key=100, busNumber=0, device=[500, 12000, 1000, 15000, 4000], deviceInfo=about
        ),
        kinds.VirtualSIOController(key=400, busNumber=0, deviceInfo=about),
        kinds.VirtualKeyboard(key=600, controllerKey=300, unitNumber=0, deviceInfo=about),
        kinds.VirtualPointingDevice(key=700, controllerKey=300, unitNumber=1, deviceInfo=about),
        kinds.VirtualVideoCard(
            key=500, controllerKey=100, unitNumber=0, videoRamSizeInKB=4096, numDisplays=1,
            useAutoDetect=False, enable3DSupport=False, deviceInfo=about,
        ),
        kinds.VirtualVMCIDevice(
            key=12000, controllerKey=100, unitNumber=17, id=1, deviceInfo=about,
            allowUnrestrictedCommunication=False, filterEnable=True,
        ),
        kinds.VirtualAHCIController(key=15000, busNumber=0, device=[16000], deviceInfo=about),
        kinds.VirtualCdrom(
            key=16000, controllerKey=15000, unitNumber=0, deviceInfo=about,
            backing=kinds.VirtualCdrom.RemoteAtapiBackingInfo(deviceName="", useAutoDetect=False),
        ),
    ]  # fmt: skip


def _followed(config: Path, vcenter: Vcenter) -> tuple[list[float], int]:
    """Seconds from each change to its line; peak memory of the process."""
    model = vcenter.model
    vms = {o.properties["name"]: o for o in model.objects.values() if "config" in o.properties}
    argv = [*_argv(config), "refresh", "vc", "--follow", "--json"]
    seen = []
    process = run.spawn(argv, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None  # noqa: S101 - it was asked for
        lines = iter(process.stdout.readline, b"")
        if json.loads(next(lines))["event"] != "read":
            raise BenchError("the inventory was not read")
        for number in range(_UPDATES):
            name = f"vm{number * 7:05}"
            began = time.monotonic()
            model.events.vmotion(vms[name], f"esx{(number * 7 + 1) % HOSTS:02}")
            told = json.loads(next(lines))
            seen.append(time.monotonic() - began)
            if told["name"] != name:
                raise BenchError(f"{told} instead of a vMotion of {name}")
        status = Path(f"/proc/{process.pid}/status").read_text()
    finally:
        process.terminate()
        process.wait(timeout=30)
    peak = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
    return seen, int(peak.split()[1]) * 1024
