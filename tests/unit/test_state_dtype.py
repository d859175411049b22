"""A state in bfloat16 is rounded at every step, and its error stays where it is."""

from __future__ import annotations

from batchrun.model.sizes import count_weights
from bench.random_models import HYBRID_60M, TRANSFORMER_60M, random_model
from bench.state_dtype import compare
from tests.unit.model.models import SMALL


def test_the_error_of_a_bfloat16_state_does_not_grow() -> None:
    """After 600 steps the logits are off by less than 2 % of their spread on average, and by less
    than twice what they are off after 100: old errors decay with the state."""
    model = random_model(SMALL)
    early, late = compare(
        model, num_steps=600, num_sequences=4, report_at=(100, 600), window=50, seed=1
    )
    assert (early.step, late.step) == (100, 600)
    assert 0 < late.mean_error < 0.02 * late.spread
    assert late.mean_error < 2 * early.mean_error
    assert 0 < late.divergence < 1e-3
    assert late.agreement > 0.95


def test_the_benchmarks_models_are_of_one_size() -> None:
    """60 million weights, within 1 %."""
    sizes = [count_weights(config).total for config in (HYBRID_60M, TRANSFORMER_60M)]
    assert all(abs(size / 60.5e6 - 1) < 0.01 for size in sizes)
