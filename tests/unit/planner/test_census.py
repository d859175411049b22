"""Prompts are counted through the path that a run takes, and a sample says how long all are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from random import Random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchrun.data.checkpoints import find_checkpoint
from batchrun.data.inputs import list_input
from batchrun.data.survey import Estimate, cut_windows
from batchrun.engine.chat import ChatTemplate
from batchrun.engine.tokenizer import Tokenizer
from batchrun.job import Job
from batchrun.planner.census import Census, take_census
from batchrun.planner.outputs import Expectation
from batchrun.prompts import input_columns

WORDS = "seven plus eleven makes eighteen, she said; 3+4=7 and so on, über Äpfel 数字".split()


@pytest.fixture(scope="module")
def chat() -> ChatTemplate:
    """The embedded checkpoint's."""
    folder = find_checkpoint("tiny")
    return ChatTemplate.load(folder, Tokenizer.load(folder))


def job_over(folder: Path, **sections: Mapping[str, object]) -> Job:
    """A job over ``folder/in``."""
    rows = {"path": f"{folder}/in", "prompt_column": "q", **sections.pop("input", {})}
    return Job.model_validate(
        {"model": {"path": "tiny"}, "input": rows, "output": {"path": f"{folder}/out"}, **sections}
    )


def write(folder: Path, name: str, rows: Mapping[str, Sequence[object]], group: int = 512) -> None:
    """One file of the input."""
    (folder / "in").mkdir(exist_ok=True)
    pq.write_table(pa.table(dict(rows)), folder / "in" / f"{name}.parquet", row_group_size=group)


def census_of(
    job: Job, chat: ChatTemplate, *, exact: bool = False, max_model_len: int = 4096, seed: int = 0
) -> Census:
    """The census of a job's rows."""
    files = list_input(str(job.input.path))
    windows = cut_windows(files, input_columns(job), [1.0] * len(files), job.input.limit)
    return take_census(
        job,
        chat,
        windows,
        Expectation(),
        num_rows=Estimate(sum(window.num_rows for window in windows)),
        max_model_len=max_model_len,
        exact=exact,
        seed=seed,
    )


def test_a_sample_of_a_skewed_input(tmp_path: Path, chat: ChatTemplate) -> None:
    """Few files and few rows hold most of the tokens; the sampled total is still within 5 % of the
    real one, and within the error that it states."""
    random = Random(4)
    for number in range(24):
        texts = []
        for _ in range(2600 if number == 7 else random.choice((5, 20, 100, 300))):
            count = min(400, max(1, int(random.lognormvariate(1.5 + number % 4 / 2, 1.1))))
            words = WORDS if number % 3 else WORDS[-3:]
            texts.append(" ".join(random.choices(words, k=count)))
        write(tmp_path, f"f{number:02d}", {"q": sorted(texts) if number == 7 else texts})
    job = job_over(tmp_path, generation={"max_tokens": 256})
    real = census_of(job, chat, exact=True)
    assert real.is_exact and real.total.error == 0
    assert real.num_sampled > 4000
    for seed in (0, 1):
        sampled = census_of(job, chat, seed=seed)
        assert not sampled.is_exact and sampled.num_sampled < real.num_sampled / 2
        off = abs(sampled.total.value - real.total.value)
        assert off < 0.05 * real.total.value
        assert off < 1.5 * sampled.total.error
        assert sampled.total.ratio < 0.1
        assert sampled.quantiles["p50"] == pytest.approx(real.quantiles["p50"], rel=0.2)
        rows = sum(one.rows for one in sampled.histogram) + sum(sampled.failing_rows.values())
        assert rows == pytest.approx(real.num_sampled)


def test_a_small_input_is_counted_whole(tmp_path: Path, chat: ChatTemplate) -> None:
    """Few rows are all tokenised: the numbers are those of the prompts themselves."""
    write(tmp_path, "a", {"q": ["3+4?", "What is 3+4?"]})
    census = census_of(job_over(tmp_path), chat)
    from batchrun.records import Message

    lengths = sorted(
        len(chat.encode([Message("user", text)], reasoning=True).token_ids)
        for text in ("3+4?", "What is 3+4?")
    )
    assert census.is_exact
    assert census.total == Estimate(sum(lengths))
    assert (census.quantiles["p1"], census.longest) == tuple(lengths)
    assert census.runnable_rows == 2


def test_rows_that_can_never_run(tmp_path: Path, chat: ChatTemplate) -> None:
    """Rows that are too long for the context and rows that are no prompt are told apart, and their
    tokens are not counted."""
    write(tmp_path, "a", {"q": ["3+4?", "", None, "word " * 400, "x" * (1 << 20) + "y"]})
    census = census_of(job_over(tmp_path, generation={"max_tokens": 64}), chat, max_model_len=256)
    assert census.failing_rows == {"invalid_prompt": 2, "too_long": 2}
    assert census.runnable_rows == 1
    assert census.total.value == census.longest < 192


def test_overrides_and_limit(tmp_path: Path, chat: ChatTemplate) -> None:
    """A row's own max_tokens counts, and only the rows up to the limit."""
    write(tmp_path, "a", {"q": ["1+1?"] * 6, "max_tokens": [10, 20, 30, 5000, 1, 1]}, group=2)
    job = job_over(tmp_path, input={"overrides": ["max_tokens"], "limit": 4})
    census = census_of(job, chat)
    assert census.num_sampled == 4
    assert census.failing_rows == {"too_long": 1}
    assert (census.max_tokens, census.most_tokens) == (20, 30)


def test_a_shared_beginning(tmp_path: Path, chat: ChatTemplate) -> None:
    """What every prompt begins with is found, in steps of 16 tokens; a short one does not count."""
    write(tmp_path, "a", {"q": ["alpha?", "beta?", "gamma?"]})
    assert census_of(job_over(tmp_path), chat).prefix_tokens == 0
    long = job_over(tmp_path, input={"system": "You add numbers and explain each step. " * 12})
    census = census_of(long, chat)
    assert census.prefix_tokens % 16 == 0
    assert 64 < census.prefix_tokens < census.quantiles["p1"]
