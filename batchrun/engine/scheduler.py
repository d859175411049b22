"""Picks the engine's next batch, only that. No tensors."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from dataclasses import dataclass

from batchrun.engine.blocks import Pool
from batchrun.engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Chunk:
    """The next ``num_tokens`` tokens of a sequence that prefills."""

    sequence: Sequence
    num_tokens: int

    @property
    def is_final(self) -> bool:
        """Whether a token is sampled after it."""
        return self.num_tokens == self.sequence.num_pending


@dataclass(frozen=True, slots=True)
class Step:
    """What one engine step runs. ``admitted`` are those among it that just got their slot."""

    decodes: tuple[Sequence, ...]
    prefills: tuple[Chunk, ...]
    admitted: tuple[Sequence, ...]

    def __bool__(self) -> bool:
        return bool(self.decodes or self.prefills)


class Scheduler:
    """First come, first served, over two resources: state slots and blocks.

    A sequence is admitted when a slot and the blocks of all the tokens it can come to hold are
    free, so nothing that runs ever has to stop. Every step takes all decoding sequences, then
    forced tokens, then prompts in order of arrival as far as ``max_batch_tokens`` goes.

    With ``deterministic`` the chunks of a prompt end at multiples of ``max_batch_tokens`` and a
    step prefills one sequence, so that no shape depends on the neighbours.
    """

    def __init__(
        self,
        slots: Pool,
        blocks: Pool,
        *,
        block_size: int,
        uses_blocks: bool,
        max_batch_tokens: int,
        deterministic: bool = False,
    ) -> None:
        """``block_size`` in tokens; ``uses_blocks`` is False for a model without attention."""
        self._slots = slots
        self._blocks = blocks
        self._block_size = block_size
        self._uses_blocks = uses_blocks
        self._max_batch_tokens = max_batch_tokens
        self._deterministic = deterministic
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []

    @property
    def num_waiting(self) -> int:
        """Sequences without a slot."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Sequences with a slot."""
        return len(self._running)

    def add(self, sequence: Sequence) -> None:
        """Put a sequence at the end of the queue."""
        self._waiting.append(sequence)

    def schedule(self) -> Step:
        """The next step; admits what fits. Empty when nothing waits or runs."""
        decodes: list[Sequence] = []
        forced: list[Sequence] = []
        prompts: list[Sequence] = []
        for sequence in self._running:
            if sequence.is_decoding:
                decodes.append(sequence)
            elif sequence.is_in_prompt:
                prompts.append(sequence)
            else:
                forced.append(sequence)
        prefills: list[Chunk] = []
        # At least a token, so that many decodes cannot keep the prompts out for ever.
        left = max(1, self._max_batch_tokens - len(decodes))
        for sequence in (*forced, *prompts):
            left -= self._prefill(sequence, left, prefills)
        admitted: list[Sequence] = []
        while left > 0 and self._waiting and self._fits(self._waiting[0]):
            sequence = self._waiting.popleft()
            self._admit(sequence)
            admitted.append(sequence)
            left -= self._prefill(sequence, left, prefills)
        return Step(tuple(decodes), tuple(prefills), tuple(admitted))

    def finish(self, ended: Collection[Sequence]) -> None:
        """Take running sequences out and free what they hold."""
        for sequence in ended:
            if sequence.slot is not None:
                self._slots.free((sequence.slot,))
                self._blocks.free(sequence.blocks)
                sequence.slot, sequence.blocks = None, ()
        self._running = [s for s in self._running if s.slot is not None]

    def abort(self, sequences: Collection[Sequence]) -> None:
        """Take sequences out, whether they wait or run."""
        if any(s.slot is None for s in sequences):
            self._waiting = deque(s for s in self._waiting if s not in sequences)
        self.finish(sequences)

    def check_integrity(self) -> None:
        """Check that the pools and the running sequences agree.

        :raises RuntimeError: they do not.
        """
        self._slots.check_integrity(s.slot for s in self._running if s.slot is not None)
        self._blocks.check_integrity(block for s in self._running for block in s.blocks)

    def _prefill(self, sequence: Sequence, left: int, prefills: list[Chunk]) -> int:
        """Append the sequence's next chunk; returns how much of what is left it takes."""
        if left <= 0:
            return 0
        if self._deterministic:
            prefills.append(Chunk(sequence, min(sequence.num_pending, self._max_batch_tokens)))
            return left
        num_tokens = min(sequence.num_pending, left)
        prefills.append(Chunk(sequence, num_tokens))
        return num_tokens

    def _fits(self, sequence: Sequence) -> bool:
        return self._slots.num_free > 0 and self._blocks.num_free >= self._num_blocks(sequence)

    def _admit(self, sequence: Sequence) -> None:
        (sequence.slot,) = self._slots.allocate(1)
        sequence.blocks = self._blocks.allocate(self._num_blocks(sequence))
        self._running.append(sequence)

    def _num_blocks(self, sequence: Sequence) -> int:
        return -(-sequence.num_reserved // self._block_size) if self._uses_blocks else 0
