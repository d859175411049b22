"""Sampling: random numbers by counter, distributions as asked, one row never sees another."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from batchrun.engine.params import SamplingParams
from batchrun.engine.sampler import Needs, Sampled, Sampler, stream_key, uniform

CPU = torch.device("cpu")
MASK = (1 << 64) - 1


def sample(
    logits: Tensor,
    params: list[SamplingParams],
    *,
    positions: list[int] | None = None,
    keys: list[int] | None = None,
    prompts: list[list[int]] | None = None,
    banned: tuple[tuple[int, list[int]], ...] = (),
) -> Sampled:
    """One token a row, rows in slots 1, 2, 3 …"""
    rows = len(params)
    sampler = Sampler(rows + 1, logits.shape[1], CPU)
    for row, one in enumerate(params):
        key = keys[row] if keys else stream_key(row, 0)
        sampler.admit(row + 1, one, key, prompts[row] if prompts else [])
    return sampler.sample(
        logits,
        torch.arange(1, rows + 1),
        torch.tensor(positions or [0] * rows),
        Needs(
            drawing=[row for row, p in enumerate(params) if not p.greedy],
            filtering=any(p.filtered for p in params),
            penalty=any(p.repetition_penalty != 1 for p in params),
            logprobs=any(p.logprobs is not None for p in params),
            banned=banned,
        ),
    ).wait()


def draw(logits: list[float], count: int, **params: float) -> Tensor:
    """How often each token is drawn in ``count`` positions of one sample."""
    one = SamplingParams(**params)  # type: ignore[arg-type]
    rows = torch.tensor([logits]).repeat(count, 1)
    result = sample(
        rows, [one] * count, positions=list(range(count)), keys=[stream_key(3, 0)] * count
    )
    return torch.bincount(torch.tensor(result.token_ids), minlength=len(logits))


def test_random_numbers_are_splitmix64_of_key_and_position() -> None:
    """The tensor arithmetic equals that of unbounded integers, bit for bit."""

    def reference(key: int, position: int) -> float:
        x = (key + (position + 1) * 0x9E3779B97F4A7C15) & MASK
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
        return ((x ^ (x >> 31)) >> 11) * 2.0**-53

    keys = [stream_key(seed, n) for seed in (0, 1, 2**63 - 1, -5) for n in (0, 1)]
    positions = [0, 1, 7, 10**6, 2, 3, 4, 5]
    got = uniform(torch.tensor(keys), torch.tensor(positions)).tolist()
    assert got == [reference(k, p) for k, p in zip(keys, positions, strict=True)]
    assert len(set(keys)) == len(keys)


def test_random_numbers_are_uniform_and_uncorrelated() -> None:
    """Over positions of one sample, and over samples and seeds at one position."""
    count = 20000
    by_position = uniform(torch.full((count,), stream_key(0, 0)), torch.arange(count))
    keys = torch.tensor([stream_key(seed, sample) for seed in range(200) for sample in range(100)])
    by_key = uniform(keys, torch.zeros(count, dtype=torch.int64))
    for numbers in (by_position, by_key):
        assert numbers.min() >= 0 and numbers.max() < 1
        histogram = torch.histc(numbers.float(), bins=50, min=0, max=1)
        chi_square = float(((histogram - count / 50) ** 2 / (count / 50)).sum())
        assert chi_square < 95  # 49 degrees of freedom: beyond is less likely than 1 in 10,000
        assert abs(float(torch.corrcoef(torch.stack([numbers[1:], numbers[:-1]]))[0, 1])) < 0.03


def test_tokens_come_as_often_as_they_are_likely() -> None:
    """The softmax at the temperature asked for."""
    logits = [0.0, 1.0, 2.0, -1.0, 0.5]
    for temperature in (0.5, 1.0, 2.0):
        counts = draw(logits, 8000, temperature=temperature)
        expected = torch.softmax(torch.tensor(logits) / temperature, 0) * 8000
        assert float(((counts - expected) ** 2 / expected).sum()) < 24  # 4 degrees, 1 in 10,000


@pytest.mark.parametrize("vocab_size", [512, 700])
def test_every_token_of_a_large_vocabulary_comes_in_its_turn(vocab_size: int) -> None:
    """The token is the one at which the running sum of probabilities passes the random number,
    wherever in the vocabulary it is; what has no probability never comes."""
    places = [0, 255, 256, 300, vocab_size - 1]
    weights = torch.tensor([0.2, 0.1, 0.3, 0.15, 0.25], dtype=torch.float64)
    logits = torch.full((vocab_size,), -torch.inf)
    logits[places] = weights.log().float()
    count = 500
    one = SamplingParams(temperature=1.0)
    keys, positions = [stream_key(3, 0)] * count, list(range(count))
    rows = logits.repeat(count, 1)

    got = sample(rows, [one] * count, positions=positions, keys=keys).token_ids
    numbers = uniform(torch.tensor(keys), torch.tensor(positions))
    turns = torch.searchsorted(weights.cumsum(0), numbers, right=True)
    near = (numbers[:, None] - weights.cumsum(0)).abs().amin(1) < 1e-6
    assert not near.any()
    assert got == [places[turn] for turn in turns]


@pytest.mark.parametrize(
    ("params", "kept"),
    [
        ({"top_k": 2}, {1, 2}),
        ({"top_k": 1}, {2}),
        ({"top_k": -1}, {0, 1, 2, 3, 4}),
        ({"top_p": 0.5}, {2}),
        ({"top_p": 0.6}, {1, 2}),
        ({"top_p": 0.86}, {1, 2, 4}),
        ({"top_p": 1e-9}, {2}),
        ({"min_p": 0.3}, {1, 2}),
        ({"min_p": 1.0}, {2}),
        ({"top_k": 3, "top_p": 0.9}, {1, 2, 4}),
        ({"top_k": 2, "top_p": 0.7}, {2}),  # of the two left, the likelier has 0.73
    ],
)
def test_what_is_cut_is_never_drawn(params: dict[str, float], kept: set[int]) -> None:
    """min_p, then top_k, then top_p of what is left, as in vLLM; and all that is left is drawn."""
    # Probabilities: .078 .213 .579 .029 .129 (rounded)
    counts = draw([0.0, 1.0, 2.0, -1.0, 0.5], 4000, **params)
    assert {i for i, count in enumerate(counts.tolist()) if count} == kept


def test_equal_probabilities_share_their_fate() -> None:
    """A cut between equal ones keeps them all, so no order of sorting decides."""
    assert set(draw([1.0, 1.0, 1.0, 0.0], 2000, top_k=2).nonzero().flatten().tolist()) == {0, 1, 2}


def test_temperature_0_takes_the_likeliest_and_mixes_with_others() -> None:
    """Greedy and drawn rows in one batch; a very small temperature is greedy too."""
    torch.manual_seed(0)
    logits = torch.randn(40, 30)
    params = [
        SamplingParams(temperature=(0.0, 1.0, 1e-9, 0.7)[i % 4], top_p=0.9) for i in range(40)
    ]
    ids = sample(logits, params).token_ids
    for row in range(0, 40, 2):
        assert ids[row] == int(logits[row].argmax())


def test_a_row_draws_the_same_alone_and_in_any_batch() -> None:
    """Whatever the others ask for."""
    torch.manual_seed(1)
    logits = torch.randn(12, 50)
    params = [
        SamplingParams(
            temperature=0.5 + 0.1 * i,
            top_p=(1.0, 0.8)[i % 2],
            top_k=(0, 5, 20)[i % 3],
            repetition_penalty=(1.0, 1.3)[i % 2],
            logprobs=0,
        )
        for i in range(12)
    ]
    keys = [stream_key(i, i % 3) for i in range(12)]
    prompts = [[i, i + 1] for i in range(12)]
    together = sample(logits, params, positions=list(range(12)), keys=keys, prompts=prompts)
    for i in range(12):
        alone = sample(
            logits[i : i + 1], params[i : i + 1], positions=[i], keys=keys[i : i + 1],
            prompts=prompts[i : i + 1],
        )  # fmt: skip
        assert alone.token_ids == together.token_ids[i : i + 1]
        assert alone.logprobs is not None and together.logprobs is not None
        assert math.isclose(alone.logprobs[0], together.logprobs[i], abs_tol=1e-5)


def test_logprobs_are_the_models() -> None:
    """Before temperature, cuts, penalty and bans."""
    torch.manual_seed(2)
    logits = torch.randn(3, 20)
    params = [
        SamplingParams(temperature=0.3, logprobs=1),
        SamplingParams(top_k=2, logprobs=0),
        SamplingParams(temperature=0, repetition_penalty=5.0, logprobs=0),
    ]
    before = logits.clone()
    result = sample(logits, params, prompts=[[], [], [int(logits[2].argmax())]], banned=((0, [1]),))
    expected = torch.log_softmax(before.double(), -1)
    assert result.logprobs is not None
    for row, (token_id, logprob) in enumerate(zip(result.token_ids, result.logprobs, strict=True)):
        assert abs(logprob - float(expected[row, token_id])) < 1e-5
    assert torch.equal(logits, before)


def test_the_repetition_penalty_acts_on_prompt_and_output() -> None:
    """Positive logits are divided, negative ones multiplied, as everywhere."""
    sampler = Sampler(2, 4, CPU)
    params = SamplingParams(temperature=0, repetition_penalty=2.0)
    sampler.admit(1, params, 0, [0])
    logits = torch.tensor([[3.0, 2.0, 1.9, -1.0]])

    def step() -> int:
        result = sampler.sample(logits, torch.tensor([1]), torch.tensor([0]), Needs(penalty=True))
        return result.wait().token_ids[0]

    # 3 -> 1.5 by the prompt; then 1 is halved, then 2; then 0 leads again with 1.5.
    assert [step() for _ in range(4)] == [1, 2, 0, 0]
    sampler.admit(1, params, 0, [])
    assert step() == 0  # a slot forgets its last sequence


def test_banned_tokens_are_not_taken() -> None:
    """Stop tokens before min_tokens: only in the row that bans them."""
    logits = torch.tensor([[0.0, 9.0, 1.0], [0.0, 9.0, 1.0]])
    params = [SamplingParams(temperature=0)] * 2
    assert sample(logits, params, banned=((0, [1]),)).token_ids == [2, 1]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_row_that_is_not_finite_is_reported_alone(bad: float) -> None:
    """The neighbours go on."""
    logits = torch.zeros(3, 8)
    logits[1, 5] = bad
    result = sample(logits, [SamplingParams(top_p=0.9)] * 3)
    assert result.finite == [True, False, True]
