"""The rules of the job file that bind several keys, or that types cannot say.

Each rule is a generator over a job whose single values are valid. What it yields names the keys
that it read, so that a rule stays silent where one of them was wrong already.
"""

from __future__ import annotations

import fnmatch
import os
import re
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from batchrun.formats import slips
from batchrun.logs import names_a_secret, redact
from batchrun.records import RESERVED_COLUMNS
from batchrun.schedule import ScheduleError, parse_schedule
from batchrun.tools import tool_problems
from batchrun.wording import nearest, quoted

Values = Mapping[str, Any]

OUTPUT_SCHEMES = ("s3", "s3a", "gs", "gcs", "file")

_ABSENT = "is not available in this version"
_CREDENTIALS = (
    "credentials come from the environment (AWS_ACCESS_KEY_ID, …), a profile or the instance role"
)


@dataclass(frozen=True, slots=True)
class Violation:
    """A rule that a job breaks: at which key, why, how to mend it.

    ``reads`` are the keys that decide, if not ``key`` alone; where one of them is wrong by itself
    the rule says nothing.
    """

    key: tuple[str | int, ...]
    message: str
    hint: str
    reads: tuple[str, ...] = ()


def violations(job: Values) -> Iterator[Violation]:
    """Every rule that ``job``, a dump of :class:`batchrun.job.Job`, breaks."""
    yield from _not_built_yet(job)
    yield from _prompt_source(job)
    yield from _columns(job)
    yield from _tokens(job)
    yield from _tools(job)
    yield from _response_format(job)
    yield from _resources(job)
    yield from _limits(job)
    yield from _output_place(job)
    yield from _evaluate(job)
    yield from _schedule(job)


def _not_built_yet(job: Values) -> Iterator[Violation]:
    model = job["model"]

    def absent(key: str, what: str, hint: str) -> Violation:
        return Violation(tuple(key.split(".")), f"{what} {_ABSENT}", hint, (key,))

    if model["quantization"] == "int4":
        yield absent("model.quantization", "int4 quantization", "write int8 or none")
    if model["kv_dtype"] == "int8":
        yield absent("model.kv_dtype", "an int8 KV cache", "write auto")
    if model["kv_dtype"] == "bfloat16" and model["dtype"] != "bfloat16":
        yield Violation(
            ("model", "kv_dtype"),
            f"a KV cache in another type than model.dtype ({model['dtype']}) {_ABSENT}",
            "write auto, or set model.dtype to bfloat16 too",
            ("model.dtype",),
        )


def _prompt_source(job: Values) -> Iterator[Violation]:
    keys = ("prompt_column", "messages_column", "template")
    given = [key for key in keys if job["input"][key] is not None]
    reads = tuple(f"input.{key}" for key in keys)
    if not given:
        yield Violation(
            ("input",),
            "says nowhere what a row's prompt is",
            "give one of prompt_column, messages_column or template",
            reads,
        )
    if len(given) > 1:
        for key in given[1:]:
            yield Violation(
                ("input", key),
                f"stands beside {given[0]}, but a row has one prompt",
                f"keep one of {' and '.join(given)}",
                reads,
            )


def _columns(job: Values) -> Iterator[Violation]:
    for key, names in (
        ("columns", job["input"]["columns"]),
        ("overrides", job["input"]["overrides"]),
    ):
        for index, name in enumerate(names):
            if name in names[:index]:
                yield Violation(("input", key, index), f"names {name} twice", "delete one of them")
    for index, name in enumerate(job["input"]["columns"]):
        if name in RESERVED_COLUMNS:
            yield Violation(
                ("input", "columns", index),
                f"{name} is a column that every output has",
                "rename the column in the input, or do not carry it through",
            )


