"""What a run would take, before it takes it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from batchrun.data.checkpoints import is_remote
from batchrun.data.jobrecord import find_run, read_semantic
from batchrun.data.shards import plan_shards
from batchrun.data.status import read_status
from batchrun.data.store import Store
from batchrun.data.survey import Estimate, FooterSurvey, cut_windows
from batchrun.errors import JobError
from batchrun.job import Job
from batchrun.jobfile import JobSource
from batchrun.model.sizes import count_weights
from batchrun.planner.census import Census, take_census
from batchrun.planner.device import Target
from batchrun.planner.outputs import Range, expect, explain
from batchrun.planner.prediction import Machine, Prediction, Workload, predict, worker_counts
from batchrun.planner.requests import Requests, count_requests
from batchrun.planner.target import find_target
from batchrun.preflight import Inspection, inspect_job
from batchrun.prompts import input_columns
from batchrun.records import Counts

FORMAT, FORMAT_VERSION = "batchrun-plan", 1
_GPU_STARTUP, _CPU_STARTUP = Range(35, 90, 240), Range(3, 8, 25)
_LOCAL_RATES, _REMOTE_RATES = Range(2e9, 1e9, 0.4e9), Range(1e9, 0.5e9, 0.2e9)


@dataclass(frozen=True, slots=True)
class InputFacts:
    """The input by its footers, of which ``num_footers`` have been read. ``rows`` are those of the
    whole input (or up to its limit), ``shards`` what they are cut into."""

    num_files: int
    num_footers: int
    size_bytes: int
    rows: Estimate
    shards: Estimate


@dataclass(frozen=True, slots=True)
class Plan:
    """A plan, with everything that its figures are made of.

    ``done`` are counts of rows that the output holds of this run already; the ``prediction`` is of
    the others. ``startup`` is the time of a worker before its first row. ``requests`` are those of
    the whole run with all its workers. ``price`` is of a worker's hour. ``output_basis`` and
    ``startup_basis`` say in words what is assumed, ``notes`` what else a person should know.
    """

    job: str
    model: str
    input: InputFacts
    census: Census
    target: Target
    num_parameters: int
    samples: int
    output: Range
    output_basis: tuple[str, ...]
    done: Counts
    startup: Range
    startup_basis: str
    prediction: Prediction
    requests: tuple[Requests, ...]
    price: float | None
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, object]:
        """Plain values: tokens, bytes, seconds, hours. Its fields are described in README.md."""
        census, target, memory = self.census, self.target, self.target.memory
        durations = [
            {**asdict(one), "cost": None if self.price is None else asdict(cost)}
            for one in self.prediction.durations
            for cost in [one.worker_hours.times(self.price or 0.0)]
        ]
        lengths = asdict(census)
        for name in ("lengths", "unreadable", "output"):
            del lengths[name]
        return {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "job": self.job,
            "model": {"path": self.model, "parameters": self.num_parameters},
            "input": asdict(self.input),
            "prompts": {**lengths, "mean": census.mean},
            "output": {
                "samples_per_row": self.samples,
                "tokens_per_sample": asdict(self.output),
                "basis": list(self.output_basis),
            },
            "done_rows": self.done.rows,
            "accelerator": {
                "name": target.name,
                "is_gpu": target.is_gpu,
                "basis": target.basis,
                "dtype": target.dtype,
                "state_dtype": target.state_dtype,
                "quantization": target.precision.quantization.value,
            },
            "memory": {
                "table": [asdict(row) for row in memory.table],
                "max_model_len": memory.max_model_len,
                "max_sequences": memory.max_sequences,
            },
            "sequences_in_flight": self.prediction.sequences,
            "decode": {**asdict(self.prediction.decode), "share": asdict(target.decode)},
            "prefill": {**asdict(self.prediction.prefill), "share": asdict(target.prefill)},
            "prompt_tokens_computed": self.prediction.prompt_tokens,
            "startup": {**asdict(self.startup), "basis": self.startup_basis},
            "durations": durations,
            "requests": [asdict(one) for one in self.requests],
            "notes": list(self.notes),
        }


def plan_job(
    job: Job,
    source: JobSource | None = None,
    *,
    accelerator: str | None = None,
    bench: Path | None = None,
    exact: bool = False,
    expect_tokens: int | None = None,
    seed: int = 0,
    progress: Callable[[str], None] = lambda _text: None,
) -> Plan:
    """Plan a run of ``job``; only reads, and needs neither weights nor a GPU.

    ``accelerator`` by name instead of the job's or this machine's; ``bench`` is a file with
    measured rates of it. ``exact`` reads every footer and tokenises every row. ``expect_tokens``
    a sample take the place of assumptions. ``progress`` is told what is being done.

    Raises JobError with every problem of the job, RequestError for an accelerator or bench file
    that cannot be used, CheckpointError where the model does not fit, StorageError.
    """
    survey = FooterSurvey(exact=exact, limit=job.input.limit, seed=seed)
    progress("reading the input's footers")
    inspection = inspect_job(job, source, find=survey.find, weights=False)
    if inspection.problems or inspection.checkpoint is None:
        raise JobError(inspection.problems)
    checkpoint = inspection.checkpoint
    progress("looking at the device")
    target = find_target(job, checkpoint, accelerator, bench)
    done, notes = _done(job)
    expectation = expect(job.generation, checkpoint.tokenizer, given=expect_tokens, done=done)
    facts = _input_facts(job, inspection, survey)
    weights = [survey.weight(file) for file in inspection.files]
    windows = cut_windows(inspection.files, input_columns(job), weights, job.input.limit)
    progress("tokenising rows")
    census = take_census(
        job,
        checkpoint.chat,
        windows,
        expectation,
        num_rows=facts.rows,
        max_model_len=target.memory.max_model_len,
        exact=exact,
        seed=seed,
    )
    counts = count_weights(checkpoint.config)
    startup, startup_basis = _startup(job, target, counts.total * 2)
    left = max(0.0, 1 - done.rows / facts.rows.value) if done and facts.rows.value else 1.0
    most = job.resources.workers
    num_workers = most if isinstance(most, int) else most.max
    prediction = predict(
        checkpoint.config,
        target.precision,
        Machine(
            target.memory.num_sequences_of(math.ceil(census.mean + census.max_tokens)),
            target.decode_device,
            target.prefill_device,
            target.decode.share,
            target.prefill.share,
            startup,
        ),
        Workload(
            rows=census.runnable_rows * left,
            samples=job.generation.n,
            mean_prompt=census.mean,
            prompt_lengths=census.lengths,
            prefix_tokens=census.prefix_tokens,
            output=census.output,
            longest=census.output.high if expect_tokens is not None else census.most_tokens,
            shards=math.ceil(facts.shards.value * left),
        ),
        worker_counts(num_workers),
        target.num_cpus,
    )
    last = prediction.durations[-1]
    notes += [*target.memory.notes, *target.notes]
    notes += [f"not counted, as it cannot be read: {why}" for why in census.unreadable]
    return Plan(
        job=job.name,
        model=job.model.path,
        input=facts,
        census=census,
        target=target,
        num_parameters=counts.total,
        samples=job.generation.n,
        output=census.output,
        output_basis=explain(expectation, job.generation),
        done=done or Counts(),
        startup=startup,
        startup_basis=startup_basis,
        prediction=prediction,
        requests=count_requests(
            job,
            num_files=facts.num_files,
            size_bytes=facts.size_bytes,
            num_shards=facts.shards.value,
            seconds=last.seconds.expected,
            workers=last.busy,
        ),
        price=job.resources.price_per_gpu_hour,
        notes=tuple(notes),
    )


def _input_facts(job: Job, inspection: Inspection, survey: FooterSurvey) -> InputFacts:
    files = inspection.files
    cut = {"carried": input_columns(job).carried, "max_tokens": job.generation.max_tokens}

    def shards_of(*some: object, limit: int | None = None) -> int:
        return len(plan_shards(some, n=job.generation.n, limit=limit, **cut))  # type: ignore[arg-type]

    if survey.is_sampled:
        rows = survey.total(files, [float(file.num_rows) for file in files])
        shards = survey.total(files, [float(shards_of(file)) for file in files])
    else:
        limit = job.input.limit
        total = sum(file.num_rows for file in files)
        rows = Estimate(total if limit is None else min(limit, total))
        shards = Estimate(shards_of(*files, limit=limit))
    return InputFacts(survey.num_files, len(files), survey.size_bytes, rows, shards)


def _done(job: Job) -> tuple[Counts | None, list[str]]:
    """What the output holds of this run already, and what is to be said of the output."""
    store = Store.open(job.output.path, job.output.storage_options)
    run = find_run(store)
    if run is None:
        return None, []
    there: Mapping[str, object] = {**read_semantic(store, run), "checkpoint": None}
    wanted = {**json.loads(json.dumps(job.semantic())), "checkpoint": None}
    if there != wanted:
        return None, [f"{store.url} holds the run of another job: submit will refuse it"]
    return read_status(store).counts, []


def _startup(job: Job, target: Target, stored_bytes: int) -> tuple[Range, str]:
    """Seconds of a worker before its first row, and what they are made of."""
    is_far = is_remote(job.model.path)
    rates = _REMOTE_RATES if is_far else _LOCAL_RATES
    own = _GPU_STARTUP if target.is_gpu else _CPU_STARTUP
    load = Range(*(stored_bytes / rate for rate in (rates.low, rates.expected, rates.high)))
    what = "process, CUDA, compiled kernels and graphs" if target.is_gpu else "Ray and processes"
    where = "from object storage" if is_far else "from disk"
    return own.plus(load), (
        f"{own.low:g} / {own.expected:g} / {own.high:g} s for {what}, and "
        f"{stored_bytes / 1e9:,.2f} GB of weights {where} at "
        f"{rates.low / 1e9:g} / {rates.expected / 1e9:g} / {rates.high / 1e9:g} GB/s (assumed)"
    )
