"""The bounds are those worked out by hand for the published 9B model and a transformer."""

from __future__ import annotations

import pytest

from batchrun.engine.accelerators import Accelerator, find_accelerator
from batchrun.engine.roofline import Bound, StepBound, decode_work, predict, prefill_work
from batchrun.model.config import ModelConfig, parse_config
from batchrun.model.sizes import Precision, Quantization
from tests.unit.model.published import NANO_9B_V2

NANO = parse_config(NANO_9B_V2)
A10 = find_accelerator("A10")
H200 = Accelerator("H200", 139 << 30, 4.3e12, 790e12)

BF16, BF16_STATE = Precision(2, 4), Precision(2, 2)
INT8, INT8_STATE = Precision(2, 4, Quantization.INT8), Precision(2, 2, Quantization.INT8)


@pytest.mark.parametrize(
    ("lengths", "precision", "batch", "step_ms", "decode_rate", "output_rate"),
    [
        ((8192, 16384), BF16, 8, 35.1, 228, 225),
        ((8192, 16384), BF16_STATE, 9, 33.9, 266, 261),
        ((8192, 16384), INT8, 23, 35.1, 655, 626),
        ((8192, 16384), INT8_STATE, 26, 31.8, 818, 774),
        ((1024, 1024), BF16, 25, 40.7, 615, 567),
        ((1024, 1024), BF16_STATE, 42, 39.6, 1060, 926),
        ((1024, 1024), INT8, 72, 51.3, 1403, 1178),
        ((1024, 1024), INT8_STATE, 120, 48.0, 2501, 1865),
    ],
)
def test_an_a10(
    lengths: tuple[int, int],
    precision: Precision,
    batch: int,
    step_ms: float,
    decode_rate: float,
    output_rate: float,
) -> None:
    """Step and decode rate within 2 %. With prefill within 3 %: the known figures make logits for
    every token of a prompt, which costs up to 2.5 % more than is needed."""
    tokens, out = lengths
    speed = predict(NANO, precision, A10, batch=batch, input_tokens=tokens, output_tokens=out)
    assert speed.step_seconds * 1e3 == pytest.approx(step_ms, rel=0.02)
    assert speed.decode_rate == pytest.approx(decode_rate, rel=0.02)
    assert output_rate * 0.99 < speed.output_rate < output_rate * 1.03
    assert speed.bound is Bound.BANDWIDTH


@pytest.mark.parametrize(
    ("precision", "batch", "step_ms"),
    [
        (BF16, 1, 28.2), (BF16, 8, 31.9), (BF16, 64, 61.9), (BF16, 128, 96.1),
        (BF16_STATE, 8, 30.1), (BF16_STATE, 128, 65.9),
        (INT8, 1, 14.4), (INT8, 8, 18.1), (INT8, 64, 48.0), (INT8, 128, 82.2),
        (INT8_STATE, 1, 14.1), (INT8_STATE, 32, 23.4), (INT8_STATE, 128, 52.0),
    ],
)  # fmt: skip
def test_a_step(precision: Precision, batch: int, step_ms: float) -> None:
    """A single decode step on an A10 at a context of 2,048 tokens, within 2 %."""
    seconds = decode_work(NANO, precision, batch, 2048).seconds(A10)
    assert seconds * 1e3 == pytest.approx(step_ms, rel=0.02)


@pytest.mark.parametrize(
    ("lengths", "precision", "batch", "step_ms", "decode_rate"),
    [
        ((8192, 16384), BF16, 228, 33.3, 6843),
        ((8192, 16384), BF16_STATE, 262, 29.1, 9008),
        ((8192, 16384), INT8, 244, 33.5, 7294),
        ((1024, 1024), BF16, 705, 55.1, 12805),
        ((1024, 1024), INT8, 752, 56.5, 13300),
    ],
)
def test_an_h200(
    lengths: tuple[int, int], precision: Precision, batch: int, step_ms: float, decode_rate: float
) -> None:
    """A device of seven times the bandwidth: the known steps and rates within 2 %."""
    tokens, out = lengths
    speed = predict(NANO, precision, H200, batch=batch, input_tokens=tokens, output_tokens=out)
    assert speed.step_seconds * 1e3 == pytest.approx(step_ms, rel=0.02)
    assert speed.decode_rate == pytest.approx(decode_rate, rel=0.02)


