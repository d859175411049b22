"""The true configurations, built without allocating: names, shapes and counts of weights."""

from __future__ import annotations

import pytest
import torch

from batchrun.model.checkpoint import expected_tensors
from batchrun.model.config import parse_config
from batchrun.model.hybrid import NemotronH
from tests.unit.model.published import H_8B, NANO_3_4B, NANO_9B_V2, NANO_12B_V2


def build(raw: dict[str, object]) -> NemotronH:
    """The model on the meta device, where nothing is allocated."""
    with torch.device("meta"):
        return NemotronH(parse_config(raw))


def test_nano_9b_v2() -> None:
    """The 9B model has exactly the published names, 341 tensors and 8,888,227,328 parameters."""
    parameters = dict(build(NANO_9B_V2).named_parameters())
    assert all(parameter.is_meta for parameter in parameters.values())
    assert len(parameters) == 341
    assert sum(parameter.numel() for parameter in parameters.values()) == 8_888_227_328
    names = {"backbone.embeddings.weight", "backbone.norm_f.weight", "lm_head.weight"}
    mixers = {
        "M": [
            "in_proj.weight", "conv1d.weight", "conv1d.bias", "A_log", "D", "dt_bias",
            "norm.weight", "out_proj.weight",
        ],
        "-": ["up_proj.weight", "down_proj.weight"],
        "*": ["q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight"],
    }  # fmt: skip
    for i, letter in enumerate(str(NANO_9B_V2["hybrid_override_pattern"])):
        names.add(f"backbone.layers.{i}.norm.weight")
        names.update(f"backbone.layers.{i}.mixer.{name}" for name in mixers[letter])
    assert set(parameters) == names
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    assert shapes["backbone.embeddings.weight"] == (131072, 4480)
    assert shapes["backbone.layers.0.mixer.in_proj.weight"] == (22656, 4480)
    assert shapes["backbone.layers.0.mixer.conv1d.weight"] == (12288, 1, 4)
    assert shapes["backbone.layers.0.mixer.out_proj.weight"] == (4480, 10240)
    assert shapes["backbone.layers.1.mixer.up_proj.weight"] == (15680, 4480)
    assert shapes["backbone.layers.14.mixer.k_proj.weight"] == (1024, 4480)
    assert shapes["backbone.layers.39.mixer.o_proj.weight"] == (4480, 5120)


@pytest.mark.parametrize(
    ("raw", "tensors", "parameters"),
    [(H_8B, None, 8_100_852_736), (NANO_12B_V2, None, 12_310_001_152), (NANO_3_4B, 263, None)],
    ids=["8B", "12B-v2", "4B"],
)
def test_relatives(raw: dict[str, object], tensors: int | None, parameters: int | None) -> None:
    """Other models of the family have their published counts."""
    model = build(raw)
    if tensors is not None:
        assert len(list(model.parameters())) == tensors
    if parameters is not None:
        assert sum(parameter.numel() for parameter in model.parameters()) == parameters


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_conv_bias": False, "tie_word_embeddings": True},
        {"use_bias": True, "mlp_bias": True, "attention_bias": True},
    ],
)
def test_expected_tensors_are_the_parameters(changes: dict[str, object]) -> None:
    """What the loader expects, written down a second time, is what the model has."""
    raw = NANO_9B_V2 | changes
    shapes = {name: tuple(p.shape) for name, p in build(raw).named_parameters()}
    assert expected_tensors(parse_config(raw)) == shapes


def test_memory_of_a_sequence() -> None:
    """The 9B model keeps 141.6 MB of SSM state a sequence and 16 KiB of KV a token."""
    config = parse_config(NANO_9B_V2)
    assert config.ssm_state_elements * 4 == 27 * 5_242_880
    assert config.conv_state_elements * 2 == 27 * 73_728
    assert config.kv_elements_per_token * 2 == 16_384
    assert parse_config(NANO_12B_V2).kv_elements_per_token * 2 == 24_576
    assert parse_config(H_8B).ssm_state_elements == 25_165_824
