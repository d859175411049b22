"""The sizes of a Nemotron-H model, and the only place that knows Hugging Face's names for them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from batchrun.errors import CheckpointError


class LayerKind(StrEnum):
    """What mixes the tokens or channels in a layer; the letters of a layer pattern."""

    MAMBA = "M"
    MLP = "-"
    ATTENTION = "*"


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The sizes of one model.

    ``layer_pattern`` has a letter of :class:`LayerKind` for each layer. Note what is *not* a
    product of other sizes: ``num_attention_heads * head_dim`` need not be ``hidden_size``, and
    the inner size of a Mamba-2 layer is its heads times their size, not a multiple of it.
    ``chunk_size`` is a performance parameter of the prefill scan, without meaning for results.
    ``torch_dtype`` names the type that the weights are stored in.
    """

    vocab_size: int
    hidden_size: int
    layer_pattern: str
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    mamba_num_heads: int
    mamba_head_dim: int
    ssm_state_size: int
    num_groups: int
    conv_kernel: int = 4
    chunk_size: int = 128
    norm_eps: float = 1e-5
    use_conv_bias: bool = True
    attention_bias: bool = False
    mlp_bias: bool = False
    mamba_proj_bias: bool = False
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 4096
    torch_dtype: str = "bfloat16"

    @property
    def layers(self) -> tuple[LayerKind, ...]:
        """The kind of each layer, from the first to the last."""
        return tuple(LayerKind(letter) for letter in self.layer_pattern)

    @property
    def num_layers(self) -> int:
        """The number of layers of all kinds."""
        return len(self.layer_pattern)

    @property
    def num_mamba_layers(self) -> int:
        """The number of Mamba-2 layers: each keeps a conv state and an SSM state a sequence."""
        return self.layer_pattern.count(LayerKind.MAMBA)

    @property
    def num_attention_layers(self) -> int:
        """The number of attention layers: each keeps a key and a value a token."""
        return self.layer_pattern.count(LayerKind.ATTENTION)

    @property
    def num_mlp_layers(self) -> int:
        """The number of MLP layers, which remember nothing."""
        return self.layer_pattern.count(LayerKind.MLP)

    @property
    def num_layers_to_last_state(self) -> int:
        """The number of layers up to the last that keeps a state; behind it stand MLPs alone, which
        have nothing to do for tokens that need no logits."""
        return len(self.layer_pattern.rstrip(LayerKind.MLP))

    @property
    def mamba_inner_size(self) -> int:
        """Channels of x, y and the gate z in a Mamba-2 layer (d_inner in the paper)."""
        return self.mamba_num_heads * self.mamba_head_dim

    @property
    def conv_dim(self) -> int:
        """Channels that the short convolution runs over: x, B and C side by side."""
        return self.mamba_inner_size + 2 * self.num_groups * self.ssm_state_size

    @property
    def mamba_proj_size(self) -> int:
        """Rows of a Mamba-2 layer's in_proj: z, x, B, C and one dt a head."""
        return self.mamba_inner_size + self.conv_dim + self.mamba_num_heads

    @property
    def conv_state_elements(self) -> int:
        """Numbers of conv state that one sequence holds, all layers together."""
        return self.num_mamba_layers * (self.conv_kernel - 1) * self.conv_dim

    @property
    def ssm_state_elements(self) -> int:
        """Numbers of SSM state that one sequence holds, all layers together."""
        return self.num_mamba_layers * self.mamba_inner_size * self.ssm_state_size

    @property
    def kv_elements_per_token(self) -> int:
        """Numbers of keys and values that one token adds, all attention layers together."""
        return self.num_attention_layers * 2 * self.num_key_value_heads * self.head_dim


def load_config(folder: Path) -> ModelConfig:
    """Read ``config.json`` of a checkpoint folder.

    Raises :class:`CheckpointError` when the folder or the file is missing, is not JSON, or
    describes a model that this package does not run.
    """
    path = folder / "config.json"
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder} is not a folder",
            "model.path must name a folder in the Hugging Face layout, with a config.json",
        )
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{folder} holds no config.json",
            "point model.path at the folder that holds config.json, or copy the checkpoint again",
        ) from None
    except (OSError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} cannot be read as JSON: {error}", "copy the checkpoint again"
        ) from error
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path}: the file holds no JSON object", "copy it again")
    return parse_config(raw, str(path))


