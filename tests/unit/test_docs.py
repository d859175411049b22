"""The documentation is real: what it names exists, and what exists is named."""

from __future__ import annotations

import contextlib
import io
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import yaml

from batchrun import __version__
from batchrun.cli import main
from batchrun.job import json_schema
from batchrun.metrics import ALL_SERIES

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    "README.md",
    "ARCHITECTURE.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "deploy/README.md",
    "jobs/eval/README.md",
]
README = (ROOT / "README.md").read_text(encoding="utf-8")

CODE = re.compile(r"```(?P<language>\w*)\n(?P<block>.*?)```|`(?P<span>[^`\n]+)`", re.DOTALL)
COMMAND = re.compile(r"(?:^|[\s/])batchrun ((?:--?[a-z]|[a-z])[^\n|]*)")


def code_of(page: str) -> Iterator[tuple[str, str]]:
    """Language and text of every fenced block and code span of a page (a span has none)."""
    for match in CODE.finditer((ROOT / page).read_text(encoding="utf-8")):
        yield match["language"] or "", match["block"] or match["span"]


def command_lines(page: str) -> set[str]:
    """Every use of ``batchrun …`` in code of a page, without the program's name."""
    return {
        found.strip()
        for language, code in code_of(page)
        if language != "python"
        for found in COMMAND.findall(code)
    }


def commands() -> dict[str, click.Command]:
    """The real commands by name."""
    context = click.Context(main)
    found = {}
    for name in main.list_commands(context):
        command = main.get_command(context, name)
        assert command is not None
        found[name] = command
    return found


def options_of(command: click.Command) -> set[str]:
    """All spellings of a command's options."""
    return {option for p in command.params for option in (*p.opts, *p.secondary_opts)} | {"--help"}


def section(marker: str) -> str:
    """What stands in the README between ``<!-- marker -->`` and ``<!-- /marker -->``."""
    return README.split(f"<!-- {marker} -->")[1].split(f"<!-- /{marker} -->")[0]


@pytest.mark.parametrize("page", PAGES)
def test_commands_and_options_of_a_page_exist(page: str) -> None:
    """Every ``batchrun …`` in the documentation names a command and options that exist."""
    real = commands()
    for line in sorted(command_lines(page)):
        words = line.split()
        if words[0].startswith("-"):
            assert words[0] in options_of(main), line
            continue
        assert words[0] in real, line
        for word in words[1:]:
            if word.startswith("--"):
                assert word.split("=")[0] in options_of(real[words[0]]), line


def test_readme_names_every_command() -> None:
    """The README's table of commands is complete."""
    table = re.findall(r"^\| `batchrun ([a-z]+)", README, re.MULTILINE)
    assert sorted(table) == sorted(commands())


@pytest.mark.parametrize("name", sorted(commands()))
def test_help_of_a_command_has_an_example(name: str) -> None:
    """``batchrun COMMAND --help`` shows how the command is used."""
    text = commands()[name].get_help(click.Context(commands()[name], info_name=f"batchrun {name}"))
    assert len(re.findall(rf"batchrun {name}\b", text)) >= 2, text


def schema_keys() -> dict[str, object]:
    """Dotted path and default of every key of the job file, ``...`` where it is required."""
    schema = json_schema()
    found: dict[str, object] = {}
    for name, value in schema["properties"].items():
        reference = value.get("$ref") or value.get("allOf", [{}])[0].get("$ref")
        if reference is None:
            found[name] = value.get("default", ...)
            continue
        inner = schema["$defs"][reference.rpartition("/")[2]]
        for key, property_ in inner["properties"].items():
            required = key in inner.get("required", [])
            found[f"{name}.{key}"] = ... if required else property_.get("default", None)
    return found


def test_readme_names_every_key_of_the_job_file() -> None:
    """The README's table of keys has every key of the schema and no other."""
    table = re.findall(r"^\| `([a-z_.]+)` \|", section("keys"), re.MULTILINE)
    assert sorted(table) == sorted(schema_keys())


def test_readme_states_the_defaults() -> None:
    """The defaults in the README's table are those of the schema."""
    real = schema_keys()
    for key, text in re.findall(r"^\| `([a-z_.]+)` \| `(.+?)` \|", section("keys"), re.MULTILINE):
        default = real[key]
        stated = yaml.safe_load(text)
        assert default is not ..., f"{key} is required"
        assert stated == (default if default is not None or stated is None else type(stated)()), key


def test_readme_names_every_metric() -> None:
    """The README lists the series that a run exports, and no other."""
    table = re.findall(r"^\| `(batchrun_[a-z_]+)", section("metrics"), re.MULTILINE)
    assert sorted(table) == sorted(series.name for series in ALL_SERIES)


@pytest.mark.parametrize("page", PAGES)
def test_links_of_a_page_lead_somewhere(page: str) -> None:
    """Relative links name files that exist, and anchors headings."""
    text = (ROOT / page).read_text(encoding="utf-8")
    headings = {
        re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
        for title in re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    }
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("#"):
            assert target[1:] in headings, target
        elif "://" not in target:
            assert ((ROOT / page).parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES)
def test_files_that_a_page_names_exist(page: str) -> None:
    """A path of this repository in a code span or block is a file or folder."""
    pattern = re.compile(r"(?<![\w/.-])((?:scripts|jobs|tests|deploy|batchrun)/[\w./-]*[\w/])")
    for language, code in code_of(page):
        if language != "text":
            for path in pattern.findall(code):
                assert (ROOT / path).exists(), path


def test_readme_example_of_python_is_right() -> None:
    """The README's example for Python runs as it stands and prints what its comments say."""
    [block] = [code for language, code in code_of("README.md") if "import LLM" in code]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(block, "README.md", "exec"), {})
    assert printed.getvalue().split() == ["37+85=122", "+12=134", "134"]


def test_shortest_job_of_the_readme_is_valid(tmp_path: Path) -> None:
    """The README's shortest job is a whole one."""
    [block] = [code for language, code in code_of("README.md") if language == "yaml"]
    assert set(yaml.safe_load(block)) == {"model", "input", "output"}


def test_changelog_and_package_have_one_version() -> None:
    """The newest entry of the changelog is the version of the package."""
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    [newest, *_] = re.findall(r"^## (\S+)", changelog, re.MULTILINE)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert newest == __version__ == project["version"]


def test_constraints_pin_every_direct_dependency() -> None:
    """Each dependency of pyproject.toml has one version in constraints.txt."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pins = dict(
        line.split("==")
        for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
        if line and not line.startswith("#")
    )
    wanted = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    names = {re.match(r"[\w-]+", requirement)[0] for requirement in wanted}  # type: ignore[index]
    assert names - set(pins) == set()
