"""The engine: requests in, outputs out, one step at a time."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from batchrun.engine.admission import Admission
from batchrun.engine.blocks import Pool
from batchrun.engine.chat import ChatTemplate
from batchrun.engine.constraints import Constraints
from batchrun.engine.forecast import Forecast
from batchrun.engine.memory import BLOCK_SIZE, MemoryPlan, plan_memory
from batchrun.engine.model_runner import Drawn, ModelRunner
from batchrun.engine.options import EngineOptions
from batchrun.engine.params import SamplingParams
from batchrun.engine.prefix import PrefixStates
from batchrun.engine.rates import find_device
from batchrun.engine.request import Output, Request, Timings
from batchrun.engine.roofline import StepBound
from batchrun.engine.scheduler import Scheduler, Step
from batchrun.engine.sequence import Sequence
from batchrun.engine.thinking import ForcedClose
from batchrun.engine.threads import torch_threads
from batchrun.engine.tokenizer import Tokenizer, load_stop_ids
from batchrun.engine.transcript import Transcript
from batchrun.errors import RequestError
from batchrun.model.config import ModelConfig, load_config
from batchrun.model.hybrid import NemotronH
from batchrun.model.weights import load_model, random_model
from batchrun.records import ErrorKind, FinishReason, Generated, RowError

_log = logging.getLogger(__name__)

_SMALL_BYTES = 64 << 20
"""Weights of a model that one thread runs best."""
_PATIENCE = 4
"""How often the whole engine may be filled with later requests before an earlier one."""


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Facts for metrics. Slots and blocks now, without those of snapshots; the others since the
    engine was loaded. ``prompt_tokens`` were computed, ``prefix_tokens`` are the other tokens of
    prompts: they came with the state that another prompt with the same beginning had left, or
    belong to an output that was all there already. ``least_seconds`` is how long the steps would
    have taken at the device's bound, None where that is not known."""

    slots_used: int
    slots_total: int
    blocks_used: int
    blocks_total: int
    num_waiting: int
    num_running: int
    steps: int
    step_seconds: float
    last_step_seconds: float
    prompt_tokens: int
    prefix_tokens: int
    sampled_tokens: int
    forced_tokens: int
    least_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a prompt is, summed over its samples: tokens sampled, and of how many at most."""

    num_sampled: int
    max_tokens: int


@dataclass(frozen=True, slots=True)
class RunningSample:
    """A sample that has its slot: how many tokens are sampled, and how many of them were not here
    but came with its request."""

    key: Hashable
    sample: int
    num_sampled: int
    num_replayed: int
    _transcript: Transcript

    def after(self, start: int) -> Generated:
        """What was sampled, from its first token (for ``start`` 0) or a later one on; to be asked
        for before the next step."""
        return self._transcript.sampled(start)


@dataclass(frozen=True, slots=True)
class _InFlight:
    """A step whose tokens are not taken in yet: when it began (monotonic), and how long it takes
    at the device's bound."""

    drawn: list[Drawn]
    started: float
    least_seconds: float


