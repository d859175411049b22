"""The job file: every key, its type, its default and what it means; and how it is checked.

One frozen class a section; field names are the keys. Unknown keys are refused. What a value must
be is said once, in the types below: validation, messages and ``batchrun schema`` all read it
there. Rules that bind several keys are in :mod:`batchrun.jobrules`.
"""

from __future__ import annotations

import copy
import functools
import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
)

from batchrun.errors import JobError, Problem
from batchrun.jobfile import JobSource, KeyPath, in_order
from batchrun.jobproblems import explain, repair, schema_of
from batchrun.jobrules import secrets, violations
from batchrun.logs import REDACTED, names_a_secret, redact
from batchrun.tools import tool_problems
from batchrun.wording import dotted, expectation, shown

MAX_INT = 2**31 - 1
TINY = "tiny"
"""The name of the model that ships with the package."""

Text = Annotated[str, StringConstraints(min_length=1)]
Names = Annotated[tuple[Text, ...], Field(strict=False)]
Count = Annotated[int, Field(ge=1, le=MAX_INT)]
CountOrZero = Annotated[int, Field(ge=0, le=MAX_INT)]
Seconds = Annotated[float, Field(gt=0)]
Override = Literal[
    "reasoning",
    "max_thinking_tokens",
    "thinking_grace",
    "max_tokens",
    "answer_reserve",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "stop",
    "seed",
    "ignore_eos",
    "tools",
]


def _without_empty(value: object) -> object:
    """Options that an unset variable left empty (``"${S3_ENDPOINT:-}"``) are as if not given."""
    if isinstance(value, dict):
        return {key: item for key, item in value.items() if item not in ("", None)}
    return value


def _not_switch(value: object) -> object:
    # A literal compares by ==, to which true is 1.
    if isinstance(value, bool):
        raise ValueError("a switch")
    return value


def _one_or_many(value: object) -> object:
    return (value,) if isinstance(value, str) else value


Options = Annotated[dict[str, Any], BeforeValidator(_without_empty)]
Texts = Annotated[Names, BeforeValidator(_one_or_many, json_schema_input_type=Text | list[Text])]


class Section(BaseModel):
    """Base of all sections: frozen, unknown keys refused, no silent change of type."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class Model(Section):
    """The checkpoint and the precision it runs in."""

    path: Text
    """Folder or URL in the Hugging Face layout; `tiny` is the model that ships with batchrun."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Weights and activations; auto is bfloat16 on a GPU, and on a CPU that computes with it for
    a bfloat16 checkpoint that is not small; else float32."""
    quantization: Literal["none", "int8", "int4"] = "none"
    """Weight-only quantization; int4 is refused in this version."""
    state_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """The SSM state; auto is float32."""
    kv_dtype: Literal["auto", "bfloat16", "int8"] = "auto"
    """The attention KV cache; auto is as dtype; another type is refused in this version."""
    max_model_len: Annotated[int, Field(ge=2, le=MAX_INT)] | None = None
    """Most tokens of prompt and output together; null is the checkpoint's, as far as memory
    holds one sequence."""

    @property
    def path_from_root(self) -> str:
        """The path whatever folder it is looked at from."""
        return self.path if self.path == TINY else from_root(self.path)


class Input(Section):
    """The rows, and how a row becomes a prompt."""

    path: Text | Annotated[tuple[Text, ...], Field(strict=False, min_length=1)]
    """A Parquet file, a folder, a glob, or a list of them; any URL that fsspec reads."""
    storage_options: Options = Field(default_factory=dict)
    """Options of the file system, such as endpoint_url; never credentials."""
    id_column: Text | None = None
    """Column with the id of a row; null is "<path relative to the input>:<row index>"."""
    prompt_column: Text | None = None
    """Column with the prompt. Exactly one of prompt_column, messages_column, template."""
    messages_column: Text | None = None
    """Column with a conversation: list<struct<role, content>>, or a JSON string of it."""
    template: Text | None = None
    """Sandboxed Jinja over the row's columns; an undefined name is an error."""
    system: Text | None = None
    """System prompt; a row whose messages begin with a system message keeps its own."""
    columns: Names = ()
    """Columns that are carried through to the output."""
    overrides: Annotated[tuple[Override, ...], Field(strict=False)] = ()
    """Columns of these names override `generation` row by row."""
    limit: Count | None = None
    """The first so many rows only."""


