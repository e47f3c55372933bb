"""What a connection will be, before anything is made."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import pytest

from offload.attachment import Attachment
from offload.catalog.store import Catalog
from offload.endpoint import NbdEndpoint, TlsClient, parse
from offload.errors import BusyError, UsageError
from offload.journal import Journal
from offload.model import ConnectionKind, Exposure, RawSource, View, ViewId
from offload.services import connect_plan, undo
from offload.services.connect_plan import planned
from offload.services.context import Context
from offload.testing.instances import make_instance

IQN = "iqn.2026-11.internal.offload:k3.v7.db"
VIEW = View(
    id=ViewId("view1"),
    name="shop-db",
    origin="timemark:t1/db",
    target="nbd",
    uri="nbd://127.0.0.1:10809",
    writable=False,
    size_bytes=1 << 20,
    sector_size=4096,
    created_at=datetime(2026, 3, 1, tzinfo=UTC),
    source=RawSource(path=Path("/pool/db.raw"), size_bytes=1 << 20),
)


@pytest.fixture
def ctx(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Context]:
    keys = tmp_path / "keys"
    keys.write_text("alice:00ff\nbob:11ee\n")
    tables = {"nbd": {"certificates": "/etc/pki", "psk": str(keys)}}
    instance = make_instance(tmp_path, tables)
    catalog = Catalog.open(instance.catalog_path)
    monkeypatch.setattr(connect_plan, "LINKS", tmp_path / "links")
    (tmp_path / "links").mkdir()
    journal = Journal(instance.journal_dir, partial(undo.run_undo, instance, catalog))
    yield Context(instance=instance, catalog=catalog, journal=journal)
    catalog.close()


def endpoint_of(ctx: Context, view: View | None, uri: str) -> NbdEndpoint:
    made = planned(ctx, view, uri, name=None, timeout_s=30)
    endpoint = parse(Attachment.from_strings(made.record).uri)
    assert isinstance(endpoint, NbdEndpoint)
    return endpoint


def test_planned_of_a_view_has_its_name_and_mode(ctx: Context) -> None:
    made = planned(ctx, VIEW, VIEW.uri, name=None, timeout_s=7)
    assert (made.name, made.view, made.kind) == ("shop-db", "view1", ConnectionKind.NBD)
    assert made.read_only
    record = Attachment.from_strings(made.record)
    assert record.timeout_s == 7
    assert record.identifier == f"offload-{ctx.instance.id}-{made.id}"
    assert not planned(ctx, replace(VIEW, writable=True), VIEW.uri, name="x", timeout_s=7).read_only


@pytest.mark.parametrize(
    ("uri", "name"),
    [
        ("nbd://Backup2.example:1/disk one", "backup2.example-1-disk-one"),
        ("nbd+unix:///?socket=/run/offload/views/v7/nbd.sock", "v7"),
        (f"iscsi://192.0.2.1/{IQN}/3", "k3.v7.db-3"),
        ("nbd://[::1]", "1-10809"),
    ],
)
def test_planned_of_anothers_view_derives_a_name(ctx: Context, uri: str, name: str) -> None:
    assert planned(ctx, None, uri, name=None, timeout_s=30).name == name


@pytest.mark.parametrize("name", ["device", "Upper", "", "a/b", "..", "x" * 64, "-x"])
def test_planned_name_that_is_none_is_refused(ctx: Context, name: str) -> None:
    with pytest.raises(UsageError) as error:
        planned(ctx, VIEW, VIEW.uri, name=name, timeout_s=30)
    assert error.value.code == "bad-name"


def test_planned_name_taken_here_or_by_another_instance_is_refused(ctx: Context) -> None:
    ctx.catalog.add_connection(planned(ctx, VIEW, VIEW.uri, name="mine", timeout_s=30))
    (connect_plan.LINKS / "others").symlink_to("/dev/null")
    (connect_plan.LINKS / "stale").symlink_to("/dev/nbd1999-gone")
    for name in ("mine", "others"):
        with pytest.raises(BusyError) as error:
            planned(ctx, VIEW, VIEW.uri, name=name, timeout_s=30)
        assert error.value.code == "name-taken"
    assert planned(ctx, VIEW, VIEW.uri, name="stale", timeout_s=30).name == "stale"


def test_planned_tls_takes_the_configured_files(ctx: Context) -> None:
    uri = "nbds://192.0.2.1:1"
    by_certificates = replace(VIEW, uri=uri, exposure=Exposure(tls="certificates"))
    assert endpoint_of(ctx, by_certificates, uri).tls == TlsClient(certificates=Path("/etc/pki"))
    by_key = replace(VIEW, uri=uri, exposure=Exposure(tls="psk"))
    keys = ctx.instance.config.nbd.psk
    assert endpoint_of(ctx, by_key, uri).tls == TlsClient(pre_shared=True, psk=keys, user="alice")
    foreign = endpoint_of(ctx, None, "nbds://bob@192.0.2.1:1")
    assert foreign.tls == TlsClient(pre_shared=True, psk=keys, user="bob")


def test_planned_tls_files_of_the_uri_win(ctx: Context) -> None:
    uri = "nbds://192.0.2.1:1?tls-certificates=/home/pki"
    assert endpoint_of(ctx, VIEW, uri).tls == TlsClient(certificates=Path("/home/pki"))


@pytest.mark.parametrize(
    ("uri", "host"), [("nbd://0.0.0.0:1", "127.0.0.1"), ("nbd://[::]:1", "::1")]
)
def test_planned_server_on_every_address_is_reached_at_loopback(
    ctx: Context, uri: str, host: str
) -> None:
    assert endpoint_of(ctx, VIEW, uri).address == (host, 1)
