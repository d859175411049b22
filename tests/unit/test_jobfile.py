"""The job file as text: what is read, what is refused, and where a problem is said to be."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from batchrun.errors import JobError
from batchrun.jobfile import JobSource, read_job_file


def read(tmp_path: Path, text: str, *overrides: str, **environ: str) -> JobSource:
    """A job file of this text."""
    path = tmp_path / "job.yaml"
    path.write_text(text, encoding="utf-8")
    return read_job_file(path, overrides, environ)


def refusal(tmp_path: Path, content: str | bytes) -> str:
    """What is said of a file that cannot be read at all, without the folder's name."""
    path = tmp_path / "job.yaml"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(JobError) as caught:
        read_job_file(path, (), {})
    assert caught.value.exit_code == 2
    return str(caught.value).replace(str(path), "job.yaml")


def problems(source: JobSource) -> list[str]:
    """The problems as lines, without the folder's name."""
    return [str(p).replace(p.location.rpartition("/")[0] + "/", "") for p in source.problems]


def test_values_and_their_lines(tmp_path: Path) -> None:
    """Every value comes with the line of its key; a key that is not there has its section's."""
    source = read(tmp_path, "# a comment\nmodel:\n  path: tiny\ninput:\n  columns:\n  - a\n  - b\n")
    assert source.raw == {"model": {"path": "tiny"}, "input": {"columns": ["a", "b"]}}
    lines = {
        key: source.place(key).rpartition(":")[2]
        for key in ("model.path", "input.columns", "input.path", "output.path")
    }
    assert lines == {
        "model.path": "3",
        "input.columns": "5",
        "input.path": "4",
        "output.path": "2",
    }
    assert source.place(("input", "columns", 1)).endswith("job.yaml:7")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("0.6", 0.6),
        (".5", 0.5),
        ("1_000", 1000),
        ("-7", -7),
        ("0x10", 16),
        ("0", 0),
        ("yes", True),
        ("Off", False),
        ("~", None),
        ("", None),
        ('"64"', "64"),
        ("'yes'", "yes"),
        ("2026-01-01", "2026-01-01"),
        ("1:30", "1:30"),
        ("0755", "0755"),
        ("s3://bucket/a:b", "s3://bucket/a:b"),
        ("Grüße 🦀", "Grüße 🦀"),
        ("|\n  two\n  lines", "two\nlines"),
    ],
)
def test_scalars(tmp_path: Path, text: str, value: object) -> None:
    """A scalar means what it looks like: no dates, base-60 or octal numbers by surprise."""
    found = read(tmp_path, f"key: {text}\n").raw["key"]
    assert found == (value + "\n" if text.startswith("|") and isinstance(value, str) else value)
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "job.yaml: is empty; start from one of the files in jobs/"),
        (" \n\n", "job.yaml: is empty"),
        ("# nothing\n", "holds nothing but comments at the top"),
        ("- a\n- b\n", "job.yaml:1: holds a list at the top; a job file is a mapping"),
        ("just words\n", "job.yaml:1: holds a single value at the top"),
        (b"model:\n  path: \xff\n", "job.yaml:2: is not UTF-8 text (byte 0xff)"),
        (b"\xff\xfem\x00", "job.yaml:1: is not UTF-8 text"),
        ("model:\n\tpath: tiny\n", "job.yaml:2: column 1: not valid YAML: a tab in the indent"),
        ("model: {path: tiny\n", "job.yaml:2: column 1: not valid YAML"),
        ("a: b: c\n", "job.yaml:1: column 5: not valid YAML: mapping values are not allowed here"),
        ("a: 'x\n", "job.yaml:2: column 1: not valid YAML"),
        ("a: \x07\n", "job.yaml:1: holds the control character U+0007; delete it"),
        ("a: 1\n---\nb: 2\n", "job.yaml:2: a second document begins here"),
        ("a: " + "[" * 40 + "]" * 40, "job.yaml:1: is nested deeper than 32 levels"),
        ("a: " + "x" * 300_000, "job.yaml: is larger than 256 KiB"),
    ],
)
def test_what_is_no_job_file(tmp_path: Path, content: str | bytes, said: str) -> None:
    """A file that is not one mapping of valid YAML is refused with its line and column."""
    assert said in refusal(tmp_path, content)


