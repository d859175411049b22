"""Matrices of int8: how far from the original, and the same numbers whichever way is taken."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from batchrun.model import quantize as module
from batchrun.model.checkpoint import expected_tensors
from batchrun.model.config import ModelConfig, parse_config
from batchrun.model.hybrid import NemotronH
from batchrun.model.ops.plain import PlainOps
from batchrun.model.quantize import Int8Linear, dequantize, int8_linear, quantize
from batchrun.model.sizes import Quantization, is_linear
from batchrun.model.weights import load_model
from tests.unit.model.models import SMALL, Driver, assert_close, random_model, random_tokens

WIDE = replace(
    SMALL,
    vocab_size=300,
    hidden_size=96,
    intermediate_size=336,
    layer_pattern="M-M*-M-",
    mamba_head_dim=24,
    ssm_state_size=16,
)
BIASED = replace(SMALL, attention_bias=True, mlp_bias=True, mamba_proj_bias=True)
TIED = replace(SMALL, tie_word_embeddings=True)


def load(folder: Path, config: ModelConfig, dtype: torch.dtype = torch.float32) -> NemotronH:
    """The checkpoint in int8."""
    return load_model(folder, config, dtype, "cpu", Quantization.INT8)


def saved(folder: Path, config: ModelConfig, seed: int = 0) -> NemotronH:
    """A random model and its checkpoint in ``folder``."""
    model = random_model(config, seed)
    save_file(dict(model.state_dict()), folder / "model.safetensors")
    return model


def twin(model: NemotronH, config: ModelConfig) -> NemotronH:
    """``model`` with the matrices that its integers stand for, in float32."""
    plain = NemotronH(replace(config, tie_word_embeddings=False)).eval().requires_grad_(False)
    for name, target in plain.named_parameters():
        layer = model.get_submodule(name.rpartition(".")[0])
        if isinstance(layer, Int8Linear) and name.endswith(".weight"):
            rows = dequantize(layer.weight, layer.scale)
            target.copy_(rows if layer.wide is None else torch.cat([rows, layer.wide.float()]))
        else:
            target.copy_(model.get_parameter(name))
    return plain


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding(dtype: torch.dtype) -> None:
    """Every weight is within half a step of its row, and a step is at most 1 % above what 127
    levels for the largest need; a scale is the same number in either dtype."""
    weight = torch.randn(64, 100, generator=torch.Generator().manual_seed(0))
    weight *= torch.logspace(-20, 20, 64)[:, None]
    integers, scale = quantize(weight.to(dtype), dtype)
    assert integers.dtype is torch.int8
    assert scale.dtype is dtype
    assert torch.equal(scale.float(), scale.bfloat16().float())
    error = (dequantize(integers, scale) - weight.to(dtype).float()).abs().amax(1)
    assert (error <= scale.float() * 0.501).all()
    largest = weight.to(dtype).float().abs().amax(1)
    assert (scale.float() <= largest / 127 * 1.01).all()
    assert integers.abs().max() <= 127


def test_rows_of_nothing_and_of_nonsense() -> None:
    """A row of zeros stays zeros; one that holds NaN or infinity does not become numbers."""
    weight = torch.ones(4, 3)
    weight[0] = 0
    weight[1, 1] = torch.nan
    weight[2, 1] = torch.inf
    integers, scale = quantize(weight, torch.float32)
    out = torch.empty(1, 4)
    int8_linear(torch.ones(1, 3), integers, scale, out)
    assert out[0, 0] == 0
    assert not torch.isfinite(out[0, 1:3]).any()
    assert out[0, 3].item() == pytest.approx(3, rel=0.01)


@pytest.mark.parametrize("tokens", [1, 4, 5, 33])
@pytest.mark.parametrize("shape", [(1, 1), (130, 67), (96, 15680), (700, 512)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_way_computes_the_same(
    tokens: int, shape: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The packed product and the one by blocks are that of the widened matrix, for any number of
    tokens and for sizes that are multiples of nothing."""
    generator = torch.Generator().manual_seed(tokens)
    integers = torch.randint(-127, 128, shape, generator=generator, dtype=torch.int8)
    scale = torch.rand(shape[0], generator=generator).add(0.5).to(dtype)
    x = torch.randn(tokens, shape[1], generator=generator).to(dtype)
    expected = x.double() @ dequantize(integers, scale).double().t()
    size = expected.abs().mean() * (1e-5 if dtype is torch.float32 else 3e-2)
    for scratch_bytes in (1, 64 << 10, 8 << 20):
        monkeypatch.setattr(module, "_CPU_SCRATCH_BYTES", {dtype: scratch_bytes})
        out = torch.full((tokens, shape[0]), torch.nan, dtype=dtype)
        int8_linear(x, integers, scale, out)
        assert (out.double() - expected).abs().max() < size * 4


@pytest.mark.parametrize("config", [SMALL, WIDE, BIASED, TIED])
def test_the_model_is_that_of_the_widened_matrices(config: ModelConfig, tmp_path: Path) -> None:
    """Prefill and decode of the quantised model give the logits of a plain one with the matrices
    that the integers stand for."""
    saved(tmp_path, config)
    model = load(tmp_path, config)
    ids = random_tokens(config, 30)
    expected = Driver(twin(model, config)).run(ids)
    assert_close(Driver(model).run(ids), expected)
    assert_close(Driver(model).run(ids, cuts=range(3, 30)), expected)
    model.prepare()
    assert not any(name.endswith("q_proj.weight") for name, _ in model.named_parameters())
    assert_close(Driver(model).run(ids), expected)


