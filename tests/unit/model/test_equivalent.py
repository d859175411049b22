"""The transformer beside a hybrid has its size, and runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from batchrun.model.config import load_config, parse_config
from batchrun.model.equivalent import equivalent_transformer
from batchrun.model.sizes import Precision, count_weights
from tests.unit.engine.support import TINY, make_engine, run_one, write_random
from tests.unit.model.models import SMALL
from tests.unit.model.published import H_8B, NANO_3_4B, NANO_9B_V2, NANO_12B_V2


@pytest.mark.parametrize("raw", [NANO_9B_V2, NANO_12B_V2, H_8B, NANO_3_4B])
def test_published_models(raw: dict[str, object]) -> None:
    """Within 1 % of the weights, attention and MLP in turn, of usual shape, and no state."""
    config = parse_config(raw)
    made = equivalent_transformer(config)
    ratio = count_weights(made).total / count_weights(config).total
    assert abs(ratio - 1) < 0.01
    assert set(made.layer_pattern) == {"*", "-"} and "**" not in made.layer_pattern
    assert 3 < made.intermediate_size / made.hidden_size < 5
    assert Precision().slot_bytes(made) == 0


def test_the_9b_model() -> None:
    """36 pairs of layers: the keys and values of common 8B transformers."""
    made = equivalent_transformer(parse_config(NANO_9B_V2))
    assert made.layer_pattern == "*-" * 36
    assert Precision().token_bytes(made) == 147_456


def test_small_models_and_impossible_ones() -> None:
    """A small hybrid has its transformer too; one without attention has none."""
    tiny = load_config(TINY)
    for config in (tiny, replace(tiny, tie_word_embeddings=True)):
        made = equivalent_transformer(config)
        assert count_weights(made).total == pytest.approx(count_weights(config).total, rel=0.01)
    with pytest.raises(ValueError, match="no attention layers"):
        equivalent_transformer(replace(SMALL, layer_pattern="MM-"))
    with pytest.raises(ValueError, match="no transformer"):
        equivalent_transformer(replace(SMALL, layer_pattern="*", intermediate_size=1))


def test_it_runs_in_the_same_engine(tmp_path: Path) -> None:
    """As a checkpoint of its own."""
    made = equivalent_transformer(load_config(TINY))
    folder = write_random(
        tmp_path,
        hybrid_override_pattern=made.layer_pattern,
        intermediate_size=made.intermediate_size,
        hidden_size=made.hidden_size,
        num_attention_heads=made.num_attention_heads,
        head_dim=made.head_dim,
    )
    engine = make_engine(folder)
    held = sum(parameter.numel() for parameter in engine.runner.model.parameters())
    assert held == count_weights(made).total
    output = run_one(engine, range(1, 40), max_tokens=20, ignore_eos=True)
    assert output.num_completion_tokens == 20
