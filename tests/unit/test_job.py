"""The job file as values: defaults, every refusal with its words, and what a run is made of."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pydantic
import pytest

from batchrun.errors import JobError
from batchrun.job import Generation, Job, check_source, json_schema, parse_job
from batchrun.jobfile import JobSource, read_job_file

MINIMAL = """\
model:
  path: tiny
input:
  path: data/in
  prompt_column: question
output:
  path: data/out
"""


def read(tmp_path: Path, text: str, *overrides: str) -> JobSource:
    """A job file of this text, read without an environment."""
    path = tmp_path / "job.yaml"
    path.write_text(text, encoding="utf-8")
    return read_job_file(path, overrides, {})


def said(tmp_path: Path, text: str, *overrides: str) -> list[str]:
    """The problems of a job as lines, without the folder's name."""
    with pytest.raises(JobError) as caught:
        parse_job(read(tmp_path, text, *overrides))
    return str(caught.value).replace(f"{tmp_path}/", "").splitlines()


def with_keys(**sections: str) -> str:
    """The minimal job with more lines in its sections."""
    lines = []
    for line in MINIMAL.splitlines():
        lines.append(line)
        if line[:-1] in sections:
            lines.append("  " + sections.pop(line[:-1]))
    lines += [f"{name}:\n  {text}" for name, text in sections.items()]
    return "\n".join(lines) + "\n"


def test_defaults_are_those_of_the_contract(tmp_path: Path) -> None:
    """What a job does not say has the documented default; the name is the file's."""
    job = parse_job(read(tmp_path, MINIMAL))
    expected: dict[str, Any] = {
        "name": "job",
        "model": {
            "path": "tiny",
            "dtype": "auto",
            "quantization": "none",
            "state_dtype": "auto",
            "kv_dtype": "auto",
            "max_model_len": None,
        },
        "input": {
            "path": "data/in",
            "storage_options": {},
            "id_column": None,
            "prompt_column": "question",
            "messages_column": None,
            "template": None,
            "system": None,
            "columns": [],
            "overrides": [],
            "limit": None,
        },
        "generation": {
            "reasoning": True,
            "max_thinking_tokens": None,
            "thinking_grace": 0,
            "max_tokens": 1024,
            "answer_reserve": "auto",
            "temperature": 0.6,
            "top_p": 0.95,
            "top_k": 0,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "stop": [],
            "seed": 0,
            "n": 1,
            "logprobs": None,
            "ignore_eos": False,
            "response_format": None,
            "tools": [],
        },
        "output": {"path": "data/out", "storage_options": {}, "compression": "zstd"},
        "resources": {
            "workers": 1,
            "gpus_per_worker": "auto",
            "accelerator_type": None,
            "max_sequences": "auto",
            "price_per_gpu_hour": None,
        },
        "errors": {
            "max_retries": 2,
            "row_timeout_s": None,
            "hang_timeout_s": 120,
            "max_failed_rows": 0,
            "canary_rows": 0,
        },
        "limits": {"max_hours": None, "max_tokens": None, "max_cost": None},
        "checkpoint": {"interval_s": 30},
        "ray": {"address": None, "runtime_env": {}},
        "metrics": {"host": "127.0.0.1", "port": 9464},
        "evaluate": None,
        "schedule": None,
    }
    assert job.model_dump(mode="json") == expected


def test_a_job_is_frozen_and_travels(tmp_path: Path) -> None:
    """A job cannot be changed, and comes out of pickle as it went in, for Ray's workers."""
    job = parse_job(read(tmp_path, MINIMAL))
    with pytest.raises(pydantic.ValidationError):
        job.generation.max_tokens = 5  # type: ignore[misc]
    assert pickle.loads(pickle.dumps(job)) == job


def test_sections_with_nothing_in_them_are_their_defaults(tmp_path: Path) -> None:
    """A section whose keys are all commented out is as if it were not there."""
    text = MINIMAL + "generation:\n  # max_tokens: 5\nray:\nmetrics:\n"
    assert parse_job(read(tmp_path, text)) == parse_job(read(tmp_path, MINIMAL))