def test_operations() -> None:
    """16.6 G a token for the matrices, 0.21 G for the recurrence, 81,920 for each token seen; in
    prefill 15.4 G and 0.22 G for the scan, less the 0.28 G of the last MLP."""
    decode = decode_work(NANO, BF16, 1, 0).num_operations
    assert decode == pytest.approx(16.6e9 + 0.21e9, rel=0.005)
    assert decode_work(NANO, BF16, 1, 1000).num_operations - decode == 81_920 * 1000
    prefill = prefill_work(NANO, BF16, 1024).num_operations / 1024
    assert prefill == pytest.approx(15.42e9 + 0.22e9 + 81_920 * 512 - 0.281e9, rel=0.005)


def test_a_transformer() -> None:
    """A model of attention alone, gated MLPs counted as they are: the keys and values of 36 layers
    and no state. At 1k in and 1k out it reads per sequence what a hybrid's state takes; a step of
    19 sequences takes 32.4 ms on an A10."""
    # Of three matrices in an MLP here are two of one and a half times the width.
    qwen = ModelConfig(
        vocab_size=151936, hidden_size=4096, layer_pattern="*-" * 36, intermediate_size=18432,
        num_attention_heads=32, num_key_value_heads=8, head_dim=128, mamba_num_heads=1,
        mamba_head_dim=1, ssm_state_size=1, num_groups=1,
    )  # fmt: skip
    assert BF16.token_bytes(qwen) == 147_456
    assert BF16.slot_bytes(qwen) == 0
    assert BF16.weight_bytes(qwen) == pytest.approx(16.381e9, rel=1e-3)
    speed = predict(qwen, BF16, A10, batch=19, input_tokens=1024, output_tokens=1024)
    assert speed.step_seconds * 1e3 == pytest.approx(32.4, rel=0.02)
    assert speed.decode_rate == pytest.approx(586, rel=0.02)
    long = predict(qwen, BF16, A10, batch=1, input_tokens=8192, output_tokens=16384)
    assert long.decode_rate == pytest.approx(34, rel=0.02)


def test_a_batch_beyond_the_ridge_is_bound_by_arithmetic() -> None:
    """And a step takes what the operations take."""
    slow = Accelerator("slow", 10**12, 1e15, 1e12)
    speed = predict(NANO, BF16, slow, batch=10, input_tokens=10, output_tokens=10)
    assert speed.bound is Bound.ARITHMETIC
    assert speed.step_seconds == speed.step.num_operations / 1e12
    assert speed.prefill_rate == pytest.approx(1e12 / 15.7e9, rel=0.02)
    total = speed.prefill_seconds + 10 * speed.step_seconds / 10
    assert speed.output_rate == pytest.approx(10 / total)


@pytest.mark.parametrize("precision", [BF16, INT8_STATE])
def test_the_bound_of_a_step_is_that_of_its_decodes(precision: Precision) -> None:
    """A step that only decodes: the time of :func:`decode_work`, whatever each has seen."""
    bound = StepBound(NANO, precision, A10)
    least = bound.seconds(decodes=16, chunks=0, prompt_tokens=0, seen_tokens=16 * 3000)
    assert least == pytest.approx(decode_work(NANO, precision, 16, 3000).seconds(A10))


def test_the_bound_of_a_step_with_prompts() -> None:
    """Prompts share the weights that decodes read: bound by arithmetic, they add their operations;
    a few tokens of them add next to nothing."""
    bound = StepBound(NANO, BF16, A10)
    alone = bound.seconds(decodes=8, chunks=0, prompt_tokens=0, seen_tokens=0)
    few = bound.seconds(decodes=8, chunks=1, prompt_tokens=8, seen_tokens=0)
    assert alone < few < 1.05 * alone
    many = bound.seconds(decodes=0, chunks=2, prompt_tokens=8192, seen_tokens=0)
    operations = prefill_work(NANO, BF16, NANO.chunk_size).num_operations * 8192 / NANO.chunk_size
    assert many == pytest.approx(operations / A10.flops, rel=0.02)
