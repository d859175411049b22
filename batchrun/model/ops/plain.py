"""The operators in plain PyTorch; see :class:`batchrun.model.ops.Ops` for shapes and meaning.

Rows are gathered and scattered by ``index_select`` and ``index_copy_``: on a CPU they copy whole
rows, several times faster than indexing with a tensor, which computes each element's place.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from batchrun.model.layout import AttentionLayout, PrefillLayout


class PlainOps:
    """Operators in plain PyTorch, batched over sequences: no loop over tokens or sequences."""

    rectangles = True

    def conv_update(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, slots: Tensor
    ) -> Tensor:
        """One token a sequence: the state's columns and the new one are the whole window."""
        window = torch.cat([state.index_select(0, slots), x[:, None]], dim=1)  # [D, K, c]
        state.index_copy_(0, slots, window[:, 1:])
        out = (window.float() * weight.t().float()).sum(1)  # [D, c]
        if bias is not None:
            out = out + bias.float()
        return F.silu(out).to(x.dtype)

    def causal_conv(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, layout: PrefillLayout
    ) -> Tensor:
        """All prefills behind one another, each after the columns of its state."""
        channels, kernel = weight.shape
        # A new sequence sees zeros before its first token, whatever the slot holds.
        before = state.index_select(0, layout.slots)  # [P, K - 1, c]
        before.masked_fill_(layout.is_new[:, None, None], 0)
        columns = x.new_empty(layout.num_columns, channels)  # [E, c]
        columns.index_copy_(0, layout.state_columns.flatten(), before.flatten(0, 1))
        columns.index_copy_(0, layout.token_columns, x)
        tails = columns.index_select(0, layout.tail_columns.flatten())
        state.index_copy_(0, layout.slots, tails.view_as(before))

        # out[j] sees columns j .. j + K - 1. Windows over two sequences are computed, not used.
        weights = weight.t().float()  # [K, c]
        columns = columns.float()
        num_out = layout.num_columns - kernel + 1
        out = columns[:num_out] * weights[0]
        for k in range(1, kernel):
            out.addcmul_(columns[k : k + num_out], weights[k])
        out = out.index_select(0, layout.token_columns - (kernel - 1))  # [T, c]
        if bias is not None:
            out = out + bias.float()
        return F.silu(out).to(x.dtype)

    def ssm_update(
        self,
        x: Tensor,
        dt: Tensor,
        B: Tensor,
        C: Tensor,
        A: Tensor,
        dt_bias: Tensor,
        skip: Tensor,
        state: Tensor,
        slots: Tensor,
    ) -> Tensor:
        """S <- exp(dt A) S + dt x (outer) B;  y = S C + skip x."""
        num_decodes, num_heads, head_dim = x.shape
        num_groups, state_size = B.shape[1:]
        per_group = num_heads // num_groups
        dt = F.softplus(dt.float() + dt_bias.float())  # [D, h]
        x32 = x.float()
        S = state.index_select(0, slots).float()  # [D, h, p, n]
        S.mul_(torch.exp(dt * A)[..., None, None])
        # Heads of a group share B and C: fold them into rows of the group.
        S = S.view(num_decodes, num_groups, per_group * head_dim, state_size)
        dt_x = (dt[..., None] * x32).view(num_decodes, num_groups, per_group * head_dim)
        S.addcmul_(dt_x[..., None], B.float()[:, :, None])
        y = (S @ C.float()[..., None]).view_as(x32)  # [D, h, p]
        state.index_copy_(0, slots, S.view(num_decodes, *state.shape[1:]).to(state.dtype))
        return (y + skip.float()[:, None] * x32).to(x.dtype)

    def ssd_scan(
        self,
        x: Tensor,
        dt: Tensor,
        B: Tensor,
        C: Tensor,
        A: Tensor,
        dt_bias: Tensor,
        skip: Tensor,
        state: Tensor,
        layout: PrefillLayout,
    ) -> Tensor:
        """The chunked algorithm of the Mamba-2 paper (state space duality), section 6.

        Inside a chunk the recurrence is a masked matrix product of its tokens; between chunks only
        the state is handed on. Padding has dt = 0, which changes neither outputs nor states.
        """
        num_heads, head_dim = x.shape[1:]
        num_groups, state_size = B.shape[1:]
        per_group = num_heads // num_groups
        c, q = layout.num_chunks, layout.chunk_size

        def to_chunks(tokens: Tensor) -> Tensor:  # [T, ...] -> [c, q, ...] float32
            cells = torch.zeros(c * q, *tokens.shape[1:], device=tokens.device)
            return cells.index_copy_(0, layout.token_cells, tokens.float()).view(
                c, q, *tokens.shape[1:]
            )

        x32 = x.float()
        dt = F.softplus(dt.float() + dt_bias.float())  # [T, h]
        xc = to_chunks(dt[..., None] * x32)  # [c, q, h, p]: dt_s * x_s
        xc = xc.permute(0, 2, 1, 3)  # [c, h, q, p]
        Bc = to_chunks(B).transpose(1, 2)  # [c, g, q, n]
        Cc = to_chunks(C).transpose(1, 2)  # [c, g, q, n]
        # a_l: the log of the decay from the start of the chunk to after its token l.
        # What counts are its differences: after a large step float32 alone would lose small ones,
        # so it is a + a_rest.
        exact = (to_chunks(dt) * A).transpose(1, 2).double().cumsum(-1)  # [c, h, q]
        a = exact.float()
        a_rest = (exact - a).float()

        # 1. Inside: y_l += sum_{s <= l} (C_l . B_s) exp(a_l - a_s) dt_s x_s
        # Above the diagonal exp would overflow: there the exponent is cut and the score zero.
        scores = (Cc @ Bc.transpose(-1, -2)).tril_()  # [c, g, q, q]
        decay = a[..., :, None] - a[..., None, :]  # [c, h, q, q]
        decay.add_(a_rest[..., :, None]).sub_(a_rest[..., None, :]).clamp_(max=0).exp_()
        decay.view(c, num_groups, per_group, q, q).mul_(scores[:, :, None])
        y = decay @ xc  # [c, h, q, p]

        # 2. What each chunk adds to the state: sum_s exp(a_last - a_s) dt_s x_s (outer) B_s
        to_end = (exact[..., -1:] - exact).float().exp()[..., None]  # [c, h, q, 1]
        rows = (xc * to_end).transpose(-1, -2)  # [c, h, p, q]
        added = rows.reshape(c, num_groups, -1, q) @ Bc  # [c, g, h/g * p, n]
        added = added.view(c, num_heads, head_dim, state_size)

        # 3. Hand the states on from chunk to chunk, each sequence from its own slot.
        across = a[..., -1].exp()[..., None, None]  # [c, h, 1, 1]
        S = state.index_select(0, layout.slots).float()  # [P, h, p, n]
        S.masked_fill_(layout.is_new[:, None, None, None], 0)
        entering = torch.empty_like(added)  # [c, h, p, n]
        for wave in layout.waves:
            S_in = S.index_select(0, wave.sequences)  # [k, h, p, n]
            entering.index_copy_(0, wave.chunks, S_in)
            S_in.mul_(across.index_select(0, wave.chunks))
            S_in.add_(added.index_select(0, wave.chunks))
            S.index_copy_(0, wave.sequences, S_in)
        state.index_copy_(0, layout.slots, S.to(state.dtype))

        # 4. From before the chunk: y_l += exp(a_l) S_in C_l
        S_rows = entering.view(c, num_groups, per_group * head_dim, state_size)
        from_before = (S_rows @ Cc.transpose(-1, -2)).view(c, num_heads, head_dim, q)
        y = y.addcmul_(from_before.transpose(-1, -2), a.exp()[..., None])

        y = y.permute(0, 2, 1, 3).reshape(c * q, num_heads, head_dim)
        y = y.index_select(0, layout.token_cells)  # [T, h, p]
        return (y + skip.float()[:, None] * x32).to(x.dtype)

    def add_norm(self, h: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> Tensor:
        """In float32, rounded once."""
        if delta is not None:
            h.add_(delta)
        return F.rms_norm(h.float(), weight.shape, weight.float(), eps).to(h.dtype)

    def gated_norm(
        self, y: Tensor, z: Tensor, weight: Tensor, group_size: int, eps: float
    ) -> Tensor:
        """Gate first, norm second, the weight last: all in float32, rounded once."""
        v = y.float() * F.silu(z.float())  # [T, inner]
        groups = v.view(len(v), -1, group_size)
        normed = F.rms_norm(groups, (group_size,), None, eps).view_as(v)
        return (normed * weight.float()).to(y.dtype)

    def attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        keys: Tensor,
        values: Tensor,
        layout: AttentionLayout,
    ) -> Tensor:
        """Sequences of similar lengths at a time, keys and values gathered from their blocks."""
        num_heads, head_dim = q.shape[1:]
        kv_heads = k.shape[1]
        key_pool, value_pool = keys.flatten(0, 1), values.flatten(0, 1)  # [rows, kv heads, d]
        key_pool.index_copy_(0, layout.write_rows, k)
        value_pool.index_copy_(0, layout.write_rows, v)
        out = torch.empty_like(q)
        for group in layout.groups:
            n, num_queries = group.query_tokens.shape
            kv_shape = (n, group.key_rows.shape[1], kv_heads, head_dim)
            rows = group.key_rows.flatten()
            group_keys = key_pool.index_select(0, rows).view(kv_shape).transpose(1, 2)
            group_values = value_pool.index_select(0, rows).view(kv_shape).transpose(1, 2)
            queries = q.index_select(0, group.query_tokens.flatten())  # [n * Lq, heads, d]
            if num_queries == 1:
                # Heads that share a key/value head become its queries: nothing is repeated.
                queries = queries.view(n, kv_heads, num_heads // kv_heads, head_dim)
                seen = F.scaled_dot_product_attention(
                    queries, group_keys, group_values, attn_mask=group.mask
                ).reshape(n, num_heads, head_dim)
            else:
                queries = queries.view(n, num_queries, num_heads, head_dim).transpose(1, 2)
                seen = F.scaled_dot_product_attention(
                    queries, group_keys, group_values, attn_mask=group.mask, enable_gqa=True
                )  # [n, heads, Lq, d]
                seen = seen.transpose(1, 2).reshape(n * num_queries, num_heads, head_dim)
                seen = seen.index_select(0, group.cells)
            out.index_copy_(0, group.tokens, seen)
        return out
