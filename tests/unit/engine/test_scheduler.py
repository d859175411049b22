"""The scheduler: who runs next, under a budget of tokens, slots and blocks."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

import pytest

from batchrun.engine.blocks import Pool
from batchrun.engine.forecast import Forecast
from batchrun.engine.params import SamplingParams
from batchrun.engine.request import Request
from batchrun.engine.scheduler import Scheduler, Step
from batchrun.engine.sequence import Sequence
from batchrun.engine.transcript import Transcript


def sequence(
    key: str, num_prompt: int, *, num_reserved: int | None = None, max_tokens: int = 10**6
) -> Sequence:
    """A sequence with a prompt of zeros; token 7 ends it."""
    request = Request(key, (0,) * num_prompt, SamplingParams(max_tokens=max_tokens))
    transcript = Transcript(
        [b""] * 9, None, stop_ids=frozenset({7}), stops=(), max_tokens=max_tokens, min_tokens=0
    )
    return Sequence(request, transcript, num_reserved=num_reserved or num_prompt + 4, added_at=0.0)


def scheduler(
    *,
    slots: int = 8,
    blocks: int = 100,
    tokens: int = 10,
    deterministic: bool = False,
    forecast: Forecast | None = None,
    patience: int = 0,
) -> Scheduler:
    """A scheduler with blocks of 4 tokens; first come, first served without a forecast."""
    return Scheduler(
        Pool("slot", slots + 1),
        Pool("block", blocks + 1),
        block_size=4,
        uses_blocks=True,
        max_batch_tokens=tokens,
        deterministic=deterministic,
        forecast=forecast,
        patience=patience,
    )


def advance(step: Step, *, forced: int = 0) -> None:
    """What the engine does after a forward pass: state advanced, a token sampled."""
    for one in step.decodes:
        one.num_context += 1
    for chunk in step.prefills:
        chunk.sequence.num_context += chunk.num_tokens
    for one in (*step.decodes, *(c.sequence for c in step.prefills)):
        if not one.num_pending:
            one.tokens += [1] * (1 + forced)


def shape(step: Step) -> tuple[list[object], list[tuple[object, int]]]:
    """Keys of the decodes; keys and lengths of the prefills."""
    return (
        [s.request.key for s in step.decodes],
        [(c.sequence.request.key, c.num_tokens) for c in step.prefills],
    )


def test_prompts_are_cut_to_the_budget_and_decodes_go_first() -> None:
    """A long prompt never holds up a sequence that decodes."""
    made = scheduler(tokens=10)
    for one in (sequence("a", 4), sequence("b", 14)):
        made.add(one)
    shapes = []
    for _ in range(4):
        step = made.schedule()
        shapes.append(shape(step))
        advance(step)
    assert shapes == [
        ([], [("a", 4), ("b", 6)]),
        (["a"], [("b", 8)]),
        (["a", "b"], []),
        (["a", "b"], []),
    ]


def test_a_prompt_of_one_token_is_a_prefill() -> None:
    """What counts is that its state holds nothing yet, not how many tokens it brings."""
    made = scheduler()
    made.add(sequence("a", 1))
    step = made.schedule()
    assert shape(step) == ([], [("a", 1)])
    assert step.prefills[0].is_final


def test_forced_tokens_are_one_short_chunk() -> None:
    """They go before prompts, together with the sampled token that they follow."""
    made = scheduler(tokens=10)
    made.add(sequence("b", 20))
    made.add(sequence("a", 12))
    for expected in ([("b", 10)], [("b", 10)], [("a", 9)]):
        step = made.schedule()
        assert shape(step)[1] == expected
        advance(step)
    made.add(sequence("c", 50))
    step = made.schedule()
    assert shape(step) == (["b"], [("a", 3), ("c", 6)])
    advance(step, forced=3)
    assert shape(made.schedule()) == ([], [("b", 4), ("a", 4), ("c", 2)])


def test_admission_is_first_come_first_served() -> None:
    """Over slots and over blocks; a big one at the head is not overtaken."""
    made = scheduler(slots=2, blocks=6, tokens=100)
    for one in (sequence("a", 8), sequence("b", 12), sequence("c", 1)):
        made.add(one)
    step = made.schedule()
    assert [s.request.key for s in step.admitted] == ["a"]  # 3 blocks, b needs 4
    assert (made.num_running, made.num_waiting) == (1, 2)
    advance(step)
    made.finish({step.admitted[0]})
    assert [s.request.key for s in made.schedule().admitted] == ["b", "c"]
    made.check_integrity()


def test_many_decodes_do_not_starve_the_prompts() -> None:
    """Even when they use up the budget, a prompt gets on by a token."""
    made = scheduler(tokens=2)
    for key in "abc":
        made.add(sequence(key, 1))
    for _ in range(4):
        advance(made.schedule())
    made.add(sequence("d", 5))
    decodes, prefills = shape(made.schedule())
    assert sorted(map(str, decodes)) == ["a", "b", "c"]
    assert prefills == [("d", 1)]


def test_deterministic_chunks_depend_on_the_sequence_alone() -> None:
    """The lengths of a prompt's chunks are the same with and without neighbours."""

    def chunks(*others: int) -> list[int]:
        made = scheduler(tokens=4, deterministic=True)
        for number, length in enumerate(others):
            made.add(sequence(f"other {number}", length))
        made.add(sequence("a", 10))
        seen = []
        for _ in range(20):
            step = made.schedule()
            assert len(step.prefills) <= 1
            seen += [c.num_tokens for c in step.prefills if c.sequence.request.key == "a"]
            advance(step)
        return seen

    assert chunks() == chunks(7) == chunks(1, 9, 4) == [4, 4, 2]


