"""States of prompt beginnings that prompts share: which to keep, who starts from one. No tensors.

A hybrid's state cannot be cut back, so it is of use only at the very token at which it was copied.
The prompts that arrive are compared at a few places: every ``GRAIN`` tokens, and at the last token
but one, where the samples of one row still agree. The sequence that is admitted first of those
that share a beginning is made to end a chunk there, and its state is copied out; the others wait
for that copy and start from it.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Iterable

from batchrun.engine.blocks import Pool
from batchrun.engine.sequence import Sequence
from batchrun.engine.snapshot import Mark, Snapshot

GRAIN = 16
"""Tokens between two places at which prompts are compared."""
MIN_TOKENS = 64
"""A beginning shorter than this is not worth a chunk of its own."""
_MAX_RECENT = 256
"""Prompts that left the queue which are remembered."""
_MAX_RECENT_MARKS = 1 << 16
"""Places of them that are: about 8 MiB at most."""


class PrefixStates:
    """Finds shared beginnings, and keeps as many of their states as the pools hold.

    A state is worth its tokens times the prompts that share it, of those that wait or were recent.
    So one that nobody comes for is worth nothing in the end. The least worthy makes room, but only
    for one of more worth: where many are worth the same, the first ones stay and are of use,
    instead of each being driven out before it is. Samples of a row come together, so of a whole
    prompt only those count that wait.

    In a step, states are copied to the sequences that start from them before the model runs, and
    snapshots are written after it; so a slot may change hands within :meth:`admit`.
    """

    def __init__(self, slots: Pool, blocks: Pool, *, block_size: int, uses_blocks: bool) -> None:
        """The pools are the snapshots' own, beside those of the sequences."""
        self._slots = slots
        self._blocks = blocks
        self._block_size = block_size
        self._uses_blocks = uses_blocks
        self._max_tokens = blocks.num_total * block_size if uses_blocks else sys.maxsize
        self._snapshots: dict[int, Snapshot] = {}  # by the hash of their mark
        self._users: dict[int, int] = {}  # prompts that wait or were recent, by hash of a mark
        self._recent: deque[tuple[Mark, ...]] = deque()
        self._num_recent = 0
        self._last: tuple[tuple[int, ...], tuple[Mark, ...]] = ((), ())

    def add(self, sequence: Sequence) -> None:
        """Take note of a sequence that begins to wait."""
        sequence.marks = self._marks(sequence.request.prompt_token_ids)
        for mark in sequence.marks:
            self._users[mark.hash] = self._users.get(mark.hash, 0) + 1

    def is_held(self, sequence: Sequence) -> bool:
        """Whether a waiting sequence should wait on, as a state that it can use is being made."""
        pending = [s for s in self._snapshots.values() if not s.is_ready]
        if not pending:
            return False
        longest = self._longest(sequence)
        return longest is not None and not longest.is_ready

    def admit(self, sequence: Sequence) -> None:
        """Say from which snapshot a sequence starts and which it makes; it is no longer waiting."""
        source = self._longest(sequence, ready=True)
        if source is not None:
            sequence.source = source
            sequence.num_context = source.num_tokens
        sequence.snapshot = self._begin(sequence)
        self._forget(tuple(mark for mark in sequence.marks if mark.is_whole))
        shared = tuple(mark for mark in sequence.marks if not mark.is_whole)
        self._recent.append(shared)
        self._num_recent += len(shared)
        while len(self._recent) > _MAX_RECENT or self._num_recent > _MAX_RECENT_MARKS:
            marks = self._recent.popleft()
            self._num_recent -= len(marks)
            self._forget(marks)

    def cancel(self, sequence: Sequence) -> None:
        """A waiting sequence has gone."""
        self._forget(sequence.marks)

    def leave(self, sequence: Sequence) -> None:
        """A running sequence has gone; what it has not copied out yet nobody will."""
        if sequence.snapshot is not None:
            self._drop(sequence.snapshot)
            sequence.snapshot = None

    def clear(self) -> None:
        """Drop all states that are ready."""
        for snapshot in [s for s in self._snapshots.values() if s.is_ready]:
            self._drop(snapshot)

    def check_integrity(self, running: Iterable[Sequence]) -> None:
        """Check that the snapshots hold their pools, and that each pending one has its maker.

        :raises RuntimeError: they do not.
        """
        self._slots.check_integrity(s.slot for s in self._snapshots.values())
        self._blocks.check_integrity(b for s in self._snapshots.values() for b in s.blocks)
        making = [s.snapshot for s in running if s.snapshot is not None]
        pending = [s for s in self._snapshots.values() if not s.is_ready]
        if {id(s) for s in making} != {id(s) for s in pending}:
            raise RuntimeError(f"{len(pending)} snapshots pending, {len(making)} being made")

    def _marks(self, prompt: tuple[int, ...]) -> tuple[Mark, ...]:
        """The places at which a prompt is compared; before its last token, which gives logits."""
        if prompt is self._last[0]:  # another sample of the same row
            return self._last[1]
        last = len(prompt) - 1
        marks: list[Mark] = []
        value = 0
        for end in range(GRAIN, min(last, self._max_tokens) + 1, GRAIN):
            value = hash((value, prompt[end - GRAIN : end]))
            marks.append(Mark(end, value))
        if 0 < last <= self._max_tokens:
            rest = prompt[len(marks) * GRAIN : last]
            marks.append(Mark(last, hash((value, rest, "whole")), is_whole=True))
        self._last = (prompt, tuple(marks))
        return self._last[1]

    def _longest(self, sequence: Sequence, *, ready: bool = False) -> Snapshot | None:
        """The longest snapshot that is a beginning of the sequence, of those that are ready."""
        for mark in reversed(sequence.marks):
            snapshot = self._snapshots.get(mark.hash)
            if snapshot is None or snapshot.mark != mark or (ready and not snapshot.is_ready):
                continue
            # Two beginnings may have one hash; nobody is to continue another's state.
            if sequence.request.prompt_token_ids[: mark.num_tokens] == snapshot.token_ids:
                return snapshot
        return None

    def _begin(self, sequence: Sequence) -> Snapshot | None:
        """The snapshot that the sequence is to make: where most tokens are saved, if any are."""
        start = sequence.num_context
        best, most = None, 0
        for mark in sequence.marks:
            others = self._users[mark.hash] - 1
            gain = mark.num_tokens - start
            if others < 1 or gain < 1 or mark.hash in self._snapshots:
                continue
            # Samples of a row are known to come, so many short gains count like a long one.
            if gain >= MIN_TOKENS or (mark.is_whole and gain * others >= MIN_TOKENS):
                if gain * others > most or (mark.is_whole and gain * others == most):
                    best, most = mark, gain * others
        return None if best is None else self._reserve(best, sequence)

    def _reserve(self, mark: Mark, sequence: Sequence) -> Snapshot | None:
        """A snapshot that is still to be written, if it is worth more than what has to go."""
        num_blocks = -(-mark.num_tokens // self._block_size) if self._uses_blocks else 0
        worth = self._worth(mark)
        victims: list[Snapshot] = []
        slots, blocks = self._slots.num_free, self._blocks.num_free
        ready = [snapshot for snapshot in self._snapshots.values() if snapshot.is_ready]
        for snapshot in sorted(ready, key=lambda s: self._worth(s.mark)):
            if (slots and blocks >= num_blocks) or self._worth(snapshot.mark) >= worth:
                break
            victims.append(snapshot)
            slots += 1
            blocks += len(snapshot.blocks)
        if not slots or blocks < num_blocks:
            return None
        for victim in victims:
            self._drop(victim)
        (slot,) = self._slots.allocate(1)
        tokens = sequence.request.prompt_token_ids[: mark.num_tokens]
        snapshot = Snapshot(mark, tokens, slot, self._blocks.allocate(num_blocks))
        self._snapshots[mark.hash] = snapshot
        return snapshot

    def _worth(self, mark: Mark) -> int:
        return mark.num_tokens * self._users.get(mark.hash, 0)

    def _drop(self, snapshot: Snapshot) -> None:
        del self._snapshots[snapshot.mark.hash]
        self._slots.free((snapshot.slot,))
        self._blocks.free(snapshot.blocks)

    def _forget(self, marks: tuple[Mark, ...]) -> None:
        for mark in marks:
            left = self._users[mark.hash] - 1
            if left:
                self._users[mark.hash] = left
            else:
                del self._users[mark.hash]
