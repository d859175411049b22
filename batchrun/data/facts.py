"""What the rows of an output look like, for its report: distributions, failures, samples.

Only reads, and of a big output only some parts, chosen by a seed, so that a report of a hundred
thousand parts takes seconds; how many were read is part of the answer.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from batchrun.data.store import Store
from batchrun.errors import OutputError
from batchrun.records import Part

MAX_PARTS = 128
"""Parts that are read for the distributions, and further ones for the failures."""

TOKEN_COLUMNS = ("prompt_tokens", "reasoning_tokens", "completion_tokens")

_MAX_SAMPLES = 1 << 20  # rows of the output that are kept in memory for the distributions
_MAX_FAILURES = 20  # shown of each kind
_NUM_LONGEST = 10
_NUM_EXAMPLES = 3
_MAX_TEXT = 600
_READERS = 8
_COLUMNS = ("id", "sample", "finish_reason", *TOKEN_COLUMNS, "thinking_budget_hit", "error")
_TEXTS = ("reasoning", "completion")


@dataclass(frozen=True, slots=True)
class Distribution:
    """How a number of tokens is distributed over samples. ``counts[0]`` are those of 0 tokens,
    ``counts[i]`` those from 2^(i-1) to 2^i - 1."""

    counts: tuple[int, ...]
    mean: float
    p50: int
    p90: int
    p99: int
    most: int


@dataclass(frozen=True, slots=True)
class FailedSample:
    """One sample that failed, with the text of the column ``error``."""

    part: str
    id: str
    sample: int
    error: str


@dataclass(frozen=True, slots=True)
class LongSample:
    """One of the samples that took the most tokens."""

    part: str
    id: str
    sample: int
    prompt_tokens: int
    reasoning_tokens: int
    completion_tokens: int
    finish_reason: str


@dataclass(frozen=True, slots=True)
class Example:
    """What the model wrote for a sample, cut short."""

    id: str
    reasoning: str
    completion: str


@dataclass(frozen=True, slots=True)
class Facts:
    """What was found. Counts are those of ``num_samples`` samples in ``num_parts`` parts of the
    ``total_parts``; failures are counted over all parts that have some, up to twice as many."""

    num_parts: int = 0
    total_parts: int = 0
    num_samples: int = 0
    tokens: Mapping[str, Distribution] = field(default_factory=dict)
    finish_reasons: Mapping[str, int] = field(default_factory=dict)
    budget_hits: int = 0
    errors: Mapping[str, int] = field(default_factory=dict)  # kind -> samples
    failures: tuple[FailedSample, ...] = ()
    longest: tuple[LongSample, ...] = ()
    examples: tuple[Example, ...] = ()
    model_license: str | None = None

    @property
    def is_complete(self) -> bool:
        """Whether every part was read."""
        return self.num_parts == self.total_parts


def read_facts(
    store: Store, parts: Iterable[Part], *, texts: bool = True, max_parts: int = MAX_PARTS
) -> Facts:
    """Look at ``parts``. Without ``texts`` no id, error message or completion is in the answer.

    Raises OutputError for a part that cannot be read.
    """
    everything = sorted(parts, key=lambda part: part.shard)
    chosen = _choose(everything, max_parts)
    failing = _choose([part for part in everything if part.counts.failed_rows], max_parts)
    with ThreadPoolExecutor(_READERS) as pool:
        tables = dict(
            zip(
                (part.name for part in chosen),
                pool.map(lambda part: _read(store, part.name, _COLUMNS), chosen),
                strict=True,
            )
        )
        more = [part for part in failing if part.name not in tables]
        failed = {part.name: tables[part.name] for part in failing if part.name in tables}
        failed |= zip(
            (part.name for part in more),
            pool.map(lambda part: _read(store, part.name, _COLUMNS), more),
            strict=True,
        )
    kinds, failures = _failures(failed)
    merged = pa.concat_tables(tables.values()) if tables else None
    return Facts(
        num_parts=len(chosen),
        total_parts=len(everything),
        num_samples=0 if merged is None else merged.num_rows,
        tokens={} if merged is None else {name: _spread(merged[name]) for name in TOKEN_COLUMNS},
        finish_reasons={} if merged is None else _count(merged["finish_reason"]),
        budget_hits=0 if merged is None else pc.sum(merged["thinking_budget_hit"]).as_py() or 0,
        errors=kinds,
        failures=failures if texts else (),
        longest=_longest(tables) if texts else (),
        examples=_examples(store, chosen) if texts else (),
        model_license=None if merged is None else _license(merged),
    )


def _license(table: pa.Table) -> str | None:
    name = (table.schema.metadata or {}).get(b"batchrun.model_license")
    return None if name is None else str(name.decode())


def _choose(parts: Sequence[Part], max_parts: int) -> list[Part]:
    """All parts, or so many of them and so few that their rows fit the memory; in their order."""
    order = list(parts)
    if len(order) > max_parts or sum(part.num_rows for part in order) > _MAX_SAMPLES:
        random.Random(0).shuffle(order)
    found: list[Part] = []
    rows = 0
    for part in order[:max_parts]:
        if found and rows + part.num_rows > _MAX_SAMPLES:
            break
        found.append(part)
        rows += part.num_rows
    return sorted(found, key=lambda part: part.shard)


def _read(store: Store, name: str, columns: Sequence[str]) -> pa.Table:
    try:
        with store.open_file(name) as source, pq.ParquetFile(source) as parquet:
            return parquet.read(columns=list(columns), use_threads=False).select(list(columns))
    except (pa.ArrowException, KeyError, ValueError) as error:
        raise OutputError(
            f"output: {store.url}/{name} cannot be read ({error})",
            "`batchrun verify` says what else is wrong",
        ) from error


def _spread(column: Any) -> Distribution:
    values = column.to_numpy()
    if not len(values):
        return Distribution((), 0.0, 0, 0, 0, 0)
    lengths = [int(value).bit_length() for value in values.tolist()]
    counts = Counter(lengths)
    ordered = sorted(values.tolist())

    def quantile(share: float) -> int:
        return int(ordered[min(len(ordered) - 1, int(share * len(ordered)))])

    return Distribution(
        counts=tuple(counts.get(length, 0) for length in range(max(lengths) + 1)),
        mean=float(values.mean()),
        p50=quantile(0.5),
        p90=quantile(0.9),
        p99=quantile(0.99),
        most=int(ordered[-1]),
    )


def _count(column: Any) -> dict[str, int]:
    found = {item["values"]: item["counts"] for item in pc.value_counts(column).to_pylist()}
    return dict(sorted(found.items(), key=lambda pair: (-pair[1], pair[0])))


def _failures(
    tables: Mapping[str, pa.Table],
) -> tuple[dict[str, int], tuple[FailedSample, ...]]:
    """How many samples failed of each kind, and the first of each."""
    kinds: Counter[str] = Counter()
    shown: list[FailedSample] = []
    for name, table in tables.items():
        for row in table.filter(pc.is_valid(table["error"])).to_pylist():
            kind = row["error"].partition(":")[0]
            kinds[kind] += 1
            if kinds[kind] <= _MAX_FAILURES:
                error = row["error"][:_MAX_TEXT]
                shown.append(FailedSample(name, row["id"], row["sample"], error))
    return dict(kinds.most_common()), tuple(shown)


def _longest(tables: Mapping[str, pa.Table]) -> tuple[LongSample, ...]:
    found: list[LongSample] = []
    for name, table in tables.items():
        made = pc.add(table["reasoning_tokens"], table["completion_tokens"])
        most = pc.select_k_unstable(
            pa.table({"made": made}), k=_NUM_LONGEST, sort_keys=[("made", "descending")]
        )
        for row in table.take(most).to_pylist():
            prompt, reasoning, completion = (int(row[column]) for column in TOKEN_COLUMNS)
            found.append(
                LongSample(
                    part=name,
                    id=row["id"],
                    sample=row["sample"],
                    prompt_tokens=prompt,
                    reasoning_tokens=reasoning,
                    completion_tokens=completion,
                    finish_reason=row["finish_reason"],
                )
            )
    found.sort(key=lambda item: -(item.reasoning_tokens + item.completion_tokens))
    return tuple(found[:_NUM_LONGEST])


def _examples(store: Store, parts: Sequence[Part]) -> tuple[Example, ...]:
    """The first answered samples of some parts."""
    found: list[Example] = []
    for part in _choose(parts, _NUM_EXAMPLES):
        table = _read(store, part.name, ("id", *_TEXTS))
        table = table.filter(pc.is_valid(table["completion"]))
        for row in table.slice(0, _NUM_EXAMPLES).to_pylist():
            found.append(Example(row["id"], *(_cut(row[name]) for name in _TEXTS)))
    return tuple(found[:_NUM_EXAMPLES])


def _cut(text: str | None) -> str:
    text = text or ""
    return text if len(text) <= _MAX_TEXT else text[:_MAX_TEXT] + " …"
