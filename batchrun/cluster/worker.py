"""The worker: one process of the cluster that owns one engine and works leases off.

The driver calls one method at a time and each call is short, so the worker needs no threads of its
own to be asked how it is, and a call that does not come back is a worker that hangs.
"""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from types import FrameType
from typing import TYPE_CHECKING

from batchrun.job import Job
from batchrun.logs import configure_logging
from batchrun.records import Generated, Lease, Part, Shard

if TYPE_CHECKING:
    from batchrun.cluster.remains import Estate, Place
    from batchrun.data.journal import Journal, JournalWriter
    from batchrun.data.retry import Retry
    from batchrun.data.schema import InputSchema
    from batchrun.data.store import Store
    from batchrun.data.writer import PartFile, PartFormat
    from batchrun.engine.engine import Engine
    from batchrun.engine.options import EngineOptions
    from batchrun.pipeline import Pipeline
    from batchrun.reports import WorkReport


@dataclass(frozen=True, slots=True)
class TraceSource:
    """A run over the same rows that differs in the thinking budget alone and kept its tokens."""

    run: str
    path: str
    storage_options: Mapping[str, object]


@dataclass(frozen=True, slots=True)
class WorkerSettings:
    """What a worker needs to know; small plain values, as they travel through Ray.

    ``num_neighbours`` is how many workers at most share this worker's machine, itself included:
    on a CPU they share its memory. ``source`` is whose tokens are taken over. With ``retry`` parts
    are made anew for the rows that failed. ``worker`` is the name that the coordinator gave it;
    without one it logs nothing.
    """

    job: Job
    run: str
    schema: InputSchema
    part_format: PartFormat
    num_threads: int
    num_neighbours: int
    deterministic: bool
    source: TraceSource | None = None
    worker: str = ""
    retry: Retry | None = None


@dataclass(frozen=True, slots=True)
class Loaded:
    """A worker that is ready: where it runs, how many sequences its engine runs at once, and how
    long it took, ``compile_s`` of ``load_s`` for compiling.

    ``device`` names what it runs on among all machines, empty on a CPU; ``remains`` is where to
    look when it has died.
    """

    host: str
    pid: int
    node_id: str
    device: str
    remains: Place
    max_sequences: int
    max_model_len: int
    load_s: float
    compile_s: float = 0.0


