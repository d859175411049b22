"""Our model computes what transformers' computes, however the tokens are fed."""

from __future__ import annotations

from random import Random

import pytest

from tests.parity.oracle import CONFIGURATIONS, make_pair, oracle_logits
from tests.unit.model.models import Driver, assert_close

pytestmark = pytest.mark.parametrize("name", CONFIGURATIONS)


def make_driver(name: str) -> Driver:
    """A driver with room for the prompt of a configuration and 16 tokens more."""
    pair = make_pair(name)
    return Driver(pair.model, num_slots=3, blocks_per_slot=len(pair.prompt) // 4 + 6)


def test_logits_of_every_prompt_length(name: str) -> None:
    """Prompts of 1 to 5 chunks + 1 tokens have the oracle's logits at every position."""
    pair, driver = make_pair(name), make_driver(name)
    chunk = pair.config.chunk_size
    multiples = [k * chunk + d for k in range(1, 6) for d in (-1, 0, 1)]
    for length in sorted({1, 2, 3, 4, 5, *multiples} - {0}):
        assert_close(driver.run(pair.prompt[:length]), pair.logits[:length])


def test_any_chunking(name: str) -> None:
    """A prompt prefilled in arbitrary pieces has the logits of the prompt in one go."""
    pair, driver = make_pair(name), make_driver(name)
    random = Random(name)
    length, chunk = len(pair.prompt), pair.config.chunk_size
    chunkings = [range(chunk, length, chunk), (1,), (length - 1,), (1, 2, 3, length - 2)]
    chunkings += [sorted(random.sample(range(1, length), random.randint(1, 8))) for _ in range(6)]
    for cuts in chunkings:
        assert_close(driver.run(pair.prompt, list(cuts)), pair.logits)


def test_token_by_token(name: str) -> None:
    """A first token prefilled and all others decoded give the logits of the prompt in one go."""
    pair, driver = make_pair(name), make_driver(name)
    assert_close(driver.step(prefills={"a": pair.prompt[:1]})["a"], pair.logits[:1])
    for i, token in enumerate(pair.prompt[1:], start=1):
        assert_close(driver.step(decodes={"a": token})["a"], pair.logits[i : i + 1])


def test_greedy_tokens(name: str) -> None:
    """Greedy generation chooses the tokens that the oracle chooses, and ends in its logits."""
    pair, driver = make_pair(name), make_driver(name)
    prompt = pair.prompt[: 2 * pair.config.chunk_size + 3]
    logits = driver.step(prefills={"a": prompt})["a"][-1]
    tokens = list(prompt)
    for _ in range(16):
        tokens.append(int(logits.argmax()))
        logits = driver.step(decodes={"a": tokens[-1]})["a"][0]
    expected = oracle_logits(pair.oracle, tokens)
    assert expected[len(prompt) - 1 : -1].argmax(-1).tolist() == tokens[len(prompt) :]
    assert_close(logits, expected[-1])
