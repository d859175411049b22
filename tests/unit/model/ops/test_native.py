"""The compiled operators against the plain ones, at sizes of real models; how they are built."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from batchrun.model.layout import lay_out
from batchrun.model.ops import Ops
from batchrun.model.ops.build import NoCompiler, load_library
from batchrun.model.ops.plain import PlainOps
from tests.unit.model.models import SMALL
from tests.unit.model.ops.batches import make_batch, native_ops

BLOCK_SIZE = 32
CONFIG = replace(
    SMALL, mamba_num_heads=8, mamba_head_dim=80, ssm_state_size=128, num_groups=2, chunk_size=128
)
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2}

Run = Callable[[Ops, torch.dtype, torch.dtype], list[Tensor]]


def draw(seed: int, *shape: int) -> Tensor:
    """Standard normal numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def mamba_layer(ops: Ops, dtype: torch.dtype, state_dtype: torch.dtype) -> list[Tensor]:
    """Decodes and prefills through the operators of a Mamba-2 layer: outputs and states."""
    batch = make_batch((5, 90, 3), (1, 40, 130), (5, 90, 3, 0, 0, 7))
    layout = lay_out(batch, CONFIG, BLOCK_SIZE, rectangles=ops.rectangles)
    assert layout.prefill is not None
    heads, p, g, n = 8, 80, 2, 128
    inner, channels = heads * p, heads * p + 2 * g * n
    # Parts of one row, as in the layer.
    projected = draw(0, len(batch.token_ids), inner + channels + heads).to(dtype)
    z, mixed, dt = projected.split([inner, channels, heads], dim=-1)
    weight, bias = draw(1, channels, 4).to(dtype), draw(2, channels).to(dtype)
    conv, ssm = draw(3, 12, 3, channels).to(dtype), draw(4, 12, heads, p, n).to(state_dtype)
    rest = (-draw(5, heads).exp(), draw(6, heads).to(dtype), draw(7, heads).to(dtype))
    norm = draw(8, inner).to(dtype)

    def split(mixed: Tensor) -> list[Tensor]:
        x, B, C = mixed.split([inner, g * n, g * n], dim=-1)
        return [x.unflatten(1, (heads, p)), B.unflatten(1, (g, n)), C.unflatten(1, (g, n))]

    slots = layout.decode_slots
    x, B, C = split(ops.conv_update(mixed[:3], weight, bias, conv, slots))
    decoded = ops.ssm_update(x, dt[:3], B, C, *rest, ssm, slots)
    x, B, C = split(ops.causal_conv(mixed[3:], weight, bias, conv, layout.prefill))
    prefilled = ops.ssd_scan(x, dt[3:], B, C, *rest, ssm, layout.prefill)
    y = torch.cat([decoded, prefilled]).flatten(1)
    return [y, conv, ssm, ops.gated_norm(y, z, norm, inner // g, 1e-5)]


def attention_layer(ops: Ops, dtype: torch.dtype, state_dtype: torch.dtype) -> list[Tensor]:
    """Decodes and prefills through the operators of an attention layer: output and pools."""
    batch = make_batch((5, 90, 300), (1, 40, 290), (5, 90, 300, 0, 0, 70))
    layout = lay_out(batch, CONFIG, BLOCK_SIZE, rectangles=ops.rectangles).attention
    assert layout is not None
    heads, kv_heads, head_dim = 10, 2, 64
    projected = draw(0, len(batch.token_ids), heads + 2 * kv_heads, head_dim).to(dtype)
    keys = draw(1, int(batch.block_tables.max()) + 1, BLOCK_SIZE, kv_heads, head_dim).to(dtype)
    values = draw(2, *keys.shape).to(dtype)
    q, k, v = projected.split([heads, kv_heads, kv_heads], dim=1)
    return [ops.attention(q, k, v, keys, values, layout), keys, values]


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("run", [mamba_layer, attention_layer])
def test_equal_to_plain(run: Run, dtype: torch.dtype, state_dtype: torch.dtype) -> None:
    """In every dtype, up to its rounding; pools too, and those of other sequences to the bit."""
    got, expected = (run(ops, dtype, state_dtype) for ops in (native_ops(), PlainOps()))
    for mine, theirs in zip(got, expected, strict=True):
        assert mine.dtype is theirs.dtype
        tolerance = max(TOLERANCES[dtype], TOLERANCES[mine.dtype])
        largest = float(theirs.abs().max())
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance * largest)


@pytest.fixture
def threads() -> Iterator[None]:
    """Puts torch's threads back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("run", [mamba_layer, attention_layer])
def test_threads_change_nothing(run: Run) -> None:
    """Results are the same to the bit, however many threads share the work."""
    results = []
    for num_threads in (1, 3):
        torch.set_num_threads(num_threads)
        results.append(run(native_ops(), torch.float32, torch.float32))
    for one, three in zip(*results, strict=True):
        assert torch.equal(one, three)


def test_prefill_in_pieces_is_exact() -> None:
    """A prompt in one piece, and in pieces that end anywhere: the same bits."""
    ops, heads = native_ops(), 8
    x, B, C = draw(0, 50, heads, 80), draw(1, 50, 2, 128), draw(2, 50, 2, 128)
    dt, rest = draw(3, 50, heads), (-draw(4, heads).exp(), draw(5, heads), draw(6, heads))
    results = []
    for cuts in ((0, 50), (0, 1, 14, 15, 50)):
        state = torch.full((12, heads, 80, 128), torch.nan)
        parts = []
        for start, end in pairwise(cuts):
            layout = lay_out(make_batch((), (end - start,), (start,)), CONFIG, BLOCK_SIZE).prefill
            assert layout is not None
            piece = slice(start, end)
            parts.append(
                ops.ssd_scan(x[piece], dt[piece], B[piece], C[piece], *rest, state, layout)
            )
        results.append((torch.cat(parts), state[layout.slots]))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_nan_comes_out() -> None:
    """A state or a key that is no number shows in what comes out, and only in its own sequence."""
    ops = native_ops()
    batch = make_batch((40, 40), (), (40, 40))
    layout = lay_out(batch, CONFIG, BLOCK_SIZE).attention
    assert layout is not None
    keys = draw(0, int(batch.block_tables.max()) + 1, BLOCK_SIZE, 2, 64)
    keys[batch.block_tables[0, 0], 3] = torch.nan
    q, k, v = draw(1, 2, 4, 64), draw(2, 2, 2, 64), draw(3, 2, 2, 64)
    out = ops.attention(q, k, v, keys, draw(4, *keys.shape), layout)
    assert out[0].isnan().all()
    assert out[1].isfinite().all()
    normed = ops.add_norm(torch.tensor([[torch.nan, 1.0], [2.0, 1.0]]), None, torch.ones(2), 0.0)
    assert normed.isnan().all(1).tolist() == [True, False]


def test_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first process compiles, the next loads what it left, and what is broken is replaced."""
    native_ops()  # skips where nothing can be compiled
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    load_library()
    (built,) = (tmp_path / "batchrun").iterdir()
    content = built.read_bytes()
    built.write_bytes(b"cut off")
    load_library()
    assert built.read_bytes() == content
    monkeypatch.setattr("batchrun.model.ops.build._compile", None)  # would fail if it were called
    load_library()


def test_no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiler that fails is named; so is one that is not there."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(NoCompiler, match="false fails: it says nothing"):
        load_library()
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(NoCompiler, match="no-such-compiler"):
        load_library()
