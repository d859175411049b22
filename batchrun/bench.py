"""The engine against what this device allows: prefill and decode at several batch sizes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from random import Random

from batchrun import __version__
from batchrun.engine.accelerators import Accelerator
from batchrun.engine.cpu_load import CpuLoad
from batchrun.engine.engine import Engine
from batchrun.engine.forward_clock import ForwardClock
from batchrun.engine.machine import describe_device
from batchrun.engine.options import EngineOptions
from batchrun.engine.params import SamplingParams
from batchrun.engine.rates import DeviceRates, measure_rates
from batchrun.engine.request import Request
from batchrun.engine.roofline import Work, decode_work, prefill_work
from batchrun.engine.threads import torch_threads
from batchrun.errors import RequestError
from batchrun.model.config import ModelConfig
from batchrun.model.sizes import Precision, count_weights

FORMAT = "batchrun-bench"
FORMAT_VERSION = 1
_WARM_STEPS = 2


@dataclass(frozen=True, slots=True)
class Workload:
    """What is measured: ``batches`` of sequences at once, each with a prompt of ``prompt_tokens``
    random ids and ``decode_steps`` tokens after it.

    :raises RequestError: a number is not positive, or there is no batch.
    """

    batches: tuple[int, ...] = (1, 8, 64)
    prompt_tokens: int = 128
    decode_steps: int = 32

    def __post_init__(self) -> None:
        if not self.batches or min(*self.batches, self.prompt_tokens, self.decode_steps) < 1:
            raise RequestError("batch sizes, prompt tokens and decode steps must be at least 1")


@dataclass(frozen=True, slots=True)
class Measurement:
    """One batch size. Rates in tokens a second: ``prefill_rate`` of prompts, ``decode_rate`` of
    outputs, from the median of the steps; the ``*_bound`` are what the measured rates of the device
    allow, at a context of ``context_tokens``, and ``decode_bound_by`` says which of them.
    ``overhead`` is the share of a decode step that is not the model's forward pass (scheduling,
    sampling, the state of reasoning and text); None where passes cannot be told apart.
    ``foreign_load`` is how many CPU cores others kept busy meanwhile; None where that is unknown.
    """

    batch: int
    prefill_rate: float
    prefill_bound: float
    decode_rate: float
    decode_bound: float
    decode_bound_by: str
    context_tokens: float
    step_seconds: float
    overhead: float | None
    foreign_load: float | None

    @property
    def prefill_ratio(self) -> float:
        """Of the bound; above 1 where the measured rates of the device were too low."""
        return self.prefill_rate / self.prefill_bound

    @property
    def decode_ratio(self) -> float:
        """Of the bound; above 1 where the measured rates of the device were too low."""
        return self.decode_rate / self.decode_bound


@dataclass(frozen=True, slots=True)
class Report:
    """All that was measured, with its conditions. ``skipped`` batch sizes do not fit in memory."""

    accelerator: str
    device: str
    memory_bytes: int
    torch_version: str
    num_threads: int
    model: str
    has_random_weights: bool
    config: ModelConfig
    num_weights: int
    dtype: str
    state_dtype: str
    quantization: str
    workload: Workload
    rates: DeviceRates
    measurements: tuple[Measurement, ...]
    skipped: tuple[int, ...]

    def document(self) -> dict[str, object]:
        """The report as JSON values: a *bench file*. Its fields are described in README.md."""
        rates = {
            "copy_bytes_per_second": self.rates.copy_bandwidth,
            "matmul_flops": {str(rows): rate for rows, rate in self.rates.matmul_flops.items()},
        }
        return {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "batchrun": __version__,
            "accelerator": self.accelerator,
            "device": self.device,
            "memory_bytes": self.memory_bytes,
            "torch": self.torch_version,
            "threads": self.num_threads,
            "model": {
                "path": self.model,
                "random_weights": self.has_random_weights,
                "weights": self.num_weights,
                "config": asdict(self.config),
            },
            "dtype": self.dtype,
            "state_dtype": self.state_dtype,
            "quantization": self.quantization,
            "rates": rates,
            "prompt_tokens": self.workload.prompt_tokens,
            "decode_steps": self.workload.decode_steps,
            "batches": [_entry(one) for one in self.measurements],
            "skipped_batches": list(self.skipped),
        }


def run_bench(
    folder: Path,
    options: EngineOptions,
    workload: Workload,
    *,
    name: str = "",
    progress: Callable[[str], None] = lambda _text: None,
    rate_seconds: float = 0.5,
) -> Report:
    """Load an engine, and measure the device and the engine in turn at every batch size.

    With the checkpoint's weights, or random ones of its config (``options.random_weights``).
    ``progress`` is told what is done, ``rate_seconds`` is how long each rate of the device is
    measured; before and after the engine, so that the bounds are of the same moment.

    :raises CheckpointError: the checkpoint cannot be used, or does not fit into memory.
    :raises RequestError: the device is not there, or sequences of this length do not fit.
    """
    budget, runs = options.max_batch_tokens, tuple(dict.fromkeys(workload.batches))
    num_prompt_steps = -(-max(runs) * workload.prompt_tokens // budget)
    num_tokens = workload.prompt_tokens + num_prompt_steps + _WARM_STEPS + workload.decode_steps + 1
    options = replace(
        options, max_sequences=max(runs), sequence_tokens=num_tokens, prefix_states=False
    )
    engine = Engine.load(folder, options)
    if num_tokens > engine.max_model_len:
        raise RequestError(
            f"{workload.prompt_tokens} prompt tokens and {workload.decode_steps} steps are more "
            f"than the {engine.max_model_len} tokens of a sequence",
            "measure with shorter prompts or fewer steps",
        )
    progress("loaded")
    options = engine.options
    with torch_threads(engine.num_threads):
        machine = describe_device(options.torch_device)
        fitting = [batch for batch in runs if batch <= engine.max_sequences]
        rates = DeviceRates(0.0, {})
        timings = []
        for batch in fitting:
            rows = min(budget, batch * workload.prompt_tokens)
            load = CpuLoad()
            for is_after in (False, True):
                if is_after:
                    timings.append(_time(engine, workload, batch, rows, load))
                measured = measure_rates(
                    engine.config,
                    options.torch_dtype,
                    options.torch_device,
                    sorted({batch, rows}),
                    seconds=rate_seconds,
                )
                rates = rates.fastest(measured)
            progress(f"measured batch {batch}")
    return Report(
        accelerator=machine.name,
        device=options.torch_device.type,
        memory_bytes=machine.memory_bytes,
        torch_version=machine.torch_version,
        num_threads=machine.num_threads,
        model=name or str(folder),
        has_random_weights=options.random_weights,
        config=engine.config,
        num_weights=count_weights(engine.config).total,
        dtype=str(options.torch_dtype).removeprefix("torch."),
        state_dtype=str(options.torch_state_dtype).removeprefix("torch."),
        quantization=options.quantization,
        workload=workload,
        rates=rates,
        measurements=tuple(
            _against_bounds(timing, engine.config, options.precision, workload, rates)
            for timing in timings
        ),
        skipped=tuple(batch for batch in runs if batch not in fitting),
    )


@dataclass(frozen=True, slots=True)
class _Timing:
    """Of a batch: seconds of all prompts, in passes of ``rows`` tokens, and of a decode step."""

    batch: int
    rows: int
    prefill_seconds: float
    step_seconds: float
    overhead: float | None
    foreign_load: float | None


def _time(engine: Engine, workload: Workload, batch: int, rows: int, load: CpuLoad) -> _Timing:
    prompts = _prompts(engine.config, batch, workload.prompt_tokens)
    _prefill(engine, prompts)  # warm-up
    prefill_seconds = min(_prefill(engine, prompts) for _ in range(2))
    num_prompt_steps = -(-batch * workload.prompt_tokens // rows)
    steps, overhead = _decode(engine, prompts, workload.decode_steps, num_prompt_steps)
    return _Timing(
        batch, rows, prefill_seconds, statistics.median(steps), overhead, load.foreign_cores()
    )


def _against_bounds(
    timing: _Timing,
    config: ModelConfig,
    precision: Precision,
    workload: Workload,
    rates: DeviceRates,
) -> Measurement:
    batch, num_prompt = timing.batch, timing.batch * workload.prompt_tokens
    context = workload.prompt_tokens + _WARM_STEPS + workload.decode_steps / 2
    step = decode_work(config, precision, batch, context)
    here = _here(rates, batch)
    prefill = _prefill_work(config, precision, batch, workload.prompt_tokens, timing.rows)
    return Measurement(
        batch=batch,
        prefill_rate=num_prompt / timing.prefill_seconds,
        prefill_bound=num_prompt / prefill.seconds(_here(rates, timing.rows)),
        decode_rate=batch / timing.step_seconds,
        decode_bound=batch / step.seconds(here),
        decode_bound_by=step.bound(here).value,
        context_tokens=context,
        step_seconds=timing.step_seconds,
        overhead=timing.overhead,
        foreign_load=timing.foreign_load,
    )


def _here(rates: DeviceRates, rows: int) -> Accelerator:
    """This device as it was measured with products of so many rows."""
    return Accelerator("here", 0, rates.copy_bandwidth, rates.matmul_flops[rows])


def _prefill_work(
    config: ModelConfig, precision: Precision, batch: int, prompt_tokens: int, rows: int
) -> Work:
    """Of ``batch`` prompts in steps of ``rows`` tokens, each of which reads the weights once."""
    one = prefill_work(config, precision, prompt_tokens)
    weights = count_weights(config).step_bytes(precision.dtype_bytes, precision.quantization)
    num_steps = -(-batch * prompt_tokens // rows)
    num_bytes = num_steps * weights + batch * (one.num_bytes - weights)
    return Work(num_bytes, batch * one.num_operations)


def _prompts(config: ModelConfig, batch: int, length: int) -> list[tuple[int, ...]]:
    """Random ids; no two prompts begin alike."""
    random = Random(batch)
    return [tuple(random.randrange(config.vocab_size) for _ in range(length)) for _ in range(batch)]


def _add(engine: Engine, prompts: Sequence[tuple[int, ...]], max_tokens: int) -> list[object]:
    params = SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True)
    keys: list[object] = [object() for _ in prompts]
    for key, prompt in zip(keys, prompts, strict=True):
        engine.add(Request(key, prompt, params))
    return keys


def _prefill(engine: Engine, prompts: Sequence[tuple[int, ...]]) -> float:
    """Seconds until all have their first token, which is their last."""
    started = time.perf_counter()
    _add(engine, prompts, 1)
    while engine.num_unfinished:
        engine.step()
    return time.perf_counter() - started


def _decode(
    engine: Engine, prompts: Sequence[tuple[int, ...]], num_steps: int, num_prompt_steps: int
) -> tuple[list[float], float | None]:
    """The seconds of each of ``num_steps`` steps that decode all prompts, and the share of them
    that is not the model's."""
    # Prompts that are through early go on while the others are read.
    keys = _add(engine, prompts, num_prompt_steps + _WARM_STEPS + num_steps + 1)
    num_new = 0
    while num_new < len(prompts):  # in the last step of a prompt all others decode
        num_new = _step(engine)
    for _ in range(_WARM_STEPS):
        _step(engine)
    seconds = []
    with ForwardClock(engine.runner.model) as clock:
        for _ in range(num_steps):
            started = time.perf_counter()
            _step(engine)
            seconds.append(time.perf_counter() - started)
        overhead = None
        if clock.num_passes == num_steps:
            overhead = max(0.0, 1 - clock.seconds / sum(seconds))
    for key in keys:
        engine.abort(key)
    return seconds, overhead


def _step(engine: Engine) -> int:
    """Run a step; how many tokens it sampled."""
    before = engine.stats().sampled_tokens
    engine.step()
    return engine.stats().sampled_tokens - before


def _entry(one: Measurement) -> dict[str, object]:
    return {
        "batch": one.batch,
        "prefill": {
            "tokens_per_second": one.prefill_rate,
            "bound": one.prefill_bound,
            "ratio": one.prefill_ratio,
        },
        "decode": {
            "tokens_per_second": one.decode_rate,
            "bound": one.decode_bound,
            "bound_by": one.decode_bound_by,
            "ratio": one.decode_ratio,
            "context_tokens": one.context_tokens,
            "step_seconds": one.step_seconds,
            "engine_overhead": one.overhead,
        },
        "foreign_cores": one.foreign_load,
    }
