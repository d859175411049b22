"""The one border where errors of storage libraries become errors of this package.

URLs are checked here too: what is refused here never reaches a library.
"""

from __future__ import annotations

import errno
import ipaddress
import os
import re
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from enum import Enum, StrEnum
from typing import Any
from urllib.parse import urlsplit

from batchrun.errors import BatchrunError, CheckpointError, InputError, OutputError, StorageError

# What S3-like services say when a request was understood and refused for want of rights.
_DENIED_CODES = frozenset(
    "AccessDenied AllAccessDisabled ExpiredToken InvalidAccessKeyId InvalidToken "
    "SignatureDoesNotMatch TokenRefreshRequired RequestTimeTooSkewed InvalidSecurity 401 403 "
    "Unauthorized Forbidden AuthorizationHeaderMalformed ExpiredTokenException".split()
)
_THROTTLED_CODES = frozenset(
    "SlowDown ServiceUnavailable Throttling ThrottlingException RequestLimitExceeded "
    "InternalError RequestTimeout OperationAborted 500 502 503 504 429 TooManyRequests".split()
)
_EXISTS_CODES = frozenset({"PreconditionFailed", "ConditionalRequestConflict", "409", "412"})
_ABSENT_CODES = frozenset({"NoSuchKey", "NoSuchVersion", "404"})
# Classes of botocore, aiohttp and fsspec for answers that did not come, by name: importing the
# libraries here would cost a second at start.
_TRANSIENT_NAMES = frozenset(
    "HTTPClientError ConnectionError ClientError FSTimeoutError ResponseParserError".split()
)
# With colons, for fsspec's chains of filesystems; without slashes, which are of local paths.
_SCHEME = re.compile(r"([A-Za-z][\w+.:-]*)://")
_CREDENTIALS_HINT = (
    "credentials come from the environment (AWS_ACCESS_KEY_ID, AWS_PROFILE) or from the "
    "machine's role; check that they may do this here"
)


class Role(StrEnum):
    """What a location is for; decides which error says that it cannot be used."""

    INPUT = "input"
    OUTPUT = "output"
    CHECKPOINT = "checkpoint"

    @property
    def error(self) -> type[BatchrunError]:
        """The class of error for a location of this role that cannot be used."""
        return _ROLE_ERRORS[self]


_ROLE_ERRORS: dict[Role, type[BatchrunError]] = {
    Role.INPUT: InputError,
    Role.OUTPUT: OutputError,
    Role.CHECKPOINT: CheckpointError,
}


class Fault(Enum):
    """What an exception of a storage library means."""

    ABSENT = "absent"
    NO_BUCKET = "no bucket"
    EXISTS = "exists"
    DENIED = "denied"
    NO_CREDENTIALS = "no credentials"
    TRANSIENT = "transient"
    NO_SPACE = "no space"
    UNUSABLE = "unusable"


def classify(error: BaseException) -> Fault:
    """What ``error`` means, by the service's code where there is one, never by message text."""
    code = _service_code(error)
    if code == "NoSuchBucket":
        return Fault.NO_BUCKET
    if code in _ABSENT_CODES:
        return Fault.ABSENT
    if code in _EXISTS_CODES:
        return Fault.EXISTS
    if code in _DENIED_CODES:
        return Fault.DENIED
    if code in _THROTTLED_CODES:
        return Fault.TRANSIENT
    if code:
        return Fault.UNUSABLE
    names = {cls.__name__ for cls in type(error).__mro__}
    if names & {"NoCredentialsError", "PartialCredentialsError", "ProfileNotFound"}:
        return Fault.NO_CREDENTIALS
    if names & _TRANSIENT_NAMES:
        return Fault.TRANSIENT
    match error:
        case FileExistsError():
            return Fault.EXISTS
        case FileNotFoundError() | NotADirectoryError():
            return Fault.ABSENT
        case PermissionError():
            return Fault.DENIED
        case ConnectionError() | TimeoutError():
            return Fault.TRANSIENT
        case OSError(errno=errno.ENOSPC | errno.EDQUOT | errno.EFBIG):
            return Fault.NO_SPACE
        case OSError(errno=errno.EBUSY | errno.EREMOTEIO):
            return Fault.TRANSIENT
        case _:
            return Fault.UNUSABLE


def _service_code(error: BaseException) -> str:
    """The error code a service gave, found along the chain of causes; "" when there is none."""
    seen: BaseException | None = error
    while seen is not None:
        response = getattr(seen, "response", None)
        if isinstance(response, dict):
            return str(response.get("Error", {}).get("Code", ""))
        status = getattr(seen, "status", None)
        if isinstance(status, int):
            return str(status)
        seen = seen.__cause__
    return ""


def translate(error: Exception, role: Role, url: str, *, early: bool = False) -> BatchrunError:
    """The error of this package that says what ``error`` means for the location ``url``.

    ``early`` is for checks before a run: what a person must mend is then an error of the
    location (exit 2) and not a loss of storage in the middle of a run (exit 75).
    """
    lost: type[BatchrunError] = role.error if early else StorageError
    text = _text(error)
    match classify(error):
        case Fault.NO_BUCKET:
            return role.error(
                f"{role}: the bucket of {url} does not exist",
                "create the bucket, or correct its name or the endpoint",
            )
        case Fault.ABSENT:
            return role.error(f"{role}: {url} does not exist", "check the path")
        case Fault.DENIED:
            hint = _CREDENTIALS_HINT if "://" in url else "check the permissions of the folder"
            return lost(f"{role}: access to {url} is denied ({text})", hint)
        case Fault.NO_CREDENTIALS:
            return lost(f"{role}: no credentials for {url} ({text})", _CREDENTIALS_HINT)
        case Fault.NO_SPACE:
            return StorageError(
                f"{role}: no space left for {url} ({text})", "make room and submit again to resume"
            )
        case Fault.TRANSIENT | Fault.EXISTS:
            return StorageError(
                f"{role}: {url} cannot be reached ({text})",
                "check the endpoint and the network, then submit again to resume",
            )
        case Fault.UNUSABLE:
            return lost(f"{role}: {url} cannot be used ({text})", "check the location's settings")


