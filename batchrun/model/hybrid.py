"""The model: embeddings, a stack of layers of three kinds, a norm, logits."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from batchrun.model.attention import Attention
from batchrun.model.batch import Batch, DecodeBatch
from batchrun.model.config import LayerKind, ModelConfig
from batchrun.model.layers import MLP, RMSNorm
from batchrun.model.layout import lay_out
from batchrun.model.mamba2 import Mamba2Mixer
from batchrun.model.ops import Ops, select_ops
from batchrun.model.packed import can_pack, pack_layers
from batchrun.model.quantize import Int8Linear, int8_linear
from batchrun.model.state import State


class Layer(nn.Module):
    """``h + mixer(norm(h))``, where the mixer is a Mamba-2 layer, an attention or an MLP.

    One mixer a layer: a layer of attention is not followed by its own MLP, as in a transformer.
    """

    def __init__(self, config: ModelConfig, kind: LayerKind) -> None:
        super().__init__()
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mixer: Mamba2Mixer | Attention | MLP
        match kind:
            case LayerKind.MAMBA:
                self.mixer = Mamba2Mixer(config)
            case LayerKind.ATTENTION:
                self.mixer = Attention(config)
            case LayerKind.MLP:
                self.mixer = MLP(config)


class Backbone(nn.Module):
    """All but the logits: token ids to hidden states."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, kind) for kind in config.layers)
        self.norm_f = RMSNorm(config.hidden_size, config.norm_eps)

    def forward(self, batch: Batch | DecodeBatch, state: State, ops: Ops) -> Tensor:
        """Hidden states [L, hidden] at ``batch.logit_rows``, behind the last norm."""
        layout = lay_out(batch, self.config, state.block_size, rectangles=ops.rectangles)
        h: Tensor = self.embeddings(batch.token_ids)  # [T, hidden]
        mamba = attention = 0  # layers of each kind so far: their place in the pools
        delta: Tensor | None = None  # what the last layer adds; the next norm adds it up
        rows, num_stateful = batch.logit_rows, self.config.num_layers_to_last_state
        for place, layer in enumerate(self.layers):
            assert isinstance(layer, Layer)
            if place == num_stateful:
                h, delta = _pick(rows, h, delta)  # from here on nothing is left to other tokens
            u = ops.add_norm(h, delta, layer.norm.weight, layer.norm.eps)
            match layer.mixer:
                case Mamba2Mixer() as mixer:
                    delta = mixer(u, layout, state.conv[mamba], state.ssm[mamba], ops)
                    mamba += 1
                case Attention() as mixer:
                    keys, values = state.keys[attention], state.values[attention]
                    delta = mixer(u, layout.attention, keys, values, ops)
                    attention += 1
                case MLP() as mixer:
                    delta = mixer(u)
        if num_stateful == len(self.layers):
            h, delta = _pick(rows, h, delta)
        return ops.add_norm(h, delta, self.norm_f.weight, self.norm_f.eps)


def _pick(rows: Tensor | slice, h: Tensor, delta: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """[T, hidden] -> [L, hidden] each."""
    return h[rows], None if delta is None else delta[rows]


class NemotronH(nn.Module):
    """A Nemotron-H language model.

    Parameters carry the names of published checkpoints (``backbone.layers.0.mixer.in_proj.weight``
    and so on). Built under ``torch.device("meta")`` it allocates nothing. With
    ``tie_word_embeddings`` the logits are made by the embeddings, and ``lm_head`` is None.
    ``ops`` overrides the operators that :func:`select_ops` would choose for the device.
    :meth:`prepare` it when its weights are there, and it runs faster.
    """

    def __init__(self, config: ModelConfig, ops: Ops | None = None) -> None:
        super().__init__()
        self.config = config
        self.ops = ops
        self.backbone = Backbone(config)
        self.lm_head: nn.Module | None = None
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @torch.no_grad()
    def prepare(self, *, deterministic: bool = False) -> None:
        """Choose the operators, as :func:`select_ops` does, and arrange the weights for speed,
        layer by layer; they must not change afterwards.

        Matrices that share their input become one, so that not all names are those of checkpoints
        any more. No second copy is kept.
        """
        if self.ops is None:
            device = self.backbone.embeddings.weight.device
            self.ops = select_ops(device, self.config, deterministic=deterministic).ops
        for layer in self.backbone.layers:
            assert isinstance(layer, Layer)
            if not isinstance(layer.mixer, MLP):
                layer.mixer.prepare()
        embeddings = self.backbone.embeddings.weight
        if can_pack(embeddings.dtype, embeddings.device):
            pack_layers(self)
        # Operators with kernels have one for quantised matrices too.
        product = getattr(self.ops, "int8_linear", int8_linear)
        for module in self.modules():
            if isinstance(module, Int8Linear):
                module.product = product

    @torch.inference_mode()
    def forward(self, batch: Batch | DecodeBatch, state: State) -> Tensor:
        """Run one step: float32 logits [L, vocab] at ``batch.logit_rows``.

        ``state`` is updated in place. One signature for everything: a whole prompt, a part of one
        from where the state stands, one token of each of many sequences, or all of that at once.
        """
        if self.ops is None:
            self.ops = select_ops(batch.token_ids.device, self.config).ops
        h = self.backbone(batch, state, self.ops)  # [L, hidden]
        if self.lm_head is None:
            return torch.nn.functional.linear(h, self.backbone.embeddings.weight).float()
        logits: Tensor = self.lm_head(h)
        return logits.float()