class Worker:
    """Owns an engine. The driver makes it a Ray actor; a test may call it as it is."""

    def __init__(self, settings: WorkerSettings) -> None:
        self._settings = settings
        self._engine: Engine | None = None
        self._pipeline: Pipeline | None = None
        self._estate: Estate | None = None
        self._draining = False

    def __repr__(self) -> str:
        """What Ray's dashboard and logs call the actor."""
        settings = self._settings
        return f"batchrun({settings.job.name} {settings.run[:8]} worker {settings.worker})"

    def load(self) -> Loaded:
        """Load the engine; may take minutes. Raises CheckpointError and the like."""
        from batchrun.data.checkpoints import find_checkpoint
        from batchrun.engine.engine import Engine

        started = time.monotonic()
        self._log()
        # Ray ends a preempted node's processes with SIGTERM first: make safe what there is.
        signal.signal(signal.SIGTERM, self._on_sigterm)
        job = self._settings.job
        folder = find_checkpoint(job.model.path, job.model_storage_options)
        self._engine = Engine.load(folder, self._options())
        return replace(self._begin(started), compile_s=self._engine.compile_seconds)

    def take_on(self, settings: WorkerSettings) -> Loaded:
        """Work for another run with the engine that is there.

        The runs must agree in model and resources.
        """
        started = time.monotonic()
        self._loaded().close()
        self._settings = settings
        self._log()
        return self._begin(started)

    def _log(self) -> None:
        """Log to stderr, which Ray keeps in a file of the worker's."""
        settings = self._settings
        if settings.worker:
            fields = {"run": settings.run, "job": settings.job.name, "worker": settings.worker}
            configure_logging(level="INFO", fields=fields)

    def _begin(self, started: float) -> Loaded:
        from batchrun.cluster.remains import Estate
        from batchrun.pipeline import BUILD_ROWS, Pipeline

        engine, settings = self._engine, self._settings
        assert engine is not None
        if self._estate is None:
            self._estate = Estate(engine.max_sequences + BUILD_ROWS)
        self._pipeline = Pipeline(
            settings.job,
            engine,
            self._publish,
            settings.schema,
            settings.part_format,
            known=None if settings.source is None else self._known,
            journals=_Journals(settings),
            flight=self._estate.flight,
            keeps_finished=settings.retry is not None,
        )
        return Loaded(
            host=socket.gethostname(),
            pid=os.getpid(),
            node_id=_node_id(),
            device=_device(),
            remains=self._estate.place,
            max_sequences=engine.max_sequences,
            max_model_len=engine.max_model_len,
            load_s=time.monotonic() - started,
        )

    def work(
        self, leases: tuple[Lease, ...], cancelled: tuple[str, ...], seconds: float, drain: bool
    ) -> WorkReport:
        """Drop the leases ``cancelled``, take new ones and work for about so long; with ``drain``
        give everything back. See :meth:`Pipeline.work`."""
        pipeline = self._loaded()
        for attempt in cancelled:
            pipeline.cancel(attempt)
        for lease in leases:
            pipeline.start(lease)
        pipeline.draining = self._draining = self._draining or drain
        return pipeline.work(seconds)

    def finish(self, timeout_s: float) -> WorkReport:
        """Make safe what there is and give it back. See :meth:`Pipeline.finish`."""
        return self._loaded().finish(timeout_s)

    def _loaded(self) -> Pipeline:
        if self._pipeline is None:
            raise RuntimeError("the worker has no engine: load() comes first")
        return self._pipeline

    def _publish(self, part_file: PartFile, lease: Lease) -> Part:
        from batchrun.data.retry import stage_part
        from batchrun.data.run import RunDirectory
        from batchrun.data.store import Store

        settings, output = self._settings, self._settings.job.output
        store = Store.open(output.path, output.storage_options)
        n = settings.part_format.n
        directory = RunDirectory(store, settings.run, n=n)
        directory.check_stands(lease.epoch)
        if settings.retry is not None:
            return stage_part(store, settings.run, settings.retry, part_file, lease, n)
        return directory.publish(part_file, lease)

    def _known(self, lease: Lease) -> Iterator[Generated | None]:
        """What another run generated for the samples of a lease."""
        from batchrun.data.store import Store
        from batchrun.data.traces import read_traces

        source = self._settings.source
        assert source is not None
        store = Store.open(source.path, source.storage_options)
        return read_traces(store, source.run, lease.shard, self._settings.part_format.n)

    def _options(self) -> EngineOptions:
        from batchrun.engine.memory import expected_tokens
        from batchrun.engine.options import EngineOptions

        job, settings = self._settings.job, self._settings
        wanted = job.resources.max_sequences
        options = EngineOptions(
            dtype=job.model.dtype,
            state_dtype=job.model.state_dtype,
            quantization=job.model.quantization,
            max_model_len=job.model.max_model_len,
            max_sequences=None if wanted == "auto" else wanted,
            sequence_tokens=expected_tokens(job.generation.max_tokens),
            deterministic=settings.deterministic,
            num_threads=settings.num_threads,
        )
        if options.torch_device.type == "cpu" and settings.num_neighbours > 1:
            share = options.free_memory_bytes() // settings.num_neighbours
            options = replace(options, memory_bytes=share)
        return options

    def _on_sigterm(self, number: int, frame: FrameType | None) -> None:
        self._draining = True
        if self._pipeline is not None:
            self._pipeline.draining = True  # in the middle of its work


class _Journals:
    """The journals of a run, in its output."""

    def __init__(self, settings: WorkerSettings) -> None:
        self._output = settings.job.output
        self._run = settings.run
        self._n = settings.part_format.n
        self._retry = settings.retry

    def read(self, shard: Shard) -> Journal:
        """What the journal of a shard holds; in a retry the samples that stay come before it."""
        from batchrun.data.journal import read_journal
        from batchrun.data.retry import read_kept

        store = self._store()
        kept = () if self._retry is None else read_kept(store, self._retry, shard.number, self._n)
        return read_journal(store, self._run, shard, self._n, kept)

    def write(self, lease: Lease) -> JournalWriter:
        """The journal of a lease."""
        from batchrun.data.journal import JournalWriter

        return JournalWriter(self._store(), self._run, lease)

    def _store(self) -> Store:
        from batchrun.data.store import Store

        return Store.open(self._output.path, self._output.storage_options)


def _device() -> str:
    """The GPUs that Ray gave this process, told from those of all other machines."""
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return f"{socket.gethostname()}/GPU {gpus}" if gpus else ""


def _node_id() -> str:
    """Ray's id of the node that this process runs on; "" outside Ray."""
    import ray

    return str(ray.get_runtime_context().get_node_id()) if ray.is_initialized() else ""