def test_aborted_sequences_leave_nothing_behind() -> None:
    """Running or waiting, their slots and blocks are free again."""
    made = scheduler(slots=1)
    running, waiting = sequence("a", 3), sequence("b", 3)
    made.add(running)
    made.add(waiting)
    made.schedule()
    made.abort({running, waiting})
    assert (made.num_running, made.num_waiting) == (0, 0)
    assert not made.schedule()
    made.check_integrity()


@pytest.mark.parametrize("seed", range(5))
def test_whatever_comes_all_of_it_runs(seed: int) -> None:
    """Random arrivals, lengths, forced tokens and ends: budgets hold, everybody ends, in a time
    that the tokens explain, and the pools are whole after every step."""
    rng = Random(seed)
    made = scheduler(slots=5, blocks=40, tokens=16)
    left = {sequence(str(i), rng.randint(1, 60), num_reserved=100) for i in range(30)}
    for one in sorted(left, key=lambda s: str(s.request.key)):
        made.add(one)
    for _ in range(2000):
        step = made.schedule()
        if not step:
            break
        assert len(step.decodes) + sum(c.num_tokens for c in step.prefills) <= 16
        slots = [s.slot for s in (*step.decodes, *(c.sequence for c in step.prefills))]
        assert len(set(slots)) == len(slots) and None not in slots and 0 not in slots
        advance(step, forced=rng.choice([0, 0, 0, 5]))
        made.check_integrity()
        ended = {s for s in left if s.slot is not None and len(s.tokens) > 90}
        made.finish(ended)
        left -= ended
    assert not left


def test_the_longest_goes_first() -> None:
    """Without anything known, the one that may become longest; equals in order of arrival."""
    made = scheduler(slots=1, forecast=Forecast(10), patience=9)
    for key, limit in (("a", 10), ("b", 100), ("c", 10), ("d", 500), ("e", 100)):
        made.add(sequence(key, 4, max_tokens=limit))
    order = []
    for _ in range(5):
        step = made.schedule()
        order += [s.request.key for s in step.admitted]
        made.finish(step.admitted)
    assert order == ["d", "b", "e", "a", "c"]


def test_what_has_ended_changes_the_order() -> None:
    """Those that wait already are put in order again when enough has been seen."""
    forecast = Forecast(10)
    made = scheduler(slots=1, forecast=forecast, patience=99)
    for key, num_prompt in (("short", 3), ("long", 200)):
        made.add(sequence(key, num_prompt, num_reserved=300, max_tokens=1000))
    made.add(sequence("medium", 3, max_tokens=60))
    for _ in range(8):  # prompts of three tokens had answers of two
        ended = sequence("", 3, max_tokens=1000)
        ended.append(1, None)
        ended.append(7, None)
        forecast.observe(ended)
    order = []
    for _ in range(3):
        step = made.schedule()
        order += [s.request.key for s in step.admitted]
        made.finish(step.admitted)
    assert order == ["long", "short", "medium"]