@pytest.mark.parametrize(
    ("section", "line", "expected"),
    [
        # Wrong names
        ("model", "kvdtype: auto", "model.kvdtype: no such key; did you mean kv_dtype?"),
        (
            "generation",
            "max_token: 5",
            "generation.max_token: no such key; did you mean max_tokens?",
        ),
        ("output", "limit: 5", "output.limit: no such key; did you mean input.limit?"),
        (
            "metrics",
            "zzz: 5",
            "metrics.zzz: no such key; delete it; the keys here are host, port",
        ),
        # Wrong types
        (
            "generation",
            'max_tokens: "64"',
            "generation.max_tokens: must be a whole number of at least 1, not the text '64'; "
            "write 64 without quotes",
        ),
        (
            "generation",
            "max_tokens: 64.0",
            "generation.max_tokens: must be a whole number of at least 1, not 64.0; "
            "the default is 1024",
        ),
        (
            "generation",
            "n: true",
            "generation.n: must be a whole number of at least 1, not true; the default is 1",
        ),
        (
            "generation",
            'reasoning: "true"',
            "generation.reasoning: must be true or false, not the text 'true'; "
            "write true without quotes",
        ),
        (
            "generation",
            "temperature: warm",
            "generation.temperature: must be a number of at least 0, not the text 'warm'; "
            "the default is 0.6",
        ),
        (
            "input",
            "columns: answer",
            "input.columns: must be a list of texts, not the text 'answer'; "
            "write a list: columns: [answer]",
        ),
        (
            "input",
            "id_column: 7",
            "input.id_column: must be a text that is not empty or null, not 7; write it in quotes: "
            'id_column: "7"',
        ),
        # Wrong words
        (
            "model",
            "dtype: bf16",
            "model.dtype: must be auto, bfloat16 or float32, not the text 'bf16'; "
            "did you mean bfloat16?",
        ),
        (
            "output",
            "compression: zst",
            "output.compression: must be zstd, snappy, gzip, lz4, brotli or none, not the text "
            "'zst'; did you mean zstd?",
        ),
        # Out of range
        (
            "generation",
            "temperature: -0.1",
            "generation.temperature: must be a number of at least 0, not -0.1; the default is 0.6",
        ),
        (
            "generation",
            "top_p: 0",
            "generation.top_p: must be a number above 0 and at most 1, not 0; the default is 0.95",
        ),
        (
            "generation",
            "top_p: 1.1",
            "generation.top_p: must be a number above 0 and at most 1, not 1.1; "
            "the default is 0.95",
        ),
        (
            "generation",
            "max_tokens: 0",
            "generation.max_tokens: must be a whole number of at least 1, not 0; "
            "the default is 1024",
        ),
        (
            "generation",
            "n: 0",
            "generation.n: must be a whole number of at least 1, not 0; the default is 1",
        ),
        (
            "generation",
            f"seed: {2**63}",
            f"generation.seed: must be a whole number, not {2**63}; the default is 0",
        ),
        (
            "generation",
            "logprobs: 5",
            "generation.logprobs: must be a whole number of at least 0 and at most 1 or null, "
            "not 5; delete the key for the default",
        ),
        (
            "errors",
            "max_failed_rows: 1.5",
            "errors.max_failed_rows: must be a whole number of at least 0 or a number of at least "
            "0 and below 1, not 1.5; the default is 0",
        ),
        (
            "resources",
            "workers: 0",
            "resources.workers: must be a whole number of at least 1 or a mapping, not 0; "
            "the default is 1",
        ),
        (
            "resources",
            "gpus_per_worker: 2",
            "resources.gpus_per_worker: must be auto, 0 or 1, not 2; the default is auto",
        ),
        (
            "resources",
            "gpus_per_worker: true",
            "resources.gpus_per_worker: must be auto, 0 or 1, not true; the default is auto",
        ),
        (
            "metrics",
            "port: 65536",
            "metrics.port: must be a whole number of at least 0 and at most 65535 or null, not "
            "65536; the default is 9464",
        ),
        # Combinations
        (
            "input",
            "template: '{{ a }}'",
            "input.template: stands beside prompt_column, but a row has one prompt; "
            "keep one of prompt_column and template",
        ),
        (
            "resources",
            "workers: {min: 3, max: 2}",
            "resources.workers: min (3) is more than max (2); exchange them",
        ),
        (
            "resources",
            "workers: {min: 3, mx: 4}",
            "resources.workers.mx: no such key; did you mean max?",
        ),
        (
            "generation",
            "answer_reserve: 1024",
            "generation.answer_reserve: must be less than max_tokens (1024), not 1024; "
            "lower it, or write auto",
        ),
        (
            "model",
            "max_model_len: 1024",
            "generation.max_tokens: is 1024, which leaves no room for a prompt in "
            "model.max_model_len (1024); lower max_tokens, or raise max_model_len",
        ),
        (
            "input",
            "columns: [a, completion]",
            "input.columns[1]: completion is a column that every output has; "
            "rename the column in the input, or do not carry it through",
        ),
        ("input", "columns: [a, a]", "input.columns[1]: names a twice; delete one of them"),
        # Credentials
        (
            "output",
            "storage_options: {secret: hush}",
            "output.storage_options.secret: is a credential, and a job holds none; credentials "
            "come from the environment (AWS_ACCESS_KEY_ID, …), a profile or the instance role",
        ),
        (
            "ray",
            "runtime_env: {env_vars: {HF_TOKEN: hush}}",
            "ray.runtime_env.env_vars.HF_TOKEN: is a credential, and a job holds none; "
            "credentials come from the environment (AWS_ACCESS_KEY_ID, …), a profile or the "
            "instance role",
        ),
    ],
)
def test_a_wrong_value(tmp_path: Path, section: str, line: str, expected: str) -> None:
    """What is wrong is said with the key's path, what it must be, and how to mend it."""
    lines = said(tmp_path, with_keys(**{section: line}))
    assert expected in [text.split(": ", 1)[1] for text in lines]


