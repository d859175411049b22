"""Taking over what was generated before: the same output as without, whatever was cut where."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest

from batchrun.engine.engine import Engine
from batchrun.engine.params import SamplingParams
from batchrun.engine.request import Output, Request
from batchrun.records import ErrorKind, FinishReason, Generated, Message
from tests.unit.engine.support import TINY, make_engine, run


@pytest.fixture(scope="module")
def tiny() -> Engine:
    """The trained model, whose reasoning closes by itself."""
    return make_engine(TINY, max_sequences=24, max_batch_tokens=96)


def questions(engine: Engine, count: int, **changes: object) -> Iterator[Request]:
    """Sums in the chat format, greedy and drawn, with budgets, stop strings and penalties."""
    rng = Random(5)
    assert engine.chat is not None
    for i in range(count):
        terms = "+".join(str(rng.randint(1, 99)) for _ in range(rng.randint(2, 6)))
        prompt = engine.chat.encode([Message("user", f"What is {terms}?")], reasoning=i % 5 != 4)
        values: dict[str, object] = {
            "max_tokens": rng.choice([12, 60]),
            "temperature": rng.choice([0.0, 0.8, 1.2]),
            "top_p": rng.choice([1.0, 0.9]),
            "repetition_penalty": rng.choice([1.0, 1.1]),
            "max_thinking_tokens": rng.choice([None, 0, 5, 17]),
            "thinking_grace": rng.choice([0, 3]),
            "answer_reserve": rng.choice([None, 2]),
            "stop": rng.choice([[], ["1"]]),
            "min_tokens": rng.choice([0, 4]),
            "logprobs": 0,
        }
        params = SamplingParams(**{**values, **changes})  # type: ignore[arg-type]
        yield Request(i, prompt.token_ids, params, seed=i, thinking=prompt.thinking)


def cut(generated: Generated, num_tokens: int) -> Generated:
    """The first so many tokens of what was sampled."""
    assert generated.logprobs is not None
    closed = generated.closed_after
    return Generated(
        generated.token_ids[:num_tokens],
        generated.logprobs[:num_tokens],
        None if closed is None or closed > num_tokens else closed,
    )


def assert_same(one: Output, other: Output) -> None:
    """Equal but for times, log-probabilities within rounding."""
    bare = {"timings": one.timings, "logprobs": None, "key": None, "prefix_tokens": 0}
    assert replace(one, **bare) == replace(other, **bare)  # type: ignore[arg-type]
    assert one.logprobs is not None and other.logprobs is not None
    for mine, its in zip(one.logprobs, other.logprobs, strict=True):
        assert mine is its is None or abs((mine or 0) - (its or 0)) < 1e-4


def test_going_on_from_any_cut_ends_the_same(tiny: Engine) -> None:
    """From none, some or all of the sampled tokens: equal tokens, texts, counts and reasons."""
    requests = list(questions(tiny, 24))
    whole = run(tiny, requests)
    assert sum(output.thinking_budget_hit for output in whole.values()) > 4
    pieces = []
    for request in requests:
        generated = whole[request.key, 0].generated
        for at in range(len(generated.token_ids) + 1):
            piece = replace(request, key=(request.key, at), generated=cut(generated, at))
            pieces.append(piece)
    assert len(pieces) > 400
    outputs = run(tiny, pieces)
    for piece in pieces:
        assert isinstance(piece.key, tuple)
        assert_same(outputs[piece.key, 0], whole[piece.key[0], 0])


def test_a_bound_completion_goes_on_from_any_cut(tiny: Engine) -> None:
    """The format takes the tokens that were taken over, too."""
    bound = {"type": "regex", "pattern": "<[0-9]{2,4}>"}
    requests = list(questions(tiny, 6, response_format=bound, min_tokens=0, stop=[]))
    whole = run(tiny, requests)
    assert sum(output.text.startswith("<") for output in whole.values()) >= 4
    for request in requests:
        output = whole[request.key, 0]
        if output.error is not None:
            continue
        for at in range(len(output.generated.token_ids) + 1):
            piece = replace(request, generated=cut(output.generated, at))
            assert_same(run(tiny, [piece])[request.key, 0], output)


@pytest.mark.parametrize("grace", [0, 3])
def test_another_budget_takes_over_what_is_the_same(tiny: Engine, grace: int) -> None:
    """From every budget to every other, longer and shorter: the output of a run from scratch."""
    budgets = [0, 1, 6, 14, 30, None]
    requests = {
        budget: list(questions(tiny, 8, max_thinking_tokens=budget, thinking_grace=grace))
        for budget in budgets
    }
    outputs = {budget: run(tiny, requests[budget]) for budget in budgets}
    for budget in budgets:
        for source in budgets:
            known = [
                replace(request, generated=outputs[source][request.key, 0].generated)
                for request in requests[budget]
            ]
            for key, output in run(tiny, known).items():
                assert_same(output, outputs[budget][key])


def test_only_what_differs_is_sampled(tiny: Engine) -> None:
    """A finished generation costs no step; a shorter budget costs the answer alone."""
    requests = list(questions(tiny, 10, max_thinking_tokens=None, max_tokens=60))
    whole = run(tiny, requests)
    before = tiny.stats()
    again = run(tiny, [replace(r, generated=whole[r.key, 0].generated) for r in requests])
    prompts = sum(len(request.prompt_token_ids) for request in requests)
    assert tiny.stats() == replace(before, prefix_tokens=before.prefix_tokens + prompts)
    for key, output in again.items():
        assert_same(output, whole[key])
    shorter = [
        replace(
            request,
            params=replace(request.params, max_thinking_tokens=4),
            generated=whole[request.key, 0].generated,
        )
        for request in requests
    ]
    answers = run(tiny, shorter).values()
    sampled = tiny.stats().sampled_tokens - before.sampled_tokens
    assert sampled == sum(o.num_completion_tokens for o in answers if o.thinking_budget_hit) > 0


def test_deterministic_runs_are_equal_wherever_they_were_cut(random_folder: Path) -> None:
    """To the byte, log-probabilities too: a token that is taken over has the step of its own that
    it had the first time, and nothing is sampled twice."""
    few = make_engine(random_folder, deterministic=True, max_sequences=2, max_batch_tokens=32)
    many = make_engine(random_folder, deterministic=True, max_sequences=9, max_batch_tokens=32)
    requests = list(questions(few, 8))
    whole = run(few, requests)
    known = []
    for request in requests:
        generated = whole[request.key, 0].generated
        half = cut(generated, len(generated.token_ids) // 2)
        known.append(replace(request, generated=half))
    before = many.stats().sampled_tokens
    again = run(many, known[::-1])
    for key, output in whole.items():
        assert (output.token_ids, output.logprobs) == (again[key].token_ids, again[key].logprobs)
        assert output.text == again[key].text and output.reasoning == again[key].reasoning
    sampled = sum(len(output.generated.token_ids) for output in whole.values())
    taken = sum(len(request.generated.token_ids) for request in known if request.generated)
    assert 0 < taken and many.stats().sampled_tokens - before == sampled - taken


@pytest.mark.parametrize("deterministic", [False, True])
def test_what_runs_can_be_taken_over_at_any_step(deterministic: bool) -> None:
    """What an engine says of its running samples, put together from pieces as it says it, is what
    another one goes on from: with budgets, stop strings, formats and several samples."""
    one = make_engine(TINY, max_sequences=6, deterministic=deterministic)
    other = make_engine(TINY, max_sequences=6, deterministic=deterministic)
    requests = [
        replace(request, sample=sample, params=replace(request.params, response_format=form))
        for request, form in zip(
            questions(one, 3, max_tokens=60, ignore_eos=True, stop=["77"]),
            [None, {"type": "regex", "pattern": "[0-9]{20,40}"}, None],
            strict=True,
        )
        for sample in range(2)
    ]
    whole = run(one, requests)
    for request in requests:
        one.add(request)
    known: dict[tuple[object, int], Generated] = {}
    ended = set()
    for step in range(25):
        ended |= {(output.key, output.sample) for output in one.step()}
        if step % 4 == 3:
            for item in one.running():
                place = item.key, item.sample
                start = known.get(place, Generated((), ()))
                tail = item.after(len(start.token_ids))
                assert start.logprobs is not None and tail.logprobs is not None
                known[place] = Generated(
                    start.token_ids + tail.token_ids,
                    start.logprobs + tail.logprobs,
                    tail.closed_after,
                )
                assert known[place] == item.after(0)
                assert item.num_sampled == len(known[place].token_ids)
    for request in requests:
        one.abort(request.key)
    assert len(known) == 6 and len(ended) < 3
    again = run(other, [replace(r, generated=known.get((r.key, r.sample))) for r in requests])
    for place, output in whole.items():
        assert (output.token_ids, output.text) == (again[place].token_ids, again[place].text)
        if deterministic:
            assert output.logprobs == again[place].logprobs


def test_what_cannot_be_taken_over_is_an_error_of_the_row(tiny: Engine) -> None:
    """Ids outside the vocabulary, or no log-probabilities where some are asked for."""
    [request] = questions(tiny, 1)
    for generated in (Generated((5, 1 << 20), (0.0, 0.0)), Generated((5,))):
        [output] = run(tiny, [replace(request, generated=generated)]).values()
        assert output.finish_reason is FinishReason.ERROR
        assert output.error is not None and output.error.kind is ErrorKind.ENGINE


def test_aborting_loses_only_what_was_sampled_here(tiny: Engine) -> None:
    """Tokens that were taken over are still where they came from."""
    [request] = questions(tiny, 1, max_thinking_tokens=None, max_tokens=60)
    [output] = run(tiny, [request]).values()
    tiny.add(replace(request, generated=cut(output.generated, 5)))
    tiny.step()
    assert tiny.progress(request.key).num_sampled == 6  # type: ignore[union-attr]
    assert tiny.abort(request.key) == 1
