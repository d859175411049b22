"""The scheduler: who runs next, under a budget of tokens, slots and blocks."""

from __future__ import annotations

from random import Random

import pytest

from batchrun.engine.blocks import Pool
from batchrun.engine.params import SamplingParams
from batchrun.engine.request import Request
from batchrun.engine.scheduler import Scheduler, Step
from batchrun.engine.sequence import Sequence
from batchrun.engine.transcript import Transcript


def sequence(key: str, num_prompt: int, *, num_reserved: int | None = None) -> Sequence:
    """A sequence with a prompt of zeros."""
    request = Request(key, (0,) * num_prompt, SamplingParams())
    transcript = Transcript(
        [b""] * 9, None, stop_ids=frozenset(), stops=(), max_tokens=10**6, min_tokens=0
    )
    return Sequence(request, transcript, num_reserved=num_reserved or num_prompt + 4, added_at=0.0)


def scheduler(
    *, slots: int = 8, blocks: int = 100, tokens: int = 10, deterministic: bool = False
) -> Scheduler:
    """A scheduler with blocks of 4 tokens."""
    return Scheduler(
        Pool("slot", slots + 1),
        Pool("block", blocks + 1),
        block_size=4,
        uses_blocks=True,
        max_batch_tokens=tokens,
        deterministic=deterministic,
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
