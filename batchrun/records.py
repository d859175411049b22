"""The plain values that rooms of the package hand to one another. No behaviour, no libraries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from batchrun.rows import Rows
from batchrun.scores import Scores, Verdict

RESERVED_COLUMNS = (
    "id",
    "sample",
    "completion",
    "reasoning",
    "finish_reason",
    "prompt_tokens",
    "reasoning_tokens",
    "completion_tokens",
    "thinking_budget_hit",
    "error",
    "tool_calls",
    "logprobs",
    "correct",
)
"""The columns that batchrun writes itself: no carried column may have one of these names."""


class FinishReason(StrEnum):
    """Why a sample ended; the values of the output column ``finish_reason``."""

    STOP = "stop"
    LENGTH = "length"
    TOOL_CALLS = "tool_calls"
    ERROR = "error"


class ErrorKind(StrEnum):
    """What kind of failure made a row an error row; the first word of the column ``error``."""

    INVALID_PROMPT = "invalid_prompt"
    TOO_LONG = "too_long"
    TEMPLATE = "template"
    TIMEOUT = "timeout"
    WORKER_LOST = "worker_lost"
    ENGINE = "engine"


HEALING = (ErrorKind.TIMEOUT, ErrorKind.WORKER_LOST, ErrorKind.ENGINE)
"""Errors that another try may not meet: the others lie in the row."""


@dataclass(frozen=True, slots=True)
class RowError:
    """Why a row cannot be answered. ``str()`` gives the text of the column ``error``."""

    kind: ErrorKind
    message: str

    def __str__(self) -> str:
        return f"{self.kind.value}: {self.message}"


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A function that the model calls; ``arguments`` is JSON, or whatever text the model gave."""

    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation. ``role`` is system, user, assistant or tool.

    Only an assistant has ``tool_calls``; its ``content`` may be empty then.
    """

    role: str
    content: str
    tool_calls: tuple[ToolCall, ...] = ()


@dataclass(frozen=True, slots=True)
class Shard:
    """The unit of publication: one input file, or a range of its row groups.

    ``number`` is the shard's place in the plan and in its part's name; it never changes.
    ``path`` is relative to the input's base and stands in default row ids; ``uri`` is where to
    read. ``fingerprint`` pins the bytes of the whole input file (ETag, or size and mtime).
    ``row_groups`` are the row groups to read, ``first_row`` the index in the file of the first of
    ``num_rows`` rows.
    """

    number: int
    path: str
    uri: str
    size_bytes: int
    fingerprint: str
    row_groups: tuple[int, ...]
    first_row: int
    num_rows: int

    @property
    def name(self) -> str:
        """What people read in messages and logs, e.g. ``000012 (2024/a.parquet)``."""
        return f"{self.number:06d} ({self.path})"


@dataclass(frozen=True, slots=True)
class Lease:
    """Rows of a shard, given to a worker.

    ``epoch`` counts the drivers of the run; ``attempt`` is unique, and attempts sort as they were
    given. A ``whole`` lease is answerable for the shard: its ``rows`` are all of them, it takes
    what the journal has, and it publishes the part. The finished rows of any other go to the
    journal alone. A lease that is ``alone`` has rows that a worker may have died of, and its
    worker holds no other. ``lost`` are rows given up, ordinal -> why: they become error rows of
    kind ``worker_lost``, whatever the journal says; only a whole lease has some.
    """

    shard: Shard
    epoch: int
    attempt: str
    rows: Rows
    whole: bool = True
    alone: bool = False
    lost: Mapping[int, str] = field(default_factory=dict)


def attempt_name(epoch: int, number: int) -> str:
    """What the attempt that is the ``number``-th of an epoch is called."""
    return f"{epoch:06d}-{number:06d}"


def attempt_epoch(attempt: str) -> int:
    """The epoch of an attempt by its name; 0 for a name that is none."""
    epoch, _, _ = attempt.partition("-")
    return int(epoch) if epoch.isdecimal() else 0


@dataclass(frozen=True, slots=True)
class Strike:
    """The death of a worker that its rows may be to blame for; written down once for each death.

    ``rows`` are those that had a slot, by shard number. ``alone`` is whether the worker ran an
    ``alone`` lease, so that, when it is a single row, the death counts for that row. A ``blind``
    strike does not know which rows had a slot, or knows that none had one (``idle``): then
    ``rows`` are all that the worker held. ``device`` and ``cause`` are as in the coordinator's
    events.
    """

    worker: str
    rows: Mapping[int, Rows]
    alone: bool = False
    blind: bool = False
    idle: bool = False
    cause: str = ""
    message: str = ""
    device: str = ""


@dataclass(frozen=True, slots=True)
class Row:
    """One input record. ``ordinal`` counts inside the shard, ``index`` inside the file.

    ``values`` holds the columns that the prompt and the overrides need, as Python values. A
    record that cannot be read has ``error`` set, and then ``values`` are not to be used.
    ``answer`` is the expected answer where the job asks for scores; None if there is none.
    """

    ordinal: int
    index: int
    id: str
    values: Mapping[str, object]
    error: RowError | None = None
    answer: object = None


@dataclass(frozen=True, slots=True)
class Generated:
    """What was sampled for a sample of a row: all that is needed to take it over elsewhere.

    ``token_ids`` are the sampled tokens from the first on, without those written by force.
    ``logprobs`` has one entry each, None when they were not asked for. ``closed_after`` is how
    many had been sampled when ``</think>`` was forced; None when it was not.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...] | None = None
    closed_after: int | None = None