def _tokens(job: Values) -> Iterator[Violation]:
    generation = job["generation"]
    most = generation["max_tokens"]
    reads = ("generation.max_tokens",)
    if generation["answer_reserve"] != "auto" and generation["answer_reserve"] >= most:
        yield Violation(
            ("generation", "answer_reserve"),
            f"must be less than max_tokens ({most}), not {generation['answer_reserve']}",
            "lower it, or write auto",
            reads,
        )
    if job["model"]["max_model_len"] is not None and most >= job["model"]["max_model_len"]:
        yield Violation(
            ("generation", "max_tokens"),
            f"is {most}, which leaves no room for a prompt in model.max_model_len "
            f"({job['model']['max_model_len']})",
            "lower max_tokens, or raise max_model_len",
            ("model.max_model_len",),
        )


def _tools(job: Values) -> Iterator[Violation]:
    for problem in tool_problems(job["generation"]["tools"]):
        key = ("generation", "tools", *problem.key)
        yield Violation(key, problem.message, problem.hint)


def _response_format(job: Values) -> Iterator[Violation]:
    written = job["generation"]["response_format"]
    if written is None:
        return
    for slip in slips(written):
        key = ("generation", "response_format", *slip.key)
        yield Violation(key, slip.message, slip.hint, ("generation.response_format",))


def _resources(job: Values) -> Iterator[Violation]:
    resources = job["resources"]
    workers = resources["workers"]
    if not isinstance(workers, int):
        if workers["min"] > workers["max"]:
            yield Violation(
                ("resources", "workers"),
                f"min ({workers['min']}) is more than max ({workers['max']})",
                "exchange them",
            )
    if resources["accelerator_type"] is not None and resources["gpus_per_worker"] == 0:
        yield Violation(
            ("resources", "accelerator_type"),
            f"asks for {quoted(resources['accelerator_type'])} while gpus_per_worker is 0",
            "delete accelerator_type, or write gpus_per_worker: auto",
            ("resources.gpus_per_worker",),
        )


def _limits(job: Values) -> Iterator[Violation]:
    if job["limits"]["max_cost"] is not None and not job["resources"]["price_per_gpu_hour"]:
        yield Violation(
            ("limits", "max_cost"),
            "needs the price of a GPU: without one nothing costs anything",
            "write resources.price_per_gpu_hour",
            ("limits.max_cost", "resources.price_per_gpu_hour"),
        )


def _output_place(job: Values) -> Iterator[Violation]:
    if slip := re.match(r"(s3a?|gs|gcs|file):/?(?!/)", job["output"]["path"]):
        hint = f"did you mean {slip[1]}://{job['output']['path'][slip.end() :]}?"
        yield Violation(("output", "path"), "is neither a URL nor a plain path", hint)
        return
    scheme = _scheme(job["output"]["path"])
    if scheme and scheme not in OUTPUT_SCHEMES:
        close = nearest(scheme, OUTPUT_SCHEMES)
        hint = f"did you mean {close}://?" if close else "write a local folder, s3://… or gs://…"
        message = f"{scheme}:// cannot hold an output, which needs an atomic create"
        yield Violation(("output", "path"), message, hint)
        return
    output = _place(job["output"]["path"])
    written = job["input"]["path"]
    for path in (written,) if isinstance(written, str) else written:
        if relation := _relation(output, _place(path)):
            yield Violation(
                ("output", "path"),
                f"{relation} ({quoted(path, 200)}), so parts and prompts would be mixed up",
                "write to a folder of its own",
                ("input.path", "output.path"),
            )
            return


def _relation(output: str, written: str) -> str:
    """How an output lies to an input where the two get in each other's way; else nothing."""
    base, pattern = _split_glob(written)
    if (base + "/").startswith(output + "/"):
        return "is the input itself" if output == base and not pattern else "holds the input"
    if not (output + "/").startswith(base + "/"):
        return ""
    # Of a folder that a glob looks into, only what the glob matches is input.
    if pattern and not _matches(output.removeprefix(base).strip("/"), pattern):
        return ""
    return "lies inside the input"


