"""The S3 store on a real gateway: the contract, in a plain bucket, with versions, with locks."""

from __future__ import annotations

import pytest

from offload.stores.s3 import S3Store
from offload.storespec import StoreSpec
from offload.testing.rgw import RunningRgw
from offload.testing.store import StoreContract


def spec_text(rgw: RunningRgw, bucket: str, prefix: str = "") -> str:
    options = {
        "endpoint": rgw.endpoint,
        "path_style": "yes",
        "credentials_file": str(rgw.credentials_file),
    }
    place = f"{bucket}/{prefix}" if prefix else bucket
    return StoreSpec(url=f"s3://{place}", options=options).text()


class S3Contract(StoreContract):
    reads_a_thread = 60

    def open(self, url: str) -> S3Store:
        return S3Store(StoreSpec.parse(url))


class TestS3Store(S3Contract):
    @pytest.fixture
    def url(self, rgw: RunningRgw) -> str:
        return spec_text(rgw, rgw.new_bucket())


class TestS3StoreBelowAPrefix(S3Contract):
    @pytest.fixture
    def url(self, rgw: RunningRgw) -> str:
        bucket = rgw.new_bucket()
        client = rgw.client()
        for key in ("a", "p/b", "some/p/b", "some/where-else/p/b", "store.json"):
            client.put_object(Bucket=bucket, Key=key, Body=b"not of this store")
        return spec_text(rgw, bucket, "some/where")


class TestS3StoreWithVersions(S3Contract):
    refuses_taken_names = False  # the gateway ignores the condition there

    @pytest.fixture
    def url(self, rgw: RunningRgw) -> str:
        return spec_text(rgw, rgw.new_bucket(versioned=True))


class TestS3StoreWithLocks(S3Contract):
    refuses_taken_names = False

    @pytest.fixture
    def url(self, rgw: RunningRgw) -> str:
        return spec_text(rgw, rgw.new_bucket(locked=True))
