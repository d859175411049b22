"""The two rules of ARCHITECTURE.md, read from the syntax tree of every module."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "batchrun"

# From the top down. A module imports only from lines below its own, or from its own folder.
# Where two names share a level of ARCHITECTURE.md and one needs the other, they have two lines.
LEVELS: tuple[frozenset[str], ...] = (
    frozenset({"__init__", "__main__"}),
    frozenset({"cli"}),
    frozenset({"cluster"}),
    frozenset({"reportpage"}),
    frozenset({"foretold"}),
    frozenset({"planner"}),
    frozenset({"pipeline", "preflight", "llm", "bench", "report"}),
    frozenset({"openrows", "saving"}),
    frozenset({"scoring", "worklog", "gauges"}),
    frozenset({"leases", "rowrequests", "completions"}),
    frozenset({"reports"}),
    frozenset({"prompts", "judge"}),
    frozenset({"evaluate"}),
    frozenset({"coordinator", "data", "engine"}),
    frozenset({"attempts"}),
    frozenset({"backlog", "canary", "crew", "devices", "meter"}),
    frozenset({"model"}),
    frozenset({"job", "manifest", "metrics"}),
    frozenset({"jobproblems", "jobrules", "events"}),
    frozenset({"tools"}),
    frozenset({"jobfile", "records", "formats", "schedule"}),
    frozenset({"scores", "rows", "charts"}),
    frozenset({"jobscalars", "wording"}),
    frozenset({"logs"}),
    frozenset({"errors"}),
)

# Every library the package may import, and the only places that do: a folder or one file.
LIBRARIES: dict[str, tuple[str, ...]] = {
    "ray": ("cluster/",),
    "torch": ("engine/", "model/"),
    "numpy": ("data/", "engine/", "model/"),
    "tokenizers": ("engine/",),
    "llguidance": ("engine/constraints.py",),
    "safetensors": ("model/weights.py",),
    "triton": ("model/ops/",),
    "mamba_ssm": ("model/ops/mamba_kernels.py",),
    "jinja2": ("engine/chat.py", "prompts.py", "reportpage.py"),
    "markupsafe": ("reportpage.py",),
    "pyarrow": ("data/",),
    "fsspec": ("data/",),
    "s3fs": ("data/",),
    "botocore": ("data/",),
    "click": ("cli/",),
    "rich": ("cli/",),
    "pydantic": ("job.py",),
    "yaml": ("jobfile.py", "manifest.py"),
    "prometheus_client": ("metrics.py",),
    "math_verify": ("evaluate.py",),
}


def unit_of(module: str) -> str:
    """``batchrun.engine.sampler`` -> ``engine``; ``batchrun`` -> ``__init__``."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def imports_of(source: str, module: str) -> Iterator[tuple[int, str]]:
    """Line and name of every module that a source imports, wherever in it the import stands.

    ``from batchrun import job`` gives ``batchrun.job``. Imports by a function call count too when
    the name is written out.
    """
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                for alias in names:
                    yield node.lineno, alias.name
            case ast.ImportFrom(level=level) if level > 0:
                yield node.lineno, "." * level + (node.module or "")
            case ast.ImportFrom(module="batchrun", names=names):
                for alias in names:
                    # The version is a plain string that everybody may name.
                    if alias.name != "__version__":
                        yield node.lineno, f"batchrun.{alias.name}"
            case ast.ImportFrom(module=str(name)):
                yield node.lineno, name
            case ast.Call(
                func=ast.Name(id="__import__" | "import_module")
                | ast.Attribute(attr="import_module"),
                args=[ast.Constant(value=str(name)), *_],
            ):
                yield node.lineno, name


def violations(source: str, path: str) -> list[str]:
    """What a module at ``path`` (relative to the package) breaks, one line each."""
    module = "batchrun." + path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    unit = unit_of(module)
    level = {name: i for i, names in enumerate(LEVELS) for name in names}
    if unit not in level:
        return [f"{path}: no level of the architecture names {unit}"]
    found = []
    for line, name in imports_of(source, module):
        library = name.split(".")[0]
        if name.startswith("."):
            found.append(f"{path}:{line}: relative import of {name}")
        elif library == "batchrun":
            other = unit_of(name)
            if other != unit and level.get(other, -1) <= level[unit]:
                found.append(f"{path}:{line}: imports {name}, which is not below {unit}")
        elif library not in sys.stdlib_module_names:
            homes = LIBRARIES.get(library, ())
            if not any(path == home or path.startswith(home) for home in homes):
                found.append(f"{path}:{line}: imports {library}, whose place is {homes}")
    return found


