"""Logs: one JSON object a line, with the run it belongs to, without secrets or control characters.

Prompts and completions are never logged; whoever logs names rows by shard and row.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from pathlib import Path
from typing import TextIO

REDACTED = "[redacted]"

# Each pattern keeps what names the secret and drops the secret: `keep` and `tail` stay.
_SECRETS = tuple(
    re.compile(pattern, re.IGNORECASE if flags == "i" else 0)
    for pattern, flags in (
        # Access key ids of AWS, for users, roles and the rest of its families.
        (r"\b(?:AKIA|ASIA|AIDA|AROA|AGPA|ANPA|ABIA|ACCA)[A-Z0-9]{12,}\b", ""),
        # Tokens of Hugging Face, GitHub and Google; JSON web tokens.
        (r"\bhf_[A-Za-z0-9]{16,}\b", ""),
        (r"\b(?:gh[pousr]_[A-Za-z0-9]{20,}|github_pat_[A-Za-z0-9_]{20,})\b", ""),
        (r"\bAIza[A-Za-z0-9_-]{30,}", ""),
        (r"\beyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]*", ""),
        (r"(?P<keep>\b(?:bearer|basic)\s+)[A-Za-z0-9._~+/=-]{8,}", "i"),
        # user:password@ of a URL.
        (r"(?P<keep>\b[a-z][a-z0-9+.-]*://)[^\s/@'\"]+(?P<tail>@)", "i"),
        # Presigned URLs: S3, GCS, Azure, CloudFront.
        (
            r"(?P<keep>[?&](?:X-Amz-(?:Signature|Credential|Security-Token)|X-Goog-(?:Signature|"
            r"Credential)|AWSAccessKeyId|Signature|sig|token|key)=)[^&\s'\"]+",
            "i",
        ),
        # name=value and "name": "value" where the name says that it is a secret.
        (
            r"(?P<keep>\b[\w.-]*(?:secret|password|passwd|api_?key|access_?key|auth_?token|"
            r"session_?token|private_?key|account_?key)[\w.-]*[\"']?\s*[:=]\s*[\"']?)"
            r"(?!\[redacted)[^\s\"',;&}\]]{4,}",
            "i",
        ),
    )
)

_SECRET_NAME = re.compile(
    r"secret|passw(or)?d|(^|[_-])token($|[_-])|api_?key|access_?key|private_?key|account_?key"
    r"|connection_?string|^key$",
    re.IGNORECASE,
)

_Fields = tuple[tuple[str, str | int], ...]
_context: ContextVar[_Fields] = ContextVar("batchrun_log_context", default=())


def redact(text: str) -> str:
    """``text`` with everything that looks like a credential replaced by ``[redacted]``."""
    for pattern in _SECRETS:
        text = pattern.sub(_mask, text)
    return text


def names_a_secret(name: str) -> bool:
    """Whether an option or variable of this name holds a secret (``aws_secret_access_key``)."""
    return _SECRET_NAME.search(name) is not None


def printable(text: str) -> str:
    """``text`` with control characters escaped, so that it cannot steer a terminal or forge a
    line. Line breaks are escaped too."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


@contextmanager
def log_context(**fields: str | int) -> Iterator[None]:
    """Within this block every log line carries ``fields``, e.g. ``run=…, shard=…, worker=…``."""
    token = _context.set((*_context.get(), *fields.items()))
    try:
        yield
    finally:
        _context.reset(token)


class JsonFormatter(logging.Formatter):
    """One record as one line of JSON: time, level, logger, message, context, exception."""

    def __init__(self, fields: Mapping[str, str | int] | None = None) -> None:
        super().__init__()
        self._fields = dict(fields or {})

    def format(self, record: logging.LogRecord) -> str:
        """The record as one line; every text in it is redacted."""
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line: dict[str, str | int] = {
            "time": time.replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": redact(record.getMessage()),
        }
        for key, value in (*self._fields.items(), *_context.get()):
            line[key] = redact(value) if isinstance(value, str) else value
        if record.exc_info and record.exc_info[0] is not None:
            line["exception"] = redact("".join(traceback.format_exception(*record.exc_info)))
        # json escapes control characters; the default keeps the line ASCII for any collector.
        return json.dumps(line)


def configure_logging(
    *,
    level: str | int = "WARNING",
    stream: TextIO | None = None,
    path: Path | None = None,
    fields: Mapping[str, str | int] | None = None,
) -> None:
    """Send this package's logs as JSON lines to ``stream`` (default stderr), or to ``path``.

    ``fields`` stand on every line of the process. Calling again replaces what was before; loggers
    of other libraries are left alone.
    """
    handler: logging.Handler
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        handler = logging.FileHandler(path, encoding="utf-8")
    else:
        handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter(fields))
    logger = logging.getLogger("batchrun")
    for old in logger.handlers[:]:
        logger.removeHandler(old)
        old.close()
    logger.addHandler(handler)
    logger.setLevel(level)
    logger.propagate = False


def _mask(match: re.Match[str]) -> str:
    groups = match.groupdict()
    return f"{groups.get('keep') or ''}{REDACTED}{groups.get('tail') or ''}"