class CountingOps(PlainOps):
    """Operators with a product of their own for quantised matrices."""

    def __init__(self) -> None:
        self.count = 0

    def int8_linear(self, x: Tensor, integers: Tensor, scale: Tensor, out: Tensor) -> None:
        """Counted."""
        self.count += 1
        int8_linear(x, integers, scale, out)


def test_operators_bring_their_product(tmp_path: Path) -> None:
    """A prepared model makes every product of a quantised matrix by the operators' kernel."""
    saved(tmp_path, SMALL)
    model = load(tmp_path, SMALL)
    ids = random_tokens(SMALL, 9)
    expected = Driver(model).run(ids)
    model.ops = ops = CountingOps()
    model.prepare()
    assert_close(Driver(model).run(ids), expected)
    assert ops.count == sum(isinstance(layer, Int8Linear) for layer in model.modules()) == 15


@pytest.mark.parametrize("config", [SMALL, WIDE, BIASED, TIED])
@pytest.mark.parametrize("seed", [0, 1])
def test_logit_error(config: ModelConfig, seed: int, tmp_path: Path) -> None:
    """On random weights int8 moves the logits by less than 6 % of their spread (root of mean
    squares), 7 % together with bfloat16, which alone costs 2 %; and it does move them."""
    model = saved(tmp_path, config, seed)
    ids = random_tokens(config, 48, seed)
    exact = Driver(model).run(ids)
    for dtype, bound in ((torch.float32, 0.06), (torch.bfloat16, 0.07)):
        logits = Driver(load(tmp_path, config, dtype), dtype=dtype).run(ids)
        error = (logits - exact).square().mean().sqrt() / exact.std()
        assert 0.005 < error.item() < bound


def test_what_is_quantised(tmp_path: Path) -> None:
    """The matrices of the layers and the head; embeddings, norms, convolutions, A, D, dt_bias, and
    the rows that make dt are the very numbers of the checkpoint."""
    original = saved(tmp_path, SMALL)
    model = load(tmp_path, SMALL)
    assert not any(isinstance(layer, nn.Linear) for layer in model.modules())
    for name in expected_tensors(SMALL):
        if is_linear(name) or name == "lm_head.weight":
            layer = model.get_submodule(name.removesuffix(".weight"))
            assert isinstance(layer, Int8Linear)
            assert layer.weight.dtype is torch.int8
            is_projection = name.endswith("in_proj.weight")
            if is_projection:
                assert torch.equal(_wide(layer), original.get_parameter(name)[-6:])
            assert (layer.wide is not None) == is_projection
        else:
            assert torch.equal(model.get_parameter(name), original.get_parameter(name))


def _wide(layer: Int8Linear) -> Tensor:
    assert layer.wide is not None
    return layer.wide


@pytest.mark.parametrize("cuts", [(0, 70), (0, 13, 14, 60, 64, 67, 70)])
def test_filling_in_pieces(cuts: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows may come in any pieces, as where matrices that share an input are stored apart."""
    weight = torch.randn(70, 12, generator=torch.Generator().manual_seed(0))
    whole = Int8Linear(12, 70, torch.float32, bias=False, num_wide=6)
    whole.fill(weight)
    monkeypatch.setattr(module, "_ROWS_AT_ONCE_BYTES", 4 * 12 * 5)
    pieces = Int8Linear(12, 70, torch.float32, bias=False, num_wide=6)
    for first, last in pairwise(cuts):
        pieces.fill(weight[first:last], first)
    assert torch.equal(pieces.weight, whole.weight)
    assert torch.equal(pieces.scale, whole.scale)
    assert torch.equal(_wide(pieces), weight[64:])
    assert torch.equal(_wide(whole), weight[64:])


_MEASURE = """
import resource, sys, torch
from pathlib import Path
from batchrun.model.config import load_config
from batchrun.model.sizes import Quantization
from batchrun.model.weights import load_model
folder = Path(sys.argv[1])
config = load_config(folder)
if sys.argv[2] == "int8":
    model = load_model(folder, config, torch.bfloat16, "cpu", Quantization.INT8)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_memory_while_loading(tmp_path: Path) -> None:
    """Never two copies: loading 150 MB of bfloat16 as int8 takes what the int8 model takes, plus
    the largest tensor, plus the rows being quantised."""
    config = {
        "model_type": "nemotron_h", "vocab_size": 8192, "hidden_size": 1024,
        "hybrid_override_pattern": "-" * 16, "intermediate_size": 2048,
        "torch_dtype": "bfloat16",
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    shapes = expected_tensors(parse_config(config))
    save_file(
        {name: torch.ones(shape, dtype=torch.bfloat16) for name, shape in shapes.items()},
        tmp_path / "model.safetensors",
    )
    weights = (tmp_path / "model.safetensors").stat().st_size
    assert weights > 150e6
    peaks = [_peak_bytes(tmp_path, how) for how in ("nothing", "int8")]
    held = weights / 2 + 8192 * 1024  # int8, and the embeddings in bfloat16
    largest = 8192 * 1024 * 2
    assert peaks[1] - peaks[0] < held + largest + 3 * module._ROWS_AT_ONCE_BYTES + 8e6


def _peak_bytes(folder: Path, how: str) -> int:
    """Peak memory of a process that loads the checkpoint, or only imports what would."""
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE, str(folder), how],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    return int(done.stdout) * (1024 if sys.platform == "linux" else 1)