class Generation(Section):
    """How a row is answered. Every key of `input.overrides` can differ from row to row."""

    reasoning: bool = True
    """Think first; wins over /think and /no_think in a row's text."""
    max_thinking_tokens: CountOrZero | None = None
    """Thinking budget: most tokens of reasoning before `</think>` is forced."""
    thinking_grace: CountOrZero = 0
    """Tokens more to end at a line break before `</think>` is forced; 0 is at once."""
    max_tokens: Count = 1024
    """Most tokens of reasoning and completion together."""
    answer_reserve: Literal["auto"] | CountOrZero = "auto"
    """`</think>` is forced when no more than this is left of max_tokens; auto is
    min(128, max_tokens // 4)."""
    temperature: Annotated[float, Field(ge=0)] = 0.6
    """0 is greedy."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.95
    """Nucleus sampling; 1 is off."""
    top_k: CountOrZero = 0
    """Sample from the k most likely tokens; 0 is off."""
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Least probability relative to the most likely token; 0 is off."""
    repetition_penalty: Annotated[float, Field(gt=0)] = 1.0
    """Above 1 makes tokens that were there less likely; 1 is off."""
    stop: Texts = ()
    """Texts that end the completion; they are not part of it."""
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] = 0
    """Random numbers depend on (seed, row, sample, position) alone."""
    n: Annotated[int, Field(ge=1, le=MAX_INT)] = 1
    """Samples of each row."""
    logprobs: Annotated[int, Field(ge=0, le=1)] | None = None
    """0 or 1: the output has the log-probability of each generated token."""
    ignore_eos: bool = False
    """Go on to max_tokens whatever the model says; for benchmarks."""
    response_format: dict[str, Any] | None = None
    """Binds the completion, never the reasoning: {type: json_schema, schema: …},
    {type: regex, pattern: …} or {type: choice, choices: […]}."""
    tools: Annotated[tuple[dict[str, Any], ...], Field(strict=False)] = ()
    """Function schemas for the chat template: {type: function, function: {name, description,
    parameters}}, or the function alone. Calls come back in `tool_calls`."""

    def with_overrides(self, values: Mapping[str, object]) -> Generation:
        """This, with one row's ``values`` in place of the job's.

        Raises:
            ValueError: A value is not what its key can hold; the text names the key.
        """
        merged = {**dict(self), **values}
        try:
            changed = Generation.model_validate(merged)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            key = str(first["loc"][0])
            expected = expectation(schema_of(("generation", key), _schema()))
            raise ValueError(f"{key} must be {expected}, not {shown(merged[key])}") from None
        reserve = changed.answer_reserve
        if reserve != "auto" and reserve >= changed.max_tokens:
            raise ValueError(
                f"answer_reserve ({reserve}) must be less than max_tokens ({changed.max_tokens})"
            )
        for problem in tool_problems(changed.tools if "tools" in values else ()):
            # Names below are texts of the row, which messages do not repeat.
            known = itertools.takewhile(lambda part: part != "properties", problem.key)
            raise ValueError(f"{dotted(('tools', *known))} {problem.message}")
        return changed


class Output(Section):
    """Where the completions go."""

    path: Text
    """A folder: a local path, s3:// or gs:// (untested)."""
    storage_options: Options = Field(default_factory=dict)
    """Options of the file system, such as endpoint_url; never credentials."""
    compression: Literal["zstd", "snappy", "gzip", "lz4", "brotli", "none"] = "zstd"
    """Compression of the Parquet parts."""


