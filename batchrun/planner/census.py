"""How long the prompts are: rows through the real path, all of them or a sample.

The sample is drawn in proportion to size: windows of rows by what the footers say of their
columns, rows of a window by their own bytes. So the total is an estimate of tokens a byte, which
differs little, times bytes that are known, and long rows are never missed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any, cast

from batchrun.data.survey import ROW_BYTES, Estimate, Window, draw, mean_of, read_windows
from batchrun.engine.chat import ChatTemplate, PromptError
from batchrun.engine.params import SamplingParams
from batchrun.errors import RequestError, ShardError
from batchrun.job import Job
from batchrun.planner.outputs import Expectation, Range
from batchrun.prompts import PromptBuilder, input_columns
from batchrun.records import ErrorKind, Row, RowError

SAMPLED_ROWS = 2048
"""Rows that are tokenised, unless all are asked for."""
_SAMPLED_WINDOWS = 96
_FEWEST_WINDOWS = 24
_READ_BYTES = 256 << 20
"""About so much of the input is decoded for a sample."""
_TEXT_BYTES = 24 << 20
"""About so much of it is tokenised; no more rows and bytes than these are not sampled."""
_WINDOWS_A_TURN = 16
_PREFIX_STEP, _LEAST_PREFIX = 16, 64
"""Shared beginnings are found every so many tokens, and kept from so many on."""
_LENGTHS = 32
_NOTHING = Range(0.0, 0.0, 0.0)
QUANTILES = (0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99)


@dataclass(frozen=True, slots=True)
class Bin:
    """``rows`` whose prompts have from ``first`` to ``last`` tokens."""

    first: int
    last: int
    rows: float


@dataclass(frozen=True, slots=True)
class Census:
    """The prompts of a job.

    ``num_sampled`` rows were tokenised; with ``is_exact`` that is every row. ``runnable_rows`` can
    run; ``failing_rows`` cannot, by kind of error. Everything else is of the runnable ones: the
    ``total`` of prompt tokens (once a row), its quantiles and histogram; ``prefix_tokens`` at the
    beginning are the same in every prompt; ``output`` and ``max_tokens`` are a sample's, in tokens.
    ``lengths`` are some prompts' tokens, each standing for equally many rows.
    """

    num_sampled: int
    is_exact: bool
    runnable_rows: float
    failing_rows: Mapping[str, float]
    total: Estimate
    quantiles: Mapping[str, int]
    longest: int
    histogram: tuple[Bin, ...]
    prefix_tokens: int
    output: Range
    max_tokens: float
    most_tokens: int
    lengths: tuple[int, ...]
    unreadable: tuple[str, ...] = ()

    @property
    def mean(self) -> float:
        """Prompt tokens of a runnable row."""
        return self.total.value / self.runnable_rows if self.runnable_rows else 0.0


def take_census(
    job: Job,
    chat: ChatTemplate,
    windows: Sequence[Window],
    expectation: Expectation,
    *,
    num_rows: Estimate,
    max_model_len: int,
    exact: bool = False,
    seed: int = 0,
) -> Census:
    """Tokenise the rows of ``windows``, or a sample of them that says how long all are.

    ``num_rows`` is how many rows the windows stand for. Raises StorageError when storage fails.
    """
    desk = _Desk(job, chat, expectation, max_model_len)
    is_whole = all(window.weight == 1.0 for window in windows)
    count = sum(window.num_rows for window in windows)
    size = sum(window.size for window in windows)
    is_small = count <= SAMPLED_ROWS and size <= _TEXT_BYTES
    if is_whole and (exact or is_small):
        desk.read_all(windows)
        draws = None
    else:
        draws = desk.sample(windows, Random(seed))
    return desk.census(num_rows, draws)


@dataclass(slots=True)
class _Desk:
    """Where rows are counted as they come."""

    job: Job
    chat: ChatTemplate
    expectation: Expectation
    max_model_len: int
    builder: PromptBuilder = field(init=False)
    lengths: dict[int, float] = field(default_factory=dict)
    """Prompt tokens -> rows that can run."""
    failing: dict[str, float] = field(default_factory=dict)
    output: Range = _NOTHING
    max_tokens: float = 0.0
    """Like ``output`` a sum over the rows that can run."""
    most_tokens: int = 0
    num_rows: int = 0
    prefix: tuple[int, ...] | None = None
    unreadable: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.builder = PromptBuilder(self.job)

    def read_all(self, windows: Sequence[Window]) -> None:
        """Every row."""
        for start in range(0, len(windows), _WINDOWS_A_TURN):
            for rows in self._read(windows[start : start + _WINDOWS_A_TURN]):
                for row in rows or ():
                    self.ask(row, 1.0)

    def sample(self, windows: Sequence[Window], random: Random) -> list[float]:
        """Some rows; estimates of the total of prompt tokens, each by itself unbiased."""
        ordered = sorted(windows, key=lambda w: (w.size / w.num_rows, w.file.path, w.first_row))
        sizes = [window.size * window.weight for window in ordered]
        total = sum(sizes)
        groups = {(w.file.uri, w.row_group): 0.0 for w in windows}
        for window in windows:
            groups[window.file.uri, window.row_group] += window.size
        mean_size = sum(groups.values()) / max(1, len(groups))
        affordable = int(_READ_BYTES / max(1.0, mean_size))
        num_draws = max(_FEWEST_WINDOWS, min(_SAMPLED_WINDOWS, affordable))
        hits = draw(sizes, num_draws, random)
        chosen = list(hits)
        per_draw = max(2, SAMPLED_ROWS // num_draws)
        draws: list[float] = []
        spare = float(_TEXT_BYTES)
        for start in range(0, len(chosen), _WINDOWS_A_TURN):
            places = chosen[start : start + _WINDOWS_A_TURN]
            for place, rows in zip(places, self._read([ordered[p] for p in places]), strict=True):
                if not rows:
                    continue
                wanted = per_draw * hits[place]
                weights = [row_bytes(row) for row in rows]
                allowed = int(spare / num_draws * hits[place] / (sum(weights) / len(weights)))
                wanted = min(wanted, max(2, allowed))
                order = sorted(range(len(rows)), key=weights.__getitem__)
                found = draw([weights[at] for at in order], wanted, random)
                ratios = []
                share = total / num_draws * hits[place] / ordered[place].size
                for at, times in found.items():
                    row, weight = rows[order[at]], weights[order[at]]
                    stands_for = share * sum(weights) / (wanted * weight) * times
                    tokens = self.ask(row, stands_for)
                    ratios += [tokens / weight] * times
                estimate = total * sum(weights) / ordered[place].size * sum(ratios) / len(ratios)
                draws += [estimate] * hits[place]
        return draws

    def _read(self, windows: Sequence[Window]) -> list[list[Row] | None]:
        found: list[list[Row] | None] = []
        columns = input_columns(self.job)
        for rows in read_windows(windows, columns, self.job.input.storage_options):
            if isinstance(rows, ShardError):
                self.unreadable.append(rows.message)
                found.append(None)
            else:
                found.append(rows)
        return found

    def ask(self, row: Row, weight: float) -> int:
        """Take in a row that stands for ``weight`` rows; its prompt tokens, 0 where it cannot
        run."""
        self.num_rows += 1
        found = self._prompt(row)
        if isinstance(found, ErrorKind):
            self.failing[found.value] = self.failing.get(found.value, 0.0) + weight
            return 0
        token_ids, output, most = found
        tokens = len(token_ids)
        self.lengths[tokens] = self.lengths.get(tokens, 0.0) + weight
        self.output = self.output.plus(output.times(weight))
        self.max_tokens += weight * most
        self.most_tokens = max(self.most_tokens, most)
        self.prefix = token_ids if self.prefix is None else _shared(self.prefix, token_ids)
        return tokens

    def _prompt(self, row: Row) -> tuple[tuple[int, ...], Range, int] | ErrorKind:
        """The prompt as the pipeline makes it, the tokens that a sample of it is expected to
        generate, and its max_tokens."""
        prompt = self.builder.build(row)
        if isinstance(prompt, RowError):
            return prompt.kind
        try:
            encoded = self.chat.encode(
                prompt.messages, reasoning=prompt.reasoning, tools=prompt.tools
            )
            params = SamplingParams(**cast(dict[str, Any], prompt.params))
        except PromptError as error:
            return error.row_error.kind
        except RequestError:
            return ErrorKind.INVALID_PROMPT
        most = params.max_tokens or 0
        if len(encoded.token_ids) + most > self.max_model_len:
            return ErrorKind.TOO_LONG
        output = self.expectation.of(params, thinking=encoded.thinking)
        return encoded.token_ids, output, most

    def census(self, num_rows: Estimate, draws: list[float] | None) -> Census:
        """What was counted, scaled to ``num_rows``."""
        lengths = sorted(self.lengths.items())
        runnable = sum(self.lengths.values())
        seen = runnable + sum(self.failing.values())
        scale = num_rows.value / seen if seen else 0.0
        if draws is None:
            total = Estimate(float(sum(tokens * rows for tokens, rows in lengths)))
        else:
            total = mean_of(draws)
            # What is not known of the rows is not known of their tokens.
            error = math.hypot(total.error, total.value * num_rows.ratio)
            total = Estimate(total.value, error)
        shared = len(self.prefix or ()) if runnable > 1 else 0
        shared -= shared % _PREFIX_STEP
        bins: dict[int, float] = {}
        for tokens, rows in lengths:
            bits = tokens.bit_length()
            bins[bits] = bins.get(bits, 0.0) + rows * scale
        mean = 1 / runnable if runnable else 0.0
        middles = [(i + 0.5) / _LENGTHS for i in range(_LENGTHS)] if runnable else []
        return Census(
            num_sampled=self.num_rows,
            is_exact=draws is None,
            runnable_rows=runnable * scale,
            failing_rows={kind: rows * scale for kind, rows in sorted(self.failing.items())},
            total=total,
            quantiles={
                f"p{100 * share:g}": tokens
                for share, tokens in zip(QUANTILES, _quantiles(lengths, QUANTILES), strict=True)
            },
            longest=lengths[-1][0] if lengths else 0,
            histogram=tuple(
                Bin(1 << (bits - 1) if bits else 0, (1 << bits) - 1, bins.get(bits, 0.0))
                for bits in range(min(bins, default=0), max(bins, default=-1) + 1)
            ),
            prefix_tokens=shared if shared >= _LEAST_PREFIX else 0,
            output=self.output.times(mean),
            max_tokens=self.max_tokens * mean,
            most_tokens=self.most_tokens,
            lengths=_quantiles(lengths, middles),
            unreadable=tuple(dict.fromkeys(self.unreadable)),
        )


def _quantiles(lengths: Sequence[tuple[int, float]], shares: Sequence[float]) -> tuple[int, ...]:
    """Of tokens in order, each with its number of rows; 0 where there are none."""
    total = sum(rows for _, rows in lengths)
    found: list[int] = []
    reached, places = 0.0, iter(lengths)
    tokens = 0
    for share in shares:
        while reached < share * total and (place := next(places, None)) is not None:
            tokens = place[0]
            reached += place[1]
        found.append(tokens)
    return tuple(found)


def row_bytes(row: Row) -> int:
    """What a row weighs in the sample: the bytes of its texts, and :data:`ROW_BYTES`."""
    return ROW_BYTES + sum(_text_bytes(value) for value in row.values.values())


def _text_bytes(value: object) -> int:
    match value:
        case str():
            return len(value) if value.isascii() else len(value.encode("utf-8", "surrogatepass"))
        case Mapping():
            return sum(_text_bytes(item) for item in value.values())
        case list() | tuple():
            return sum(_text_bytes(item) for item in value)
        case _:
            return 8


def _shared(one: tuple[int, ...], other: tuple[int, ...]) -> tuple[int, ...]:
    """The beginning that both have."""
    if other[: len(one)] == one:
        return one
    length = next(
        (at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b),
        min(len(one), len(other)),
    )
    return one[:length]