def _text(error: BaseException) -> str:
    """What the library says, from the first error in the chain that says anything.

    s3fs turns the service's answer into an error of Python that may say just ``None``.
    """
    current: BaseException | None = error
    while current is not None:
        text = " ".join(str(current).split())
        if text not in ("", "None"):
            return text
        current = current.__cause__ or current.__context__
    return type(error).__name__


@contextmanager
def border(role: Role, url: str, *, early: bool = False) -> Iterator[None]:
    """Everything that a storage library raises inside becomes an error of this package."""
    try:
        yield
    except BatchrunError:
        raise
    except Exception as error:
        raise translate(error, role, url, early=early) from error


def scheme_of(url: str) -> str:
    """The scheme of ``url``: ``s3``, ``gs``, ``https``; ``file`` for a plain path."""
    found = _SCHEME.match(url)
    return found[1].lower() if found else "file"


def check_url(url: str, role: Role) -> None:
    """Raise the role's error for a URL that no library should ever see."""
    if not url.strip():
        raise role.error(f"{role}: the path is empty", "give a folder, a file or a URL")
    if any(ord(character) < 32 or ord(character) == 127 for character in url):
        raise role.error(f"{role}: the path {url!r} holds control characters", "remove them")
    if scheme_of(url) == "file":
        return
    parts = urlsplit(url)
    if "@" in parts.netloc:
        raise role.error(
            f"{role}: the URL holds a user name or password", "leave them out; " + _CREDENTIALS_HINT
        )
    if scheme_of(url) in {"http", "https"}:
        _refuse_link_local(url, role)


def check_path(path: str, role: Role) -> str:
    """``path`` unchanged if it is a plain relative path; raise the role's error otherwise."""
    hostile = (
        path.startswith("/")
        or any(piece in {"", ".", ".."} for piece in path.split("/"))
        or any(ord(character) < 32 or ord(character) == 127 for character in path)
    )
    if hostile:
        raise role.error(f"{role}: {path!r} is not a path inside the location", "check the name")
    return path


def filesystem(
    url: str, storage_options: Mapping[str, object] | None, role: Role
) -> tuple[Any, str]:
    """The fsspec filesystem of ``url`` and the path in it. Does no request.

    Options with an empty value count as not given, so that ``${S3_ENDPOINT:-}`` can be left
    unset. Listings are never cached: other machines write beside this one.
    """
    import fsspec

    check_url(url, role)
    options: dict[str, Any] = {
        key: value for key, value in (storage_options or {}).items() if value not in (None, "")
    }
    client_options = options.get("client_kwargs")
    nested = client_options.get("endpoint_url") if isinstance(client_options, Mapping) else None
    for endpoint in (options.get("endpoint_url"), nested):
        if endpoint:
            _refuse_link_local(str(endpoint), role)
    if scheme_of(url) in {"s3", "s3a"}:
        # One try inside the SDK; patience is ours, where outcomes are understood.
        defaults = {
            "connect_timeout": 10,
            "read_timeout": 60,
            "retries": {"mode": "standard", "total_max_attempts": 1},
        }
        options["config_kwargs"] = {**defaults, **options.get("config_kwargs", {})}
    if scheme_of(url) in {"s3", "s3a", "gs", "gcs"}:
        options["use_listings_cache"] = False
    if scheme_of(url) == "file":
        # Not by URL: a double colon in a file's name would read as a chain of filesystems.
        return fsspec.filesystem("file"), local_path(url)
    try:
        if scheme_of(url) in {"s3", "s3a"}:
            from batchrun.data.paced import PacedS3FileSystem

            return PacedS3FileSystem(**options), str(PacedS3FileSystem._strip_protocol(url))
        fs, path = fsspec.core.url_to_fs(url, **options)
    except ImportError as error:
        raise role.error(
            f"{role}: {url} needs a library that is not installed ({error})", "install it with pip"
        ) from error
    except ValueError as error:
        raise role.error(f"{role}: {url} is not a URL that can be used ({error})") from error
    except Exception as error:
        raise translate(error, role, url, early=True) from error
    return fs, str(path)


def _refuse_link_local(endpoint: str, role: Role) -> None:
    """Raise for an endpoint in the link-local range: metadata services of clouds live there."""
    host = urlsplit(endpoint if "://" in endpoint else f"http://{endpoint}").hostname or ""
    try:
        found = {str(item[4][0]) for item in socket.getaddrinfo(host, None)}
    except (OSError, UnicodeError):
        found = {host}
    for text in found:
        try:
            address = ipaddress.ip_address(text.partition("%")[0])
        except ValueError:
            continue
        mapped = getattr(address, "ipv4_mapped", None) or address
        if mapped.is_link_local:
            raise role.error(
                f"{role}: the endpoint {endpoint} is a link-local address",
                "give the address of the object store",
            )


def local_path(url: str) -> str:
    """The absolute local path of a plain path or ``file://`` URL."""
    path = url[len("file://") :] if url.lower().startswith("file://") else url
    return os.path.abspath(os.path.expanduser(path))
