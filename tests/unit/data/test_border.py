"""Every error of the storage libraries becomes one of this package's."""

from __future__ import annotations

import errno
from pathlib import Path

import aiohttp
import botocore.exceptions
import pytest
from fsspec.exceptions import FSTimeoutError
from s3fs.errors import translate_boto_error

from batchrun.data.border import Fault, Role, border, check_url, classify, filesystem, translate
from batchrun.errors import BatchrunError, InputError, OutputError, StorageError


def s3_error(code: str) -> Exception:
    """The exception that s3fs makes of an answer with this code."""
    answer = {"Error": {"Code": code, "Message": "text that must not matter"}}
    return translate_boto_error(botocore.exceptions.ClientError(answer, "PutObject"))


@pytest.mark.parametrize(
    ("error", "fault"),
    [
        (s3_error("PreconditionFailed"), Fault.EXISTS),
        (s3_error("ConditionalRequestConflict"), Fault.EXISTS),
        (s3_error("412"), Fault.EXISTS),
        (s3_error("409"), Fault.EXISTS),
        (s3_error("404"), Fault.ABSENT),
        (s3_error("NoSuchKey"), Fault.ABSENT),
        (s3_error("NoSuchBucket"), Fault.NO_BUCKET),
        (s3_error("AccessDenied"), Fault.DENIED),
        (s3_error("ExpiredToken"), Fault.DENIED),
        (s3_error("403"), Fault.DENIED),
        (s3_error("SlowDown"), Fault.TRANSIENT),
        (s3_error("503"), Fault.TRANSIENT),
        (s3_error("InternalError"), Fault.TRANSIENT),
        (s3_error("MalformedXML"), Fault.UNUSABLE),
        (botocore.exceptions.NoCredentialsError(), Fault.NO_CREDENTIALS),
        (botocore.exceptions.ProfileNotFound(profile="x"), Fault.NO_CREDENTIALS),
        (botocore.exceptions.EndpointConnectionError(endpoint_url="x"), Fault.TRANSIENT),
        (botocore.exceptions.ReadTimeoutError(endpoint_url="x"), Fault.TRANSIENT),
        (botocore.exceptions.ConnectTimeoutError(endpoint_url="x"), Fault.TRANSIENT),
        (aiohttp.ClientPayloadError("x"), Fault.TRANSIENT),
        (FSTimeoutError(), Fault.TRANSIENT),
        (ConnectionResetError(), Fault.TRANSIENT),
        (TimeoutError(), Fault.TRANSIENT),
        (FileNotFoundError(), Fault.ABSENT),
        (PermissionError(), Fault.DENIED),
        (FileExistsError(), Fault.EXISTS),
        (OSError(errno.ENOSPC, "full"), Fault.NO_SPACE),
        (OSError(errno.EROFS, "read-only"), Fault.UNUSABLE),
        (ValueError("x"), Fault.UNUSABLE),
    ],
    ids=lambda value: value.name if isinstance(value, Fault) else type(value).__name__,
)
def test_errors_are_told_apart_by_code(error: Exception, fault: Fault) -> None:
    """The service's code or the class decides, never the text of a message."""
    assert fault is classify(error)


@pytest.mark.parametrize("fault", list(Fault), ids=lambda fault: fault.name)
@pytest.mark.parametrize("role", list(Role), ids=lambda role: role.value)
def test_every_fault_has_an_error_that_helps(fault: Fault, role: Role) -> None:
    """Whatever happens, the message names the place and the hint says what to do."""
    samples = {
        Fault.ABSENT: FileNotFoundError("x"),
        Fault.NO_BUCKET: s3_error("NoSuchBucket"),
        Fault.EXISTS: FileExistsError("x"),
        Fault.DENIED: PermissionError("x"),
        Fault.NO_CREDENTIALS: botocore.exceptions.NoCredentialsError(),
        Fault.TRANSIENT: TimeoutError("x"),
        Fault.NO_SPACE: OSError(errno.ENOSPC, "full"),
        Fault.UNUSABLE: ValueError("x"),
    }
    for early in (True, False):
        error = translate(samples[fault], role, "s3://bucket/key", early=early)
        assert "bucket" in error.message and role.value in error.message
        assert error.hint


def test_what_a_person_must_mend_is_exit_2_before_a_run_only() -> None:
    """Denied access is the job's fault before a run, and lost storage in the middle of one."""
    error = PermissionError("x")
    assert type(translate(error, Role.INPUT, "s3://b", early=True)) is InputError
    assert type(translate(error, Role.OUTPUT, "s3://b", early=True)) is OutputError
    assert type(translate(error, Role.OUTPUT, "s3://b")) is StorageError


def test_our_own_errors_pass_the_border_unchanged() -> None:
    """What is explained already is not explained again."""
    mine = InputError("mine")
    with pytest.raises(BatchrunError) as caught, border(Role.OUTPUT, "x"):
        raise mine
    assert mine is caught.value


@pytest.mark.parametrize("url", ["", "  ", "a\0b", "s3://b/\n", "\x7f"])
def test_urls_that_are_none_are_refused(url: str) -> None:
    """Empty URLs and control characters are errors of the place they are given for."""
    with pytest.raises(InputError):
        check_url(url, Role.INPUT)


@pytest.mark.parametrize("url", ["nosuch://x/y", "http://169.254.169.254/latest/meta-data"])
def test_urls_that_cannot_be_read_are_refused(url: str) -> None:
    """Unknown schemes and metadata services are errors with exit code 2."""
    with pytest.raises(InputError) as caught:
        filesystem(url, None, Role.INPUT)
    assert caught.value.exit_code == 2


def test_a_host_that_resolves_to_a_metadata_service_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A name is no disguise."""
    answer = [(2, 1, 6, "", ("169.254.169.254", 0))]
    monkeypatch.setattr("socket.getaddrinfo", lambda *_: answer)
    with pytest.raises(InputError, match="link-local"):
        filesystem("s3://b/x", {"endpoint_url": "http://innocent.example"}, Role.INPUT)


def test_relative_paths_and_home_work_for_inputs(tmp_path: Path) -> None:
    """A plain path is a local one."""
    fs, path = filesystem(str(tmp_path), None, Role.INPUT)
    assert fs.isdir(path)


def test_an_error_that_says_none_is_told_by_its_cause() -> None:
    """s3fs raises PermissionError(None); the message still says what the service answered."""
    error = PermissionError(None)
    error.__cause__ = RuntimeError("SignatureDoesNotMatch")
    told = translate(error, Role.OUTPUT, "s3://bucket/x", early=True)
    assert told.message == "output: access to s3://bucket/x is denied (SignatureDoesNotMatch)"
