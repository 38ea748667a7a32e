"""One decoder block: its weights under Hugging Face's names, and its forward pass, which is dense prefill."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from teal.engine.cache import BlockCache
from teal.engine.config import EngineConfig
from teal.linear import SparseLinear
from teal.ops.sparse_gemv import pack

# Gives the tensor of a name, of exactly this shape, in the dtype and on the device the model shall have.
TakeTensor = Callable[[str, tuple[int, ...]], Tensor]


def scoped(take: TakeTensor, prefix: str) -> TakeTensor:
    return lambda name, shape: take(prefix + name, shape)


class RMSNorm(nn.Module):
    """x [..., d] -> x / rms(x) * weight, the mean in float32, the product in x's dtype."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cuda:  # one kernel instead of eight
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding: x [..., head_dim], cos and sin of a shape that broadcasts to it."""
    low, high = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-high, low), dim=-1) * sin


def _projection(
    take: TakeTensor, name: str, shape: tuple[int, int], bias: bool, quantization: str | None
) -> SparseLinear:
    packed = pack(take(f"{name}.weight", shape), quantization)
    return SparseLinear(packed, take(f"{name}.bias", shape[:1]) if bias else None)


class Attention(nn.Module):
    """Grouped-query attention; `window` is how many positions a token sees, itself included; None is all."""

    def __init__(self, config: EngineConfig, window: int | None, take: TakeTensor) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = config.heads, config.kv_heads, config.head_dim
        self.window = window
        query, key, hidden = self.heads * self.head_dim, self.kv_heads * self.head_dim, config.hidden_size
        quantization = config.quantization
        self.q_proj = _projection(take, "q_proj", (query, hidden), config.qkv_bias, quantization)
        self.k_proj = _projection(take, "k_proj", (key, hidden), config.qkv_bias, quantization)
        self.v_proj = _projection(take, "v_proj", (key, hidden), config.qkv_bias, quantization)
        self.o_proj = _projection(take, "o_proj", (hidden, query), config.output_bias, quantization)
        self.q_norm, self.k_norm = None, None
        if config.qk_norm:
            self.q_norm = RMSNorm(take("q_norm.weight", (self.head_dim,)), config.rms_norm_eps)
            self.k_norm = RMSNorm(take("k_norm.weight", (self.head_dim,)), config.rms_norm_eps)

    def split_heads(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[..., heads * head_dim] each -> [..., heads, head_dim] each; normalized where the model does."""
        query, key, value = (x.unflatten(-1, (-1, self.head_dim)) for x in (query, key, value))
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        return query, key, value

    def forward(self, x: Tensor, cache: BlockCache, cos: Tensor, sin: Tensor, start: int) -> Tensor:
        """x [B, T, d] at positions start ... start + T - 1 (cos, sin [T, head_dim]) -> [B, T, d]."""
        projected = (layer.prefill(x) for layer in (self.q_proj, self.k_proj, self.v_proj))
        query, key, value = (part.transpose(1, 2) for part in self.split_heads(*projected))  # [B, heads, T, D]
        end = start + x.shape[1]
        cache.keys[:, :, start:end] = rotate(key, cos, sin)
        cache.values[:, :, start:end] = value
        mask = self._mask(start, end, x.device)
        attended = F.scaled_dot_product_attention(
            rotate(query, cos, sin), cache.keys[:, :, :end], cache.values[:, :, :end],
            attn_mask=mask, is_causal=mask is None, enable_gqa=True,
        )  # fmt: skip
        return self.o_proj.prefill(attended.transpose(1, 2).flatten(2))

    def _mask(self, start: int, end: int, device: torch.device) -> Tensor | None:
        """Which of the positions before `end` each token sees [T, end], or None for plain causality."""
        if start == 0 and (self.window is None or end <= self.window):
            return None
        seen = torch.arange(end, device=device)
        token = seen[start:, None]
        mask = seen <= token
        return mask if self.window is None else mask & (seen > token - self.window)


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x))"""

    def __init__(self, config: EngineConfig, take: TakeTensor) -> None:
        super().__init__()
        inner, hidden, quantization = config.intermediate_size, config.hidden_size, config.quantization
        self.gate_proj = _projection(take, "gate_proj", (inner, hidden), config.mlp_bias, quantization)
        self.up_proj = _projection(take, "up_proj", (inner, hidden), config.mlp_bias, quantization)
        self.down_proj = _projection(take, "down_proj", (hidden, inner), config.mlp_bias, quantization)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj.prefill(F.silu(self.gate_proj.prefill(x)) * self.up_proj.prefill(x))


class DecoderBlock(nn.Module):
    """Attention and MLP, each behind a norm and beside a residual. Decode is `engine.decode_step`."""

    def __init__(self, config: EngineConfig, window: int | None, take: TakeTensor) -> None:
        super().__init__()
        shape, eps = (config.hidden_size,), config.rms_norm_eps
        self.input_layernorm = RMSNorm(take("input_layernorm.weight", shape), eps)
        self.self_attn = Attention(config, window, scoped(take, "self_attn."))
        self.post_attention_layernorm = RMSNorm(take("post_attention_layernorm.weight", shape), eps)
        self.mlp = MLP(config, scoped(take, "mlp."))

    @property
    def projections(self) -> tuple[SparseLinear, ...]:
        """All seven, in the order of use: q, k, v, o, gate, up, down."""
        attention, mlp = self.self_attn, self.mlp
        return (
            attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj,
            mlp.gate_proj, mlp.up_proj, mlp.down_proj,
        )  # fmt: skip

    def forward(self, hidden: Tensor, cache: BlockCache, cos: Tensor, sin: Tensor, start: int) -> Tensor:
        """hidden [B, T, d] at positions start ... start + T - 1 -> [B, T, d]; writes keys and values."""
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), cache, cos, sin, start)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))
