"""The Triton operators against the plain ones, under Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from batchrun.model.batch import Batch, DecodeBatch
from batchrun.model.layout import AttentionLayout, PrefillLayout, lay_out
from batchrun.model.ops.plain import PlainOps
from tests.unit.model.models import SMALL, Driver, random_model, random_tokens
from tests.unit.model.ops.batches import make_batch
from tests.unit.model.ops.interpreter import InterpretedOps

PLAIN = PlainOps()
CHUNK = SMALL.chunk_size

# (prefill lengths, context lengths): alone and many, ragged, new and continued, around a chunk.
PREFILLS = [
    ((1,), (0,)),
    ((CHUNK + 1,), (6,)),
    ((1, 2, 3, 4, 5), (0, 1, 0, 2, 7)),
    ((CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 1, 1), (0, 3, 9, 0, 0)),
]


@pytest.fixture
def draw() -> Callable[..., Tensor]:
    """Standard normal numbers, the same in every test."""
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(*shape, generator=generator)


def assert_same(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """NaN in the same places, and elsewhere equal to ``tolerance`` of the largest number."""
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    assert torch.equal(actual.isnan(), expected.isnan())
    actual, expected = actual.float().nan_to_num(0.0), expected.float().nan_to_num(0.0)
    scale = max(1.0, expected.abs().max().item())
    assert (actual - expected).abs().max().item() <= tolerance * scale


def prefill_layouts(
    lens: tuple[int, ...], contexts: tuple[int, ...], chunk_size: int = CHUNK
) -> tuple[PrefillLayout, PrefillLayout]:
    """With and without rectangles."""
    batch, config = make_batch((), lens, contexts), replace(SMALL, chunk_size=chunk_size)
    with_rectangles = lay_out(batch, config, 4).prefill
    without = lay_out(batch, config, 4, rectangles=False).prefill
    assert with_rectangles is not None and without is not None and without.waves == ()
    return with_rectangles, without


def ssm_inputs(
    num_tokens: int, draw: Callable[..., Tensor], sizes: tuple[int, int, int, int]
) -> dict[str, Tensor]:
    """Random arguments of the scan and the update but for state and places. x, B and C are parts
    of one row, as the convolution gives them, and dt is one of a wider one."""
    h, p, g, n = sizes
    x, B, C = draw(num_tokens, h * p + 2 * g * n).split([h * p, g * n, g * n], dim=-1)
    return {
        "x": x.unflatten(1, (h, p)),
        "dt": draw(num_tokens, h + 5)[:, 5:] * 3 - 2,
        "B": B.unflatten(1, (g, n)),
        "C": C.unflatten(1, (g, n)),
        "A": -draw(h).exp(),
        "dt_bias": draw(h),
        "skip": draw(h),
    }


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("lens", "contexts"), PREFILLS)
def test_causal_conv(
    fast: InterpretedOps,
    lens: tuple[int, ...],
    contexts: tuple[int, ...],
    bias: bool,
    draw: Callable[..., Tensor],
) -> None:
    """Outputs and states of packed prefills; what a new sequence finds in its slot is not read."""
    plain_layout, layout = prefill_layouts(lens, contexts)
    channels = 11
    weight = draw(4, channels).t()  # in memory column by column, as a prepared model has it
    arguments = (draw(sum(lens), channels + 3)[:, 3:], weight, draw(channels) if bias else None)
    expected_state = draw(12, 3, channels)
    expected_state[layout.slots[layout.is_new]] = torch.nan
    state = expected_state.clone()
    expected = PLAIN.causal_conv(*arguments, expected_state, plain_layout)
    assert_same(fast.causal_conv(*arguments, state, layout), expected, 1e-6)
    assert torch.equal(state, expected_state) and not state.isnan().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_conv_update(fast: InterpretedOps, dtype: torch.dtype, draw: Callable[..., Tensor]) -> None:
    """One token each in place; padding rows meet in the scratch slot, and their NaN stays there."""
    slots = torch.tensor([7, 0, 2, 0, 9])
    x, weight, bias = draw(5, 14)[:, 3:].to(dtype), draw(11, 4).to(dtype), draw(11).to(dtype)
    expected_state = draw(12, 3, 11).to(dtype)
    expected_state[0] = torch.nan
    state = expected_state.clone()
    expected = PLAIN.conv_update(x, weight, bias, expected_state, slots)
    out = fast.conv_update(x, weight, bias, state, slots)
    assert_same(out[[0, 2, 4]], expected[[0, 2, 4]], 1e-6 if dtype is torch.float32 else 1e-3)
    assert torch.equal(state[1:], expected_state[1:]) and not state[1:].isnan().any()


@pytest.mark.parametrize("sizes", [(4, 10, 2, 12), (2, 80, 1, 16)])
def test_ssm_update(
    fast: InterpretedOps, sizes: tuple[int, int, int, int], draw: Callable[..., Tensor]
) -> None:
    """The recurrence in place by slot; others keep every bit, padding rows harm nobody."""
    h, p, _, n = sizes
    slots = torch.tensor([7, 0, 2, 0])
    inputs = ssm_inputs(4, draw, sizes)
    inputs["dt"][2] = -1e4  # a step of nothing
    inputs["dt"][0, 0] = 40.0  # beyond where softplus is the identity
    expected_state = draw(12, h, p, n)
    expected_state[0] = torch.nan
    before = expected_state.clone()
    state = expected_state.clone()
    expected = PLAIN.ssm_update(**inputs, state=expected_state, slots=slots)
    y = fast.ssm_update(**inputs, state=state, slots=slots)
    assert_same(y[[0, 2]], expected[[0, 2]], 1e-5)
    assert_same(state[[7, 2]], expected_state[[7, 2]], 1e-5)
    others = [slot for slot in range(12) if slot not in (0, 2, 7)]
    assert torch.equal(state[others], before[others]) and torch.equal(state[2], before[2])


@pytest.mark.parametrize(("lens", "contexts"), PREFILLS)
def test_ssd_scan(
    fast: InterpretedOps,
    lens: tuple[int, ...],
    contexts: tuple[int, ...],
    draw: Callable[..., Tensor],
) -> None:
    """Outputs and final states of packed prefills, each from its own state or from nothing."""
    plain_layout, layout = prefill_layouts(lens, contexts)
    inputs = ssm_inputs(sum(lens), draw, (4, 10, 2, 12))
    expected_state = draw(12, 4, 10, 12)
    before = expected_state.clone()
    expected_state[layout.slots[layout.is_new]] = torch.nan
    state = expected_state.clone()
    expected = PLAIN.ssd_scan(**inputs, state=expected_state, layout=plain_layout)
    assert_same(fast.ssd_scan(**inputs, state=state, layout=layout), expected, 1e-5)
    assert_same(state, expected_state, 1e-5)
    others = [slot for slot in range(12) if slot not in layout.slots.tolist()]
    assert torch.equal(state[others], before[others]) and not state.isnan().any()


def test_ssd_scan_of_extreme_steps(fast: InterpretedOps, draw: Callable[..., Tensor]) -> None:
    """Steps that forget everything at once, or change nothing, give neither infinity nor NaN."""
    plain_layout, layout = prefill_layouts((24, 3), (0, 4))
    inputs = ssm_inputs(27, draw, (4, 10, 2, 12))
    inputs["dt"] = torch.tensor([-1e4, 300.0, 0.0] * 9)[:, None].expand(27, 4)
    expected_state, state = torch.zeros(12, 4, 10, 12), torch.zeros(12, 4, 10, 12)
    expected = PLAIN.ssd_scan(**inputs, state=expected_state, layout=plain_layout)
    assert_same(fast.ssd_scan(**inputs, state=state, layout=layout), expected, 1e-4)
    assert_same(state, expected_state, 1e-4)


def test_ssd_scan_in_float16(fast: InterpretedOps, draw: Callable[..., Tensor]) -> None:
    """Narrow activations and a chunk of 16 with heads of 80: within float16's rounding; the state
    between calls is float32."""
    lens, contexts = (17, 5), (0, 3)
    plain_layout, layout = prefill_layouts(lens, contexts, chunk_size=16)
    inputs = ssm_inputs(sum(lens), draw, (2, 80, 1, 16))
    for name in ("x", "dt", "B", "C"):
        inputs[name] = inputs[name].half()
    expected_state = draw(12, 2, 80, 16)
    state = expected_state.clone()
    expected = PLAIN.ssd_scan(**inputs, state=expected_state, layout=plain_layout)
    assert_same(fast.ssd_scan(**inputs, state=state, layout=layout), expected, 2e-3)
    assert_same(state, expected_state, 2e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_norms(fast: InterpretedOps, dtype: torch.dtype, draw: Callable[..., Tensor]) -> None:
    """The gated norm over groups, and the norm behind the residual sum, which is kept rounded."""
    tolerance = 1e-6 if dtype is torch.float32 else 1e-3
    y, wide, weight = draw(5, 30).to(dtype), draw(5, 40).to(dtype), draw(30).to(dtype)
    z = wide[:, :30]  # the first part of a projection
    expected = PLAIN.gated_norm(y, z, weight, 10, 1e-5)
    assert_same(fast.gated_norm(y, z, weight, 10, 1e-5), expected, tolerance)
    for delta in (None, draw(5, 30).to(dtype)):
        expected_h = y.clone()
        h = y.clone()
        expected = PLAIN.add_norm(expected_h, delta, weight, 1e-5)
        assert_same(fast.add_norm(h, delta, weight, 1e-5), expected, tolerance)
        assert torch.equal(h, expected_h)


ATTENTION = [
    # decodes' contexts, prefills' (length, context)
    ((), ((1, 0),)),
    ((3, 1, 70, 4), ()),
    ((19,), ((5, 2), (1, 0), (30, 0), (4, 8))),
    # More queries than a block of them, after more keys than a block.
    ((2,), ((70, 45), (65, 0))),
]


def attention_case(
    decodes: tuple[int, ...],
    prefills: tuple[tuple[int, int], ...],
    kv_heads: int,
    draw: Callable[..., Tensor],
    *,
    head_dim: int = 10,
    blocks_each: int = 40,
    dtype: torch.dtype = torch.float32,
) -> tuple[Batch, tuple[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]:
    """A batch, its q, k and v, which are parts of one row, and pools that are NaN where no key or
    value of the batch's contexts stands."""
    batch = make_batch(
        decodes,
        tuple(length for length, _ in prefills),
        (*decodes, *(context for _, context in prefills)),
        blocks_each=blocks_each,
    )
    heads = [6, kv_heads, kv_heads]
    row = draw(len(batch.token_ids), sum(heads), head_dim).to(dtype)
    q, k, v = row.split(heads, dim=1)
    num_blocks = int(batch.block_tables.max()) + 1
    keys = torch.full((num_blocks, 4, kv_heads, head_dim), torch.nan, dtype=dtype)
    values = keys.clone()
    for context, table in zip(batch.context_lens, batch.block_tables, strict=True):
        position = torch.arange(context)
        keys[table[position // 4], position % 4] = draw(context, kv_heads, head_dim).to(dtype)
        values[table[position // 4], position % 4] = draw(context, kv_heads, head_dim).to(dtype)
    return batch, (q, k, v), (keys, values)


def attention_layouts(batch: Batch | DecodeBatch) -> tuple[AttentionLayout, AttentionLayout]:
    """With and without rectangles."""
    with_rectangles = lay_out(batch, SMALL, 4).attention
    without = lay_out(batch, SMALL, 4, rectangles=False).attention
    assert with_rectangles is not None and without is not None and without.groups == ()
    return with_rectangles, without


@pytest.mark.parametrize("kv_heads", [1, 2, 6])
@pytest.mark.parametrize(("decodes", "prefills"), ATTENTION)
def test_attention(
    fast: InterpretedOps,
    decodes: tuple[int, ...],
    prefills: tuple[tuple[int, int], ...],
    kv_heads: int,
    draw: Callable[..., Tensor],
) -> None:
    """Pages of earlier steps and of this one are seen up to each query, and nothing else is."""
    batch, new, pools = attention_case(decodes, prefills, kv_heads, draw)
    expected_pools = tuple(pool.clone() for pool in pools)
    plain_layout, layout = attention_layouts(batch)
    expected = PLAIN.attention(*new, *expected_pools, plain_layout)
    out = fast.attention(*new, *pools, layout)
    assert not out.isnan().any()
    assert_same(out, expected, 1e-5)
    for pool, changed in zip(pools, expected_pools, strict=True):
        assert_same(pool, changed, 0.0)


def test_attention_over_a_context_in_pieces(
    fast: InterpretedOps, draw: Callable[..., Tensor]
) -> None:
    """A long context is cut among programs and joined; short ones leave most pieces empty."""
    batch, new, pools = attention_case((1030, 1, 300, 511), (), 2, draw, blocks_each=260)
    plain_layout, layout = attention_layouts(batch)
    expected = PLAIN.attention(*new, *(pool.clone() for pool in pools), plain_layout)
    assert_same(fast.attention(*new, *pools, layout), expected, 1e-5)


def test_attention_in_float16(fast: InterpretedOps, draw: Callable[..., Tensor]) -> None:
    """Heads of a power of two and narrow numbers: within float16's rounding."""
    batch, new, pools = attention_case(
        (40, 9), ((20, 3),), 2, draw, head_dim=16, dtype=torch.float16
    )
    plain_layout, layout = attention_layouts(batch)
    expected = PLAIN.attention(*new, *(pool.clone() for pool in pools), plain_layout)
    assert_same(fast.attention(*new, *pools, layout), expected, 2e-3)


def test_attention_of_padding_rows(fast: InterpretedOps, draw: Callable[..., Tensor]) -> None:
    """They live in scratch block 0, which may hold NaN, and no row that counts sees it."""
    batch, (q, k, v), pools = attention_case((9, 70), (), 2, draw)
    expected_pools = tuple(pool.clone() for pool in pools)
    expected = PLAIN.attention(q, k, v, *expected_pools, attention_layouts(batch)[0])
    padded = DecodeBatch(
        token_ids=torch.zeros(4, dtype=torch.int64),
        slots=torch.cat([batch.slots, torch.zeros(2, dtype=torch.int64)]),
        context_lens=torch.tensor([9, 70, 1, 1]),
        block_tables=torch.cat([batch.block_tables, torch.zeros_like(batch.block_tables)]),
    )
    out = fast.attention(
        *(torch.cat([t, t]) for t in (q, k, v)), *pools, attention_layouts(padded)[1]
    )
    assert_same(out[:2], expected, 1e-5)
    for pool, changed in zip(pools, expected_pools, strict=True):
        assert_same(pool[1:], changed[1:], 0.0)


def test_a_model_runs_on_them(fast: InterpretedOps) -> None:
    """Prompts, pieces of prompts, decodes and padding rows over pools of NaN: the same logits."""
    logits = []
    for ops in (PLAIN, fast):
        driver = Driver(random_model(replace(SMALL, layer_pattern="M*")))
        driver.model.prepare()
        driver.model.ops = ops
        a, b = random_tokens(SMALL, 13), random_tokens(SMALL, 9, seed=1)
        steps = [
            driver.step(prefills={"a": a[:9], "b": b[:1]}),
            driver.step(decodes={"b": b[1]}, prefills={"a": a[9:12]}, padding_rows=1),
        ]
        logits.append(torch.cat([step[name] for step in steps for name in sorted(step)]))
        # The same once more, as a graph has it: described on the device, with padding.
        slots = torch.tensor([driver.slots["a"], driver.slots["b"], 0])
        tables = torch.cat([driver.tables[slots[:2]], torch.zeros_like(driver.tables[:1])])
        contexts = torch.tensor([driver.contexts["a"], driver.contexts["b"], 1])
        batch = DecodeBatch(torch.tensor([a[12], b[2], 0]), slots, contexts, tables)
        logits[-1] = torch.cat([logits[-1], driver.model(batch, driver.state)[:2]])
    assert_same(logits[1], logits[0], 2e-5)


def test_the_package_behind_the_kernels_stays_unimported(fast: InterpretedOps) -> None:
    """mamba_ssm's own code, which wants a CUDA extension, never ran, and no stand-in is left."""
    fast.add_norm(torch.ones(1, 4), None, torch.ones(4), 1e-5)
    assert "mamba_ssm.ops.triton.ssd_bmm" in fast.imported_modules()
    assert "mamba_ssm" not in fast.imported_modules()