@dataclass(frozen=True, slots=True)
class Completion:
    """One finished sample of one row, as it goes to the journal and to the output.

    Token counts are those of the output's columns; ``error`` is set exactly when
    ``finish_reason`` is ``error``, and then both texts are null. ``verdict`` is there exactly
    when the job asks for scores, ``generated`` only where the run keeps its tokens. ``tool_calls``
    are those that the completion held, and holds no more.
    """

    ordinal: int
    sample: int
    id: str
    completion: str | None
    reasoning: str | None
    finish_reason: FinishReason
    prompt_tokens: int = 0
    reasoning_tokens: int = 0
    completion_tokens: int = 0
    thinking_budget_hit: bool = False
    error: str | None = None
    logprobs: tuple[float | None, ...] | None = None
    verdict: Verdict | None = None
    generated: Generated | None = None
    tool_calls: tuple[ToolCall, ...] | None = None


@dataclass(frozen=True, slots=True)
class Counts:
    """Sums over rows and samples. ``rows`` counts input rows, ``failed_rows`` those among them
    of which a sample has an error; tokens are sums over samples. ``scores`` is there when the job
    asks for them and a row has been scored. ``malformed_tool_calls`` counts samples that began a
    tool call that is none, ``empty`` samples without an error whose completion is empty."""

    rows: int = 0
    failed_rows: int = 0
    prompt_tokens: int = 0
    reasoning_tokens: int = 0
    completion_tokens: int = 0
    thinking_budget_hits: int = 0
    scores: Scores | None = None
    malformed_tool_calls: int = 0
    empty: int = 0

    @property
    def output_tokens(self) -> int:
        """Tokens of reasoning and completion."""
        return self.reasoning_tokens + self.completion_tokens

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Counts:
        """What ``dataclasses.asdict`` gave, in this version or an earlier one.

        Raises TypeError for anything else.
        """
        scores = raw.get("scores")
        return cls(**{**raw, "scores": None if scores is None else Scores.from_json(scores)})

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            self.rows + other.rows,
            self.failed_rows + other.failed_rows,
            self.prompt_tokens + other.prompt_tokens,
            self.reasoning_tokens + other.reasoning_tokens,
            self.completion_tokens + other.completion_tokens,
            self.thinking_budget_hits + other.thinking_budget_hits,
            _both(self.scores, other.scores),
            self.malformed_tool_calls + other.malformed_tool_calls,
            self.empty + other.empty,
        )


def row_scores(samples: Sequence[Completion]) -> Scores:
    """The scores of one row from all its samples, in their order."""
    return Scores.of_row([sample.verdict or Verdict(None) for sample in samples])


def _both(first: Scores | None, second: Scores | None) -> Scores | None:
    if first is None or second is None:
        return first or second
    return first + second


@dataclass(frozen=True, slots=True)
class Part:
    """A published part: what its commit record and the run's manifest say of it."""

    shard: int
    name: str
    attempt: str
    size_bytes: int
    sha256: str
    num_rows: int
    counts: Counts = field(default_factory=Counts)