@pytest.mark.parametrize(
    ("section", "line", "key"),
    [
        ("model", "quantization: int4", "model.quantization"),
        ("model", "kv_dtype: int8", "model.kv_dtype"),
        ("model", "kv_dtype: bfloat16", "model.kv_dtype"),
    ],
)
def test_what_is_not_built_is_refused(tmp_path: Path, section: str, line: str, key: str) -> None:
    """A key of the contract whose feature is not there yet is refused at its line."""
    text = with_keys(**{section: line})
    [problem] = said(tmp_path, text)
    name = key.partition(".")[2] or key
    first = next(i for i, row in enumerate(text.splitlines(), 1) if f"{name}:" in row)
    assert problem.startswith(f"job.yaml:{first}: {key}: ")
    assert " is not available in this version; " in problem


TOOLS = """
model: {path: m}
input: {path: in, prompt_column: p}
output: {path: out}
generation:
  tools:
    - type: function
      function:
        name: add
        description: Adds.
        parameters:
          type: object
          properties: {a: {type: integer}}
          required: [a]
    - name: now
    - type: function
      function:
        name: add
        parameters: {type: dict}
    - description: nameless
      parameters:
        type: object
        properties:
          city: string
        required: city
    - type: query
      function: {name: "get weather", description: 3, parameters: [1]}
    - type: function
"""


def test_tools_are_checked_at_their_lines(tmp_path: Path) -> None:
    """Whatever is wrong with a function schema is said at its own line, all of it."""
    assert said(tmp_path, TOOLS) == [
        "job.yaml:18: generation.tools[2].function.name: is the name of tool 0 already (they are "
        "counted from 0); rename or delete one of them",
        "job.yaml:19: generation.tools[2].function.parameters.type: must be object: arguments are "
        "always named; write type: object",
        "job.yaml:20: generation.tools[3]: has no name; add name:",
        "job.yaml:24: generation.tools[3].parameters.properties.city: describes an argument that "
        "is no JSON schema; write city: {type: string}",
        "job.yaml:25: generation.tools[3].parameters.required: is no list of names; "
        "write required: [city]",
        "job.yaml:26: generation.tools[4].type: is not function, the only type of tool; "
        "write type: function",
        "job.yaml:27: generation.tools[4].function.name: is no name: a text without white space "
        "and quotes is; write for example name: get_weather",
        "job.yaml:27: generation.tools[4].function.description: is not a text; write it in quotes",
        "job.yaml:27: generation.tools[4].function.parameters: is no JSON schema of an object; "
        "write {type: object, properties: {…}}",
        "job.yaml:28: generation.tools[5].function: is missing or no mapping; "
        "write function: {name: …, description: …, parameters: …}",
    ]


