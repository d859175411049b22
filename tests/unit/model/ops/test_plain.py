"""The operators of a CPU, plain and compiled, against what they stand for, written as loops."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from batchrun.model.layout import AttentionLayout, PrefillLayout, lay_out
from batchrun.model.ops import Ops, select_ops
from batchrun.model.ops.native import NativeOps
from batchrun.model.ops.plain import PlainOps
from tests.unit.model.models import SMALL, assert_close
from tests.unit.model.ops.batches import make_batch, native_ops

TOLERANCE = 1e-4
"""Some outputs of the recurrence are near 100, where the last bit of float32 is 8e-6."""

# (prefill lengths, context lengths): one and many, ragged, new and continued, around a chunk of 8.
PREFILLS = [
    ((1,), (0,)),
    ((8, 9, 7, 1), (0, 0, 0, 0)),
    ((2, 17, 1, 8, 3), (5, 0, 0, 12, 1)),
    ((41, 16), (3, 0)),
]


def lay_out_prefill(
    lens: tuple[int, ...], contexts: tuple[int, ...], chunk_size: int = SMALL.chunk_size
) -> PrefillLayout:
    """The layout of prefills in slots that are neither sorted nor neighbours."""
    config = replace(SMALL, chunk_size=chunk_size)
    layout = lay_out(make_batch((), lens, contexts), config, 4).prefill
    assert layout is not None
    return layout


def ssm_inputs(num_tokens: int, draw: Callable[..., Tensor]) -> dict[str, Tensor]:
    """Random arguments of the scan and the update but for state and places."""
    h, p, g, n = 6, 10, 3, 12
    return {
        "x": draw(num_tokens, h, p),
        "dt": draw(num_tokens, h) * 3 - 2,
        "B": draw(num_tokens, g, n),
        "C": draw(num_tokens, g, n),
        "A": -draw(h).exp(),
        "dt_bias": draw(h),
        "skip": draw(h),
    }


def recurrence(inputs: dict[str, Tensor], token: int, S: Tensor) -> tuple[Tensor, Tensor]:
    """One token, one head at a time, straight from the definition: (y [h, p], new S)."""
    x, B, C = (inputs[name][token].double() for name in ("x", "B", "C"))
    dt = F.softplus((inputs["dt"][token] + inputs["dt_bias"]).double())
    new, y = torch.empty_like(S), torch.empty_like(x)
    for head in range(len(x)):
        group = head // (len(x) // len(B))
        decay = torch.exp(dt[head] * inputs["A"][head].double())
        new[head] = decay * S[head] + dt[head] * torch.outer(x[head], B[group])
        y[head] = new[head] @ C[group] + inputs["skip"][head].double() * x[head]
    return y, new


@pytest.fixture(params=["plain", "native"])
def ops(request: pytest.FixtureRequest) -> Ops:
    """Each kind of operators that a CPU has."""
    return PlainOps() if request.param == "plain" else native_ops()


@pytest.fixture
def draw() -> Callable[..., Tensor]:
    """Standard normal numbers, the same in every test."""
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(*shape, generator=generator)


@pytest.mark.parametrize(("lens", "contexts"), PREFILLS)
def test_ssd_scan(
    lens: tuple[int, ...], contexts: tuple[int, ...], ops: Ops, draw: Callable[..., Tensor]
) -> None:
    """Outputs and final states are those of the recurrence from each sequence's state."""
    layout = lay_out_prefill(lens, contexts)
    inputs = ssm_inputs(sum(lens), draw)
    state = draw(12, 6, 10, 12)
    before = state.clone()
    state[layout.slots[layout.is_new]] = torch.nan
    y = ops.ssd_scan(**inputs, state=state, layout=layout)
    token = 0
    for length, context, slot in zip(lens, contexts, layout.slots.tolist(), strict=True):
        S = before[slot].double() if context else torch.zeros(6, 10, 12, dtype=torch.double)
        for _ in range(length):
            expected, S = recurrence(inputs, token, S)
            assert_close(y[token], expected.float(), TOLERANCE)
            token += 1
        assert_close(state[slot], S.float(), TOLERANCE)
    others = [slot for slot in range(12) if slot not in layout.slots.tolist()]
    assert torch.equal(state[others], before[others])


