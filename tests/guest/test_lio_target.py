"""The lio target on the real kernel: the contract suite, and what clients see of a view."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from offload.errors import IntegrityError, NotFoundError, OffloadError, UsageError
from offload.iscsi import canonical_names, identity
from offload.model import BackupSource, NbdSource, Qcow2Source, RawSource
from offload.run import run, spawn, terminate
from offload.target import ExportRequest, Target
from offload.testing.instances import make_instance
from offload.testing.libiscsi import Initiator, ScsiError
from offload.testing.lio import MIB, Site, loop_disk, site, wait_until
from offload.testing.target import TargetClient, TargetContract
from targets.lio import LioTarget

pytestmark = pytest.mark.in_guest(timeout_s=1200)

DATA_PROTECT, ILLEGAL_REQUEST = 7, 5
PATTERN = bytes(range(256)) * 2


class TestLioTarget(TargetContract):
    @pytest.fixture
    def target(self, folder: Path) -> Target:
        return LioTarget(make_instance(folder))

    def connect(self, uri: str) -> TargetClient:
        return Initiator(uri)

    def test_alive_killed_server_is_dead_and_can_be_served_again(
        self, target: Target, request_: ExportRequest, content: bytes
    ) -> None:
        """There is no process to kill: the administrator clears all of LIO."""
        endpoint = target.export(request_)
        run(["targetctl", "clear"])
        assert not target.alive(request_.run_dir, endpoint.server)
        assert target.clients(request_.run_dir, endpoint.server) == []
        target.withdraw(request_.run_dir, endpoint.server)
        again = target.export(request_)
        assert again.uri == endpoint.uri
        client = self.connect(again.uri)
        assert client.pread(512, 0) == content[:512]
        client.close()
        target.withdraw(request_.run_dir, again.server)


@pytest.fixture
def lio() -> Iterator[Site]:
    with site() as made:
        yield made


# -- identity ---------------------------------------------------------------------------------


def test_identity_is_the_views_own_and_lasts(lio: Site) -> None:
    image = lio.image()
    request = lio.request(image)
    one = lio.export(request)
    with Initiator(one.uri) as client:
        standard, serial, pages = client.inquiry(), client.inquiry(0x80), client.inquiry(0x83)
    assert standard[8:16] == b"OFFLOAD "
    assert standard[16:32] == b"TimeView".ljust(16)
    assert standard[32:36] == b"1   "
    assert identity("v1").serial.encode() in serial
    # NAA 6 (IEEE registered extended): from the serial number on in its vendor specific part
    naa = pages[pages.index(b"\x01\x03\x00\x10") + 4 :][:16].hex()
    assert naa.startswith("6001405")
    assert naa[7:] == identity("v1").serial[:25]
    assert canonical_names("lio", "v1") == (f"naa.{naa}",)
    lio.withdraw(request)

    again = lio.export(request)
    other = lio.export(lio.request(image, view_id="v2"))
    assert again.uri == one.uri
    with Initiator(again.uri) as client:
        assert (client.inquiry(0x80), client.inquiry(0x83)) == (serial, pages)
    with Initiator(other.uri) as client:
        assert naa not in client.inquiry(0x83).hex()


@pytest.mark.parametrize("kind", ["file", "device", "overlay"])
def test_sectors_of_4096_bytes_are_shown_as_such(lio: Site, kind: str) -> None:
    image = lio.image()
    content = image.read_bytes()
    source = RawSource(path=image, size_bytes=MIB, sector_size=4096)
    with loop_disk(image, 4096) as disk:
        if kind == "device":
            source = replace(source, path=disk)
        endpoint = lio.export(lio.request(source, on_overlay=kind == "overlay"))
        with Initiator(endpoint.uri) as client:
            assert (client.block_size, client.blocks) == (4096, MIB // 4096)
            assert client.pread(MIB, 0) == content
            if kind == "overlay":
                client.pwrite(b"x" * 4096, 4096)
                assert client.pread(8192, 0) == content[:4096] + b"x" * 4096
        lio.close()


# -- read-only --------------------------------------------------------------------------------


def test_write_to_a_read_only_view_gets_data_protect(lio: Site) -> None:
    image = lio.image()
    content = image.read_bytes()
    endpoint = lio.export(lio.request(image))
    with Initiator(endpoint.uri) as client:
        assert client.mode_sense()[2] & 0x80  # WP, SBC-3 6.4.1
        with pytest.raises(ScsiError) as refused:
            client.pwrite(PATTERN, 0)
        assert refused.value.sense_key == DATA_PROTECT
        client.flush()
        assert client.pread(MIB, 0) == content
    device = Path(endpoint.server["device"])
    assert run(["blockdev", "--getro", str(device)]).stdout.strip() == "1"
    assert image.read_bytes() == content


def test_read_only_view_offers_nothing_that_writes(lio: Site) -> None:
    endpoint = lio.export(lio.request())
    with Initiator(endpoint.uri) as client:
        assert not client.inquiry()[5] & 0x08  # 3PC, SPC-4 6.4.2: no third-party copy
        assert client.inquiry(0xB2)[5] & 0xE0 == 0  # LBPU, LBPWS, LBPWS10, SBC-3 6.5.5


def test_read_behind_the_end_is_an_error_and_no_more(lio: Site) -> None:
    endpoint = lio.export(lio.request())
    with Initiator(endpoint.uri) as client:
        with pytest.raises(ScsiError) as refused:
            client.pread(512, MIB)
        assert refused.value.sense_key == ILLEGAL_REQUEST
        assert len(client.pread(512, MIB - 512)) == 512


# -- the device under it ----------------------------------------------------------------------


def test_free_block_device_is_served_itself(lio: Site) -> None:
    image = lio.image()
    with loop_disk(image) as disk:
        endpoint = lio.export(lio.request(disk))
        assert endpoint.server["device"] == str(disk)
        with Initiator(endpoint.uri) as client:
            assert client.pread(MIB, 0) == image.read_bytes()
            with pytest.raises(ScsiError) as refused:
                client.pwrite(PATTERN, 0)
            assert refused.value.sense_key == DATA_PROTECT
        lio.close()


def test_device_in_use_is_served_all_the_same(lio: Site) -> None:
    """The second view of one snapshot, too."""
    image = lio.image()
    with loop_disk(image) as disk:
        requests = [lio.request(disk, view_id=f"v{number}") for number in range(3)]
        endpoints = [lio.export(request) for request in requests]
        assert len({endpoint.server["device"] for endpoint in endpoints}) == 3
        for endpoint in endpoints:
            with Initiator(endpoint.uri) as client:
                assert client.pread(MIB, 0) == image.read_bytes()
        lio.withdraw(requests[0])
        assert all(lio.target.alive(r.run_dir, lio.served[r.run_dir].server) for r in requests[1:])
        lio.close()


def test_name_of_a_device_may_hold_the_kernels_syntax(lio: Site) -> None:
    """A comma ends an option in LIO's control file."""
    image = lio.image()
    with loop_disk(image) as disk:
        link = lio.folder / "a,readonly=0,b"
        link.symlink_to(disk)
        endpoint = lio.export(lio.request(link))
        with Initiator(endpoint.uri) as client, pytest.raises(ScsiError) as refused:
            client.pwrite(PATTERN, 0)
        assert refused.value.sense_key == DATA_PROTECT
        lio.close()


