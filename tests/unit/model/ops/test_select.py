"""Which operators are chosen where, and what is said about it."""

from __future__ import annotations

import importlib.metadata
from types import SimpleNamespace

import pytest
import torch

from batchrun.model import ops
from batchrun.model.ops import mamba_kernels, select_ops
from batchrun.model.ops.mamba_kernels import MAMBA_VERSION, find_obstacle
from batchrun.model.ops.plain import PlainOps

CUDA = torch.device("cuda")


def install(monkeypatch: pytest.MonkeyPatch, **versions: str) -> None:
    """Let these distributions be what is installed."""

    def version(name: str) -> str:
        try:
            return versions[name.replace("-", "_")]
        except KeyError:
            raise importlib.metadata.PackageNotFoundError(name) from None

    monkeypatch.setattr(importlib.metadata, "version", version)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A GPU as far as it is asked about itself."""
    found = SimpleNamespace(capability=(8, 6))
    properties = SimpleNamespace(multi_processor_count=72)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: found.capability)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    return found


@pytest.mark.parametrize(
    ("versions", "said"),
    [
        ({}, "triton is not installed"),
        ({"triton": "3.7.1"}, "mamba-ssm is not installed"),
        ({"triton": "3.7.1", "mamba_ssm": MAMBA_VERSION}, "einops is not installed"),
        (
            {"triton": "3.7.1", "mamba_ssm": "2.4.0", "einops": "0.8"},
            f"mamba-ssm 2.4.0 is installed and {MAMBA_VERSION} is needed",
        ),
    ],
)
def test_what_is_missing_is_named_with_the_remedy(
    monkeypatch: pytest.MonkeyPatch, gpu: SimpleNamespace, versions: dict[str, str], said: str
) -> None:
    """On a GPU without the kernels the plain operators run, and both texts say what to do."""
    install(monkeypatch, **versions)
    selection = select_ops(CUDA)
    assert isinstance(selection.ops, PlainOps)
    assert selection.reason == (f"plain PyTorch operators on cuda, many times slower: {said}")
    assert selection.hint == "run scripts/install_gpu.sh"


def test_an_untested_triton_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """By its version, with what to install instead; a tested one is not."""
    others = {"mamba_ssm": MAMBA_VERSION, "einops": "0.8.2"}
    install(monkeypatch, triton="4.0.0", **others)
    obstacle = find_obstacle()
    assert obstacle is not None and "triton 4.0.0" in obstacle.reason
    assert "constraints.txt" in obstacle.hint
    install(monkeypatch, triton="3.7.1", **others)
    assert find_obstacle() is None


def test_an_old_gpu_runs_the_plain_operators(
    monkeypatch: pytest.MonkeyPatch, gpu: SimpleNamespace
) -> None:
    """One before Ampere, with both capabilities named."""
    monkeypatch.setattr(mamba_kernels, "find_obstacle", lambda: None)
    gpu.capability = (7, 5)
    selection = select_ops(CUDA)
    assert isinstance(selection.ops, PlainOps)
    assert "need compute capability 8.0 and this GPU has 7.5" in selection.reason


def test_kernels_that_cannot_be_compiled_are_not_used(
    monkeypatch: pytest.MonkeyPatch, gpu: SimpleNamespace
) -> None:
    """A missing compiler shows when the first kernel is launched, not when a job's rows fail."""
    monkeypatch.setattr(mamba_kernels, "find_obstacle", lambda: None)

    def fail(**_: object) -> None:
        raise RuntimeError("Failed to find C compiler.\nMore")

    monkeypatch.setattr(mamba_kernels, "load_kernels", fail)
    pytest.importorskip("triton", reason="the kernels' files import it")
    selection = select_ops(CUDA)
    assert isinstance(selection.ops, PlainOps)
    assert selection.reason.endswith(
        "cannot be compiled here (RuntimeError: Failed to find C compiler.)"
    )
    assert "gcc" in selection.hint


def test_wrong_results_of_the_first_kernel_are_found() -> None:
    """What compiles and computes something else is no operator."""

    class Wrong(PlainOps):
        def conv_update(self, *arguments: torch.Tensor | None) -> torch.Tensor:  # type: ignore[override]
            return super().conv_update(*arguments) * 1.1  # type: ignore[arg-type]

    ops._try_out(PlainOps(), torch.device("cpu"))
    with pytest.raises(RuntimeError, match="wrong results"):
        ops._try_out(Wrong(), torch.device("cpu"))