class WorkerRange(Section):
    """As many workers as the cluster gives, within bounds."""

    min: Count
    """What the cluster must be able to hold before the run begins."""
    max: Count
    """Asked for; each is used as soon as it is there."""


class Resources(Section):
    """What a run takes of the cluster."""

    workers: Count | WorkerRange = 1
    """How many workers, each with one engine; or {min: …, max: …}."""
    gpus_per_worker: Annotated[Literal["auto", 0, 1], BeforeValidator(_not_switch)] = "auto"
    """auto is 1 where the cluster has GPUs, else 0."""
    accelerator_type: Text | None = None
    """Ray's label, such as A10G; null is any."""
    max_sequences: Literal["auto"] | Count = "auto"
    """Sequences in flight in one worker."""
    price_per_gpu_hour: Annotated[float, Field(ge=0)] | None = None
    """For limits.max_cost, and the cost in plans, sweeps and reports."""

    @property
    def most_workers(self) -> int:
        """So many workers are asked for, and each is used as soon as it is there."""
        return self.workers if isinstance(self.workers, int) else self.workers.max

    @property
    def fewest_workers(self) -> int:
        """So many workers the cluster must be able to hold, or the run does not begin."""
        return 1 if isinstance(self.workers, int) else self.workers.min


class Errors(Section):
    """What a run bears."""

    max_retries: CountOrZero = 2
    """Per row; a worker's death counts only for rows then run alone."""
    row_timeout_s: Seconds | None = None
    """A row that takes longer becomes an error row."""
    hang_timeout_s: Seconds = 120
    """No engine step for so long (load and compile exempt): the worker is replaced."""
    max_failed_rows: CountOrZero | Annotated[float, Field(ge=0, lt=1)] = 0
    """A count, or a fraction below 1; more failed rows end the run with exit code 3."""
    canary_rows: CountOrZero = 0
    """First run this many rows on one worker, and stop if too many fail or come back empty."""


class Limits(Section):
    """A run that reaches a limit keeps what is done and ends with exit code 75."""

    max_hours: Annotated[float, Field(gt=0)] | None = None
    """Hours since the start of this submit."""
    max_tokens: Count | None = None
    """Tokens of prompts and generated ones together."""
    max_cost: Annotated[float, Field(gt=0)] | None = None
    """Hours of all workers times resources.price_per_gpu_hour."""


class Checkpoint(Section):
    """How often a worker's progress is made durable."""

    interval_s: Seconds = 30
    """At most this much generation is lost with a worker."""


class Ray(Section):
    """The cluster."""

    address: Text | None = None
    """Address of a Ray cluster; null starts Ray on this machine."""
    runtime_env: dict[str, Any] = Field(default_factory=dict)
    """Ray's runtime environment; never credentials."""


class Metrics(Section):
    """The run's Prometheus endpoint."""

    host: Text = "127.0.0.1"
    """Address to listen on."""
    port: Annotated[int, Field(ge=0, le=65535)] | None = 9464
    """null is off, 0 any free port."""


class Evaluate(Section):
    """Whether answers are right, row by row."""

    answer_column: Text
    """Column with the expected answer: text, a number, a boolean, or a list: any of it is right."""
    scorer: Literal["exact", "number", "choice", "regex", "math"]
    """How a completion is compared with it."""
    pattern: Text | None = None
    """For the scorer regex: its first group (or all of it) in the last match is the answer."""
    choices: Names = ()
    """For the scorer choice: the options; none are the letters A to Z."""


