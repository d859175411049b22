"""Fixtures that tests of several rooms share."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import s3fs
from hypothesis import HealthCheck, settings

from tests.integration.faults import RUNTIME_ENV
from tests.radosgw import ACCESS_KEY, SECRET_KEY, radosgw

# How long an example takes says something about the machine, nothing about a promise.
settings.register_profile(
    "batchrun",
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    print_blob=True,
)
settings.load_profile("batchrun")


@dataclass(frozen=True)
class S3Server:
    """An S3 server on this machine, with a bucket that nobody else uses."""

    endpoint_url: str
    bucket: str

    @property
    def url(self) -> str:
        """The bucket as a URL."""
        return f"s3://{self.bucket}"

    @property
    def storage_options(self) -> dict[str, object]:
        """What a job's ``storage_options`` would say."""
        return {"endpoint_url": self.endpoint_url}


_USE_RADOSGW = os.environ.get("BATCHRUN_TEST_RADOSGW") == "1"


@pytest.fixture(scope="session")
def s3_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The endpoint of an S3 server in processes of its own, one for the whole session.

    It is moto's, or, with BATCHRUN_TEST_RADOSGW=1, Ceph's gateway, which looks at signatures too.
    Credentials and region stand in the environment from here on, so that processes which a test
    starts (Ray workers too) inherit them.
    """
    settings = {
        "AWS_ACCESS_KEY_ID": ACCESS_KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        # What S3 itself wants since 2025, other services do not know yet.
        "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
        "AWS_RESPONSE_CHECKSUM_VALIDATION": "when_required",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        patch.delenv("AWS_PROFILE", raising=False)
        if _USE_RADOSGW:
            with radosgw(tmp_path_factory.mktemp("radosgw")) as gateway:
                yield gateway.endpoint_url
        else:
            with _moto() as endpoint:
                yield endpoint


@contextmanager
def _moto() -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=dict(os.environ),
    )
    try:
        endpoint = f"http://127.0.0.1:{port}"
        _wait_until_up(endpoint, server)
        yield endpoint
    finally:
        server.terminate()
        server.wait(timeout=10)


@pytest.fixture
def s3_server(s3_process: str) -> S3Server:
    """The S3 server with a fresh, empty bucket."""
    bucket = f"bucket-{uuid.uuid4().hex[:12]}"
    s3fs.S3FileSystem(endpoint_url=s3_process).mkdir(bucket)
    return S3Server(s3_process, bucket)


def _wait_until_up(endpoint: str, server: subprocess.Popen[bytes]) -> None:
    for _ in range(300):
        if server.poll() is not None:
            raise RuntimeError(f"the S3 server ended with {server.returncode}")
        try:
            with urllib.request.urlopen(endpoint, timeout=1):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    raise RuntimeError(f"the S3 server at {endpoint} does not answer")


@pytest.fixture(scope="session")
def cluster(s3_process: str) -> Iterator[str]:
    """The address of a Ray of this session. Runs in this process use it by themselves.

    The S3 server is there first, so that workers inherit its credentials.
    """
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import ray

    ray.init(
        address="local",
        runtime_env=RUNTIME_ENV,
        include_dashboard=False,
        num_cpus=8,
        object_store_memory=80 * 2**20,
        log_to_driver=False,
        logging_level="ERROR",
    )
    yield str(ray.get_runtime_context().gcs_address)
    ray.shutdown()
