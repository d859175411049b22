"""Logs: one line of JSON each, with where it belongs, without secrets or tricks."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from batchrun.logs import (
    RepeatGate,
    configure_logging,
    log_context,
    log_event,
    log_file,
    names_a_secret,
    printable,
    redact,
)


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    """Where this package's logs go in a test; afterwards logging is as it was."""
    logger = logging.getLogger("batchrun")
    before = (logger.handlers[:], logger.level, logger.propagate)
    stream = io.StringIO()
    configure_logging(level="INFO", stream=stream, fields={"run": "0a1b", "epoch": 3})
    yield stream
    logger.handlers[:], logger.level, logger.propagate = before


def lines(stream: io.StringIO) -> list[dict[str, object]]:
    """The log as values."""
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_a_line_says_where_it_belongs(stream: io.StringIO) -> None:
    """Each line has time, level and message, the process's fields and the context's."""
    log = logging.getLogger("batchrun.pipeline")
    with log_context(worker="w0"), log_context(shard="000012 (a.parquet)"):
        log.warning("row %d failed", 7)
    log.info("done")
    log.debug("not at this level")
    first, second = lines(stream)
    assert str(first.pop("time")).endswith("Z") and second.pop("time")
    assert first == {
        "level": "warning",
        "logger": "batchrun.pipeline",
        "message": "row 7 failed",
        "run": "0a1b",
        "epoch": 3,
        "worker": "w0",
        "shard": "000012 (a.parquet)",
    }
    assert second == {
        "level": "info",
        "logger": "batchrun.pipeline",
        "message": "done",
        "run": "0a1b",
        "epoch": 3,
    }


def test_an_exception_is_on_its_line(stream: io.StringIO) -> None:
    """A traceback is part of its record, redacted, and not lines of its own."""
    try:
        raise ValueError("cannot read s3://user:hunter22@bucket/x")
    except ValueError:
        logging.getLogger("batchrun").exception("failed")
    [line] = lines(stream)
    assert "ValueError: cannot read s3://[redacted]@bucket/x" in str(line["exception"])
    assert "hunter22" not in stream.getvalue()


def test_text_cannot_forge_a_line(stream: io.StringIO) -> None:
    """Line breaks and control characters of a text stay inside its JSON string."""
    logging.getLogger("batchrun").warning("id %s", 'x\n{"level": "error"}\x1b[2J\u2028y')
    assert len(stream.getvalue().splitlines()) == 1
    assert "\x1b" not in stream.getvalue()
    assert lines(stream)[0]["message"] == 'id x\n{"level": "error"}\x1b[2J\u2028y'


def test_logging_to_a_file(tmp_path: Path, stream: io.StringIO) -> None:
    """Logs can go to a file instead, whose folder is made; nothing then goes to the stream."""
    configure_logging(level="INFO", path=tmp_path / "logs" / "run.jsonl")
    logging.getLogger("batchrun").info("to the file")
    [line] = (tmp_path / "logs" / "run.jsonl").read_text().splitlines()
    assert json.loads(line)["message"] == "to the file"
    assert stream.getvalue() == ""


SECRETS = [
    ("key AKIAIOSFODNN7EXAMPLE used", "key [redacted] used"),
    ("ASIAIOSFODNN7EXAMPLE", "[redacted]"),
    ("Authorization: Bearer abcdef.ghi-jkl_123", "Authorization: Bearer [redacted]"),
    ("authorization: basic dXNlcjpwYXNz", "authorization: basic [redacted]"),
    ("s3://user:pa55word@bucket/key", "s3://[redacted]@bucket/key"),
    ("https://token@host/path", "https://[redacted]@host/path"),
    (
        "https://b.s3.amazonaws.com/k?X-Amz-Credential=AKIAX%2F2026&X-Amz-Signature=0f1e2d&x=1",
        "https://b.s3.amazonaws.com/k?X-Amz-Credential=[redacted]&X-Amz-Signature=[redacted]&x=1",
    ),
    (
        "https://a.blob.core.windows.net/c/f?sv=2022&sig=abc%2Bdef",
        "https://a.blob.core.windows.net/c/f?sv=2022&sig=[redacted]",
    ),
    (
        "{'aws_secret_access_key': 'wJalrXUtnFEMI'}",
        "{'aws_secret_access_key': '[redacted]'}",
    ),
    ("AWS_SESSION_TOKEN=FwoGZXIvYXdzEA", "AWS_SESSION_TOKEN=[redacted]"),
    ("password: hunter22, next", "password: [redacted], next"),
    ("hf_abcdefghijklmnopqrstuv", "[redacted]"),
    ("ghp_abcdefghijklmnopqrstuvwxyz0123", "[redacted]"),
    ("eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.abc_def", "[redacted]"),
]


@pytest.mark.parametrize(("text", "clean"), SECRETS)
def test_secrets_are_redacted(text: str, clean: str) -> None:
    """What looks like a credential is masked; what names it stays readable."""
    assert redact(text) == clean
    assert redact(clean) == clean