def test_what_does_not_fit_lets_others_pass_so_many_times() -> None:
    """A long one that lacks blocks is passed by shorter ones, up to the patience; then all wait
    for it."""
    made = scheduler(slots=8, blocks=10, tokens=1000, forecast=Forecast(10), patience=3)
    first, big = sequence("first", 8), sequence("big", 30)
    made.add(first)
    made.schedule()
    made.add(big)  # 9 blocks, and 7 are free
    small = [sequence(str(n), 1, num_reserved=4, max_tokens=3) for n in range(6)]
    for one in small:
        made.add(one)
    assert [s.request.key for s in made.schedule().admitted] == ["0", "1", "2"]
    assert not made.schedule().admitted
    made.finish({first, *small[:3]})
    assert [s.request.key for s in made.schedule().admitted] == ["big", "3"]
    made.check_integrity()


def test_aborted_ones_are_not_admitted() -> None:
    """Out of the middle of the order, and as the one that waits longest."""
    made = scheduler(slots=1, forecast=Forecast(10), patience=2)
    all_of_them = [sequence(str(n), 4, max_tokens=10 * (n + 1)) for n in range(5)]
    for one in all_of_them:
        made.add(one)
    made.abort({all_of_them[0], all_of_them[3]})
    order = []
    while step := made.schedule():
        order += [s.request.key for s in step.admitted]
        made.finish(step.admitted)
    assert order == ["4", "2", "1"]
    assert made.num_waiting == made.num_waiting_tokens == 0


@dataclass(frozen=True, slots=True)
class Ran:
    """A workload that was run: its engine steps, and the most later rows that passed a row."""

    steps: int
    most_passes: int


def work_off(made: Scheduler, forecast: Forecast, lengths: list[int], limits: list[int]) -> Ran:
    """Run rows that end after so many tokens, all of them waiting from the beginning."""
    rows = {
        sequence(str(n), 20, num_reserved=1, max_tokens=limit): length
        for n, (length, limit) in enumerate(zip(lengths, limits, strict=True))
    }
    for row in rows:
        made.add(row)
    steps, most = 0, 0
    admitted: list[int] = []
    while step := made.schedule():
        steps += 1
        for row in step.admitted:
            most = max(most, sum(arrival > row.arrival for arrival in admitted))
            admitted.append(row.arrival)
        ended = set()
        for row in step.decodes:
            row.num_context += 1
        for chunk in step.prefills:
            chunk.sequence.num_context += chunk.num_tokens
        for row in (*step.decodes, *(c.sequence for c in step.prefills)):
            if row.num_pending == 0:
                row.append(7 if row.transcript.num_sampled + 1 == rows[row] else 1, None)
                if row.transcript.finish_reason is not None:
                    ended.add(row)
                    forecast.observe(row)
        made.finish(ended)
    assert len(admitted) == len(rows)
    return Ran(steps, most)


@pytest.mark.parametrize("seed", range(4))
def test_a_skewed_workload_takes_fewer_steps(seed: int) -> None:
    """One row in twelve is twenty times as long. First come, first served leaves a long one alone
    at the end; the longest first comes within a tenth of what the slots can do at best. And no
    row is passed by more than the patience allows."""
    rng = Random(seed)
    is_long = [rng.random() < 0.08 for _ in range(300)]
    lengths = [rng.randint(300, 500) if long else rng.randint(5, 40) for long in is_long]
    limits = [500 if long else 50 for long in is_long]

    def ran(patience: int) -> Ran:
        forecast = Forecast(512)
        made = scheduler(slots=16, tokens=512, forecast=forecast, patience=patience)
        return work_off(made, forecast, lengths, limits)

    first_come, longest_first = ran(0), ran(4 * 16)
    assert first_come.most_passes == 0
    assert longest_first.most_passes <= 4 * 16
    assert longest_first.steps < first_come.steps
    assert longest_first.steps < 1.1 * sum(lengths) / 16
