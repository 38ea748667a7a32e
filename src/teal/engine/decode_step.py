"""The decode step: all blocks, one token per sequence. The contract, its reference, the only choice of one.

What a backend may rely on, and must keep:
- nothing waits for the host or branches on a value: position, hidden state and cache are device tensors, so a
  whole step can be captured once and replayed;
- thresholds and compensations are read from the SparseLinear at every call; turning the level changes them in
  place where their shapes allow it;
- the operations may be fused in any way, within a block (norm + threshold + compaction; q, k, v + rotary +
  cache write; attention; o + residual; gate, up + SiLU * product; down + residual) and across blocks.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from teal.engine.block import MLP, Attention, DecoderBlock, rotate
from teal.engine.cache import BlockCache, KVCache

if TYPE_CHECKING:
    from teal.engine.model import DecoderModel


class TokenPosition(NamedTuple):
    """Where each sequence's token stands: `index` [B] int64, and its `cos` and `sin` [B, head_dim]."""

    index: Tensor
    cos: Tensor
    sin: Tensor


class DecodeStep(Protocol):
    """Run all `blocks` for one token per sequence.

    hidden [B, d] -> [B, d] in the model's dtype. Every block writes the token's key and value into its part of
    `cache` at `position.index` and attends to the positions up to it (within the block's window). The cache holds
    S positions, S > every index; S is the context or, while that suffices, a smaller multiple of EXTENT.
    """

    def __call__(
        self, blocks: Sequence[DecoderBlock], hidden: Tensor, cache: KVCache, position: TokenPosition
    ) -> Tensor: ...


class WholeTokenStep(ABC):
    """A `DecodeStep` that runs a whole token over buffers of its own, embedding and LM head included, for one sequence:
    what `engine.capture` makes a graph of. A base class, as every token asks whether its step is one.
    """

    observed: bool  # someone watches a projection's inputs, which only the reference's step shows; `refresh` sets it

    @abstractmethod
    def __call__(
        self, blocks: Sequence[DecoderBlock], hidden: Tensor, cache: KVCache, position: TokenPosition
    ) -> Tensor: ...

    @abstractmethod
    def refresh(self, blocks: Sequence[DecoderBlock], cache: KVCache) -> int:
        """How often tensors were replaced until now; what was captured at another number is stale."""

    @abstractmethod
    def logits(self, model: "DecoderModel", token: Tensor, position: Tensor, cache: KVCache) -> Tensor | None:
        """See `DecoderModel.decode`: token [1] at position [1] -> logits [1, V]; None where the call must serve."""


def choose_decode_step(model: "DecoderModel") -> DecodeStep:
    """The best implementation for the model's device, dtype and weight layout."""
    from teal.engine import cpu_step, cuda_step

    if cuda_step.serves(model):
        return cuda_step.CudaDecodeStep(model.config, model.dtype, model.device)
    if cpu_step.serves(model.blocks, model.dtype):
        return cpu_step.CpuDecodeStep(model.blocks)
    return reference_decode_step


def reference_decode_step(
    blocks: Sequence[DecoderBlock], hidden: Tensor, cache: KVCache, position: TokenPosition
) -> Tensor:
    """The definition: every operation on its own, in the model's dtype."""
    for block, block_cache in zip(blocks, cache.blocks, strict=True):
        hidden = decode_block(block, hidden, block_cache, position)
    return hidden


def decode_block(block: DecoderBlock, hidden: Tensor, cache: BlockCache, position: TokenPosition) -> Tensor:
    """One block: hidden [B, d] -> [B, d]"""
    query, key, value = project_qkv(block.self_attn, block.input_layernorm(hidden), position)
    write_cache(cache, key, value, position.index)
    attended = attend(query, cache, position.index, block.self_attn.window)
    hidden = hidden + block.self_attn.o_proj.decode(attended.flatten(1))
    return hidden + gated_mlp(block.mlp, block.post_attention_layernorm(hidden))


def project_qkv(attention: Attention, x: Tensor, position: TokenPosition) -> tuple[Tensor, Tensor, Tensor]:
    """x [B, d] -> rotated query [B, heads, D] and key [B, kv_heads, D], and value [B, kv_heads, D]."""
    layers = (attention.q_proj, attention.k_proj, attention.v_proj)
    query, key, value = attention.split_heads(*(layer.decode(x) for layer in layers))
    cos, sin = position.cos[:, None], position.sin[:, None]
    return rotate(query, cos, sin), rotate(key, cos, sin), value


def write_cache(cache: BlockCache, key: Tensor, value: Tensor, index: Tensor) -> None:
    """Store key and value [B, kv_heads, D] at position index[b] of sequence b."""
    sequence = torch.arange(key.shape[0], device=key.device)
    cache.keys[sequence, :, index] = key
    cache.values[sequence, :, index] = value


def attend(query: Tensor, cache: BlockCache, index: Tensor, window: int | None) -> Tensor:
    """query [B, heads, D] over the cached positions up to index[b] -> [B, heads, D]."""
    positions = torch.arange(cache.keys.shape[2], device=index.device)
    seen = positions <= index[:, None]  # [B, S]
    if window is not None:
        seen &= positions > index[:, None] - window
    grouped = query.unflatten(1, (cache.keys.shape[1], -1))  # [B, kv_heads, group, D]
    attended = F.scaled_dot_product_attention(grouped, cache.keys, cache.values, attn_mask=seen[:, None, None])
    return attended.flatten(1, 2)


def gated_mlp(mlp: MLP, x: Tensor) -> Tensor:
    """x [B, d] -> [B, d]"""
    return mlp.down_proj.decode(F.silu(mlp.gate_proj.decode(x)) * mlp.up_proj.decode(x))