def test_tools_are_kept_as_written(tmp_path: Path) -> None:
    """Good function schemas, wrapped or bare, are part of what determines the content."""
    text = TOOLS.split("    - type: function\n      function:\n        name: add\n        param")[0]
    job = parse_job(read(tmp_path, text))
    assert [list(tool) for tool in job.generation.tools] == [["type", "function"], ["name"]]
    generation = job.semantic()["generation"]
    assert isinstance(generation, dict) and generation["tools"][1] == '{"name": "now"}'
    assert job.has_tools
    assert not parse_job(read(tmp_path, MINIMAL)).has_tools


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("{type: regex}", "generation.response_format.pattern: is missing; regex needs it"),
        ("{type: choice, choices: []}", "generation.response_format.choices: must be a list of"),
        (
            "{type: choice, choices: [yes, a]}",
            "generation.response_format.choices[0]: must be a text that is not empty, not true",
        ),
        (
            "\n    type: json_schema\n    schema:\n      items:\n        uniqueItem: true",
            "generation.response_format.schema.items.uniqueItem: is not a keyword",
        ),
        ("regex", "generation.response_format: must be a mapping or null, not the text 'regex'"),
    ],
)
def test_a_response_format_that_is_none(tmp_path: Path, written: str, expected: str) -> None:
    """What is wrong inside a response format is said at the line of the very key."""
    text = with_keys(generation=f"response_format: {written}")
    [problem] = said(tmp_path, text)
    last = expected.partition(": ")[0].rpartition(".")[2].partition("[")[0]
    rows = enumerate(text.splitlines(), 1)
    line = next(
        i for i, row in rows if f"{last}:" in row or "response_format: {type: regex}" in row
    )
    assert problem.startswith(f"job.yaml:{line}: {expected}")


def test_the_order_of_a_schema_s_properties_is_content(tmp_path: Path) -> None:
    """Completions have their properties in that order, so another order is another job."""

    def semantic(properties: str) -> dict[str, object]:
        schema = f"{{type: object, properties: {{{properties}}}}}"
        line = f"response_format: {{type: json_schema, schema: {schema}}}"
        return parse_job(read(tmp_path, with_keys(generation=line))).semantic()

    one, other = semantic("a: {}, b: {}"), semantic("b: {}, a: {}")
    assert one == semantic("a: {}, b: {}")
    assert json.dumps(one, sort_keys=True) != json.dumps(other, sort_keys=True)


def test_what_is_built_is_accepted(tmp_path: Path) -> None:
    """Keys that only look like those that are refused are fine."""
    text = with_keys(
        model="kv_dtype: bfloat16\n  dtype: bfloat16\n  state_dtype: bfloat16\n"
        "  quantization: int8",
        resources="workers: {min: 2, max: 4}\n  price_per_gpu_hour: 1",
        errors="max_failed_rows: 0.5\n  canary_rows: 5",
        limits="max_hours: 0.5\n  max_tokens: 10\n  max_cost: 0.5",
        checkpoint="interval_s: 5",
        generation="tools: []\n  stop: END\n  logprobs: 1\n  max_thinking_tokens: 0\n"
        "  response_format: {type: choice, choices: [a]}",
        metrics="port: null",
        ray="runtime_env: {env_vars: {TOKENIZERS_PARALLELISM: 'false'}}",
    )
    job = parse_job(read(tmp_path, text))
    assert (job.resources.fewest_workers, job.resources.most_workers) == (2, 4)
    assert job.generation.stop == ("END",)
    assert job.errors.max_failed_rows == 0.5


def test_a_limit_of_cost_needs_a_price(tmp_path: Path) -> None:
    """Without a price, and with one of 0, it would never be reached."""
    for resources in ("workers: 1", "price_per_gpu_hour: 0"):
        [problem] = said(tmp_path, with_keys(limits="max_cost: 0.5", resources=resources))
        assert "limits.max_cost: needs the price of a GPU" in problem


