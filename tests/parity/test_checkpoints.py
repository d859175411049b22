"""Checkpoints written by transformers load, and compute the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import batchrun
from batchrun.model.config import load_config
from batchrun.model.weights import load_model
from tests.parity.oracle import load_oracle, make_oracle, oracle_logits
from tests.unit.model.models import Driver, assert_close, random_tokens


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_bias": True, "mlp_bias": True},
        # transformers' own module ignores these two; so must whoever reads what it wrote.
        {"attention_bias": True},
        {"tie_word_embeddings": True},
    ],
    ids=["plain", "biases", "attention_bias", "tied"],
)
def test_saved_by_transformers(changes: dict[str, object], tmp_path: Path) -> None:
    """A folder written by save_pretrained gives the writer's logits."""
    oracle = make_oracle(3, **changes)
    oracle.save_pretrained(tmp_path)
    model = load_model(tmp_path, load_config(tmp_path), torch.float32, "cpu")
    prompt = random_tokens(model.config, 20)
    assert_close(Driver(model).run(prompt), oracle_logits(oracle, prompt))


def test_saved_in_shards(tmp_path: Path) -> None:
    """Several weight files with an index, as transformers writes them, load."""
    oracle = make_oracle(4)
    oracle.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    model = load_model(tmp_path, load_config(tmp_path), torch.float32, "cpu")
    prompt = random_tokens(model.config, 20)
    assert_close(Driver(model).run(prompt), oracle_logits(oracle, prompt))


def test_embedded_model() -> None:
    """The checkpoint that ships with the package computes in transformers what it does here."""
    folder = Path(batchrun.__file__).parent / "models" / "tiny"
    oracle = load_oracle(folder)
    model = load_model(folder, load_config(folder), torch.float32, "cpu")
    prompt = random_tokens(model.config, 150)
    logits = Driver(model, blocks_per_slot=40).run(prompt, [64, 65, 149])
    assert_close(logits, oracle_logits(oracle, prompt))
