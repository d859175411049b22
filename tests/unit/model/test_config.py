"""Both spellings of config.json are read; what would be computed wrongly is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from batchrun.errors import CheckpointError
from batchrun.model.config import LayerKind, load_config, parse_config
from tests.unit.model.published import NANO_9B_V2

RAW: dict[str, object] = {
    "model_type": "nemotron_h",
    "vocab_size": 512,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "hybrid_override_pattern": "M-*M",
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "mamba_num_heads": 6,
    "mamba_head_dim": 16,
    "ssm_state_size": 32,
    "n_groups": 3,
    "conv_kernel": 3,
    "chunk_size": 64,
    "layer_norm_epsilon": 1e-6,
    "use_conv_bias": False,
    "use_bias": True,
    "mlp_bias": True,
    "max_position_embeddings": 1000,
    "torch_dtype": "float32",
}


def without(*keys: str) -> dict[str, object]:
    """The raw config less some keys."""
    return {key: value for key, value in RAW.items() if key not in keys}


def test_every_key() -> None:
    """Each key lands in its field."""
    config = parse_config(RAW)
    assert config.layers == (LayerKind.MAMBA, LayerKind.MLP, LayerKind.ATTENTION, LayerKind.MAMBA)
    assert (config.vocab_size, config.hidden_size, config.intermediate_size) == (512, 64, 96)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (4, 2, 24)
    assert (config.mamba_num_heads, config.mamba_head_dim, config.ssm_state_size) == (6, 16, 32)
    assert (config.num_groups, config.conv_kernel, config.chunk_size) == (3, 3, 64)
    assert (config.norm_eps, config.max_position_embeddings) == (1e-6, 1000)
    assert (config.use_conv_bias, config.mamba_proj_bias, config.mlp_bias) == (False, True, True)
    assert (config.attention_bias, config.tie_word_embeddings) == (False, False)
    assert config.torch_dtype == "float32"
    assert (config.mamba_inner_size, config.conv_dim) == (96, 96 + 2 * 3 * 32)
    assert (config.num_mamba_layers, config.num_attention_layers, config.num_mlp_layers) == (
        2,
        1,
        1,
    )


def test_second_spelling() -> None:
    """Keys with the prefix `mamba_` and the layer list of transformers 5 mean the same."""
    renamed = without(
        "ssm_state_size", "n_groups", "conv_kernel", "chunk_size", "use_conv_bias", "head_dim",
        "layer_norm_epsilon", "hybrid_override_pattern", "torch_dtype",
    )  # fmt: skip
    renamed |= {
        "mamba_state_dim": 32,
        "mamba_num_groups": 3,
        "mamba_d_conv": 3,
        "mamba_chunk_size": 64,
        "mamba_conv_bias": False,
        "attention_head_dim": 24,
        "rms_norm_eps": 1e-6,
        "layers_block_type": ["linear_attention", "mlp", "full_attention", "mamba"],
        "dtype": "torch.float32",
    }
    assert parse_config(renamed) == parse_config(RAW)


def test_keys_without_effect() -> None:
    """Rope, expand and limits of the time step (infinity in both its spellings) are ignored."""
    inert = {"rope_theta": 1e4, "partial_rotary_factor": 1.0, "expand": 7, "sliding_window": None}
    for limit in ([0.0, {"__float__": "Infinity"}], [0.0, float("inf")], [0.001, 0.1]):
        assert parse_config(RAW | inert | {"time_step_limit": limit}) == parse_config(RAW)


def test_sizes_of_absent_layers() -> None:
    """A model of attention alone needs no Mamba-2 sizes, and the other way round."""
    attention = without("mamba_num_heads", "mamba_head_dim", "ssm_state_size", "n_groups")
    attention["hybrid_override_pattern"] = "*-*-"
    assert parse_config(attention).num_mamba_layers == 0
    mamba = without("num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size")
    mamba["hybrid_override_pattern"] = "MMMM"
    assert parse_config(mamba).kv_elements_per_token == 0


@pytest.mark.parametrize(
    ("changes", "key", "message"),
    [
        ({"model_type": "llama"}, "model_type", "is 'llama'"),
        ({"model_type": None}, "model_type", "is missing"),
        ({"hybrid_override_pattern": "ME*M"}, "hybrid_override_pattern", "mixture-of-experts"),
        ({"hybrid_override_pattern": "M?*M"}, "hybrid_override_pattern", "unknown layers '?'"),
        ({"hybrid_override_pattern": "M-*"}, "num_hidden_layers", "is 4, but"),
        ({"hybrid_override_pattern": None}, "hybrid_override_pattern", "is missing"),
        ({"layers_block_type": ["mlp"] * 4}, "hybrid_override_pattern", "listed layers are '----'"),
        ({"hybrid_override_pattern": None, "layer_types": ["moe"]}, "layer_types", "mixture"),
        ({"hybrid_override_pattern": None, "layer_types": ["x"]}, "layer_types", "layer type 'x'"),
        ({"hybrid_override_pattern": None, "layer_types": "M-*M"}, "layer_types", "must be a list"),
        ({"hybrid_override_pattern": 3}, "hybrid_override_pattern", "must be a string"),
        ({"hidden_size": None}, "hidden_size", "is missing"),
        ({"hidden_size": "64"}, "hidden_size", "positive whole number, but is '64'"),
        ({"hidden_size": 0}, "hidden_size", "positive whole number"),
        ({"hidden_size": True}, "hidden_size", "positive whole number"),
        ({"num_key_value_heads": 3}, "num_attention_heads", "not a multiple of the 3"),
        ({"n_groups": 4}, "mamba_num_heads", "not a multiple of the 4"),
        ({"conv_kernel": 1}, "conv_kernel", "at least 2"),
        ({"mamba_d_conv": 4}, "mamba_d_conv", "is 4, but conv_kernel is 3"),
        ({"layer_norm_epsilon": -1}, "layer_norm_epsilon", "number from 0 to 1"),
        ({"mlp_bias": "no"}, "mlp_bias", "must be true or false"),
        ({"mlp_hidden_act": "silu"}, "mlp_hidden_act", "only 'relu2' is known"),
        ({"mamba_hidden_act": "gelu"}, "mamba_hidden_act", "only 'silu' is known"),
        ({"quantization_config": {"bits": 4}}, "quantization_config", "quantised"),
    ],
)
def test_refused(changes: dict[str, object], key: str, message: str) -> None:
    """The error names the file, the key and what is wrong, and hints at a way out."""
    with pytest.raises(CheckpointError) as caught:
        parse_config(RAW | changes, "models/x/config.json")
    assert caught.value.message.startswith(f"models/x/config.json: {key} ")
    assert message in caught.value.message
    assert caught.value.hint


def test_files(tmp_path: Path) -> None:
    """A good file loads; a missing folder or file, no JSON, or no object is named."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps(NANO_9B_V2))
    assert load_config(tmp_path) == parse_config(NANO_9B_V2)
    for text in ("", "{", "[1]", "\udcff", "[" * 100_000):
        path.write_bytes(text.encode(errors="surrogateescape"))
        with pytest.raises(CheckpointError, match=r"config\.json"):
            load_config(tmp_path)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"holds no config\.json"):
        load_config(tmp_path)
    with pytest.raises(CheckpointError, match="is not a folder"):
        load_config(tmp_path / "absent")


def test_reading_a_config_needs_no_torch() -> None:
    """Configs and headers are read without loading torch, which takes seconds."""
    code = "import sys, batchrun.model.checkpoint; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
