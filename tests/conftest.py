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
from dataclasses import dataclass

import pytest
from hypothesis import HealthCheck, settings

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


@pytest.fixture(scope="session")
def s3_process() -> Iterator[str]:
    """The endpoint of a moto server in a process of its own, one for the whole session.

    Credentials and region stand in the environment from here on, so that processes which a test
    starts (Ray workers too) inherit them.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = {
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        patch.delenv("AWS_PROFILE", raising=False)
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
    request = urllib.request.Request(f"{s3_process}/{bucket}", method="PUT")
    with urllib.request.urlopen(request) as answer:
        assert answer.status == 200
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