def test_every_problem_at_once_in_the_order_of_the_file(tmp_path: Path) -> None:
    """One look shows all: of the text, of single values, of combinations and of overrides."""
    lines = said(
        tmp_path,
        "modle: {}\n"
        "model:\n"
        "  path: 5\n"
        "input:\n"
        "  path: ${NONE}\n"
        "  columns: [id]\n"
        "output:\n"
        "  path: ftp://host/out\n"
        "generation:\n"
        "  top_p: 2\n"
        "  answer_reserve: 2000\n"
        "metrics: 9464\n",
        "generation.n=x",
    )
    assert [line.partition(";")[0] for line in lines] == [
        "job.yaml:1: modle: no such key",
        "job.yaml:3: model.path: must be a text that is not empty, not 5",
        "job.yaml:4: input: says nowhere what a row's prompt is",
        "job.yaml:5: input.path: the environment variable NONE is not set",
        "job.yaml:6: input.columns[0]: id is a column that every output has",
        "job.yaml:8: output.path: ftp:// cannot hold an output, which needs an atomic create",
        "job.yaml:10: generation.top_p: must be a number above 0 and at most 1, not 2",
        "job.yaml:11: generation.answer_reserve: must be less than max_tokens (1024), not 2000",
        "job.yaml:12: metrics: must be a mapping, not 9464",
        "--set: generation.n: must be a whole number of at least 1, not the text 'x'",
    ]


def test_no_complaint_about_what_was_wrong_already(tmp_path: Path) -> None:
    """A rule over several keys is silent where one of them is unusable by itself."""
    text = with_keys(generation="max_tokens: many\n  answer_reserve: 5000")
    [problem] = said(tmp_path, text)
    assert "generation.max_tokens: must be a whole number" in problem


@pytest.mark.parametrize("text", ["{}\n", "model: 5\ninput: [a]\noutput: x\n", "a: 1\n"])
def test_hopeless_jobs_get_messages_too(tmp_path: Path, text: str) -> None:
    """However little of a job there is, what is missing is named."""
    lines = said(tmp_path, text)
    keys = {line.split(": ")[1] for line in lines}
    assert {"model", "input", "output"} <= keys


@pytest.mark.parametrize(
    ("inputs", "output", "relation"),
    [
        ("in", "in", "is the input itself"),
        ("in/", "./in", "is the input itself"),
        ("in", "in/out", "lies inside the input"),
        ("in/day", "in", "holds the input"),
        ("in/a.parquet", "in", "holds the input"),
        ("[other, in]", "in/out", "lies inside the input"),
        ("in/*.parquet", "in", "holds the input"),
        ("in/*", "in/out", "lies inside the input"),
        ("in/**/*.parquet", "in/x/out", "lies inside the input"),
        ("in/*/*.parquet", "in/out", "lies inside the input"),
        ("s3://b/in/", "s3://b/in/out", "lies inside the input"),
        ("s3a://b/in", "s3://b//in/../in", "is the input itself"),
        ("s3://b", "s3://b/out", "lies inside the input"),
        ("file://{tmp}/in", "{tmp}/in/out", "lies inside the input"),
        ("{tmp}/link", "{tmp}/real/out", "lies inside the input"),
        ("in", "in", "is the input itself"),
        ("in", "out", ""),
        ("in", "input", ""),
        ("in/a.parquet", "in/out", ""),
        ("in/*.parquet", "in/out", ""),
        ("s3://b/in", "s3://c/in/out", ""),
        ("s3://b/in", "b/in", ""),
        ("https://host/in/a.parquet", "in", ""),
    ],
)
def test_output_and_input_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inputs: str, output: str, relation: str
) -> None:
    """Parts never mix with prompts, however the two places are spelt."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    text = (
        f"model: {{path: tiny}}\ninput: {{path: {inputs}, prompt_column: p}}\n"
        f"output: {{path: {output}}}\n"
    ).replace("{tmp}", str(tmp_path))
    problems = check_source(read(tmp_path, text)).problems
    found = [p.message.partition(" (")[0] for p in problems if p.key == "output.path"]
    assert found == ([relation] if relation else [])


@pytest.mark.parametrize(
    ("path", "hint"),
    [
        ("ftp://x/y", "write a local folder, s3://… or gs://…"),
        ("s3n://x/y", "did you mean s3://?"),
        ("s3:/b/x", "did you mean s3://b/x?"),
        ("hf://datasets/x", "write a local folder, s3://… or gs://…"),
    ],
)
def test_outputs_that_cannot_create_atomically(tmp_path: Path, path: str, hint: str) -> None:
    """An output is a local folder, s3:// or gs://; slips of the pen are recognised."""
    [problem] = check_source(read(tmp_path, MINIMAL, f"output.path={path}")).problems
    assert (problem.key, problem.hint) == ("output.path", hint)