def _evaluate(job: Values) -> Iterator[Violation]:
    evaluate = job["evaluate"]
    if evaluate is None:
        return
    scorer, pattern, choices = evaluate["scorer"], evaluate["pattern"], evaluate["choices"]
    if scorer == "regex" and pattern is None:
        hint = r"give it, for example pattern: 'Answer: (\w+)'"
        yield Violation(("evaluate", "pattern"), "is missing: the scorer regex needs it", hint)
    if scorer != "regex" and pattern is not None:
        message = f"is for the scorer regex, not for {scorer}"
        yield Violation(("evaluate", "pattern"), message, "delete it, or write scorer: regex")
    if pattern is not None:
        try:
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            hint = "see the documentation of Python's module re; put the pattern in single quotes"
            yield Violation(("evaluate", "pattern"), f"is no regular expression: {error}", hint)
    if scorer != "choice" and choices:
        message = f"is for the scorer choice, not for {scorer}"
        yield Violation(("evaluate", "choices"), message, "delete it, or write scorer: choice")
    seen: set[str] = set()
    for index, choice in enumerate(choices):
        plain = unicodedata.normalize("NFC", choice).strip().casefold()
        if not plain:
            hint = "delete it, or write its text"
            yield Violation(("evaluate", "choices", index), "is nothing but white space", hint)
        elif plain in seen:
            message = f"is an option already (case does not matter): {quoted(choice)}"
            yield Violation(("evaluate", "choices", index), message, "delete one of them")
        seen.add(plain)


def _schedule(job: Values) -> Iterator[Violation]:
    if job["schedule"] is None:
        return
    try:
        parse_schedule(job["schedule"])
    except ScheduleError as error:
        yield Violation(("schedule",), error.message, error.hint)


def secrets(raw: object, key: tuple[str | int, ...] = ()) -> Iterator[Violation]:
    """Credentials that stand in the job's values. Their text is not repeated."""
    texts = (("input", "template"), ("input", "system"), ("evaluate", "pattern"))
    if key in texts or key[:1] == ("generation",):
        return
    match raw:
        case Mapping():
            for name, value in raw.items():
                inner = (*key, str(name))
                is_option = "storage_options" in key or "runtime_env" in key
                if is_option and isinstance(value, str) and value and names_a_secret(str(name)):
                    yield Violation(inner, "is a credential, and a job holds none", _CREDENTIALS)
                else:
                    yield from secrets(value, inner)
        case list() | tuple():
            for index, value in enumerate(raw):
                yield from secrets(value, (*key, index))
        case str() if redact(raw) != raw:
            yield Violation(key, "holds a credential, and a job holds none", _CREDENTIALS)


def _scheme(path: str) -> str:
    match = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", path)
    return match[1].lower() if match else ""


def _place(path: str) -> str:
    """One spelling a place, so that two can be compared: no dots, no trailing slash."""
    scheme = _scheme(path)
    if scheme in ("", "file"):
        local = urlsplit(path).path if scheme else path
        return os.path.realpath(os.path.expanduser(local)).rstrip("/")
    scheme = {"s3a": "s3", "s3n": "s3", "gcs": "gs"}.get(scheme, scheme)
    rest = os.path.normpath(path.partition("://")[2]).lstrip("/")
    return f"{scheme}://{rest}"


def _split_glob(place: str) -> tuple[str, str]:
    """The folder above the first wildcard, and the pattern from there on."""
    parts = place.split("/")
    for index, part in enumerate(parts):
        if any(c in part for c in "*?["):
            return "/".join(parts[:index]), "/".join(parts[index:])
    return place, ""


def _matches(folder: str, pattern: str) -> bool:
    """Whether parts in ``folder`` are among what a glob finds: as files, or in a folder of it."""
    parts, patterns = [*folder.split("/"), "part-000000-00000000.parquet"], pattern.split("/")
    if "**" in patterns:
        last = patterns[-1]
        return last == "**" or any(fnmatch.fnmatchcase(part, last) for part in parts)
    return len(patterns) <= len(parts) and all(
        fnmatch.fnmatchcase(part, wanted) for part, wanted in zip(parts, patterns, strict=False)
    )
