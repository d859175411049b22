"""Random weights: reproducible, and of a size that keeps a model's numbers in bounds."""

from __future__ import annotations

import torch
from torch.nn.functional import softplus

from batchrun.model.random_weights import random_weight
from batchrun.model.weights import random_model
from tests.unit.model.models import SMALL


def test_weights_depend_on_name_and_seed_alone() -> None:
    """The same again, and others for another name or seed."""
    one = random_weight("a.up_proj.weight", (4, 9))
    assert one.equal(random_weight("a.up_proj.weight", (4, 9)))
    assert not one.equal(random_weight("b.up_proj.weight", (4, 9)))
    assert not one.equal(random_weight("a.up_proj.weight", (4, 9), seed=1))
    # A fixed value, so that a checkpoint made elsewhere is this one.
    assert one.dtype == torch.float32 and one.shape == (4, 9)


def test_time_steps_are_those_of_a_training() -> None:
    """Softplus of the biases lies between 0.001 and 0.1; decay rates between 1 and 16."""
    steps = softplus(random_weight("m.dt_bias", (2000,)))
    assert 0.0009 < steps.min() < 0.0015 and 0.07 < steps.max() < 0.11
    rates = random_weight("m.A_log", (2000,)).exp()
    assert 1 <= rates.min() < 1.1 and 15.9 < rates.max() <= 16


def test_every_parameter_is_filled() -> None:
    """Norms are 1, biases 0, matrices keep the size of their input."""
    weights = dict(random_model(SMALL, torch.float32, "cpu").named_parameters())
    assert weights["backbone.norm_f.weight"].eq(1).all()
    assert all(weight.isfinite().all() for weight in weights.values())
    conv_bias = weights["backbone.layers.0.mixer.conv1d.bias"]
    assert conv_bias.eq(0).all()
    up = weights["backbone.layers.3.mixer.up_proj.weight"]
    assert abs(float(up.std()) * SMALL.hidden_size**0.5 - 1) < 0.1