def test_paths_that_are_no_files(tmp_path: Path) -> None:
    """A missing file, a folder and an odd path are refused, with a file that may be meant."""
    (tmp_path / "demo.yaml").write_text("a: 1\n")
    said = []
    for path in ("dmo.yaml", ".", "no/such/folder.yaml", "a\0b"):
        with pytest.raises(JobError) as caught:
            read_job_file(str(tmp_path / path), (), {})
        said.append(str(caught.value).replace(str(tmp_path), "T"))
    assert said[0] == "T/dmo.yaml: no such file; did you mean T/demo.yaml?"
    assert said[1] == "T: is a folder, not a job file; did you mean T/demo.yaml?"
    assert said[2] == "T/no/such/folder.yaml: no such file; name the YAML file of a job"
    assert (
        said[3]
        == "T/a\\x00b: cannot be read: embedded null byte; check the path and its permissions"
    )


def test_a_pipe_can_be_read(tmp_path: Path) -> None:
    """A job may come from a pipe, as in ``batchrun validate <(…)``."""
    read_end, write_end = os.pipe()
    os.write(write_end, b"name: piped\n")
    os.close(write_end)
    assert read_job_file(f"/dev/fd/{read_end}", (), {}).raw == {"name": "piped"}
    os.close(read_end)


def test_every_problem_of_the_text_is_found(tmp_path: Path) -> None:
    """Duplicate keys, anchors, aliases, tags, merge keys and bad numbers: all, each at its line."""
    source = read(
        tmp_path,
        "a: 1\n"
        "a: 2\n"
        "b: &x {c: 1}\n"
        "d: *x\n"
        "e: !!python/object/apply:os.system [touch /tmp/never]\n"
        "f: !custom g\n"
        "g: {<<: *x, h: .nan}\n"
        "i: 1e999\n"
        f"j: {'9' * 5000}\n"
        "k: {{ text }}\n"
        "? [l]\n: m\n"
        "n: fine\n",
    )
    assert [text.partition(";")[0] for text in problems(source)] == [
        "job.yaml:2: a: is there twice",
        "job.yaml:3: b: the anchor &x is not allowed",
        "job.yaml:4: d: the alias *x is not allowed",
        "job.yaml:5: e: the YAML tag !!python/object/apply:os.system is not allowed",
        "job.yaml:6: f: the YAML tag !custom is not allowed",
        "job.yaml:7: g.<<: merge keys are not allowed in a job file",
        "job.yaml:7: g.h: .nan is not a finite number",
        "job.yaml:8: i: is a number too large to be held",
        "job.yaml:9: j: is a number of more than 40 digits",
        "job.yaml:10: k: has a key that is no plain word",
        "job.yaml:11: has a key that is no plain word",
    ]
    assert source.raw["n"] == "fine"
    assert not Path("/tmp/never").exists()


