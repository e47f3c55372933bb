"""The S3 store in trouble: a real gateway behind a proxy that fails as networks and servers do."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from offload.errors import (
    ConfigError,
    IntegrityError,
    OffloadError,
    PolicyError,
    PrivilegeError,
    UnavailableError,
)
from offload.stores import s3_traffic
from offload.stores.s3 import S3Store
from offload.stores.s3_traffic import Body, RateLimit
from offload.storespec import StoreSpec
from offload.testing.fault_proxy import FaultProxy, Trouble, fault_proxy
from offload.testing.rgw import KMS_KEY, RunningRgw

MIB = 1 << 20
SECRETS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE")


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in SECRETS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent/credentials")


@pytest.fixture
def proxy(rgw: RunningRgw) -> Iterator[FaultProxy]:
    with fault_proxy(rgw.endpoint) as made:
        yield made


def spec(rgw: RunningRgw, bucket: str, **options: str) -> StoreSpec:
    usual = {
        "endpoint": rgw.endpoint,
        "path_style": "yes",
        "credentials_file": str(rgw.credentials_file),
        "retry_for": "20",
    }
    return StoreSpec(url=f"s3://{bucket}/p", options={**usual, **options})


@pytest.fixture
def store(rgw: RunningRgw, proxy: FaultProxy) -> Iterator[S3Store]:
    """By way of the proxy; it has answered once."""
    made = S3Store(spec(rgw, rgw.new_bucket(), endpoint=proxy.endpoint))
    assert not made.exists("first")
    proxy.forget()
    yield made
    made.close()


def small_parts(store: S3Store) -> S3Store:
    store.multipart_above, store.part_bytes = 6 * MIB, 5 * MIB  # the gateway's least part
    return store


# -- what fails for a while ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fault",
    [
        {"trouble": Trouble.ERROR, "status": 500, "code": "InternalError", "times": 3},
        {"trouble": Trouble.ERROR, "status": 503, "code": "SlowDown", "times": 3},
        {"trouble": Trouble.ERROR, "status": 429, "code": "TooManyRequests", "times": 2},
        {"trouble": Trouble.ERROR, "status": 400, "code": "BadDigest", "times": 1},
        {"trouble": Trouble.CUT_REQUEST, "times": 2},
        {"trouble": Trouble.LOSE_REPLY, "times": 1},
        {"trouble": Trouble.LATE, "seconds": 0.5},
    ],
    ids=lambda f: f"{f['trouble']}-{f.get('code', '')}",
)
def test_put_is_made_good_again(store: S3Store, proxy: FaultProxy, fault: dict[str, Any]) -> None:
    data = os.urandom(300_000)
    proxy.inject(methods=("PUT",), **fault)
    assert store.put("packs/x", [data[:1000], data[1000:]]) == len(data)
    assert store.get("packs/x") == data
    assert not proxy.faults[0].times


def test_put_whose_reply_was_lost_is_not_sent_again(store: S3Store, proxy: FaultProxy) -> None:
    proxy.inject(Trouble.LOSE_REPLY, methods=("PUT",))
    store.put("a", [b"once"])
    assert proxy.count("PUT") == 1
    assert proxy.count("HEAD") == 1


def test_put_whose_reply_was_lost_is_no_success_where_somebody_elses_object_is(
    rgw: RunningRgw, store: S3Store, proxy: FaultProxy
) -> None:
    store.put("a", [b"theirs"])
    proxy.inject(Trouble.LOSE_REPLY, methods=("PUT",))
    with pytest.raises(OffloadError) as caught:
        store.put("a", [b"ours!!"])
    assert caught.value.code == "object-exists"
    assert store.get("a") == b"theirs"


@pytest.mark.parametrize(
    "fault",
    [
        {"trouble": Trouble.ERROR, "status": 503, "code": "SlowDown", "times": 3},
        {"trouble": Trouble.CUT_REPLY, "at_least": 1000, "times": 4},
        {"trouble": Trouble.SLOW, "bytes_per_s": 4 * MIB},
        {"trouble": Trouble.LATE, "seconds": 0.5},
    ],
    ids=lambda f: str(f["trouble"]),
)
def test_get_is_made_good_again(store: S3Store, proxy: FaultProxy, fault: dict[str, Any]) -> None:
    data = os.urandom(MIB)
    store.put("packs/x", [data])
    proxy.inject(methods=("GET",), **fault)
    assert store.get_range("packs/x", 100, MIB - 100) == data[100:]
    assert store.get("packs/x") == data
    assert not proxy.faults[0].times


def test_get_that_is_cut_goes_on_where_it_was_cut(store: S3Store, proxy: FaultProxy) -> None:
    data = os.urandom(MIB)
    store.put("packs/x", [data])
    proxy.forget()
    proxy.inject(Trouble.CUT_REPLY, methods=("GET",), times=3, at_least=1000)
    assert store.get("packs/x") == data
    asked = [seen.got_bytes for seen in proxy.seen]
    assert asked == sorted(asked, reverse=True)
    assert sum(asked) < 2.2 * MIB


def test_delete_whose_reply_was_lost_is_done(store: S3Store, proxy: FaultProxy) -> None:
    store.put("a", [b"x"])
    proxy.inject(Trouble.LOSE_REPLY, methods=("DELETE",))
    store.delete("a")
    assert not store.exists("a")


def test_list_that_fails_between_two_pages_has_all_names(store: S3Store, proxy: FaultProxy) -> None:
    store.page_names = 3
    names = [f"many/{n}" for n in range(5)]
    for name in names:
        store.put(name, [b""])
    proxy.forget()
    proxy.inject(Trouble.ERROR, methods=("GET",), part="continuation-token", times=2)
    assert list(store.list("many/")) == names
    assert proxy.count("GET") == 4


def test_server_that_fails_for_too_long_is_given_up(rgw: RunningRgw, proxy: FaultProxy) -> None:
    made = S3Store(spec(rgw, rgw.new_bucket(), endpoint=proxy.endpoint, retry_for="0.5"))
    made.put("a", [b"x"])
    proxy.inject(Trouble.ERROR, status=503, code="ServiceUnavailable", times=10_000)
    with pytest.raises(UnavailableError) as caught:
        made.get("a")
    assert caught.value.code == "store-unavailable"
    assert "HTTP 503" in caught.value.message
    made.close()


def test_what_is_refused_is_not_asked_again(store: S3Store, proxy: FaultProxy) -> None:
    proxy.inject(Trouble.ERROR, status=403, code="AccessDenied", times=5)
    with pytest.raises(PrivilegeError):
        store.get("a")
    assert proxy.count() == 1


# -- large objects ---------------------------------------------------------------------------------


@pytest.mark.parametrize("lost", [None, "uploadId", "partNumber=2", "uploads"])
def test_large_put_goes_in_parts_and_survives_lost_replies(
    store: S3Store, proxy: FaultProxy, lost: str | None
) -> None:
    small_parts(store)
    data = random.Random(1).randbytes(12 * MIB + 17)
    if lost:
        methods = ("PUT",) if lost.startswith("part") else ("POST",)
        proxy.inject(Trouble.LOSE_REPLY, methods=methods, part=lost)
    assert store.put("packs/big", [data[:7], data[7:]]) == len(data)
    assert proxy.count("PUT", "partNumber") == (4 if lost == "partNumber=2" else 3)
    assert store.get("packs/big") == data
    store.sweep("")


def test_large_put_that_fails_leaves_nothing(
    rgw: RunningRgw, store: S3Store, proxy: FaultProxy
) -> None:
    small_parts(store)
    proxy.inject(Trouble.ERROR, methods=("PUT",), part="partNumber=2", status=403, code="Denied")
    with pytest.raises(UnavailableError):
        store.put("packs/big", [bytes(12 * MIB)])
    assert not store.exists("packs/big")
    assert "Uploads" not in rgw.client().list_multipart_uploads(Bucket=store.place.bucket)


def test_large_put_that_is_killed_is_swept(rgw: RunningRgw) -> None:
    bucket = rgw.new_bucket()
    script = (
        "import os, sys\nfrom offload.stores.s3 import S3Store\n"
        "from offload.storespec import StoreSpec\n"
        "store = S3Store(StoreSpec.parse(sys.stdin.read()))\n"
        "store.multipart_above, store.part_bytes = 6 << 20, 5 << 20\n"
        "real = store.client.complete_multipart_upload\n"
        "store.client.complete_multipart_upload = lambda **w: os.kill(os.getpid(), 9)\n"
        "store.put('packs/ab/abcdefghjk-000001', [bytes(12 << 20)])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], input=spec(rgw, bucket).text(), text=True, check=False,
        timeout=60,
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL
    store = S3Store(spec(rgw, bucket))
    assert list(store.list("packs/")) == []
    assert len(rgw.client().list_multipart_uploads(Bucket=bucket)["Uploads"]) == 1
    assert store.sweep("zzzzzzzzzz") == 0
    assert store.sweep("abcdefghjk", min_age_s=3600) == 0
    assert store.sweep("abcdefghjk") == 1
    assert "Uploads" not in rgw.client().list_multipart_uploads(Bucket=bucket)
    store.close()


# -- bounds ----------------------------------------------------------------------------------------


def test_rate_limit_is_shared_by_threads() -> None:
    slept: list[float] = []
    limit = RateLimit(1000, clock=lambda: 0.0, sleep=slept.append)
    threads = [threading.Thread(target=limit.take, args=(500,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(slept) == [0.5, 1.0, 1.5]


def test_bandwidth_is_kept_each_way_and_over_retries(rgw: RunningRgw, proxy: FaultProxy) -> None:
    made = S3Store(spec(rgw, rgw.new_bucket(), endpoint=proxy.endpoint, bandwidth="1MiB"))
    data = os.urandom(MIB)
    for ask in (lambda: made.put("a", [data]), lambda: made.get("a")):
        began = time.monotonic()
        ask()
        assert time.monotonic() - began > 0.7  # the last piece is not waited for
    began = time.monotonic()
    proxy.inject(Trouble.CUT_REQUEST, methods=("PUT",))
    made.put("b", [data])
    assert time.monotonic() - began > 1.1  # the half that was in vain counts
    made.close()


def test_body_costs_only_while_it_is_sent() -> None:
    taken: list[int] = []
    limit = RateLimit(0)
    limit.take = taken.append  # type: ignore[method-assign,assignment]
    body = Body([b"abc", bytearray(b""), memoryview(b"defg")], limit)
    assert body.read() == b"abcdefg"
    assert taken == []
    body.seek(2)
    body.sending()
    assert body.read() == b"cdefg"
    assert sum(taken) == 5


def test_no_more_requests_at_once_than_allowed(
    rgw: RunningRgw, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = S3Store(spec(rgw, rgw.new_bucket(), parallel="2"))
    made.put("a", [b"x"])
    running, most, mutex = 0, 0, threading.Lock()
    real = made.client.get_object

    def counted(**words: Any) -> Any:
        nonlocal running, most
        with mutex:
            running += 1
            most = max(most, running)
        try:
            return real(**words)
        finally:
            with mutex:
                running -= 1

    monkeypatch.setattr(made.client, "get_object", counted)
    threads = [threading.Thread(target=made.get, args=("a",)) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 2
    made.close()


# -- what is wrong for good: one clear line each ---------------------------------------------------


def failing(what: S3Store) -> OffloadError:
    with pytest.raises(OffloadError) as caught:
        what.exists("store.json")
    what.close()
    assert "\n" not in caught.value.message
    return caught.value


def test_bucket_that_is_not_there(rgw: RunningRgw) -> None:
    for ask in (
        lambda s: s.exists("a"),
        lambda s: s.get("a"),
        lambda s: s.put("a", [b"x"]),
        lambda s: list(s.list("a/")),
    ):
        made = S3Store(spec(rgw, "no-such-bucket"))
        with pytest.raises(UnavailableError) as caught:
            ask(made)
        made.close()
        assert caught.value.code == "no-bucket"


def test_bucket_of_somebody_else(rgw: RunningRgw, tmp_path: Path) -> None:
    stranger = rgw.new_user()
    keys = str(stranger.write_credentials(tmp_path / "keys"))
    error = failing(S3Store(spec(rgw, rgw.new_bucket(), credentials_file=keys)))
    assert error.code == "store-denied"
    assert stranger.secret_key not in error.message + error.hint


def test_no_credentials(rgw: RunningRgw) -> None:
    bare = spec(rgw, rgw.new_bucket())
    options = {k: v for k, v in bare.options.items() if k != "credentials_file"}
    error = failing(S3Store(StoreSpec(url=bare.url, options=options)))
    assert error.code == "store-credentials"
    assert "there are no credentials" in error.message


@pytest.mark.parametrize(
    ("wrong", "words"),
    [("access", "not known"), ("secret", "does not fit")],
)
def test_wrong_credentials(
    rgw: RunningRgw, monkeypatch: pytest.MonkeyPatch, wrong: str, words: str
) -> None:
    bare = spec(rgw, rgw.new_bucket())
    options = {k: v for k, v in bare.options.items() if k != "credentials_file"}
    access = "A" * 20 if wrong == "access" else rgw.owner.access_key
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", access)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b" * 40)
    error = failing(S3Store(StoreSpec(url=bare.url, options=options)))
    assert error.code == "store-credentials"
    assert words in error.message
    assert "b" * 40 not in error.message + error.hint


@pytest.mark.parametrize("code", ["ExpiredToken", "RequestExpired", "InvalidToken"])
def test_expired_credentials(store: S3Store, proxy: FaultProxy, code: str) -> None:
    proxy.inject(Trouble.ERROR, status=400, code=code, methods=("GET",))
    with pytest.raises(UnavailableError) as caught:
        list(store.list("a/"))
    assert caught.value.code == "store-credentials"


def test_credentials_that_others_can_read_are_refused(rgw: RunningRgw, tmp_path: Path) -> None:
    keys = rgw.owner.write_credentials(tmp_path / "keys")
    keys.chmod(0o640)
    with pytest.raises(ConfigError) as caught:
        S3Store(spec(rgw, "b", credentials_file=str(keys)))
    assert caught.value.code == "open-credentials"
    assert rgw.owner.secret_key not in caught.value.message


def test_usual_credentials_file_that_others_can_read_is_refused(
    rgw: RunningRgw, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = rgw.owner.write_credentials(tmp_path / "keys")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(keys))
    options = {"endpoint": rgw.endpoint, "path_style": "yes"}
    made = S3Store(StoreSpec(url=f"s3://{rgw.new_bucket()}", options=options))
    made.put("a", [b"x"])
    made.close()
    keys.chmod(0o604)
    with pytest.raises(ConfigError) as caught:
        S3Store(StoreSpec(url="s3://b", options=options))
    assert caught.value.code == "open-credentials"


def test_profile_and_file_come_before_the_environment(
    rgw: RunningRgw, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = rgw.owner.write_credentials(tmp_path / "keys", profile="night")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "A" * 20)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b" * 40)
    made = S3Store(spec(rgw, rgw.new_bucket(), credentials_file=str(keys), profile="night"))
    made.put("a", [b"x"])
    made.close()
    with pytest.raises(ConfigError) as caught:
        S3Store(spec(rgw, "b", credentials_file=str(keys), profile="day")).exists("a")
    assert "day" in caught.value.message


def test_endpoint_that_refuses_is_told_soon(
    rgw: RunningRgw, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_traffic, "_FIRST_PATIENCE_S", 0.1)
    error = failing(S3Store(spec(rgw, "b", endpoint="http://127.0.0.1:1")))
    assert error.code == "store-unreachable"


def test_tls_with_the_authority_and_without(rgw: RunningRgw) -> None:
    bucket = rgw.new_bucket()
    made = S3Store(spec(rgw, bucket, endpoint=rgw.tls_endpoint, ca_file=str(rgw.ca_file)))
    made.put("a", [b"x"])
    assert made.get("a") == b"x"
    made.close()
    error = failing(S3Store(spec(rgw, bucket, endpoint=rgw.tls_endpoint)))
    assert error.code == "store-tls"
    with pytest.raises(ConfigError):
        S3Store(spec(rgw, bucket, ca_file="/nonexistent/ca.pem"))


def test_clock_far_off_names_both_clocks(rgw: RunningRgw, monkeypatch: pytest.MonkeyPatch) -> None:
    import botocore.auth

    made = S3Store(spec(rgw, rgw.new_bucket()))
    wrong = datetime.now(UTC) - timedelta(hours=3)
    monkeypatch.setattr(
        botocore.auth, "get_current_datetime", lambda **_: wrong.replace(tzinfo=None)
    )
    error = failing(made)
    assert error.code == "store-clock"
    assert error.message.count("Z") == 2


def test_lock_asked_for_on_a_bucket_without(rgw: RunningRgw) -> None:
    made = S3Store(spec(rgw, rgw.new_bucket()))
    with pytest.raises(PolicyError) as caught:
        made.put("a", [b"x"], retain_until=datetime.now(UTC) + timedelta(days=1))
    assert caught.value.code == "no-object-lock"
    made.close()


def test_unknown_storage_class(rgw: RunningRgw) -> None:
    made = S3Store(spec(rgw, rgw.new_bucket(), storage_class="DUSTY"))
    with pytest.raises(OffloadError) as caught:
        made.put("a", [b"x"])
    assert caught.value.code in ("store-option", "store-unavailable")
    made.close()


def test_encryption_by_the_server_is_asked_for(rgw: RunningRgw) -> None:
    bucket = rgw.new_bucket()
    made = S3Store(spec(rgw, bucket, server_side_encryption="aws:kms", kms_key=KMS_KEY))
    made.put("a", [b"x"])
    found = rgw.client().head_object(Bucket=bucket, Key="p/a")
    assert (found["ServerSideEncryption"], found["SSEKMSKeyId"]) == ("aws:kms", KMS_KEY)
    assert made.get("a") == b"x"
    made.close()


def test_object_that_is_cut_short_in_the_store(rgw: RunningRgw, store: S3Store) -> None:
    store.put("a", [bytes(100)])
    with pytest.raises(IntegrityError) as caught:
        store.get_range("a", 50, 100)
    assert caught.value.code == "object-short"


# -- versions and locks ----------------------------------------------------------------------------


def test_versions_show_what_was_hidden(rgw: RunningRgw) -> None:
    made = S3Store(spec(rgw, rgw.new_bucket(versioned=True)))
    made.put("a/b", [b"first"])
    made.put("a/b", [b"second"])
    made.delete("a/b")
    found = list(made.versions("a/"))
    assert [v.name for v in found] == ["a/b"] * 3
    assert [(v.deleted, v.latest) for v in found] == [(True, True), (False, False), (False, False)]
    texts = sorted(made.get_version(v, 0, None) for v in found if not v.deleted)
    assert texts == [b"first", b"second"]
    assert not made.exists("a/b")
    made.close()


@pytest.mark.parametrize("mode", ["compliance", "governance"])
def test_locked_object_survives_and_its_lock_is_only_extended(rgw: RunningRgw, mode: str) -> None:
    made = S3Store(spec(rgw, rgw.new_bucket(locked=True), lock_mode=mode))
    until = datetime.now(UTC).replace(microsecond=0) + timedelta(days=1)
    made.put("a", [b"kept"], retain_until=until)
    made.put("free", [b"not"])
    (version,) = made.versions("a")
    assert made.retained_until(version) == until
    made.retain(version, until + timedelta(days=1))
    made.retain(version, until)
    assert made.retained_until(version) == until + timedelta(days=1)
    assert made.retained_until(next(iter(made.versions("free")))) is None
    with pytest.raises(Exception, match="AccessDenied"):
        rgw.client().delete_object(Bucket=made.place.bucket, Key="p/a", VersionId=version.id)
    made.delete("a")
    assert made.get_version(version, 0, None) == b"kept"
    made.close()
