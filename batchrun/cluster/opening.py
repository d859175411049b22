"""Opening a run: everything between a checked job and the first worker. No Ray in here."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from batchrun import __version__
from batchrun.cluster.places import located
from batchrun.data.checkpoints import find_checkpoint, is_remote, remote_fingerprint
from batchrun.data.inputs import InputFile, list_input
from batchrun.data.layout import canonical_json, run_id
from batchrun.data.plan import PlanRule
from batchrun.data.resume import (
    OpenedRun,
    check_keepable,
    check_open,
    check_output,
    check_run,
    open_retry,
    open_run,
)
from batchrun.data.store import Store
from batchrun.data.writer import PartFormat
from batchrun.errors import JobError
from batchrun.job import Job
from batchrun.jobfile import JobSource
from batchrun.model.checkpoint import checkpoint_fingerprint
from batchrun.preflight import inspect_job
from batchrun.prompts import input_columns
from batchrun.records import ErrorKind

_LICENSES = (("Apache License", "Apache-2.0"), ("MIT License", "MIT"))


@dataclass(frozen=True, slots=True)
class CheckedJob:
    """A job that can run: nothing is written yet. ``semantic`` is what makes its content; with
    ``keeps_traces`` its run keeps the sampled tokens beside its parts. ``files`` are those of the
    input, whose footers have been read. With ``keep_finished`` the finished parts of another job's
    run stay; with ``retry`` only rows are run that failed so."""

    job: Job
    store: Store
    semantic: dict[str, object]
    model_license: str | None
    keeps_traces: bool = False
    files: tuple[InputFile, ...] = ()
    keep_finished: bool = False
    retry: tuple[ErrorKind, ...] | None = None

    def variant(self, job: Job) -> CheckedJob:
        """Another job, which differs from this one only in how it thinks and in its output.

        Raises OutputError when that output holds another job's run.
        """
        semantic = {**job.semantic(), "checkpoint": self.semantic["checkpoint"]}
        store = Store.open(job.output.path, job.output.storage_options)
        check_output(store, semantic)
        return CheckedJob(job, store, semantic, self.model_license, files=self.files)

    @property
    def run(self) -> str:
        """The id of the run."""
        return run_id(self.semantic)

    @property
    def part_format(self) -> PartFormat:
        """What the run's parts look like."""
        metadata = {
            "batchrun.version": __version__,
            "batchrun.job": canonical_json(self.job.redacted()),
            "batchrun.model": self.job.model.path,
        }
        if self.model_license is not None:
            metadata["batchrun.model_license"] = self.model_license
        generation = self.job.generation
        return PartFormat(
            run=self.run,
            n=generation.n,
            logprobs=generation.logprobs is not None,
            correct=self.job.evaluate is not None,
            tool_calls=self.job.has_tools,
            compression=self.job.output.compression,
            traces=self.keeps_traces,
            metadata=metadata,
        )

    @property
    def rule(self) -> PlanRule:
        """What of the job decides how its input is planned."""
        generation = self.job.generation
        return PlanRule(
            input_columns(self.job), generation.max_tokens, generation.n, self.job.input.limit
        )

    def check_keepable(self) -> None:
        """Raise OutputError unless what is finished in the output could stay; only reads."""
        check_keepable(self.store, self.semantic, self.files, self.rule, self.part_format)

    def open(self, confirm: Callable[[], None] = lambda: None) -> OpenedRun:
        """Begin or resume the run; only while its lock is held. See :func:`open_run`."""
        rows, rule = self.job.input, self.rule
        paths = rows.path if isinstance(rows.path, str) else list(rows.path)
        files = list_input(paths, rows.storage_options, known=self.files)
        if self.retry is not None:
            return open_retry(self.store, self.semantic, files, rule, self.retry, confirm)
        return open_run(
            self.store,
            self.semantic,
            located(self.job.redacted()),
            files,
            rule,
            keep_finished=self.part_format if self.keep_finished else None,
            confirm=confirm,
        )


def check(job: Job, source: JobSource | None, *, keep_finished: bool = False) -> CheckedJob:
    """Find out whether ``job`` can run; only reads.

    Raises JobError with every problem, OutputError when the output holds another job's run, unless
    its finished parts are to stay (``keep_finished``).
    """
    inspection = inspect_job(job, source)
    if inspection.problems:
        raise JobError(inspection.problems)
    checked = _checked(job, inspection.files, keep_finished=keep_finished)
    check_output(checked.store, checked.semantic, keep_finished=keep_finished)
    if keep_finished:
        checked.check_keepable()
    return checked


def check_opening(job: Job, files: tuple[InputFile, ...]) -> None:
    """Raise what opening the run of ``job``, which is well otherwise, would raise; only reads.

    Raises OutputError for an output that holds anything but its run, InputError for input that
    changed after it was finished.
    """
    checked = _checked(job, files)
    check_open(checked.store, checked.semantic, files, checked.rule)


def _checked(job: Job, files: tuple[InputFile, ...], *, keep_finished: bool = False) -> CheckedJob:
    folder, fingerprint = _look_at_checkpoint(job)
    return CheckedJob(
        job,
        Store.open(job.output.path, job.output.storage_options),
        {**job.semantic(), "checkpoint": fingerprint},
        read_license(folder),
        files=files,
        keep_finished=keep_finished,
    )


def check_retry(
    job: Job,
    source: JobSource | None,
    kinds: tuple[ErrorKind, ...],
    model_path: str | None = None,
) -> CheckedJob:
    """Find out whether rows of the run of ``job`` can be tried again; only reads.

    ``model_path`` is how the run itself names the model, where ``job`` names it otherwise.
    Raises JobError with every problem, OutputError when the output does not hold this job's run.
    """
    inspection = inspect_job(job, source)
    if inspection.problems:
        raise JobError(inspection.problems)
    checked = replace(_checked(job, inspection.files), retry=kinds)
    model = checked.semantic["model"]
    if model_path is not None and isinstance(model, dict):
        renamed = {**checked.semantic, "model": {**model, "path": model_path}}
        checked = replace(checked, semantic=renamed)
    check_run(checked.store, checked.semantic)
    return checked


def _look_at_checkpoint(job: Job) -> tuple[Path, str]:
    """The checkpoint's folder, of a remote one without its weights, and what pins its bytes."""
    path, options = job.model.path, job.model_storage_options
    folder = find_checkpoint(path, options, weights=False)
    if is_remote(path):
        return folder, remote_fingerprint(path, options)
    return folder, checkpoint_fingerprint(folder)


def read_license(folder: Path) -> str | None:
    """The checkpoint's licence: as its config or model card says, else by its LICENSE file."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if isinstance(config.get("license"), str):
        return str(config["license"])
    card = folder / "README.md"
    if card.is_file():
        text = card.read_text(encoding="utf-8", errors="replace")[:4096]
        for key in ("license_name", "license"):
            if found := re.search(rf"^{key}:\s*(\S+)\s*$", text, re.MULTILINE):
                return found[1].strip("'\"")
    for name in ("LICENSE", "LICENSE.txt", "LICENSE.md"):
        file = folder / name
        if file.is_file():
            text = file.read_text(encoding="utf-8", errors="replace")[:4096]
            for words, short in _LICENSES:
                if words in text:
                    return short
            return next((line.strip()[:200] for line in text.splitlines() if line.strip()), None)
    return None