def test_qcow2_is_read_as_what_it_holds(lio: Site) -> None:
    image = lio.image()
    qcow2 = lio.folder / "image.qcow2"
    run(["qemu-img", "convert", "-O", "qcow2", str(image), str(qcow2)])
    endpoint = lio.export(lio.request(Qcow2Source(path=qcow2, size_bytes=MIB)))
    assert endpoint.server["device"].startswith("/dev/nbd")
    with Initiator(endpoint.uri) as client:
        assert client.pread(MIB, 0) == image.read_bytes()
        with pytest.raises(ScsiError) as refused:
            client.pwrite(PATTERN, 0)
        assert refused.value.sense_key == DATA_PROTECT


def test_nbd_server_is_served_on(lio: Site) -> None:
    image, socket = lio.image(), lio.folder / "other.sock"
    server = spawn(["nbdkit", "-f", "-r", "-U", str(socket), "file", str(image)])
    try:
        wait_until(socket.exists)
        source = NbdSource(uri=f"nbd+unix:///?socket={socket}", size_bytes=MIB)
        endpoint = lio.export(lio.request(source))
        with Initiator(endpoint.uri) as client:
            assert client.pread(MIB, 0) == image.read_bytes()
        lio.close()
    finally:
        terminate(server)


# -- writable ---------------------------------------------------------------------------------