def test_exploding_aliases_cost_nothing(tmp_path: Path) -> None:
    """A file whose aliases would expand to billions of values is refused in under a second."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 30)]
    started = time.monotonic()
    source = read(tmp_path, "\n".join(lines))
    assert time.monotonic() - started < 1
    assert "the anchor &a0 is not allowed" in str(source.problems[0])


def test_environment_variables(tmp_path: Path) -> None:
    """Variables are read inside values, typed afterwards, and cannot add structure."""
    source = read(
        tmp_path,
        "plain: ${N}\n"
        'quoted: "${N}"\n'
        "inside: s3://${BUCKET}/in-${N}\n"
        "fallback: ${NONE:-7}\n"
        "of_empty: ${EMPTY:-7}\n"
        "empty: ${EMPTY}\n"
        'no_default: "${NONE:-}"\n'
        "literal: a $${N} and $5 and $N\n"
        "injected: ${EVIL}\n",
        N="64",
        BUCKET="b",
        EMPTY="",
        EVIL="x\nadmin: true",
    )
    assert source.problems == ()
    assert source.raw == {
        "plain": 64,
        "quoted": "64",
        "inside": "s3://b/in-64",
        "fallback": 7,
        "of_empty": 7,
        "empty": None,
        "no_default": "",
        "literal": "a ${N} and $5 and $N",
        "injected": "x\nadmin: true",
    }


def test_unset_and_misspelt_variables(tmp_path: Path) -> None:
    """A variable that is not set is a problem at its line, with both ways to mend it."""
    source = read(tmp_path, "a: ok\nb:\n  c: ${MISSING}\nd: ${not a name}\n")
    assert problems(source) == [
        "job.yaml:3: b.c: the environment variable MISSING is not set; "
        "export MISSING=…, or give a default: ${MISSING:-…}",
        "job.yaml:4: d: has a `${` that names no variable; "
        "write ${NAME} or ${NAME:-default}, or $${ for a literal ${",
    ]
    assert source.broken == {("b", "c"), ("d",)}


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("generation.max_tokens=256", ("generation", "max_tokens"), 256),
        ("generation.reasoning=false", ("generation", "reasoning"), False),
        ("input.limit=", ("input", "limit"), None),
        ("input.limit=null", ("input", "limit"), None),
        ("input.columns=[a, 'b']", ("input", "columns"), ["a", "b"]),
        ("resources.workers={min: 1, max: 1}", ("resources", "workers"), {"min": 1, "max": 1}),
        ("input.system=Answer: yes", ("input", "system"), "Answer: yes"),
        ("input.template={{ text }}?", ("input", "template"), "{{ text }}?"),
        ('name="007"', ("name",), "007"),
        ("output.path=s3://b/x=y", ("output", "path"), "s3://b/x=y"),
        ("output.path=${WHERE}", ("output", "path"), "elsewhere"),
    ],
)
def test_overrides(tmp_path: Path, override: str, key: tuple[str, ...], value: object) -> None:
    """``--set`` takes a scalar as it stands or a YAML list or mapping, and makes sections."""
    source = read(tmp_path, "input: {limit: 3}\nray:\n", override, WHERE="elsewhere")
    found: object = source.raw
    for part in key:
        assert isinstance(found, dict)
        found = found[part]
    assert found == value
    assert source.problems == ()
    assert source.place(key) == "--set"


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("generation.max_tokens", "--set: 'generation.max_tokens' is not of the form key.path"),
        ("=3", "--set: '=3' is not of the form key.path=value"),
        ("a..b=3", "--set: 'a..b=3' is not of the form key.path=value"),
        ("name.first=x", "--set: name.first: name is not a section; set name itself"),
        ("input.columns=[a", "--set: column 3: not valid YAML"),
        ("input.path=${NONE}", "--set: input.path: the environment variable NONE is not set"),
    ],
)
def test_bad_overrides(tmp_path: Path, override: str, said: str) -> None:
    """An override that cannot be read is a problem at ``--set``."""
    [problem] = read(tmp_path, "name: x\n", override).problems
    assert str(problem).startswith(said)


def test_an_override_replaces_a_broken_value(tmp_path: Path) -> None:
    """A value that is set on the command line need not be readable in the file."""
    source = read(tmp_path, "input:\n  path: ${NONE}\n", "input.path=here")
    assert source.problems == ()
    assert source.raw == {"input": {"path": "here"}}


def test_control_characters_do_not_reach_messages(tmp_path: Path) -> None:
    """A key or a file name cannot steer a terminal or forge a line."""
    [problem] = read(tmp_path, '"\\e[31m\\nx": ${NONE}\n').problems
    assert "\x1b" not in str(problem) and "\n" not in str(problem)
    with pytest.raises(JobError) as caught:
        read_job_file(tmp_path / "a\x1b[2J\nb.yaml", (), {})
    assert "\x1b" not in str(caught.value) and "\n" not in str(caught.value)
