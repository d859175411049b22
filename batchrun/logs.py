"""Logs: one JSON object a line, with the run it belongs to, without secrets or control characters.

Prompts and completions are never logged; whoever logs names rows by shard and row. What happens to
a run is told by :func:`log_event`; nobody hears of it until logging is configured.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from pathlib import Path
from typing import TextIO

REDACTED = "[redacted]"
_MAX_FIELD = 2000  # characters of a value; a traceback has four times as many
_REPEAT_S = 60.0
_STORY = "batchrun.events"

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


def log_event(
    event: str,
    message: str,
    *,
    level: int = logging.INFO,
    error_class: str = "",
    place: Mapping[str, str | int] | None = None,
    **fields: str | int | float,
) -> None:
    """One line of a run's story. ``event`` is its name, ``place`` and ``fields`` say where it
    belongs (shard, attempt, row, worker) and how much it was.

    Of lines with the same ``error_class`` one is written a minute; it says how many there were.
    """
    story = {"event": event, "error_class": error_class, "fields": {**(place or {}), **fields}}
    logging.getLogger(_STORY).log(level, "%s", message, extra={"story": story})


class RepeatGate:
    """Lets one of a kind pass in a while, and counts the others."""

    def __init__(
        self, seconds: float = _REPEAT_S, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._seconds = seconds
        self._clock = clock
        self._kinds: dict[str, tuple[float, int]] = {}  # when one passed last; how many since

    def admit(self, kind: str, count: int = 1) -> int:
        """0 when one of ``kind`` has just passed; else how many came since, these included."""
        passed_at, held = self._kinds.get(kind, (float("-inf"), 0))
        now = self._clock()
        if now - passed_at < self._seconds:
            self._kinds[kind] = (passed_at, held + count)
            return 0
        self._kinds[kind] = (now, 0)
        return held + count

    def held(self) -> dict[str, int]:
        """How many of each kind did not pass since the last that did."""
        return {kind: held for kind, (_, held) in self._kinds.items() if held}


class _Repeats(logging.Filter):
    """Drops errors that were logged just now; the next that passes says how many there were."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = RepeatGate()
        self.places: dict[str, dict[str, str | int]] = {}  # the context of those held back

    def filter(self, record: logging.LogRecord) -> bool:
        story = getattr(record, "story", None)
        if story is not None:
            kind, count = story["error_class"], int(story["fields"].get("rows", 1))
        else:
            kind, count = f"{record.name}: {record.msg}", 1
            if record.levelno < logging.WARNING:
                return True
        if not kind:
            return True
        occurrences = self.gate.admit(kind, count)
        record.__dict__["occurrences"] = occurrences
        self.places[kind] = dict(_context.get())
        return occurrences > 0


class JsonFormatter(logging.Formatter):
    """One record as one line of JSON: time, level, event, logger, message, context, exception."""

    def __init__(self, fields: Mapping[str, str | int] | None = None) -> None:
        super().__init__()
        self._fields = dict(fields or {})

    def format(self, record: logging.LogRecord) -> str:
        """The record as one line; every text in it is redacted."""
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line: dict[str, object] = {
            "time": time.replace("+00:00", "Z"),
            "level": record.levelname.lower(),
        }
        story = getattr(record, "story", None)
        if story is not None:
            line["event"] = story["event"]
        else:
            line["logger"] = record.name
        line["message"] = _clean(record.getMessage())
        own = {} if story is None else story["fields"]
        for key, value in {**self._fields, **dict(_context.get()), **own}.items():
            line[key] = _clean(value) if isinstance(value, str) else value
        if getattr(record, "occurrences", 1) > 1:
            line["occurrences"] = getattr(record, "occurrences", 1)
        if record.exc_info and record.exc_info[0] is not None:
            text = "".join(traceback.format_exception(*record.exc_info))
            line["exception"] = redact(text)[-4 * _MAX_FIELD :]
        # json escapes control characters; the default keeps the line ASCII for any collector.
        return json.dumps(line)


def configure_logging(
    *,
    level: str | int = "WARNING",
    stream: TextIO | None = None,
    path: Path | None = None,
    fields: Mapping[str, str | int] | None = None,
) -> None:
    """Send this package's logs as JSON lines to ``stream`` (default stderr), or to the end of
    ``path``.

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
    handler.addFilter(_Repeats())
    logger = logging.getLogger("batchrun")
    _end_handlers(logger)
    logger.addHandler(handler)
    logger.setLevel(level)
    logger.propagate = False


@contextmanager
def log_file(path: str | None) -> Iterator[None]:
    """Inside this block what happens is logged to the end of the file ``path``; ``-`` is stderr.

    Warnings go to stderr as well, for people, as they do without it. None changes nothing. Raises
    OSError where the file cannot be opened.
    """
    if path is None:
        yield
        return
    logger = logging.getLogger("batchrun")
    level, propagate = logger.level, logger.propagate
    configure_logging(level="INFO", path=None if path == "-" else Path(path))
    if path != "-":
        people = logging.StreamHandler(sys.stderr)
        people.setLevel(logging.WARNING)
        people.addFilter(lambda record: not hasattr(record, "story"))
        logger.addHandler(people)
    try:
        yield
    finally:
        _say_held(logger)
        _end_handlers(logger)
        logger.setLevel(level)
        logger.propagate = propagate


def _say_held(logger: logging.Logger) -> None:
    """The errors that nobody would hear of any more."""
    for handler in logger.handlers:
        for repeats in handler.filters:
            if isinstance(repeats, _Repeats):
                for kind, count in repeats.gate.held().items():
                    message = f"{count} more of: {kind}"
                    place = {**repeats.places[kind], "occurrences": count}
                    log_event("repeated", message, level=logging.WARNING, place=place)


def _end_handlers(logger: logging.Logger) -> None:
    for old in logger.handlers[:]:
        logger.removeHandler(old)
        old.close()


def _clean(text: str) -> str:
    text = redact(text)
    return text if len(text) <= _MAX_FIELD else f"{text[:_MAX_FIELD]}..."


# What nobody listens to is dropped: without this Python prints warnings on stderr.
logging.getLogger(_STORY).addHandler(logging.NullHandler())


def _mask(match: re.Match[str]) -> str:
    groups = match.groupdict()
    return f"{groups.get('keep') or ''}{REDACTED}{groups.get('tail') or ''}"