def test_writable_view_keeps_what_was_written_when_it_is_served_again(lio: Site) -> None:
    image = lio.image()
    content = image.read_bytes()
    request = lio.request(image, on_overlay=True)
    with Initiator(lio.export(request).uri) as client:
        assert not client.mode_sense()[2] & 0x80
        client.pwrite(PATTERN, 4096)
        client.flush()
    lio.withdraw(request)
    with Initiator(lio.export(request).uri) as client:
        found = client.pread(MIB, 0)
    assert found == content[:4096] + PATTERN + content[4096 + len(PATTERN) :]
    assert image.read_bytes() == content


def test_writable_view_says_that_it_has_a_write_cache(lio: Site) -> None:
    """Or an initiator would never flush. MODE SENSE, caching page, WCE: SBC-3, 6.4.5."""
    endpoint = lio.export(lio.request(on_overlay=True))
    with Initiator(endpoint.uri) as client:
        pages = client.mode_sense()[4 + client.mode_sense()[3] :]
    caching = pages.index(b"\x08\x12")
    assert pages[caching + 2] & 0x04


# -- refused ----------------------------------------------------------------------------------


def test_image_of_broken_sectors_is_refused(lio: Site) -> None:
    image = lio.image(MIB + 512)
    source = RawSource(path=image, size_bytes=MIB + 512, sector_size=4096)
    with pytest.raises(UsageError) as refused:
        lio.target.export(lio.request(source))
    assert refused.value.code == "partial-sector"


def test_overlay_that_is_gone_is_not_replaced_by_its_origin(lio: Site) -> None:
    request = lio.request(on_overlay=True)
    assert request.overlay is not None
    request.overlay.path.unlink()
    with pytest.raises(NotFoundError) as refused:
        lio.target.export(request)
    assert refused.value.code == "overlay-missing"


def test_composed_image_of_another_size_is_refused(lio: Site) -> None:
    qcow2 = lio.folder / "image.qcow2"
    run(["qemu-img", "create", "-q", "-f", "qcow2", str(qcow2), str(MIB)])
    with pytest.raises(IntegrityError):
        lio.target.export(lio.request(Qcow2Source(path=qcow2, size_bytes=2 * MIB)))


def test_backup_that_is_not_there_says_so(lio: Site) -> None:
    source = BackupSource(
        store=str(lio.folder / "store"),
        backup="b" * 10,
        volume="root",
        size_bytes=MIB,
        cache_dir=lio.folder / "cache",
    )
    with pytest.raises(OffloadError) as refused:
        lio.target.export(lio.request(source))
    assert "store" in refused.value.message


# -- many -------------------------------------------------------------------------------------


def test_64_views_at_once_are_served_and_withdraw_to_nothing(lio: Site) -> None:
    image = lio.image()
    requests = [lio.request(image, view_id=f"m{number}") for number in range(64)]
    endpoints = [lio.export(request) for request in requests]
    assert len({endpoint.uri for endpoint in endpoints}) == 64
    first, last = Initiator(endpoints[0].uri), Initiator(endpoints[-1].uri)
    assert first.pread(MIB, 0) == last.pread(MIB, 0) == image.read_bytes()
    assert len(lio.target.clients(requests[0].run_dir, endpoints[0].server)) == 1
    assert lio.target.clients(requests[1].run_dir, endpoints[1].server) == []
    first.close()
    last.close()


_EXPORT = """
import sys
from pathlib import Path
from offload.model import Exposure, RawSource
from offload.target import ExportRequest
from offload.testing.instances import make_instance
from targets.lio import LioTarget
folder = Path(sys.argv[1])
for number in range(3):
    request = ExportRequest(
        view_id=f"p{number}", name="p", run_dir=folder / "run" / f"p{number}",
        source=RawSource(path=folder / "image", size_bytes=1 << 20), exposure=Exposure(),
    )
    target = LioTarget(make_instance(folder))
    endpoint = target.export(request)
    assert target.alive(request.run_dir, endpoint.server)
    target.withdraw(request.run_dir, endpoint.server)
"""


def test_several_processes_export_and_withdraw_at_once(tmp_path: Path) -> None:
    folders = [tmp_path / str(number) for number in range(3)]
    for folder in folders:
        folder.mkdir()
        (folder / "image").write_bytes(bytes(MIB))
    running = [
        subprocess.Popen([sys.executable, "-c", _EXPORT, str(folder)], stderr=subprocess.PIPE)
        for folder in folders
    ]
    assert [process.communicate()[1] for process in running] == [b""] * 3
    assert [process.returncode for process in running] == [0] * 3
