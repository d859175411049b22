"""Turns a scheduled step into tensors, runs the model and samples. Knows no queue.

A step has three phases. :meth:`ModelRunner.launch` gives the device the forward pass,
:meth:`ModelRunner.sample` what is drawn from its logits, and :meth:`ModelRunner.collect` waits for
the drawn tokens. The first two only put work in line, so between them the host may collect the
step before: what it sampled is read on the device, slot by slot, and need not be known here yet.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from batchrun.engine.constraints import BoundRow, Constraints
from batchrun.engine.graphs import IN_FLIGHT, CudaRecorder, DecodeGraphs, Recorder
from batchrun.engine.memory import BLOCK_SIZE, MemoryPlan
from batchrun.engine.sampler import Needs, Sampler, Sampling, stream_key
from batchrun.engine.scheduler import Chunk, Step
from batchrun.engine.sequence import Sequence
from batchrun.model.batch import Batch, DecodeBatch
from batchrun.model.hybrid import NemotronH
from batchrun.model.state import State
from batchrun.model.transfer import to_device


@dataclass(frozen=True, slots=True)
class NextToken:
    """A sampled token. It means nothing where ``is_finite`` is False (the logits held NaN or
    infinity) or ``is_stuck`` is True (the sequence's constraint lets no token follow)."""

    sequence: Sequence
    token_id: int
    logprob: float | None
    is_finite: bool
    is_stuck: bool = False


@dataclass(frozen=True, slots=True)
class Pass:
    """A forward pass: its logits [L, V], and the sequences that they are of."""

    logits: torch.Tensor
    sequences: list[Sequence]


@dataclass(frozen=True, slots=True)
class Drawn:
    """The tokens of a pass, on their way to the host. ``stuck`` are rows that may take none."""

    sequences: list[Sequence]
    sampling: Sampling
    stuck: frozenset[int]


class ModelRunner:
    """The model with its pools, and what each slot needs to be run and sampled."""

    def __init__(
        self,
        model: NemotronH,
        plan: MemoryPlan,
        *,
        dtype: torch.dtype,
        state_dtype: torch.dtype,
        device: torch.device,
        one_by_one: bool = False,
        constraints: Constraints | None = None,
    ) -> None:
        """``one_by_one`` gives each sequence a forward pass of its own."""
        self.model = model
        self.constraints = constraints
        """None for a checkpoint without a tokenizer, whose tokens have no text to bind."""
        self._device = device
        self._one_by_one = one_by_one
        self.state = State.allocate(
            model.config, plan.num_slots, plan.num_blocks, BLOCK_SIZE, dtype, state_dtype, device
        )
        self._sampler = Sampler(plan.max_sequences + 1, model.config.vocab_size, device)
        shape = (plan.max_sequences + 1, max(1, plan.blocks_per_sequence))
        self._tables = torch.zeros(shape, dtype=torch.int64, device=device)
        # [slots] the token that each slot's sequence was sampled last.
        self._last_tokens = torch.zeros(len(self._tables), dtype=torch.int64, device=device)
        self._uses_blocks = plan.blocks_per_sequence > 0
        self._graphs: DecodeGraphs | None = None
        # Whether the operators find pages by themselves, so that nothing is laid out for them.
        self._follows_tables = model.ops is not None and not model.ops.rectangles

    @torch.inference_mode()
    def warm_up(self, num_tokens: int) -> None:
        """On a GPU, have all kernels compiled and decode steps recorded; elsewhere do nothing.

        ``num_tokens`` is what a step takes at most. Only scratch slot and block are written to.
        """
        if self._device.type != "cuda":
            return
        for lens in ((num_tokens,), (max(1, num_tokens // 2), 1)):
            self._run_scratch(lens)
        if self.model.ops is not None and not self.model.ops.rectangles:
            self.record(CudaRecorder(self._device))
        torch.cuda.synchronize(self._device)

    @torch.inference_mode()
    def record(self, recorder: Recorder) -> None:
        """From now on, replay steps that only decode."""
        self._graphs = DecodeGraphs(
            self.model,
            self.state,
            self._tables,
            self._last_tokens,
            most=1 if self._one_by_one else len(self._tables) - 1,
            recorder=recorder,
        )

    def _run_scratch(self, lens: tuple[int, ...]) -> None:
        """A step of prompts that nobody asked for."""
        width = -(-max(lens) // BLOCK_SIZE)
        zeros = torch.zeros(sum(lens), dtype=torch.int64, device=self._device)
        batch = Batch(
            token_ids=zeros,
            num_decodes=0,
            prefill_lens=lens,
            slots=zeros[: len(lens)],
            context_lens=(0,) * len(lens),
            block_tables=zeros.new_zeros(len(lens), width),
            logit_rows=zeros[:1],
        )
        self.model(batch, self.state)

    @torch.inference_mode()
    def launch(self, step: Step) -> list[Pass]:
        """Run a step and advance its sequences.

        A decode whose last token is not known here yet takes the one that its slot was sampled
        last. Of the passes there is none without logits.
        """
        for sequence in step.admitted:
            self._admit(sequence)
        if not self._one_by_one:
            passes = [self._forward(step.decodes, step.prefills)]
        else:
            passes = [self._forward((sequence,), ()) for sequence in step.decodes]
            passes += [self._forward((), (chunk,)) for chunk in step.prefills]
        return [done for done in passes if done.sequences]

    @torch.inference_mode()
    def sample(self, passes: list[Pass]) -> list[Drawn]:
        """Draw a token for each sequence that still runs and is still where the pass left it."""
        return [drawn for done in passes if (drawn := self._sample(done)) is not None]

    @staticmethod
    def collect(drawn: list[Drawn]) -> list[NextToken]:
        """The tokens, once they are here."""
        return [token for one in drawn for token in _read(one)]

    def _forward(self, decodes: tuple[Sequence, ...], prefills: tuple[Chunk, ...]) -> Pass:
        num_decodes = len(decodes)
        token_ids = [s.tokens[-1] if s.num_pending else IN_FLIGHT for s in decodes]
        context_lens = [sequence.num_context for sequence in decodes]
        slots = [sequence.slot or 0 for sequence in decodes]
        if self._graphs is not None and not prefills:
            logits = self._graphs.run(token_ids, slots, context_lens)
            for sequence in decodes:
                sequence.num_context += 1
            # The next pass overwrites them; it comes before this one is sampled only here.
            return Pass(logits.clone() if self._one_by_one else logits, list(decodes))
        sampled = list(decodes)
        logit_rows = list(range(num_decodes))
        longest = 1 + max(context_lens, default=0)
        for chunk in prefills:
            sequence, start = chunk.sequence, chunk.sequence.num_context
            fed = sequence.tokens[start : start + chunk.num_tokens]
            if not sequence.is_in_prompt:
                # All of them now: what a chunk leaves of one token comes as a decode.
                self._sampler.observe(sequence.slot or 0, sequence.tokens[start:])
            token_ids += fed
            context_lens.append(start)
            slots.append(sequence.slot or 0)
            longest = max(longest, start + chunk.num_tokens)
            if chunk.is_final:
                sampled.append(sequence)
                logit_rows.append(len(token_ids) - 1)
        slot_ids = to_device(slots, self._device)  # [S]
        width = -(-longest // BLOCK_SIZE) if self._uses_blocks else 1
        tables = self._tables[slot_ids, :width]
        ids = to_device(token_ids, self._device)  # [T]
        if IN_FLIGHT in token_ids[:num_decodes]:
            known = ids[:num_decodes]
            last = self._last_tokens[slot_ids[:num_decodes]]
            ids[:num_decodes] = torch.where(known == IN_FLIGHT, last, known)
        batch: Batch | DecodeBatch
        if not prefills and self._follows_tables:
            # Most steps: there is next to nothing to lay out.
            contexts = to_device(context_lens, self._device)
            batch = DecodeBatch(ids, slot_ids, contexts, tables)
        else:
            batch = Batch(
                token_ids=ids,
                num_decodes=num_decodes,
                prefill_lens=tuple(chunk.num_tokens for chunk in prefills),
                slots=slot_ids,
                context_lens=tuple(context_lens),
                block_tables=tables,
                logit_rows=to_device(logit_rows, self._device),
            )
        logits = self.model(batch, self.state)  # [L, V]
        for sequence in decodes:
            sequence.num_context += 1
        for chunk in prefills:
            chunk.sequence.num_context += chunk.num_tokens
            self._keep(chunk.sequence)
        return Pass(logits, sampled)

    def _sample(self, done: Pass) -> Drawn | None:
        rows = []
        for row, sequence in enumerate(done.sequences):
            if sequence.slot is None:
                continue  # it has ended since
            if sequence.num_pending:
                # Its reasoning was closed since. What that takes it has not read yet, but it counts
                # from now on: one token alone would come as a decode.
                self._sampler.observe(sequence.slot, sequence.tokens[sequence.num_context :])
                continue
            rows.append(row)
        if not rows:
            return None
        sequences, logits = done.sequences, done.logits
        if len(rows) != len(sequences):
            sequences = [sequences[row] for row in rows]
            logits = logits[to_device(rows, self._device)]
        params = [sequence.request.params for sequence in sequences]
        counts = [sequence.transcript.num_sampled for sequence in sequences]
        allowed, stuck = self._allowed(sequences)
        needs = Needs(
            drawing=[row for row, p in enumerate(params) if not p.greedy],
            filtering=any(p.filtered and not p.greedy for p in params),
            penalty=any(p.repetition_penalty != 1.0 for p in params),
            logprobs=any(p.logprobs is not None for p in params),
            banned=tuple(
                (row, sorted(sequence.transcript.stop_ids))
                for row, (sequence, p, count) in enumerate(
                    zip(sequences, params, counts, strict=True)
                )
                if count < p.min_tokens and sequence.transcript.stop_ids and not p.bound_to
            ),
            allowed=allowed,
        )
        slots = to_device([sequence.slot or 0 for sequence in sequences], self._device)
        sampling = self._sampler.sample(logits, slots, to_device(counts, self._device), needs)
        self._last_tokens[slots] = sampling.ids
        return Drawn(sequences, sampling, stuck)

    def _allowed(
        self, sequences: list[Sequence]
    ) -> tuple[tuple[torch.Tensor, torch.Tensor] | None, frozenset[int]]:
        """What the rows with a constraint may take (``Needs.allowed``), and for which that is
        nothing. On a GPU this is worked out while the model runs."""
        bound: list[int] = []
        rows: list[BoundRow] = []
        for row, sequence in enumerate(sequences):
            transcript = sequence.transcript
            if transcript.constraint is not None:
                bound.append(row)
                rows.append(
                    BoundRow(transcript.constraint, transcript.begun_close, transcript.may_stop)
                )
        if not rows or self.constraints is None:
            return None, frozenset()
        masks, empty = self.constraints.masks(rows, self._device)
        return (
            (to_device(bound, self._device), masks),
            frozenset(bound[place] for place in empty),
        )

    def _admit(self, sequence: Sequence) -> None:
        """Set up the sequence's slot; whatever the last one left there is overwritten, or is not
        read because the sequence starts from nothing."""
        slot = sequence.slot or 0
        request = sequence.request
        self._tables[slot] = 0
        if sequence.blocks:
            self._tables[slot, : len(sequence.blocks)] = to_device(sequence.blocks, self._device)
        self._sampler.admit(
            slot, request.params, stream_key(request.seed, request.sample), sequence.tokens
        )
        source = sequence.source
        if source is not None:
            blocks = sequence.blocks[: len(source.blocks)]
            self.state.copy(source.slot, source.blocks, slot, blocks)

    def _keep(self, sequence: Sequence) -> None:
        """Copy out the sequence's state if this is where its snapshot was to be made."""
        snapshot = sequence.snapshot
        if snapshot is not None and sequence.num_context == snapshot.num_tokens:
            blocks = sequence.blocks[: len(snapshot.blocks)]
            self.state.copy(sequence.slot or 0, blocks, snapshot.slot, snapshot.blocks)
            snapshot.is_ready = True
            sequence.snapshot = None


def _read(drawn: Drawn) -> list[NextToken]:
    result = drawn.sampling.wait()
    sequences = drawn.sequences
    logprobs = result.logprobs or [0.0] * len(sequences)
    rows = zip(sequences, result.token_ids, logprobs, result.finite, strict=True)
    return [
        NextToken(
            sequence,
            token_id,
            logprob if sequence.request.params.logprobs is not None else None,
            is_finite,
            row in drawn.stuck,
        )
        for row, (sequence, token_id, logprob, is_finite) in enumerate(rows)
    ]