def parse_config(raw: Mapping[str, object], source: str = "config.json") -> ModelConfig:
    """The sizes in a parsed ``config.json``; ``source`` names the file in errors.

    Both spellings of each Mamba-2 key are read, and the layers from ``hybrid_override_pattern`` or
    from ``layers_block_type``. Keys without an effect on this architecture are ignored: positions
    (rope), ``expand``, ``sliding_window``, and the limits of the time step, which are (0, inf)
    whatever the file says: as the model was trained, and as other engines run it.
    Raises :class:`CheckpointError` naming the key.
    """
    keys = _Keys(raw, source)
    keys.check_architecture()
    pattern = keys.layer_pattern()
    # Sizes of a kind of layer that the model has not may be missing; then they are 1, unused.
    attention = None if LayerKind.ATTENTION in pattern else 1
    mamba = None if LayerKind.MAMBA in pattern else 1
    heads = keys.integer("num_attention_heads", default=attention)
    config = ModelConfig(
        vocab_size=keys.integer("vocab_size"),
        hidden_size=keys.integer("hidden_size"),
        layer_pattern=pattern,
        intermediate_size=keys.integer(
            "intermediate_size", default=None if LayerKind.MLP in pattern else 1
        ),
        num_attention_heads=heads,
        num_key_value_heads=keys.integer("num_key_value_heads", default=heads),
        head_dim=keys.integer("head_dim", "attention_head_dim", default=attention),
        mamba_num_heads=keys.integer("mamba_num_heads", "mamba_n_heads", default=mamba),
        mamba_head_dim=keys.integer("mamba_head_dim", "mamba_d_head", default=mamba),
        ssm_state_size=keys.integer(
            "ssm_state_size", "mamba_state_dim", "mamba_d_state", default=mamba
        ),
        num_groups=keys.integer("n_groups", "mamba_num_groups", "mamba_n_groups", default=mamba),
        conv_kernel=keys.integer("conv_kernel", "mamba_d_conv", default=4),
        chunk_size=keys.integer("chunk_size", "mamba_chunk_size", default=128),
        norm_eps=keys.number("layer_norm_epsilon", "rms_norm_eps", "norm_eps", default=1e-5),
        use_conv_bias=keys.flag("use_conv_bias", "mamba_conv_bias", default=True),
        attention_bias=keys.flag("attention_bias", default=False),
        mlp_bias=keys.flag("mlp_bias", default=False),
        # `use_bias` is the key that both published implementations obey; the `mamba_proj_bias`
        # beside it in config.json has no effect there, and none here.
        mamba_proj_bias=keys.flag("use_bias", default=False),
        tie_word_embeddings=keys.flag("tie_word_embeddings", default=False),
        max_position_embeddings=keys.integer("max_position_embeddings", default=4096),
        torch_dtype=keys.text("torch_dtype", "dtype", default="bfloat16").removeprefix("torch."),
    )
    keys.check_multiple("num_attention_heads", heads, config.num_key_value_heads, "key/value heads")
    keys.check_multiple("mamba_num_heads", config.mamba_num_heads, config.num_groups, "groups")
    if config.conv_kernel < 2:
        raise keys.error("conv_kernel", f"is {config.conv_kernel}, but must be at least 2")
    return config


_LAYER_TYPES = {
    "linear_attention": LayerKind.MAMBA,
    "mamba": LayerKind.MAMBA,
    "mamba2": LayerKind.MAMBA,
    "mlp": LayerKind.MLP,
    "full_attention": LayerKind.ATTENTION,
    "attention": LayerKind.ATTENTION,
}
"""Names of layer kinds in ``layers_block_type``, those of earlier releases among them."""

_MEND = "check that config.json belongs to this checkpoint and was copied whole"