MODULES = sorted(str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", MODULES)
def test_module_keeps_both_rules(path: str) -> None:
    """Imports point downward, and each library is imported in its own place alone."""
    assert violations((PACKAGE / path).read_text(encoding="utf-8"), path) == []


@pytest.mark.parametrize(
    ("path", "source", "said"),
    [
        ("engine/a.py", "from batchrun.data.store import Store", "not below engine"),
        ("engine/a.py", "from batchrun import coordinator", "not below engine"),
        ("errors.py", "import batchrun.records", "not below errors"),
        ("model/a.py", "def f():\n    from batchrun.cli import main", "model/a.py:2"),
        ("data/a.py", "from batchrun import LLM", "not below data"),
        ("cli/a.py", "import torch.nn", "imports torch"),
        ("coordinator.py", "import importlib\nimportlib.import_module('ray')", "imports ray"),
        ("engine/sampler.py", "import jinja2", "imports jinja2"),
        ("data/a.py", "import requests", "imports requests"),
        ("data/a.py", "from . import store", "relative"),
        ("helpers.py", "", "no level"),
    ],
)
def test_a_broken_rule_is_found(path: str, source: str, said: str) -> None:
    """The check above sees upward, sideways, hidden, relative and foreign imports."""
    [found] = violations(source, path)
    assert said in found


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("engine/a.py", "from batchrun.engine.b import c"),
        ("engine/a.py", "import torch, json\nfrom batchrun.model.config import ModelConfig"),
        ("cli/a.py", "from batchrun import __version__\nfrom batchrun.data.run import read_status"),
        ("data/__init__.py", "from batchrun.data.store import Store"),
    ],
)
def test_a_kept_rule_is_not_reported(path: str, source: str) -> None:
    """Imports of the own folder, of lower levels and of the standard library are fine."""
    assert violations(source, path) == []


def test_every_level_is_drawn() -> None:
    """The table of ARCHITECTURE.md names every module and folder of the package, and no other."""
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| \d \| ([^|]+) \|", text, re.MULTILINE)
    drawn = {name.rstrip("/") for row in rows for name in re.findall(r"`([^`]+)`", row)}
    real = {path.split("/")[0] for path in MODULES}
    assert drawn == real - {"__init__.py", "__main__.py"}


def loaded_with(*modules: str) -> set[str]:
    """The libraries that these modules load when they are imported, themselves or by others."""
    libraries: set[str] = set()
    seen: set[str] = set()
    left = list(modules)
    while left:
        name = left.pop()
        path = PACKAGE / "/".join(name.split(".")[1:])
        path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        if name in seen or not path.is_file():
            continue
        seen.add(name)
        left.append(name.rpartition(".")[0] or "batchrun")
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                for _, found in imports_of(ast.unparse(node), name):
                    libraries.add(found.split(".")[0])
                    left.append(found)
    return libraries


def test_the_driver_starts_without_the_engine() -> None:
    """What a run needs beside its workers loads no model library: torch alone is some 190 MB."""
    driver = loaded_with("batchrun.cluster.driver", "batchrun.cluster.fleet")
    assert {"ray", "pyarrow"} <= driver
    assert not {"torch", "safetensors", "llguidance", "triton"} & driver
    assert "torch" in loaded_with("batchrun.pipeline")


def test_command_line_starts_light() -> None:
    """``batchrun --help`` loads none of the heavy libraries."""
    heavy = ["torch", "ray", "pyarrow", "s3fs", "fsspec", "tokenizers", "pydantic", "jinja2"]
    code = (
        "import sys, batchrun.cli\n"
        "try:\n    batchrun.cli.main(['--help'])\n"
        "except SystemExit as end:\n    assert not end.code, end.code\n"
        f"print('heavy:', [name for name in {heavy} if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "heavy: []"
