"""Picks the engine's next batch, only that. No tensors."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Collection
from dataclasses import dataclass
from heapq import heapify, heappop, heappush

from batchrun.engine.blocks import Pool
from batchrun.engine.forecast import Forecast
from batchrun.engine.prefix import PrefixStates
from batchrun.engine.sequence import Sequence

_MAX_PASSED = 64
"""Waiting sequences looked at in a step that cannot go now."""


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
    """The longest first, over two resources: state slots and blocks.

    Of those that wait, the one with the most expected work goes first, so that a run does not end
    with one long row on an idle machine; what does not fit into the free blocks lets others pass.
    But only so many of later arrival pass a sequence: then it is the next, and everybody waits
    until it fits. Without a forecast or with a ``patience`` of 0 that is first come, first served.

    A sequence is admitted when a slot and the blocks of all the tokens it can come to hold are
    free, so nothing that runs ever has to stop. Every step takes all decoding sequences, then
    forced tokens, then prompts in order of admission as far as ``max_batch_tokens`` goes.

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
        forecast: Forecast | None = None,
        patience: int = 0,
        prefixes: PrefixStates | None = None,
    ) -> None:
        """``block_size`` in tokens; ``uses_blocks`` is False for a model without attention.

        ``patience`` is how many of later arrival may pass a sequence. With ``prefixes``, sequences
        start from states that others have computed, and wait for those that are being made.
        """
        self._slots = slots
        self._blocks = blocks
        self._block_size = block_size
        self._uses_blocks = uses_blocks
        self._max_batch_tokens = max_batch_tokens
        self._deterministic = deterministic
        self._forecast = forecast
        self._patience = 0 if forecast is None else patience
        self._prefixes = prefixes
        self._version = 0
        self._num_arrived = 0
        self._num_waiting_tokens = 0
        self._waiting: OrderedDict[int, Sequence] = OrderedDict()  # by arrival
        self._longest: list[tuple[int, int]] = []  # heap of (-rank, arrival); some have gone
        self._ahead: list[int] = []  # arrivals that passed the one that waits longest, ascending
        self._running: list[Sequence] = []
        self._most_running = slots.num_total

    @property
    def running(self) -> tuple[Sequence, ...]:
        """The sequences with a slot, in the order in which they got it."""
        return tuple(self._running)

    def limit(self, num_running: int) -> None:
        """Admit while fewer than so many run, from now on."""
        self._most_running = num_running

    @property
    def num_waiting(self) -> int:
        """Sequences without a slot."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Sequences with a slot."""
        return len(self._running)

    @property
    def num_waiting_tokens(self) -> int:
        """Tokens that the waiting sequences hold in memory."""
        return self._num_waiting_tokens

    def add(self, sequence: Sequence) -> None:
        """Put a sequence at the end of the queue."""
        self._num_arrived += 1
        self._num_waiting_tokens += len(sequence.tokens)
        sequence.arrival = self._num_arrived
        self._waiting[sequence.arrival] = sequence
        if self._prefixes is not None:
            self._prefixes.add(sequence)
        if self._forecast is not None and self._patience:
            heappush(self._longest, (-self._forecast.rank(sequence), sequence.arrival))

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
            elif sequence.num_pending:  # else its last token is in flight
                forced.append(sequence)
        prefills: list[Chunk] = []
        # At least a token, so that many decodes cannot keep the prompts out for ever.
        left = max(1, self._max_batch_tokens - len(decodes))
        for sequence in (*forced, *prompts):
            left -= self._prefill(sequence, left, prefills)
        admitted: list[Sequence] = []
        passed: list[tuple[int, int]] = []
        self._reorder()
        while left > 0 and (picked := self._next(passed)) is not None:
            self._admit(picked)
            admitted.append(picked)
            if picked.is_decoding:  # all but the last token came from a snapshot
                decodes.append(picked)
                left -= 1
            else:
                left -= self._prefill(picked, left, prefills)
        for entry in passed:
            heappush(self._longest, entry)
        return Step(tuple(decodes), tuple(prefills), tuple(admitted))

    def finish(self, ended: Collection[Sequence]) -> None:
        """Take running sequences out and free what they hold."""
        for sequence in ended:
            if sequence.slot is not None:
                if self._prefixes is not None:
                    self._prefixes.leave(sequence)
                self._slots.free((sequence.slot,))
                self._blocks.free(sequence.blocks)
                sequence.slot, sequence.blocks = None, ()
        self._running = [s for s in self._running if s.slot is not None]

    def abort(self, sequences: Collection[Sequence]) -> None:
        """Take sequences out, whether they wait or run."""
        for sequence in sequences:
            if sequence.slot is None and self._waiting.pop(sequence.arrival, None) is not None:
                self._num_waiting_tokens -= len(sequence.tokens)
                if self._prefixes is not None:
                    self._prefixes.cancel(sequence)
        self.finish(sequences)

    def forget_prefixes(self) -> None:
        """Start nothing from the snapshots that are there or being made."""
        if self._prefixes is not None:
            for sequence in self._running:
                self._prefixes.leave(sequence)
            self._prefixes.clear()

    def check_integrity(self) -> None:
        """Check that the pools and the running sequences agree.

        :raises RuntimeError: they do not.
        """
        self._slots.check_integrity(s.slot for s in self._running if s.slot is not None)
        self._blocks.check_integrity(block for s in self._running for block in s.blocks)
        if self._prefixes is not None:
            self._prefixes.check_integrity(self._running)

    def _prefill(self, sequence: Sequence, left: int, prefills: list[Chunk]) -> int:
        """Append the sequence's next chunk; returns how much of what is left it takes."""
        if left <= 0:
            return 0
        if self._deterministic:
            prefills.append(Chunk(sequence, min(sequence.num_pending, self._max_batch_tokens)))
            return left
        num_tokens = min(sequence.num_pending, left)
        if sequence.snapshot is not None:
            num_tokens = min(num_tokens, sequence.snapshot.num_tokens - sequence.num_context)
        prefills.append(Chunk(sequence, num_tokens))
        return num_tokens

    def _next(self, passed: list[tuple[int, int]]) -> Sequence | None:
        """The waiting sequence to be admitted now, if any fits. ``passed`` takes the entries of
        those that have to wait on, for all calls of one step."""
        if not self._waiting or not self._slots.num_free:
            return None
        if len(self._running) >= self._most_running:
            return None
        oldest = next(iter(self._waiting.values()))
        del self._ahead[: bisect_left(self._ahead, oldest.arrival)]
        if len(self._ahead) >= self._patience:
            return oldest if self._fits(oldest) else None
        while self._longest and len(passed) < _MAX_PASSED:
            entry = heappop(self._longest)
            sequence = self._waiting.get(entry[1])
            if sequence is None:
                continue
            is_held = self._prefixes is not None and self._prefixes.is_held(sequence)
            if self._fits(sequence) and not is_held:
                return sequence
            passed.append(entry)
        return None

    def _reorder(self) -> None:
        """Put the waiting in order again when more is known, or when most entries have gone."""
        forecast = self._forecast
        if forecast is None or not self._patience:
            return
        if self._version == forecast.version and len(self._longest) < 2 * len(self._waiting) + 64:
            return
        self._version = forecast.version
        self._longest = [(-forecast.rank(s), s.arrival) for s in self._waiting.values()]
        heapify(self._longest)

    def _fits(self, sequence: Sequence) -> bool:
        return self._slots.num_free > 0 and self._blocks.num_free >= self._num_blocks(sequence)

    def _admit(self, sequence: Sequence) -> None:
        del self._waiting[sequence.arrival]
        self._num_waiting_tokens -= len(sequence.tokens)
        if self._patience:
            insort(self._ahead, sequence.arrival)
        if self._prefixes is not None:
            self._prefixes.admit(sequence)
        (sequence.slot,) = self._slots.allocate(1)
        sequence.blocks = self._blocks.allocate(self._num_blocks(sequence))
        self._running.append(sequence)

    def _num_blocks(self, sequence: Sequence) -> int:
        return -(-sequence.num_reserved // self._block_size) if self._uses_blocks else 0
