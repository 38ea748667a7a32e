"""What the engine must know of a model, read off its transformers config; what it cannot do is refused."""

from dataclasses import dataclass
from typing import Any

import torch

from teal.errors import TealError, UnsupportedModelError


@dataclass(frozen=True)
class Family:
    """What a model type's code fixes and its config does not say.

    A bias is True, False or the name of the config field that decides. `windows` tells which blocks have a
    sliding window: "none", "all" (`sliding_window` may be null) or "layer_types" (the config lists them).
    """

    qkv_bias: bool | str = False
    output_bias: bool | str = False
    mlp_bias: bool | str = False
    qk_norm: bool = False
    windows: str = "none"


FAMILIES = {
    "llama": Family(qkv_bias="attention_bias", output_bias="attention_bias", mlp_bias="mlp_bias"),
    "mistral": Family(windows="all"),
    "qwen2": Family(qkv_bias=True, windows="layer_types"),
    "qwen3": Family(qkv_bias="attention_bias", output_bias="attention_bias", qk_norm=True, windows="layer_types"),
}

# Config fields for arithmetic that the engine does not have, and their values that change nothing.
_NEUTRAL_VALUES: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "quantization_config": (None,),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "partial_rotary_factor": (None, 1.0),
    "num_experts": (None, 0),
    "num_local_experts": (None, 0),
}
# Their frequencies depend on the length of the sequence, which a captured step cannot follow.
_LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")


@dataclass(frozen=True)
class EngineConfig:
    """A decoder of the Llama kind. Biases follow the projections; `windows` has one entry per block.

    `inverse_frequencies` [head_dim / 2] and `rope_scale` (on cosine and sine) are transformers' own RoPE
    parameters, so every RoPE type of fixed frequencies is the same here. `dtype` is None if not stored.
    `quantization` of the projections and `head_quantization` are "int8", "int4" or None: chosen at load.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    heads: int
    kv_heads: int
    head_dim: int
    max_positions: int
    rms_norm_eps: float
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    tied_embeddings: bool
    windows: tuple[int | None, ...]
    inverse_frequencies: tuple[float, ...]
    rope_scale: float
    eos_token_ids: tuple[int, ...]
    dtype: torch.dtype | None
    quantization: str | None = None
    head_quantization: str | None = None

    @property
    def blocks(self) -> int:
        return len(self.windows)

    @property
    def weights(self) -> int:
        """Numbers in the matrices; an LM head counts where it is tied, too, as it is packed on its own."""
        attention = 2 * (self.heads + self.kv_heads) * self.head_dim
        return self.hidden_size * (self.blocks * (attention + 3 * self.intermediate_size) + 2 * self.vocab_size)

    @classmethod
    def of(cls, config: Any, eos_token_id: int | list[int] | None = None) -> "EngineConfig":
        """Read a transformers config. `eos_token_id` (generation settings) goes before the config's own.

        Raises TealError, naming the field, for anything the engine would compute differently.
        """
        family = _family(config)
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        frequencies, rope_scale = _rope(config, head_dim)
        eos = config.eos_token_id if eos_token_id is None else eos_token_id
        return cls(
            model_type=config.model_type,
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_dim=head_dim,
            max_positions=_max_positions(config),
            rms_norm_eps=config.rms_norm_eps,
            qkv_bias=_bias(config, family.qkv_bias),
            output_bias=_bias(config, family.output_bias),
            mlp_bias=_bias(config, family.mlp_bias),
            qk_norm=family.qk_norm,
            tied_embeddings=bool(config.tie_word_embeddings),
            windows=_windows(config, family),
            inverse_frequencies=frequencies,
            rope_scale=rope_scale,
            eos_token_ids=() if eos is None else (eos,) if isinstance(eos, int) else tuple(eos),
            dtype=config.dtype,
        )


def _refuse(config: Any, what: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"the engine does not support {what} (model type {config.model_type!r}); decode this model with "
        "transformers: teal.sparsify(model, plan), then model.generate"
    )


def _family(config: Any) -> Family:
    if config.model_type not in FAMILIES:
        raise _refuse(config, f"this architecture, only {', '.join(FAMILIES)}")
    for field, neutral in _NEUTRAL_VALUES.items():
        value = getattr(config, field, neutral[0])
        if value not in neutral:
            raise _refuse(config, field if isinstance(value, dict) else f"{field}={value!r}")
    return FAMILIES[config.model_type]


def _bias(config: Any, rule: bool | str) -> bool:
    return bool(getattr(config, rule)) if isinstance(rule, str) else rule


def _windows(config: Any, family: Family) -> tuple[int | None, ...]:
    window = getattr(config, "sliding_window", None)
    layer_types: list[str] | None = getattr(config, "layer_types", None)
    if family.windows == "layer_types" and layer_types is not None:
        kinds = {"full_attention": None, "sliding_attention": window}
        if unknown := sorted(set(layer_types) - set(kinds)):
            raise _refuse(config, f"layer type {unknown[0]!r}")
        return tuple(kinds[kind] for kind in layer_types)
    if layer_types is not None:
        raise _refuse(config, "layer_types")
    if family.windows == "none" and window is not None:
        raise _refuse(config, f"sliding_window={window}")
    return (window,) * config.num_hidden_layers


def _max_positions(config: Any) -> int:
    """What the model was made for; YaRN is often switched on without raising max_position_embeddings."""
    parameters = config.rope_parameters or {}
    if parameters.get("rope_type") != "yarn":
        return config.max_position_embeddings
    original = parameters.get("original_max_position_embeddings") or config.max_position_embeddings
    return max(config.max_position_embeddings, int(parameters.get("factor", 1.0) * original))


def _rope(config: Any, head_dim: int) -> tuple[tuple[float, ...], float]:
    """Inverse frequencies and scale as transformers computes them, alike for all families here."""
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    parameters = config.rope_parameters or {}
    rope_type = parameters.get("rope_type")
    if rope_type is None or rope_type in _LENGTH_DEPENDENT_ROPE:
        raise _refuse(config, f"RoPE of type {rope_type!r}" if rope_type else "RoPE per layer type")
    if parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise _refuse(config, f"partial_rotary_factor={parameters['partial_rotary_factor']}")
    try:
        rotary = LlamaRotaryEmbedding(config)
    except (KeyError, ValueError, TypeError) as error:
        raise TealError(f"the RoPE settings {parameters} are not understood ({error!r})") from error
    frequencies = rotary.inv_freq.tolist()
    if len(frequencies) != head_dim // 2:
        raise _refuse(config, f"RoPE on {2 * len(frequencies)} of {head_dim} dimensions")
    return tuple(frequencies), float(rotary.attention_scaling)