class Job(Section):
    """A model, an input, how to generate, an output."""

    name: Annotated[str, StringConstraints(pattern=r"^[^\x00-\x1f\x7f]{1,200}$")] = "job"
    """What people call the job; default is the file's name."""
    model: Model
    """The checkpoint."""
    input: Input
    """The rows."""
    generation: Generation = Field(default_factory=Generation)
    """How a row is answered."""
    output: Output
    """Where the completions go."""
    resources: Resources = Field(default_factory=Resources)
    """What a run takes of the cluster."""
    errors: Errors = Field(default_factory=Errors)
    """What a run bears."""
    limits: Limits = Field(default_factory=Limits)
    """When a run stops early."""
    checkpoint: Checkpoint = Field(default_factory=Checkpoint)
    """How often progress is made durable."""
    ray: Ray = Field(default_factory=Ray)
    """The cluster."""
    metrics: Metrics = Field(default_factory=Metrics)
    """The Prometheus endpoint."""
    evaluate: Evaluate | None = None
    """Whether answers are right; null is not to ask."""
    schedule: Text | None = None
    """Cron expression for `batchrun schedule`."""

    def semantic(self) -> dict[str, object]:
        """What determines the content of the output: a run with another value of it is another
        run. Where the input lies and how the work is spread are not part of it; the input's bytes
        are pinned shard by shard instead. A local model is named from the root, so that a job is
        the same run from whatever folder it is submitted."""
        model = self.model.model_dump(mode="json")
        rows = self.input.model_dump(mode="json", exclude={"path", "storage_options"})
        content: dict[str, object] = {
            "model": {**model, "path": self.model.path_from_root},
            "input": rows,
            "generation": self._generation_content(),
        }
        if self.evaluate is not None:
            content["evaluate"] = self.evaluate.model_dump(mode="json")
        return content

    def _generation_content(self) -> dict[str, object]:
        """`generation`, with schemas as texts: the order of their keys is that of the prompt, and
        of a completion's properties."""
        content = self.generation.model_dump(mode="json")
        content["tools"] = [json.dumps(tool, ensure_ascii=False) for tool in content["tools"]]
        bound_to = content["response_format"]
        if bound_to is not None and "schema" in bound_to:
            content["response_format"] = {**bound_to, "schema": json.dumps(bound_to["schema"])}
        return content

    @property
    def has_tools(self) -> bool:
        """Whether rows may call functions, so that the output has the column `tool_calls`."""
        return bool(self.generation.tools) or "tools" in self.input.overrides

    @property
    def model_storage_options(self) -> dict[str, object]:
        """Options for reading the checkpoint: those of the input, or else of the output, where
        it lies in storage of the same kind."""
        scheme = self.model.path.partition("://")[0]
        for place in (self.input, self.output):
            path = place.path if isinstance(place.path, str) else place.path[0]
            if "://" in path and path.partition("://")[0] == scheme:
                return dict(place.storage_options)
        return {}

    def redacted(self) -> dict[str, object]:
        """The whole job with every default filled in and every credential masked."""
        masked = _masked(self.model_dump(mode="json"))
        assert isinstance(masked, dict)
        return masked


@dataclass(frozen=True, slots=True)
class Reading:
    """A job file as far as it can be understood.

    ``problems`` are all that is wrong with it, in the order of the file. ``job`` has the default
    in place of each wrong value (``bad``), for checks of all the rest; None if there is no more
    to check.
    """

    job: Job | None
    problems: tuple[Problem, ...]
    bad: frozenset[KeyPath]


def parse_job(source: JobSource) -> Job:
    """The job that ``source`` describes.

    Raises:
        JobError: Something is wrong with it; ``problems`` says everything.
    """
    reading = check_source(source)
    if reading.problems or reading.job is None:
        raise JobError(reading.problems)
    return reading.job


