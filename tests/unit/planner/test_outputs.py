"""What is expected of outputs: by assumption, by a person, by what is done already."""

from __future__ import annotations

import pytest

from batchrun.data.checkpoints import find_checkpoint
from batchrun.engine.params import SamplingParams
from batchrun.engine.tokenizer import Tokenizer
from batchrun.job import Generation
from batchrun.planner.outputs import Expectation, Range, expect, explain
from batchrun.records import Counts


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """The embedded checkpoint's."""
    return Tokenizer.load(find_checkpoint("tiny"))


def test_assumptions() -> None:
    """Reasoning and completion take shares of their room; the high case is max_tokens."""
    plain = SamplingParams(max_tokens=1600)
    assert Expectation().of(plain, thinking=False) == Range(25, 400, 1600)
    budget = SamplingParams(max_tokens=1600, max_thinking_tokens=800)
    assert Expectation().of(budget, thinking=True) == Range(112.5, 600, 1600)
    free = Expectation().of(SamplingParams(max_tokens=1600, answer_reserve=0), thinking=True)
    assert free == Range(200, 800, 1600)
    forced = SamplingParams(max_tokens=1600, ignore_eos=True)
    assert Expectation().of(forced, thinking=True) == Range(1600, 1600, 1600)


def test_what_is_known_takes_the_place_of_assumptions(tokenizer: Tokenizer) -> None:
    """A figure that was given, then the mean of what is done, within max_tokens."""
    params, generation = SamplingParams(max_tokens=100), Generation(max_tokens=100, n=2)
    done = Counts(rows=6, failed_rows=1, reasoning_tokens=300, completion_tokens=100)
    measured = expect(generation, tokenizer, done=done)
    assert measured.of(params, thinking=True) == Range(32, 40, 50)
    assert "40 tokens a sample" in explain(measured, generation)[0]
    given = expect(generation, tokenizer, given=70, done=done)
    assert given.of(params, thinking=True) == Range(70, 70, 70)
    assert Expectation(given=500).of(params, thinking=True) == Range(100, 100, 100)
    assert expect(generation, tokenizer, done=Counts(rows=1, failed_rows=1)).measured is None


def test_choices(tokenizer: Tokenizer) -> None:
    """Completions that are one of a list are as long as its texts, and a stop token."""
    texts = ["yes", "not at all, by no means"]
    short, long = (len(tokenizer.encode_plain(text)) + 1 for text in texts)
    generation = Generation(reasoning=False, response_format={"type": "choice", "choices": texts})
    expectation = expect(generation, tokenizer)
    found = expectation.of(SamplingParams(max_tokens=1024), thinking=False)
    assert found == Range(short, (short + long) / 2, long)
    assert any("choices" in line for line in explain(expectation, generation))
