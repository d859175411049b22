"""Compiles the operators for this machine's CPU, once, and keeps them for the next process."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

SOURCE = Path(__file__).with_name("native.cpp")
_FLAGS = ("-O3", "-std=c++17", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared")
_CHOICES = (
    ("-march=native", "-mprefer-vector-width=512", "-fopenmp"),
    ("-mcpu=native", "-fopenmp"),
    ("-march=native",),
    (),
)
"""Tried in this order: what a compiler for another kind of CPU calls them, and without OpenMP."""
_SECONDS = 60


class NoCompiler(Exception):
    """The operators cannot be compiled here; the message says why."""


def load_library() -> ctypes.CDLL:
    """The compiled operators: from the cache, else compiled now, which takes some seconds.

    The compiler is ``$CXX``, else ``c++`` or ``g++``; the cache is ``$XDG_CACHE_HOME/batchrun``,
    else ``~/.cache/batchrun``. Where that cannot be written, each process compiles for itself.

    :raises NoCompiler: there is no compiler, or it fails.
    """
    compiler = _find_compiler()
    name = f"ops-{_fingerprint(compiler)}.so"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "batchrun"
    try:
        return ctypes.CDLL(str(cache / name))
    except OSError:  # not there yet, or not what it should be
        pass
    with tempfile.TemporaryDirectory() as folder:
        built = Path(folder) / name
        _compile(compiler, built)
        try:
            library = ctypes.CDLL(str(built))
        except OSError as error:
            raise NoCompiler(f"what {compiler[0]} compiled cannot be loaded: {error}") from error
        _keep(built, cache)
    return library


def _find_compiler() -> list[str]:
    wanted = os.environ.get("CXX")
    for command in [shlex.split(wanted)] if wanted else [["c++"], ["g++"]]:
        path = shutil.which(command[0])
        if path is not None:
            return [path, *command[1:]]
    raise NoCompiler(f"no C++ compiler ({wanted or 'c++ or g++'}) is on the PATH")


def _fingerprint(compiler: list[str]) -> str:
    """Of the source, the compiler, and the CPU that code is made for."""
    digest = hashlib.sha256(SOURCE.read_bytes())
    version = Path(compiler[0]).resolve()
    digest.update(repr((compiler, str(version), version.stat().st_mtime, _FLAGS)).encode())
    digest.update(repr((_CHOICES, platform.machine(), _cpu())).encode())
    return digest.hexdigest()[:16]


def _cpu() -> str:
    """What tells CPUs apart that do not run each other's code: a shared home may serve many."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    kinds = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(kinds)}))


def _compile(compiler: list[str], target: Path) -> None:
    message = ""
    for choice in _CHOICES:
        command = [*compiler, *_FLAGS, *choice, str(SOURCE), "-o", str(target), "-lm"]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=_SECONDS, check=False
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise NoCompiler(f"{compiler[0]} does not run: {error}") from error
        if done.returncode == 0 and target.is_file():
            return
        message = message or (done.stderr.strip().splitlines() or ["it says nothing"])[-1]
    raise NoCompiler(f"{compiler[0]} fails: {message}")


def _keep(built: Path, cache: Path) -> None:
    """Put it into the cache in one step: others may be about to do the same, or to load it."""
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=cache, delete=False) as file:
            file.write(built.read_bytes())
        os.chmod(file.name, 0o755)
        os.replace(file.name, cache / built.name)
    except OSError:
        return
