"""Sampling parameters: vLLM's names and defaults, every value checked."""

from __future__ import annotations

import pytest

from batchrun.engine.params import SamplingParams
from batchrun.errors import RequestError


def test_defaults_are_those_of_vllm() -> None:
    """A call written for vLLM means the same here."""
    params = SamplingParams()
    assert (params.n, params.temperature, params.top_p, params.top_k) == (1, 1.0, 1.0, 0)
    assert (params.min_p, params.repetition_penalty, params.max_tokens) == (0.0, 1.0, 16)
    assert (params.min_tokens, params.stop, params.stop_token_ids) == (0, (), ())
    assert (params.seed, params.logprobs, params.ignore_eos) == (None, None, False)
    assert params.max_thinking_tokens is None


def test_stop_may_be_one_text_or_several() -> None:
    """A single stop string is not taken for its characters."""
    assert SamplingParams(stop="END").stop_strings == ("END",)
    assert SamplingParams(stop=["a", "b"]).stop_strings == ("a", "b")
    assert SamplingParams(stop=None).stop_strings == ()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n", 0),
        ("n", True),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", "hot"),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_k", -2),
        ("top_k", 1.5),
        ("min_p", 1.1),
        ("repetition_penalty", 0.0),
        ("max_tokens", 0),
        ("min_tokens", -1),
        ("min_tokens", 17),
        ("logprobs", 2),
        ("max_thinking_tokens", -1),
        ("thinking_grace", -1),
        ("answer_reserve", -1),
        ("seed", 1.5),
        ("stop", [""]),
        ("stop", [3]),
        ("stop", 3),
        ("stop", {"END": 1}),
        ("stop", "\ud800"),
        ("stop_token_ids", ["x"]),
        ("stop_token_ids", 2),
        ("ignore_eos", 1),
    ],
)
def test_a_bad_value_is_named(name: str, value: object) -> None:
    """What cannot be is refused when written, naming the parameter, as a ValueError."""
    with pytest.raises(RequestError, match=name) as caught:
        SamplingParams(**{name: value})  # type: ignore[arg-type]
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    ("max_tokens", "reserve", "expected"),
    [(1024, None, 128), (64, None, 16), (3, None, 0), (64, 5, 5)],
)
def test_the_answer_reserve_is_a_quarter_up_to_128(
    max_tokens: int, reserve: int | None, expected: int
) -> None:
    """auto = min(128, max_tokens // 4); a number is taken as it is."""
    assert SamplingParams(answer_reserve=reserve).reserve_of(max_tokens) == expected
