"""The decode step on an NVIDIA GPU, for one sequence: five kernels a block, one before them and one after.

embedding | norm, q, k, v | rotary embedding, cache write, attention | o, residual | norm, gate, up |
silu * up, down, residual | norm, LM head

A sparse LM head is two kernels: its inputs, which are the largest of the norm, and the projection of these.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from teal.engine.block import DecoderBlock
from teal.engine.cache import BlockCache, KVCache
from teal.engine.config import EngineConfig
from teal.engine.decode_step import TokenPosition, WholeTokenStep, reference_decode_step
from teal.linear import SparseLinear
from teal.ops import nvrtc
from teal.ops.cuda_attention import AttentionKernel, Heads
from teal.ops.cuda_projection import Operands, Projection
from teal.ops.cuda_token import EmbedKernel, HeadInputsKernel
from teal.ops.cuda_weight import CudaWeight
from teal.ops.reference import KEEP_ALL

if TYPE_CHECKING:
    from teal.engine.model import DecoderModel


def serves(model: "DecoderModel") -> bool:
    """Whether this step can run the model where it is: its weights are packed for it and its shapes fit."""
    layers = (layer for block in model.blocks for layer in block.projections)
    return (
        model.device.type == "cuda"
        and refusal(model.config, model.dtype) is None
        and all(layer.packed.layout == CudaWeight.layout for layer in layers)
    )


def refusal(config: EngineConfig, dtype: torch.dtype) -> str | None:
    """Why a model cannot take this step, or None."""
    if dtype not in (torch.bfloat16, torch.float16):
        return f"it computes in bfloat16 and float16, not in {dtype}"
    if config.head_dim % 16 or config.head_dim > 256:
        return f"it has no attention for heads of {config.head_dim} dimensions"
    if config.heads // config.kv_heads > 16:
        return "more than 16 query heads share a key head"
    if config.hidden_size % 8 or config.intermediate_size % 8:
        return "hidden and intermediate size must be multiples of 8"
    if max(config.intermediate_size, config.hidden_size, config.heads * config.head_dim) > 32768:
        return "more than 32768 input channels"
    return None


class CudaDecodeStep(WholeTokenStep):
    """See `engine.decode_step.WholeTokenStep`. Batches of more than one sequence take the reference's step.

    Raises TealError if a kernel does not compile.
    """

    def __init__(self, config: EngineConfig, dtype: torch.dtype, device: torch.device) -> None:
        self._config, self._device = config, device
        with torch.accelerator.device_index(device.index):
            query, key = config.heads * config.head_dim, config.kv_heads * config.head_dim
            hidden, inner = config.hidden_size, config.intermediate_size

            def buffer(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
                return torch.zeros(shape, dtype=dtype, device=device)

            self._token = (buffer(1, dtype=torch.int64), buffer(config.head_dim), buffer(config.head_dim))
            self._hidden, self._middle = buffer(hidden), buffer(hidden)
            self._qkv, self._attended, self._gate_up = buffer(query + 2 * key), buffer(query), buffer(2 * inner)
            self._keep_all = torch.full((), KEEP_ALL, dtype=torch.float32, device=device)
            self._project_qkv = Projection(hidden, (query, key, key), dtype, kind="normalized")
            self._project_o = Projection(query, (hidden,), dtype)
            self._project_gate_up = Projection(hidden, (inner, inner), dtype, kind="normalized")
            self._project_down = Projection(inner, (hidden,), dtype, kind="gated")
            heads = Heads(config.heads, config.kv_heads, config.head_dim, config.qk_norm)
            self._attention = AttentionKernel(heads, dtype)
            partial = buffer(self._attention.partial_floats, dtype=torch.float32)
            self._attention_scratch = partial, buffer(config.kv_heads, dtype=torch.int32)
            self._embed = EmbedKernel(hidden, config.head_dim, dtype)
            self._head_inputs = buffer(hidden)
            self._find_head_inputs = HeadInputsKernel(hidden, dtype)
            self._project_head: dict[str, Projection] = {}  # by kind
            self.observed = False
            self._revision = 0
            self._tensors: list[Any] = []
            self._launches: list[nvrtc.Launch] = []

    def __call__(
        self, blocks: Sequence[DecoderBlock], hidden: Tensor, cache: KVCache, position: TokenPosition
    ) -> Tensor:
        if hidden.shape[0] != 1 or not self._ready(blocks, cache):
            return reference_decode_step(blocks, hidden, cache, position)
        self._hidden.copy_(hidden[0])
        for own, given in zip(self._token, position, strict=True):
            own.copy_(given.view_as(own))
        with torch.accelerator.device_index(self._device.index):
            _start(self._launches)
        return self._hidden.clone()[None]

    def logits(self, model: "DecoderModel", token: Tensor, position: Tensor, cache: KVCache) -> Tensor | None:
        if any(
            of.shape != (1,) or of.dtype != torch.int64 or of.device != self._hidden.device for of in (token, position)
        ):
            return None
        if not self._ready(model.blocks, cache):
            return None
        with torch.accelerator.device_index(self._device.index):
            _start([self._embedding(model, token, position), *self._launches])
            return self._head(model)

    def _embedding(self, model: "DecoderModel", token: Tensor, position: Tensor) -> nvrtc.Launch:
        tables = model.embed_tokens.weight, model.cos, model.sin
        return self._embed.prepared(token, position, tables, (self._hidden, *self._token))

    def _head(self, model: "DecoderModel") -> Tensor:
        head, norm, eps = model.lm_head, model.norm.weight, self._config.rms_norm_eps
        if head.packed.layout != CudaWeight.layout:
            return head.decode(model.norm(self._hidden[None]))
        logits = torch.empty(1, head.out_features, dtype=self._hidden.dtype, device=self._hidden.device)
        weight = head.packed.storage[0]
        operands = [Operands(weight, head.threshold, logits[0], head.bias)]
        if head.dropped_inputs == 0:
            project = self._head_projection(weight, "normalized")
            _start([project.prepared(self._hidden, operands, norm, eps=eps, dependent=True)])
        else:
            project = self._head_projection(weight, "plain")
            _start([
                self._find_head_inputs.prepared(self._hidden, norm, self._head_inputs, head.dropped_inputs, eps),
                project.prepared(self._head_inputs, operands, dependent=True),
            ])  # fmt: skip
        return logits

    def _head_projection(self, weight: Tensor, kind: str) -> Projection:
        if kind not in self._project_head:
            channels, outputs = weight.shape
            self._project_head[kind] = Projection(channels, (outputs,), weight.dtype, kind=kind)
        return self._project_head[kind]

    def _ready(self, blocks: Sequence[DecoderBlock], cache: KVCache) -> bool:
        """Whether the launches, prepared anew if they must be, may run: nobody watches."""
        self.refresh(blocks, cache)
        return not self.observed

    def refresh(self, blocks: Sequence[DecoderBlock], cache: KVCache) -> int:
        """Prepares the launches anew if tensors were replaced since."""
        layers = [layer for block in blocks for layer in block.projections]
        self.observed = any(layer.observer is not None for layer in layers)
        tensors = [*(setting for layer in layers for setting in _settings(layer)), *cache.blocks]
        if len(tensors) == len(self._tensors) and all(a is b for a, b in zip(tensors, self._tensors, strict=True)):
            return self._revision
        self._tensors = tensors
        with torch.accelerator.device_index(self._device.index):
            self._launches = [
                launch
                for index, (block, block_cache) in enumerate(zip(blocks, cache.blocks, strict=True))
                for launch in self._block_launches(block, block_cache, index == 0, *blocks[index + 1 : index + 2])
            ]
        self._revision += 1
        return self._revision

    def _block_launches(
        self, block: DecoderBlock, cache: BlockCache, first: bool, following: DecoderBlock | None = None
    ) -> list[nvrtc.Launch]:
        attention, mlp, eps = block.self_attn, block.mlp, self._config.rms_norm_eps
        query, key = attention.q_proj.out_features, attention.k_proj.out_features
        q, k, v = self._qkv.split((query, key, key))
        qkv = [
            self._operands(layer, y)
            for layer, y in ((attention.q_proj, q), (attention.k_proj, k), (attention.v_proj, v))
        ]
        o = [self._operands(attention.o_proj, self._middle)]
        gate_up = [
            self._operands(layer, y)
            for layer, y in zip((mlp.gate_proj, mlp.up_proj), self._gate_up.chunk(2), strict=True)
        ]
        down = [self._operands(mlp.down_proj, self._hidden)]
        norms = block.input_layernorm.weight, block.post_attention_layernorm.weight
        # What each projection's launch after it reads first.
        after_qkv = [self._threshold(attention.o_proj)]
        after_o = [self._threshold(mlp.gate_proj), self._threshold(mlp.up_proj), norms[1]]
        after_gate_up = [self._threshold(mlp.down_proj)]
        after_down = []
        if following is not None:
            after_down = [*map(self._threshold, following.projections[:3]), following.input_layernorm.weight]
        return [
            self._project_qkv.prepared(
                self._hidden, qkv, norms[0], eps=eps, following=after_qkv, dependent=not first
            ),
            self._attend(block, cache),
            self._project_o.prepared(
                self._attended, o, residual=self._hidden, following=after_o, dependent=True
            ),
            self._project_gate_up.prepared(
                self._middle, gate_up, norms[1], eps=eps, following=after_gate_up, dependent=True
            ),
            self._project_down.prepared(
                self._gate_up, down, residual=self._middle, following=after_down, dependent=True
            ),
        ]  # fmt: skip

    def _threshold(self, layer: SparseLinear) -> Tensor:
        return self._keep_all if layer.always_dense else layer.threshold

    def _operands(self, layer: SparseLinear, y: Tensor) -> Operands:
        sparse_bias = None if layer.always_dense else layer.sparse_bias
        return Operands(layer.packed.storage[0], self._threshold(layer), y, layer.bias, sparse_bias)

    def _attend(self, block: DecoderBlock, cache: BlockCache) -> nvrtc.Launch:
        attention = block.self_attn
        norm_q, norm_k = (None if norm is None else norm.weight for norm in (attention.q_norm, attention.k_norm))
        position, cosine, sine = self._token
        return self._attention.prepared(
            self._qkv, (norm_q, norm_k), (cosine, sine), position, (cache.keys, cache.values), self._attended,
            self._attention_scratch, window=attention.window, eps=self._config.rms_norm_eps,
        )  # fmt: skip


def _start(launches: Sequence[nvrtc.Launch]) -> None:
    stream = torch.cuda.current_stream().cuda_stream
    for launch in launches:
        launch.start(stream)


def _settings(layer: SparseLinear) -> tuple[Any, ...]:
    """What launches depend on and what may be replaced."""
    return layer.threshold, layer.sparse_bias, layer.always_dense