def test_ssd_scan_with_extreme_time_steps(ops: Ops, draw: Callable[..., Tensor]) -> None:
    """Time steps that forget everything at once, or change nothing, give neither inf nor NaN."""
    layout = lay_out_prefill((24,), (0,))
    inputs = ssm_inputs(24, draw)
    inputs["dt"] = torch.tensor([-1e4, 300.0, 0.0] * 8)[:, None].expand(24, 6)
    state = torch.zeros(12, 6, 10, 12)
    y = ops.ssd_scan(**inputs, state=state, layout=layout)
    S = torch.zeros(6, 10, 12, dtype=torch.double)
    for token in range(24):
        expected, S = recurrence(inputs, token, S)
        torch.testing.assert_close(y[token].double(), expected, rtol=1e-4, atol=1e-2)


def test_ssd_scan_keeps_small_time_steps_after_large_ones(
    ops: Ops, draw: Callable[..., Tensor]
) -> None:
    """A token that forgets everything takes no precision from those after it in its chunk."""
    layout = lay_out_prefill((40,), (0,), chunk_size=64)
    inputs = ssm_inputs(40, draw)
    inputs["dt"][2:8] = 300.0
    inputs["dt"][8:] = -2.0
    y = ops.ssd_scan(**inputs, state=torch.zeros(12, 6, 10, 12), layout=layout)
    S = torch.zeros(6, 10, 12, dtype=torch.double)
    for token in range(40):
        expected, S = recurrence(inputs, token, S)
        if token >= 8:
            torch.testing.assert_close(y[token].double(), expected, rtol=1e-5, atol=1e-3)


def test_ssm_update(ops: Ops, draw: Callable[..., Tensor]) -> None:
    """One step of the recurrence for each decode, in place in its slot alone."""
    slots = torch.tensor([7, 2, 9])
    inputs = ssm_inputs(3, draw)
    state = draw(12, 6, 10, 12)
    before = state.clone()
    y = ops.ssm_update(**inputs, state=state, slots=slots)
    for i, slot in enumerate(slots.tolist()):
        expected, S = recurrence(inputs, i, before[slot].double())
        assert_close(y[i], expected.float(), TOLERANCE)
        assert_close(state[slot], S.float(), TOLERANCE)
    others = [slot for slot in range(12) if slot not in slots.tolist()]
    assert torch.equal(state[others], before[others])


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize(("lens", "contexts"), PREFILLS)
def test_causal_conv(
    lens: tuple[int, ...],
    contexts: tuple[int, ...],
    with_bias: bool,
    ops: Ops,
    draw: Callable[..., Tensor],
) -> None:
    """A convolution over each sequence alone, with its state or zeros before its first token."""
    channels, kernel = 7, 4
    layout = lay_out_prefill(lens, contexts)
    x, weight = draw(sum(lens), channels), draw(channels, kernel)
    bias = draw(channels) if with_bias else None
    state = draw(12, kernel - 1, channels)
    before = state.clone()
    state[layout.slots[layout.is_new]] = torch.nan
    out = ops.causal_conv(x, weight, bias, state, layout)
    for mine, inputs, context, slot in zip(
        out.split(lens), x.split(lens), contexts, layout.slots.tolist(), strict=True
    ):
        history = before[slot] if context else torch.zeros(kernel - 1, channels)
        columns = torch.cat([history, inputs])
        expected = F.conv1d(columns.t()[None], weight[:, None], bias, groups=channels)
        assert_close(mine, F.silu(expected[0]).t(), TOLERANCE)
        assert torch.equal(state[slot], columns[-(kernel - 1) :])


def test_conv_update_continues_causal_conv(ops: Ops, draw: Callable[..., Tensor]) -> None:
    """Tokens fed one by one give what they give in one piece."""
    layout = lay_out_prefill((9,), (0,))
    slot = layout.slots
    x, weight, bias = draw(9, 7), draw(7, 4), draw(7)
    state, again = draw(12, 3, 7), torch.zeros(12, 3, 7)
    expected = ops.causal_conv(x, weight, bias, state, layout)
    steps = [ops.conv_update(x[i : i + 1], weight, bias, again, slot) for i in range(9)]
    assert_close(torch.cat(steps), expected, TOLERANCE)
    assert torch.equal(again[slot], state[slot])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_add_norm(dtype: torch.dtype, ops: Ops, draw: Callable[..., Tensor]) -> None:
    """What is added stays added, rounded to the dtype; the norm is of that sum."""
    h, delta = draw(5, 12).to(dtype), draw(5, 12).to(dtype)
    weight = draw(12).to(dtype)
    added = h + delta
    scale = (added.double().square().mean(-1, keepdim=True) + 1e-5).sqrt()
    expected = (added.double() / scale * weight.double()).to(dtype)
    tolerance = 1e-6 if dtype is torch.float32 else 2e-2
    assert_close(ops.add_norm(h, delta, weight, 1e-5).double(), expected.double(), tolerance)
    assert torch.equal(h, added)
    assert_close(ops.add_norm(h, None, weight, 1e-5).double(), expected.double(), tolerance)
    assert torch.equal(h, added)


