"""What is computed of a model's weights is what the loaded model takes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from batchrun.model.config import ModelConfig, parse_config
from batchrun.model.sizes import Quantization, count_weights
from batchrun.model.weights import load_model
from tests.unit.model.models import SMALL, random_model
from tests.unit.model.published import NANO_9B_V2

CONFIGS = (
    SMALL,
    replace(SMALL, tie_word_embeddings=True),
    replace(SMALL, layer_pattern="*-*-", attention_bias=True, mlp_bias=True),
    replace(SMALL, layer_pattern="MM", mamba_proj_bias=True, use_conv_bias=False),
)


def test_the_published_model() -> None:
    """The 9B model: 8.89 billion weights, 17.78 GB in bfloat16, 9.5 GB in int8, and of those a
    step reads all but the 1.17 GB of embeddings."""
    counts = count_weights(parse_config(NANO_9B_V2))
    assert counts.total == 8_888_227_328
    assert (counts.linears, counts.head) == (7_711_621_120, 587_202_560)
    assert counts.memory_bytes(2, Quantization.NONE) == 17_776_454_656
    assert counts.step_bytes(2, Quantization.NONE) == pytest.approx(16.602e9, rel=1e-3)
    assert counts.memory_bytes(2, Quantization.INT8) == pytest.approx(9.478e9, rel=3e-3)
    assert counts.step_bytes(2, Quantization.INT8) == pytest.approx(8.303e9, rel=3e-3)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("quantization", list(Quantization))
def test_bytes_are_those_of_the_loaded_model(
    config: ModelConfig, dtype: torch.dtype, quantization: Quantization, tmp_path: Path
) -> None:
    """To the byte, whatever layers, biases and ties it has."""
    save_file(dict(random_model(config).state_dict()), tmp_path / "model.safetensors")
    model = load_model(tmp_path, config, dtype, "cpu", quantization)
    held = sum(parameter.nbytes for parameter in model.parameters())
    assert count_weights(config).memory_bytes(dtype.itemsize, quantization) == held
    embeddings = model.backbone.embeddings.weight
    read = held if config.tie_word_embeddings else held - embeddings.nbytes
    if config.tie_word_embeddings and quantization is Quantization.INT8:
        read -= embeddings.nbytes
    assert count_weights(config).step_bytes(dtype.itemsize, quantization) == read
