"""How long a run will take: prompts and outputs against what a device can do. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from batchrun.engine.accelerators import Accelerator
from batchrun.engine.roofline import Bound, decode_work, prefill_seconds
from batchrun.model.config import ModelConfig
from batchrun.model.sizes import Precision
from batchrun.planner.outputs import Range

_MIN_LEASE_ROWS = 16  # as of the coordinator's crew


@dataclass(frozen=True, slots=True)
class Workload:
    """What is to be done.

    ``rows`` have a prompt each, of ``mean_prompt`` tokens; ``prompt_lengths`` are those of equal
    parts of them, the first ``prefix_tokens`` of every prompt are computed once. Each row has
    ``samples``, which generate ``output`` tokens on average and ``longest`` at most. ``shards``
    keep one worker each busy, a big one more.
    """

    rows: float
    samples: int
    mean_prompt: float
    prompt_lengths: tuple[int, ...]
    prefix_tokens: int
    output: Range
    longest: float
    shards: float


@dataclass(frozen=True, slots=True)
class Machine:
    """One worker: how many sequences it runs at once, the rates that its bounds are made of, which
    part of the bounds it reaches, and the seconds until it begins."""

    max_sequences: int
    decode_device: Accelerator
    prefill_device: Accelerator
    decode_share: Range
    prefill_share: Range
    startup: Range


@dataclass(frozen=True, slots=True)
class Speed:
    """Tokens a second of one full worker: at most (``bound``, for which it waits for
    ``bound_by``), and as it is expected to be."""

    bound: float
    bound_by: str
    rate: Range


@dataclass(frozen=True, slots=True)
class Duration:
    """A run with ``workers``, of which ``busy`` have something to do. ``seconds`` from its start to
    its end, ``worker_hours`` of all workers together."""

    workers: int
    busy: int
    seconds: Range
    worker_hours: Range


@dataclass(frozen=True, slots=True)
class Prediction:
    """Speeds of one worker, and how long the run takes with some numbers of them. ``sequences``
    run at once in a full worker, with ``context`` tokens each on average; ``step_seconds`` is the
    least time in which each of them gets a token. ``prompt_tokens`` are computed."""

    sequences: int
    context: float
    step_seconds: float
    prompt_tokens: float
    decode: Speed
    prefill: Speed
    durations: tuple[Duration, ...]


def predict(
    config: ModelConfig,
    precision: Precision,
    machine: Machine,
    work: Workload,
    workers: Sequence[int],
    num_cpus: int | None = None,
) -> Prediction:
    """Predict the run of ``work`` with each number of ``workers``.

    Prefill and decode take turns on a device. A worker's sequences decode together, each step a
    token of each; the run is not over before its longest sequence. Low times are those of few
    output tokens on a fast engine. ``num_cpus`` is set where workers share one machine's CPUs:
    more workers than that take longer for each.
    """
    sequences = max(1, machine.max_sequences)
    lengths = work.prompt_lengths or (1,)
    context = work.mean_prompt + work.output.expected / 2
    step = decode_work(config, precision, sequences, context)
    step_seconds = step.seconds(machine.decode_device)
    prefix = min(work.prefix_tokens, *lengths)
    per_row = max(1.0, work.mean_prompt - prefix)
    parts = [max(1, length - prefix) for length in lengths]
    # What attention takes grows faster than a prompt, so it is of the parts, not of the mean.
    row_seconds = sum(
        prefill_seconds(config, precision, machine.prefill_device, part) for part in parts
    ) * (per_row / sum(parts))
    prompt_tokens = work.rows * per_row + (prefix if work.rows else 0)
    bound = sequences / step_seconds
    prefill_bound = per_row / row_seconds

    def duration(count: int) -> Duration:
        if not work.rows:
            return Duration(count, 0, Range(0.0, 0.0, 0.0), Range(0.0, 0.0, 0.0))
        # A big shard is leased in ranges, of no fewer rows than an engine runs at once.
        leases = max(int(work.shards), int(work.rows / max(_MIN_LEASE_ROWS, sequences)))
        busy = max(1, min(count, leases))
        crowd = 1.0 if num_cpus is None else max(1.0, busy / num_cpus)

        def seconds(output: float, longest: float, decode: float, prefill: float) -> float:
            samples = work.rows * work.samples / busy
            steps = max(samples * output / min(sequences, max(1.0, samples)), longest)
            batch = max(1.0, samples * output / steps) if steps else 1.0
            step = decode_work(config, precision, round(batch), work.mean_prompt + output / 2)
            decoding = steps * step.seconds(machine.decode_device) / decode
            reading = work.rows / busy * row_seconds / prefill
            return crowd * (decoding + reading)

        out, fast, read = work.output, machine.decode_share, machine.prefill_share
        longest = min(work.longest, 2 * out.expected)
        total = Range(
            seconds(out.low, out.low, fast.high, read.high),
            seconds(out.expected, longest, fast.expected, read.expected),
            seconds(out.high, work.longest, fast.low, read.low),
        ).plus(machine.startup)
        return Duration(count, busy, total, total.times(count / 3600))

    return Prediction(
        sequences=sequences,
        context=context,
        step_seconds=step_seconds,
        prompt_tokens=prompt_tokens,
        decode=Speed(
            bound, step.bound(machine.decode_device).value, machine.decode_share.times(bound)
        ),
        prefill=Speed(
            prefill_bound, Bound.ARITHMETIC.value, machine.prefill_share.times(prefill_bound)
        ),
        durations=tuple(duration(count) for count in workers),
    )


def worker_counts(most: int) -> tuple[int, ...]:
    """1, 2, 4 and so on, and ``most``."""
    counts = []
    count = 1
    while count < most:
        counts.append(count)
        count *= 2
    return (*counts, most)