def test_gated_norm(ops: Ops, draw: Callable[..., Tensor]) -> None:
    """Gate first, then the norm of each group of channels, then the weight."""
    y, z, weight = draw(5, 12), draw(5, 12), draw(12)
    out = ops.gated_norm(y, z, weight, 4, 1e-5)
    for group in range(3):
        channels = slice(4 * group, 4 * group + 4)
        gated = y[:, channels] * z[:, channels] * torch.sigmoid(z[:, channels])
        norm = gated.square().mean(-1, keepdim=True).add(1e-5).sqrt()
        assert_close(out[:, channels], gated / norm * weight[channels], TOLERANCE)


@pytest.mark.parametrize("kv_heads", [1, 2, 6])
@pytest.mark.parametrize(
    ("decodes", "prefills"),
    [
        ((), ((1, 0),)),
        ((3, 1, 70, 4), ()),
        ((19,), ((5, 2), (1, 0), (30, 0), (4, 8))),
        # Longer than a run of queries, so that it is cut.
        ((2,), ((300, 9), (257, 0))),
        # More keys than one group may gather.
        ((300,) * 20 + (290,), ()),
    ],
)
def test_attention(
    decodes: tuple[int, ...],
    prefills: tuple[tuple[int, int], ...],
    kv_heads: int,
    ops: Ops,
    draw: Callable[..., Tensor],
) -> None:
    """Every new token sees its sequence up to itself, keys of earlier steps included."""
    block_size, head_dim, num_heads = 4, 8, 6
    lens = tuple(length for length, _ in prefills)
    contexts = (*decodes, *(context for _, context in prefills))
    batch = make_batch(decodes, lens, contexts, blocks_each=80)
    layout = lay_out(batch, SMALL, block_size).attention
    assert isinstance(layout, AttentionLayout)
    num_tokens = len(batch.token_ids)
    q = draw(num_tokens, num_heads, head_dim)
    k, v = draw(num_tokens, kv_heads, head_dim), draw(num_tokens, kv_heads, head_dim)
    num_blocks = int(batch.block_tables.max()) + 1
    keys = torch.full((num_blocks, block_size, kv_heads, head_dim), torch.nan)
    values = keys.clone()
    old = []
    for context, table in zip(contexts, batch.block_tables, strict=True):
        position = torch.arange(context)
        blocks, offsets = table[position // block_size], position % block_size
        keys[blocks, offsets] = draw(context, kv_heads, head_dim)
        values[blocks, offsets] = draw(context, kv_heads, head_dim)
        old.append((keys[blocks, offsets], values[blocks, offsets]))
    out = ops.attention(q, k, v, keys, values, layout)
    begin = 0
    for length, (old_keys, old_values) in zip(batch.query_lens, old, strict=True):
        mine = slice(begin, begin + length)
        begin += length
        all_keys = torch.cat([old_keys, k[mine]]).repeat_interleave(num_heads // kv_heads, 1)
        all_values = torch.cat([old_values, v[mine]]).repeat_interleave(num_heads // kv_heads, 1)
        scores = torch.einsum("qhd,khd->hqk", q[mine], all_keys) * head_dim**-0.5
        future = torch.ones(scores.shape[1:], dtype=torch.bool).triu(len(old_keys) + 1)
        weights = scores.masked_fill(future, -torch.inf).softmax(-1)
        assert_close(out[mine], torch.einsum("hqk,khd->qhd", weights, all_values), TOLERANCE)


def test_selection_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled operators run where they can be compiled and hold the model, else the plain ones;
    the reason is there to print."""
    native_ops()  # skips where nothing can be compiled
    cpu = torch.device("cpu")
    selection = select_ops(cpu, SMALL)
    assert isinstance(selection.ops, NativeOps)
    assert selection.reason == "operators compiled for this CPU (native.cpp)"
    selection = select_ops(cpu, replace(SMALL, ssm_state_size=2048))
    assert isinstance(selection.ops, PlainOps)
    assert "states of 1024 and attention heads of 256 at most" in selection.reason
    monkeypatch.setenv("CXX", "no-such-compiler")
    selection = select_ops(cpu, SMALL)
    assert isinstance(selection.ops, PlainOps)
    assert "no C++ compiler (no-such-compiler) is on the PATH" in selection.reason