def check_source(source: JobSource) -> Reading:
    """Find every problem of ``source`` that can be known from the file alone."""
    raw = _sections(source.raw)
    found = dict.fromkeys(source.problems)
    bad: set[KeyPath] = set(source.broken)
    for key in source.broken:
        repair(raw, key)
    schema = _schema()
    job: Job | None = None
    # Each wrong value is noted and replaced, until what is left is a job. A wrong section can
    # hide wrong keys no deeper than the schema is, so a few rounds are enough.
    for _ in range(8):
        try:
            job = Job.model_validate(raw)
            break
        except ValidationError as error:
            for key, kind in _real_errors(error, raw):
                if not any(key[: len(path)] == path for path in source.broken):
                    message, hint = explain(key, kind, raw, schema)
                    found[Problem(source.place(key), dotted(key), message, hint)] = None
                bad.add(key)
            for key in sorted(bad, key=len, reverse=True):
                repair(raw, key)
    broken_rules = list(secrets(source.raw)) + (list(violations(job.model_dump())) if job else [])
    for rule in broken_rules:
        reads: list[KeyPath] = [tuple(key.split(".")) for key in rule.reads] or [rule.key]
        if not any(_overlap(key, path) for key in reads for path in bad):
            place = source.place(rule.key)
            found[Problem(place, dotted(rule.key), rule.message, rule.hint)] = None
    if job is not None and job.name == "job" and "name" not in raw:
        stem = Path(source.name).stem
        job = job.model_copy(update={"name": stem if stem.isprintable() and stem else "job"})
    return Reading(job, in_order(found), frozenset(bad))


def from_root(path: str) -> str:
    """A local path as seen from the root; URLs stay as they are."""
    if "://" in path:
        return path
    # Not resolve(): a glob stays as it is, and a link may point elsewhere on a cluster.
    local = Path(path).expanduser()
    # The folder that a process runs in may be gone, so it is asked for where it matters.
    return str(local if local.is_absolute() else Path.cwd() / local)


def json_schema() -> dict[str, Any]:
    """The JSON Schema of the job file, for editors."""
    schema = Job.model_json_schema()
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **schema,
        "title": "batchrun job",
    }


@functools.cache
def _schema() -> dict[str, Any]:
    return Job.model_json_schema()


def _sections(raw: Mapping[str, object]) -> dict[str, Any]:
    """A copy to repair. A section with nothing in it (all its keys commented out) is empty."""
    values: dict[str, Any] = copy.deepcopy(dict(raw))
    for name, field in Job.model_fields.items():
        if values.get(name, ...) is None and isinstance(field.annotation, type):
            if issubclass(field.annotation, Section):
                values[name] = {}
    return values


def _real_errors(error: ValidationError, raw: Mapping[str, Any]) -> list[tuple[KeyPath, str]]:
    """Key paths and kinds of pydantic's errors, one a place.

    Pydantic's locations name the branches of unions too, and give one error a branch. The names
    go, and of errors at a value and inside it only those inside stay, as they say more.
    """
    found: dict[KeyPath, str] = {}
    for detail in error.errors(include_url=False):
        key: list[str | int] = []
        value: Any = raw
        parts = detail["loc"]
        for position, part in enumerate(parts):
            last_missing = detail["type"] == "missing" and position == len(parts) - 1
            if isinstance(value, dict) and (part in value or last_missing):
                value = value.get(part)
            elif isinstance(value, list | tuple) and isinstance(part, int) and part < len(value):
                value = value[part]
            else:
                continue
            key.append(part)
        found.setdefault(tuple(key), detail["type"])
    return [
        (key, kind)
        for key, kind in found.items()
        if not any(len(other) > len(key) and other[: len(key)] == key for other in found)
    ]


def _overlap(key: KeyPath, other: KeyPath) -> bool:
    shorter = min(len(key), len(other))
    return key[:shorter] == other[:shorter]


def _masked(value: object, name: str = "") -> object:
    match value:
        case dict():
            return {key: _masked(item, key) for key, item in value.items()}
        case list():
            return [_masked(item, name) for item in value]
        case str() if name and value and names_a_secret(name):
            return REDACTED
        case str():
            return redact(value)
        case _:
            return value