class Engine:
    """Generates for many requests at once; sequences join and leave at any step.

    :meth:`load` it, :meth:`add` requests, call :meth:`step` until :attr:`num_unfinished` is 0.
    """

    def __init__(
        self,
        runner: ModelRunner,
        plan: MemoryPlan,
        options: EngineOptions,
        *,
        config: ModelConfig,
        tokenizer: Tokenizer | None,
        chat: ChatTemplate | None,
        stop_ids: frozenset[int],
        load_seconds: float = 0.0,
        num_threads: int | None = None,
        compile_seconds: float = 0.0,
        bound: StepBound | None = None,
    ) -> None:
        """``num_threads`` are torch's while a step runs; None leaves them as they are. ``bound``
        is that of the device, where it is known."""
        self.config = config
        self.tokenizer = tokenizer
        """None for a checkpoint without tokenizer.json: drive it with token ids."""
        self.chat = chat
        """None for a checkpoint without a chat template."""
        self.memory = plan
        self.load_seconds = load_seconds
        """What loading took, all of it."""
        self.compile_seconds = compile_seconds
        """The part of it in which operators were compiled and steps recorded."""
        self.max_model_len = plan.max_model_len
        self.max_sequences = plan.max_sequences
        self.deterministic = options.deterministic
        self.runner = runner
        self.num_threads = num_threads
        """Torch's while a step runs; None for as many as it has."""
        self.options = options
        self._overlaps = options.overlaps
        self._admission = Admission(
            config,
            tokenizer,
            runner.constraints,
            stop_ids=stop_ids,
            max_model_len=plan.max_model_len,
            replays_at_once=not options.deterministic,
        )
        end_slot = plan.num_slots - plan.num_snapshots
        end_block = plan.num_blocks - plan.num_snapshot_blocks
        uses_blocks = plan.blocks_per_sequence > 0
        self._slots = Pool("slot", end_slot)
        self._blocks = Pool("block", end_block)
        prefixes = None
        if plan.num_snapshots:
            prefixes = PrefixStates(
                Pool("snapshot slot", plan.num_slots, end_slot),
                Pool("snapshot block", plan.num_blocks, end_block),
                block_size=BLOCK_SIZE,
                uses_blocks=uses_blocks,
            )
        self._forecast = Forecast(options.max_batch_tokens)
        self._scheduler = Scheduler(
            self._slots,
            self._blocks,
            block_size=BLOCK_SIZE,
            uses_blocks=uses_blocks,
            max_batch_tokens=options.max_batch_tokens,
            deterministic=options.deterministic,
            forecast=self._forecast,
            # One sequence after the other takes as long in any order.
            patience=0 if options.deterministic else _PATIENCE * plan.max_sequences,
            prefixes=prefixes,
        )
        self.on_admit: Callable[[Iterable[Hashable]], None] | None = None
        """Called with the keys of sequences that got their slot, before the model sees them."""
        self._sequences: dict[Hashable, dict[int, Sequence]] = {}
        self._ready: list[Output] = []
        self._in_flight: _InFlight | None = None
        self._taken_in_at = 0.0
        self._steps = 0
        self._step_seconds = 0.0
        self._last_step_seconds = 0.0
        self._prompt_tokens = 0
        self._prefix_tokens = 0
        self._sampled_tokens = 0
        self._forced_tokens = 0
        self._bound = bound
        self._least_seconds = 0.0

    @classmethod
    def load(cls, folder: Path, options: EngineOptions | None = None) -> Engine:
        """Load a checkpoint folder.

        :raises CheckpointError: the checkpoint cannot be used, or does not fit into memory.
        :raises RequestError: the device asked for is not there.
        """
        started = time.monotonic()
        options = options or EngineOptions()
        config = load_config(folder)
        options = options.resolved(config)
        device, dtype = options.torch_device, options.torch_dtype
        if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
            raise RequestError(
                f"device {options.device!r}: torch finds {torch.cuda.device_count()} GPUs here"
            )
        weight_bytes = options.precision.weight_bytes(config)
        is_small = device.type == "cpu" and weight_bytes < _SMALL_BYTES
        # A sum shared by threads depends on how many there are, and threads that wait for one
        # another after every small product cost several times what they bring.
        num_threads = 1 if options.deterministic or is_small else options.num_threads
        tokenizer = Tokenizer.load(folder) if (folder / "tokenizer.json").is_file() else None
        chat = None
        if tokenizer is not None and ChatTemplate.exists(folder):
            chat = ChatTemplate.load(folder, tokenizer)
        close = None if tokenizer is None else ForcedClose(tokenizer.encode_plain)
        plan = plan_memory(
            config,
            options.memory_request(num_forced=0 if close is None else close.max_tokens),
        )
        for note in plan.notes:
            _log.warning("%s", note)
        quantization = options.precision.quantization
        model: NemotronH
        if options.random_weights:
            model = random_model(config, dtype, device, quantization)
        else:
            model = load_model(folder, config, dtype, device, quantization)
        compile_started = time.monotonic()
        model.prepare(deterministic=options.deterministic)
        compile_seconds = time.monotonic() - compile_started
        runner = ModelRunner(
            model,
            plan,
            dtype=dtype,
            state_dtype=options.torch_state_dtype,
            device=device,
            one_by_one=options.deterministic,
            constraints=None
            if tokenizer is None
            else Constraints(
                tokenizer, config.vocab_size, num_threads=num_threads or torch.get_num_threads()
            ),
        )
        compile_started = time.monotonic()
        runner.warm_up(options.max_batch_tokens)
        compile_seconds += time.monotonic() - compile_started
        return cls(
            runner,
            plan,
            options,
            config=config,
            tokenizer=tokenizer,
            chat=chat,
            stop_ids=load_stop_ids(folder),
            load_seconds=time.monotonic() - started,
            num_threads=num_threads,
            compile_seconds=compile_seconds,
            bound=None if is_small else _find_bound(config, options, num_threads),
        )

    @property
    def num_waiting(self) -> int:
        """Requests that have no slot yet."""
        return self._scheduler.num_waiting

    @property
    def num_waiting_tokens(self) -> int:
        """Tokens of the requests that have no slot yet, as they lie in memory."""
        return self._scheduler.num_waiting_tokens

    @property
    def num_running(self) -> int:
        """Requests that have a slot."""
        return self._scheduler.num_running

    @property
    def num_unfinished(self) -> int:
        """Requests whose output is still to come."""
        return self.num_waiting + self.num_running + len(self._ready)

    def admission_error(
        self, num_prompt_tokens: int, params: SamplingParams, *, thinking: bool = False
    ) -> RowError | None:
        """Why a prompt of so many tokens can never run, or None."""
        return self._admission.error(num_prompt_tokens, params, thinking)

    def add(self, request: Request) -> None:
        """Queue a request. One that can never run comes out of the next step with its error, one
        whose output is all in what it brings (:attr:`Request.generated`) with that.

        :raises ValueError: (key, sample) is in the engine already.
        """
        if request.sample in self._sequences.get(request.key, {}):
            raise ValueError(f"request {request.key!r}, sample {request.sample} is there already")
        sequence = self._admission.sequence(request, time.monotonic())
        if isinstance(sequence, RowError):
            self._ready.append(_error_output(request, sequence))
            return
        if sequence.transcript.finish_reason is not None:
            output, num_prompt = _output(sequence, sequence.added_at), len(request.prompt_token_ids)
            self._ready.append(replace(output, prefix_tokens=num_prompt))
            self._prefix_tokens += num_prompt
            return
        self._sequences.setdefault(request.key, {})[request.sample] = sequence
        self._scheduler.add(sequence)

    def abort(self, key: Hashable) -> int:
        """Drop all samples of a key; they give no output.

        :returns: how many tokens that were sampled here are lost with them.
        """
        self._ready = [output for output in self._ready if output.key != key]
        dropped = set(self._sequences.pop(key, {}).values())
        if dropped:
            self._scheduler.abort(dropped)
        if not self.num_running:
            self._in_flight = None
        return sum(s.transcript.num_sampled - s.num_replayed for s in dropped)

    def progress(self, key: Hashable) -> Progress | None:
        """How far the unfinished samples of a key are; None when there are none."""
        sequences = self._sequences.get(key, {}).values()
        if not sequences:
            return None
        return Progress(
            sum(s.transcript.num_sampled for s in sequences),
            sum(s.transcript.max_tokens for s in sequences),
        )

    def is_running(self, key: Hashable) -> bool:
        """Whether a sample of a key has its slot."""
        return any(s.slot is not None for s in self._sequences.get(key, {}).values())

    def running(self) -> Iterator[RunningSample]:
        """The samples that have a slot, and what is sampled of them."""
        for sequence in self._scheduler.running:
            request, transcript = sequence.request, sequence.transcript
            yield RunningSample(
                request.key,
                request.sample,
                transcript.num_sampled,
                sequence.num_replayed,
                transcript,
            )

    def forget_prefixes(self) -> None:
        """Drop the states of shared beginnings, those being made too. What runs goes on."""
        self._scheduler.forget_prefixes()

    def step(self) -> list[Output]:
        """Schedule, run, sample, take in what was sampled; the outputs of the sequences that ended.

        Where steps overlap, what a step samples is taken in by the next call, after that one has
        given the device its own forward pass; so the device has work while the host waits for the
        tokens, takes them in and schedules. The pass reads them on the device. What it could not
        know is made good before anything is sampled from it: a sequence that turned out to have
        ended has run for nothing, and one whose reasoning was closed by force has read the token
        before the close, as it had to. Neither is sampled. A last token that is one by count is
        never run. Slots and blocks are free as soon as a sequence has ended, though a pass may
        still be writing there: the device does what it is given in order, and whoever gets them
        writes later.
        """
        outputs, self._ready = self._ready, []
        started = time.monotonic()
        step = self._schedule(started)
        num_running = self.num_running
        least_seconds = 0.0 if self._bound is None else _least_seconds(step, self._bound)
        try:
            with torch_threads(self.num_threads):
                passes = self.runner.launch(step) if step else []
                outputs += self.take_in()
                if step:
                    self._in_flight = _InFlight(self.runner.sample(passes), started, least_seconds)
                if not self._overlaps or not self.num_running:  # nobody may come for it
                    outputs += self.take_in()
        except torch.OutOfMemoryError as full:
            outputs += self.take_in()  # what was sampled before is sound
            outputs += self._shed(full, num_running)
        return outputs

    def take_in(self) -> list[Output]:
        """Wait for what the step in flight sampled, if there is one, and give each sequence its
        token; the outputs of those that ended.

        Each step does it. It is asked for where no step follows, so that no token is lost."""
        in_flight, self._in_flight = self._in_flight, None
        if in_flight is None:
            return []
        next_tokens = self.runner.collect(in_flight.drawn)
        now = time.monotonic()
        outputs: list[Output] = []
        ended: set[Sequence] = set()
        num_sampled = 0
        for token in next_tokens:
            sequence = token.sequence
            if sequence.slot is None:
                continue  # aborted since
            if sequence.first_token_at is None:
                sequence.first_token_at = now
            if not token.is_finite:
                ended.add(sequence)
                # Whether its state was broken already when it was copied nobody knows.
                self.forget_prefixes()
                error = RowError(ErrorKind.ENGINE, "the model's logits are not finite numbers")
                outputs.append(_error_output(sequence.request, error))
                continue
            known = sequence.next_known()
            if known is not None:
                sequence.append(*known)
                sequence.num_replayed += 1
            elif token.is_stuck:
                sequence.transcript.end()
            else:
                sequence.append(token.token_id, token.logprob)
                num_sampled += 1
            if sequence.transcript.error is not None:
                ended.add(sequence)
                error = RowError(ErrorKind.ENGINE, f"response_format: {sequence.transcript.error}")
                outputs.append(_error_output(sequence.request, error))
            elif sequence.transcript.finish_reason is not None:
                ended.add(sequence)
                self._forecast.observe(sequence)
                outputs.append(_output(sequence, now))
        self._sampled_tokens += num_sampled
        if ended:
            self._finish(ended)
        self._steps += 1
        # The time before the last step was taken in is that step's.
        self._last_step_seconds = now - max(in_flight.started, self._taken_in_at)
        self._taken_in_at = now
        self._step_seconds += self._last_step_seconds
        self._least_seconds += in_flight.least_seconds
        return outputs

    def stats(self) -> EngineStats:
        """Facts for metrics."""
        return EngineStats(
            slots_used=self._slots.num_used,
            slots_total=self._slots.num_total,
            blocks_used=self._blocks.num_used,
            blocks_total=self._blocks.num_total,
            num_waiting=self.num_waiting,
            num_running=self.num_running,
            steps=self._steps,
            step_seconds=self._step_seconds,
            last_step_seconds=self._last_step_seconds,
            prompt_tokens=self._prompt_tokens,
            prefix_tokens=self._prefix_tokens,
            sampled_tokens=self._sampled_tokens,
            forced_tokens=self._forced_tokens,
            least_seconds=None if self._bound is None else self._least_seconds,
        )

    def check_integrity(self) -> None:
        """Check that slots and blocks are held by exactly the running sequences.

        :raises RuntimeError: they are not.
        """
        self._scheduler.check_integrity()

    def _schedule(self, now: float) -> Step:
        step = self._scheduler.schedule()
        for sequence in step.admitted:
            sequence.admitted_at = now
            self._prompt_tokens += len(sequence.request.prompt_token_ids) - sequence.num_cached
            self._prefix_tokens += sequence.num_cached
        if step.admitted and self.on_admit is not None:
            self.on_admit([sequence.request.key for sequence in step.admitted])
        return step

    def _shed(self, error: torch.OutOfMemoryError, num_running: int) -> list[Output]:
        """The device has no memory for a step of so many: run half as many from now on.

        What the step left in the states is neither before nor after it, so all that ran begin
        again, with the tokens that they have. One that ran alone is given up.
        """
        running = self._scheduler.running
        self._scheduler.forget_prefixes()
        self._scheduler.finish(running)
        self._scheduler.limit(max(1, num_running // 2))
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        _log.warning(
            "out of memory in a step of %d sequences; at most %d from now on",
            num_running,
            max(1, num_running // 2),
        )
        outputs = []
        for sequence in running:
            self._forget(sequence.request)
            if num_running == 1:
                text = " ".join(str(error).split())[:200]
                reason = RowError(ErrorKind.ENGINE, f"out of memory with this row alone: {text}")
                outputs.append(_error_output(sequence.request, reason))
            else:
                self.add(replace(sequence.request, generated=sequence.known))
        return outputs

    def _finish(self, ended: set[Sequence]) -> None:
        self._scheduler.finish(ended)
        for sequence in ended:
            request = sequence.request
            self._forced_tokens += sequence.transcript.num_forced
            self._forget(request)

    def _forget(self, request: Request) -> None:
        samples = self._sequences[request.key]
        del samples[request.sample]
        if not samples:
            del self._sequences[request.key]


def _output(sequence: Sequence, now: float) -> Output:
    request, transcript = sequence.request, sequence.transcript
    assert transcript.finish_reason is not None
    with_logprobs = request.params.logprobs is not None
    return Output(
        key=request.key,
        sample=request.sample,
        text=transcript.text(),
        reasoning=transcript.reasoning(),
        token_ids=tuple(transcript.token_ids),
        finish_reason=transcript.finish_reason,
        num_reasoning_tokens=transcript.num_reasoning_tokens,
        num_completion_tokens=transcript.num_completion_tokens,
        thinking_budget_hit=transcript.budget_hit,
        logprobs=tuple(transcript.logprobs) if with_logprobs else None,
        prompt_tokens=len(request.prompt_token_ids),
        prefix_tokens=sequence.num_cached,
        timings=Timings(
            queued_s=(sequence.admitted_at or now) - sequence.added_at,
            first_token_s=(sequence.first_token_at or now) - sequence.added_at,
            total_s=now - sequence.added_at,
        ),
    )


def _error_output(request: Request, error: RowError) -> Output:
    return Output(
        key=request.key,
        sample=request.sample,
        text="",
        reasoning=None,
        token_ids=(),
        finish_reason=FinishReason.ERROR,
        prompt_tokens=len(request.prompt_token_ids),
        error=error,
    )


def _find_bound(
    config: ModelConfig, options: EngineOptions, num_threads: int | None
) -> StepBound | None:
    with torch_threads(num_threads):
        device = find_device(options.torch_device, options.torch_dtype)
    return None if device is None else StepBound(config, options.precision, device)


def _least_seconds(step: Step, bound: StepBound) -> float:
    return bound.seconds(
        decodes=len(step.decodes),
        chunks=len(step.prefills),
        prompt_tokens=sum(chunk.num_tokens for chunk in step.prefills),
        seen_tokens=sum(sequence.num_context for sequence in step.decodes),
    )
