"""DecoderModel: a model of a supported family: dense prefill, sparse decode, over a static cache."""

from typing import Any

import torch
from torch import Tensor, nn

from teal.engine.block import DecoderBlock, RMSNorm, TakeTensor, scoped
from teal.engine.cache import KVCache, check_holds
from teal.engine.config import EngineConfig
from teal.engine.decode_step import TokenPosition, WholeTokenStep, choose_decode_step
from teal.errors import TealError
from teal.linear import SparseHead
from teal.ops.sparse_gemv import pack


class DecoderModel(nn.Module):
    """The decoder of `config` with the tensors that `take` gives, for up to `context` positions.

    Its projections are SparseLinear and dense until a plan is applied (`teal.sparsify`, `set_sparsity`); its LM
    head is dense until `lm_head.set_sparsity`.
    They are packed for the device their tensors are on, and the decode step is chosen for it: do not move it. A cast
    on the CPU chooses the step again; caches made before it no longer fit.
    Raises TealError if `context` is more than the model was made for.
    """

    cos: Tensor  # [context, head_dim]
    sin: Tensor

    def __init__(self, config: EngineConfig, take: TakeTensor, context: int) -> None:
        super().__init__()
        if not 1 <= context <= config.max_positions:
            raise TealError(f"context must be between 1 and the model's {config.max_positions}, got {context}")
        self.config = config
        self.context = context
        embeddings = take("embed_tokens.weight", (config.vocab_size, config.hidden_size))
        self.embed_tokens = nn.Embedding.from_pretrained(embeddings)
        self.layers = nn.ModuleList(
            DecoderBlock(config, window, scoped(take, f"layers.{index}."))
            for index, window in enumerate(config.windows)
        )
        self.norm = RMSNorm(take("norm.weight", (config.hidden_size,)), config.rms_norm_eps)
        shape = (config.vocab_size, config.hidden_size)
        head = embeddings if config.tied_embeddings else take("lm_head.weight", shape)
        head = head.detach()
        self.lm_head = SparseHead(pack(head, config.head_quantization))
        cos, sin = _rotary_tables(config, context)
        self.register_buffer("cos", cos.to(embeddings), persistent=False)
        self.register_buffer("sin", sin.to(embeddings), persistent=False)
        self.decode_step = choose_decode_step(self)

    def _apply(self, fn: Any, recurse: bool = True) -> "DecoderModel":
        super()._apply(fn, recurse)
        if not isinstance(self.decode_step, WholeTokenStep):  # whose buffers captured graphs read
            self.decode_step = choose_decode_step(self)
        return self

    @property
    def blocks(self) -> list[DecoderBlock]:
        return list(self.layers)  # pyright: ignore[reportReturnType]

    @property
    def device(self) -> torch.device:
        return self.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embed_tokens.weight.dtype

    def new_cache(self, batch: int = 1, context: int | None = None) -> KVCache:
        """A cache for `batch` sequences of up to `context` positions (the model's, if None)."""
        if context is not None and not 1 <= context <= self.context:
            raise TealError(f"context must be between 1 and the engine's {self.context}, got {context}")
        return KVCache.allocate(self.config, batch, context or self.context, self.dtype, self.device)

    @torch.inference_mode()
    def prefill(self, tokens: Tensor, cache: KVCache, start: int = 0, all_positions: bool = False) -> Tensor:
        """Run tokens [B, T] int64 densely at positions start ... start + T - 1 and fill the cache there.

        Returns the logits of the last position [B, vocabulary], or of all [B, T, vocabulary].
        A long prompt may come in several calls. Raises TealError if the cache is too short.
        """
        end = start + tokens.shape[1]
        check_holds(cache.context, end, 0)
        cos, sin = self.cos[start:end], self.sin[start:end]
        hidden = self.embed_tokens(tokens)
        for block, block_cache in zip(self.blocks, cache.blocks, strict=True):
            hidden = block(hidden, block_cache, cos, sin, start)
        return self.lm_head.prefill(self.norm(hidden if all_positions else hidden[:, -1]))

    @torch.inference_mode()
    def decode(self, token: Tensor, position: Tensor, cache: KVCache) -> Tensor:
        """Run one token per sequence: token [B] int64 at position [B] int64 -> logits [B, vocabulary].

        All on the device, nothing waits for the host; the caller sees to it that positions fit the cache.
        """
        if isinstance(self.decode_step, WholeTokenStep):
            logits = self.decode_step.logits(self, token, position, cache)
            if logits is not None:
                return logits
        at = TokenPosition(position, self.cos[position], self.sin[position])
        return self.lm_head.decode(self.norm(self.decode_step(self.blocks, self.embed_tokens(token), cache, at)))


def _rotary_tables(config: EngineConfig, context: int) -> tuple[Tensor, Tensor]:
    frequencies = torch.tensor(config.inverse_frequencies, dtype=torch.float32)
    angles = torch.arange(context, dtype=torch.float32)[:, None] * frequencies
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos() * config.rope_scale, angles.sin() * config.rope_scale