@pytest.mark.parametrize(
    "secret",
    [
        "s3://AKIAIOSFODNN7EXAMPLE:wJalrXUtnFEMIbPxRfiCY@bucket/in",
        "https://user:hunter22@host/in.parquet",
        "https://host/in.parquet?X-Amz-Signature=0123456789abcdef&X-Amz-Credential=AKIAX",
        "https://account.blob.core.windows.net/c/in.parquet?sv=1&sig=abcdefgh",
    ],
)
def test_credentials_in_urls_are_refused_and_not_repeated(tmp_path: Path, secret: str) -> None:
    """A URL that carries a credential is refused, and no message shows it."""
    [line] = said(tmp_path, MINIMAL, f"input.path={secret}")
    assert line.startswith("--set: input.path: holds a credential, and a job holds none; ")
    for hidden in ("AKIA", "hunter22", "0123456789abcdef", "abcdefgh", "wJalr"):
        assert hidden not in line


def test_prompts_may_speak_of_secrets(tmp_path: Path) -> None:
    """What a prompt says is the user's affair: texts of prompts are not searched."""
    text = with_keys(input="system: 'Never print password=hunter2 or https://a:b@c/'")
    assert parse_job(read(tmp_path, text)).input.system is not None


def test_semantic_configuration(tmp_path: Path) -> None:
    """The identity of a run is what determines its content, and nothing else."""
    job = parse_job(read(tmp_path, MINIMAL))

    def same(*overrides: str) -> bool:
        return parse_job(read(tmp_path, MINIMAL, *overrides)).semantic() == job.semantic()

    for operational in (
        "name=other",
        "input.path=moved",
        "output.path=moved",
        "output.compression=none",
        "resources.workers=4",
        "errors.max_retries=9",
        "metrics.port=0",
    ):
        assert same(operational), operational
    for semantic in (
        "model.path=elsewhere",
        "model.dtype=float32",
        "model.quantization=int8",
        "input.prompt_column=other",
        "input.system=Be brief",
        "input.limit=5",
        "input.columns=[a]",
        "generation.seed=1",
        "generation.max_tokens=5",
        "generation.n=2",
    ):
        assert not same(semantic), semantic
    assert json.loads(json.dumps(job.semantic())) == job.semantic()


def test_redacted(tmp_path: Path) -> None:
    """The job that is published beside the output shows no credential, whatever made the job."""
    raw = {
        "model": {"path": "tiny"},
        "input": {"path": "in", "prompt_column": "p", "storage_options": {"anon": True}},
        "output": {"path": "out", "storage_options": {"endpoint_url": "http://127.0.0.1:9"}},
    }
    job = parse_job(JobSource.of_mapping(raw))
    assert job.redacted()["output"] == {
        "path": "out",
        "storage_options": {"endpoint_url": "http://127.0.0.1:9"},
        "compression": "zstd",
    }
    options = {"secret": "hush", "client_kwargs": {"aws_access_key_id": "AKIAIOSFODNN7EXAMPLE"}}
    planted = job.model_copy(
        update={"output": job.output.model_copy(update={"storage_options": options})}
    )
    text = json.dumps(planted.redacted())
    assert "hush" not in text and "AKIA" not in text and text.count("[redacted]") == 2


def test_empty_options_are_as_if_not_given(tmp_path: Path) -> None:
    """``endpoint_url: "${S3_ENDPOINT:-}"`` without the variable means no such option."""
    text = with_keys(input='storage_options: {endpoint_url: "${S3_ENDPOINT:-}", anon: true}')
    assert parse_job(read(tmp_path, text)).input.storage_options == {"anon": True}