@dataclass(frozen=True, slots=True)
class _Keys:
    """Typed access to the keys of a config.json. The first name given that is there counts."""

    raw: Mapping[str, object]
    source: str

    def error(self, key: str, what: str, hint: str = _MEND) -> CheckpointError:
        return CheckpointError(f"{self.source}: {key} {what}", hint)

    def find(self, names: tuple[str, ...]) -> tuple[str, object]:
        """The key that is there and its value; null counts as missing, two values as wrong."""
        found = [(n, self.raw[n]) for n in names if self.raw.get(n) is not None]
        for name, value in found[1:]:
            if value != found[0][1]:
                raise self.error(name, f"is {value!r}, but {found[0][0]} is {found[0][1]!r}")
        return found[0] if found else (names[0], None)

    def integer(self, *names: str, default: int | None = None) -> int:
        key, value = self.find(names)
        if value is None:
            if default is None:
                raise self.error(key, "is missing")
            return default
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self.error(key, f"must be a positive whole number, but is {value!r}")
        return value

    def number(self, *names: str, default: float) -> float:
        key, value = self.find(names)
        if value is None:
            return default
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < 1:
            raise self.error(key, f"must be a number from 0 to 1, but is {value!r}")
        return float(value)

    def flag(self, *names: str, default: bool) -> bool:
        key, value = self.find(names)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.error(key, f"must be true or false, but is {value!r}")
        return value

    def text(self, *names: str, default: str) -> str:
        key, value = self.find(names)
        if value is None:
            return default
        if not isinstance(value, str):
            raise self.error(key, f"must be a string, but is {value!r}")
        return value

    def check_architecture(self) -> None:
        """Refuse what would be computed wrongly: other models, activations, quantised weights."""
        model_type = self.raw.get("model_type")
        if model_type != "nemotron_h":
            raise self.error(
                "model_type",
                "is missing" if model_type is None else f"is {model_type!r}",
                'this package runs models of model_type "nemotron_h" only',
            )
        for key, only in (("mlp_hidden_act", "relu2"), ("mamba_hidden_act", "silu")):
            if self.raw.get(key, only) != only:
                raise self.error(
                    key,
                    f"is {self.raw[key]!r}; only {only!r} is known",
                    "use a Nemotron-H checkpoint with its published activation",
                )
        if self.raw.get("quantization_config"):
            raise self.error(
                "quantization_config",
                "is set: the weights of this checkpoint are quantised",
                "use the checkpoint with bfloat16 weights",
            )

    def layer_pattern(self) -> str:
        """One letter a layer, from whichever of the keys is there; all that are must agree."""
        pattern = self.text("hybrid_override_pattern", default="")
        key, listed = self.find(("layers_block_type", "layer_types"))
        if pattern:
            key = "hybrid_override_pattern"
        elif listed is None:
            raise self.error("hybrid_override_pattern", "is missing, and so is layers_block_type")
        if listed is not None:
            from_list = self._pattern_of(key, listed)
            if pattern and from_list != pattern:
                raise self.error(key, f"is {pattern!r}, but the listed layers are {from_list!r}")
            pattern = from_list
        if "E" in pattern:
            raise self.error(
                key,
                "has mixture-of-experts layers",
                "use a dense Nemotron-H model, such as NVIDIA-Nemotron-Nano-9B-v2",
            )
        unknown = sorted(set(pattern) - set(LayerKind))
        if unknown:
            raise self.error(key, f"has unknown layers {', '.join(map(repr, unknown))}")
        num_layers = self.integer("num_hidden_layers", default=len(pattern))
        if num_layers != len(pattern):
            raise self.error(
                "num_hidden_layers", f"is {num_layers}, but {key} has {len(pattern)} layers"
            )
        return pattern

    def _pattern_of(self, key: str, listed: object) -> str:
        if not isinstance(listed, Sequence) or isinstance(listed, str) or not listed:
            raise self.error(key, f"must be a list of layer types, but is {listed!r}")
        letters = []
        for name in listed:
            letter = "E" if name == "moe" else _LAYER_TYPES.get(str(name))
            if letter is None:
                raise self.error(key, f"has the unknown layer type {name!r}")
            letters.append(str(letter))
        return "".join(letters)

    def check_multiple(self, key: str, value: int, divisor: int, of_what: str) -> None:
        if value % divisor:
            raise self.error(key, f"is {value}, not a multiple of the {divisor} {of_what}")