@pytest.mark.parametrize(
    "text",
    [
        "s3://bucket/prompts/a.parquet",
        "s3://bucket/a@b/c.parquet",
        "https://host:9000/path?version=2",
        "generation.max_tokens: must be a whole number of at least 1, not 0",
        "tokens: 1234567, reasoning_tokens: 55555",
        "mail me at somebody@example.org",
        "basic usage",
        "the secret of success",
    ],
)
def test_other_text_is_left_alone(text: str) -> None:
    """Paths, counts and prose are no secrets."""
    assert redact(text) == text


@pytest.mark.parametrize(
    ("name", "secret"),
    [
        ("secret", True),
        ("key", True),
        ("aws_access_key_id", True),
        ("HF_TOKEN", True),
        ("token", True),
        ("MY_PASSWORD", True),
        ("OPENAI_API_KEY", True),
        ("endpoint_url", False),
        ("max_tokens", False),
        ("TOKENIZERS_PARALLELISM", False),
        ("keyfile_name", False),
        ("anon", False),
        ("profile", False),
    ],
)
def test_names_of_secrets(name: str, secret: bool) -> None:
    """Options and variables that hold secrets are known by their names."""
    assert names_a_secret(name) is secret


def test_printable() -> None:
    """Control characters are shown, not obeyed; everything else stays."""
    assert printable("a\n\x1b[31m\u202e\x00é🦀") == "a\\n\\x1b[31m\\u202e\\x00é🦀"


def test_an_event_has_its_fields_at_the_top(stream: io.StringIO) -> None:
    """A line of a run's story: its event, its own fields before those of the context."""
    with log_context(worker="w0", epoch=4):
        place: dict[str, str | int] = {"shard": "000000 (a.parquet)", "row": "0-7"}
        log_event("lease_given", "some rows", worker="w1", place=place)
    (line,) = lines(stream)
    del line["time"]
    assert line == {
        "level": "info",
        "event": "lease_given",
        "message": "some rows",
        "run": "0a1b",
        "epoch": 4,
        "worker": "w1",
        "shard": "000000 (a.parquet)",
        "row": "0-7",
    }


def test_fields_of_an_event_are_clean(stream: io.StringIO) -> None:
    """Secrets are masked in fields too, control characters escaped, long texts cut."""
    log_event("row_failed", "50% hf_abcdefghijklmnopqrst", row="a\x1b[31m\n", kind="x" * 9000)
    (line,) = lines(stream)
    assert line["message"] == "50% [redacted]" and line["row"] == "a\x1b[31m\n"
    assert len(str(line["kind"])) < 2100
    assert "\x1b" not in stream.getvalue() and stream.getvalue().count("\n") == 1


def test_the_same_error_is_written_once_a_minute(stream: io.StringIO) -> None:
    """Of one class the first is written; other classes and the story itself are not held back."""
    for number in range(5):
        log_event("row_failed", "timeout", error_class="timeout", row=number, rows=2)
    log_event("row_failed", "too_long", error_class="too_long", row=9)
    for _ in range(2):
        log_event("worker_lost", "gone", level=logging.WARNING)
        logging.getLogger("batchrun.data").warning("slow %s", _)
    written = lines(stream)
    assert [line["message"] for line in written] == [
        "timeout",
        "too_long",
        "gone",
        "slow 0",
        "gone",
    ]
    assert (written[0]["occurrences"], written[0]["row"]) == (2, 0)


def test_a_gate_counts_what_it_held_back() -> None:
    """The next that passes after a while stands for those before it too."""
    now = [0.0]
    gate = RepeatGate(60, lambda: now[0])
    assert [gate.admit("a", 3), gate.admit("a", 2), gate.admit("b"), gate.admit("a")] == [
        3,
        0,
        1,
        0,
    ]
    assert gate.held() == {"a": 3}
    now[0] = 61.0
    assert gate.admit("a") == 4
    assert gate.held() == {}


def test_a_log_file_grows_and_keeps_what_people_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each run appends; warnings stand on stderr as well, in plain words; errors that were held
    back are counted at the end; afterwards logging is as it was."""
    logger = logging.getLogger("batchrun")
    before = (logger.handlers[:], logger.level, logger.propagate)
    path = tmp_path / "deep" / "run.log"
    for _ in range(2):
        with log_file(str(path)):
            log_event("run_started", "3 rows")
            log_event("row_failed", "timeout", level=logging.WARNING, error_class="t", rows=1)
            log_event("row_failed", "timeout", level=logging.WARNING, error_class="t", rows=41)
            logging.getLogger("batchrun.metrics").warning("port %d is taken", 80)
    assert before == (logger.handlers[:], logger.level, logger.propagate)
    assert capsys.readouterr().err == 2 * "port 80 is taken\n"
    found = [json.loads(line) for line in path.read_text().splitlines()]
    assert 2 * ["3 rows", "timeout", "port 80 is taken", "41 more of: t"] == [
        line["message"] for line in found
    ]


def test_without_a_log_nothing_is_said(capfd: pytest.CaptureFixture[str]) -> None:
    """Events are for whoever asked for a log: Python must not print them by itself."""
    with log_file(None):
        log_event("worker_lost", "gone", level=logging.ERROR)
    assert capfd.readouterr().err == ""