def test_the_checkpoint_shares_the_storage_of_its_kind() -> None:
    """A checkpoint in S3 is read with the options of the input or output that is in S3 too."""

    def options(model: str, inputs: str) -> dict[str, object]:
        raw = {
            "model": {"path": model},
            "input": {"path": inputs, "prompt_column": "p", "storage_options": {"a": 1}},
            "output": {"path": "s3://b/out", "storage_options": {"b": 2}},
        }
        return parse_job(JobSource.of_mapping(raw)).model_storage_options

    assert options("s3://m/x", "s3://b/in") == {"a": 1}
    assert options("s3://m/x", "in") == {"b": 2}
    assert options("gs://m/x", "in") == {}
    assert options("tiny", "in") == {}


def test_row_overrides() -> None:
    """A row's values replace the job's, under the same rules and with the same words."""
    base = Generation(max_tokens=100, answer_reserve=20)
    assert base.with_overrides({"max_tokens": 50, "temperature": 0}).max_tokens == 50
    for values, expected in (
        ({"top_p": 2}, "top_p must be a number above 0 and at most 1, not 2"),
        ({"max_tokens": "5"}, "max_tokens must be a whole number of at least 1, not the text '5'"),
        ({"max_tokens": 20}, "answer_reserve (20) must be less than max_tokens (20)"),
    ):
        with pytest.raises(ValueError) as caught:
            base.with_overrides(values)
        assert str(caught.value) == expected


def test_json_schema_describes_the_job_file() -> None:
    """Editors learn every key with its meaning, and that others are mistakes."""
    schema = json_schema()
    assert list(schema["properties"]) == list(Job.model_fields)
    assert schema["required"] == ["model", "input", "output"]
    for name, definition in schema["$defs"].items():
        assert definition["additionalProperties"] is False, name
        for key, part in definition["properties"].items():
            assert part["description"], f"{name}.{key}"
    assert schema["$defs"]["Generation"]["properties"]["top_p"]["maximum"] == 1


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("scorer: exact", "job.yaml:8: evaluate.answer_column: is missing"),
        ("answer_column: a", "job.yaml:8: evaluate.scorer: is missing"),
        (
            "{answer_column: a, scorer: exakt}",
            "evaluate.scorer: must be exact, number, choice, regex or math, not the text 'exakt'; "
            "did you mean exact?",
        ),
        ("{answer_column: a, scorer: exact, k: 1}", "evaluate.k: no such key"),
        ("{answer_column: a, scorer: regex}", "evaluate.pattern: is missing"),
        (
            "{answer_column: a, scorer: regex, pattern: '(x'}",
            "job.yaml:9: evaluate.pattern: is no regular expression: "
            "missing ), unterminated subpattern at position 0",
        ),
        ("{answer_column: a, scorer: exact, pattern: x}", "is for the scorer regex, not for exact"),
        ("{answer_column: a, scorer: exact, choices: [x]}", "is for the scorer choice, not for"),
        (
            "{answer_column: a, scorer: choice, choices: [a, b, A]}",
            "evaluate.choices[2]: is an option already (case does not matter): 'A'",
        ),
        ("{answer_column: a, scorer: choice, choices: [a, ' ']}", "choices[1]: is nothing but"),
    ],
)
def test_wrong_scoring(tmp_path: Path, line: str, expected: str) -> None:
    """What is wrong with `evaluate` is said once, at its line."""
    [problem] = said(tmp_path, with_keys(evaluate=line))
    assert expected in problem


def test_scoring_is_part_of_the_content(tmp_path: Path) -> None:
    """Another scorer is another run; a job that does not ask for scores is what it always was."""
    plain = parse_job(read(tmp_path, MINIMAL)).semantic()
    assert "evaluate" not in plain
    contents = [
        parse_job(read(tmp_path, with_keys(evaluate=line))).semantic()["evaluate"]
        for line in (
            "{answer_column: a, scorer: exact}",
            "{answer_column: b, scorer: exact}",
            "{answer_column: a, scorer: number}",
            "{answer_column: a, scorer: regex, pattern: 'token=(\\w+)'}",
            "{answer_column: a, scorer: choice, choices: ['yes', 'no']}",
        )
    ]
    assert contents[0] == {
        "answer_column": "a", "scorer": "exact", "pattern": None, "choices": [],
    }  # fmt: skip
    assert len({json.dumps(content) for content in contents}) == 5
