"""The decode step on a CPU: all blocks in one call of the native library, from addresses prepared once."""

import ctypes
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from teal.engine.block import DecoderBlock
from teal.engine.cache import KVCache
from teal.engine.decode_step import TokenPosition, reference_decode_step
from teal.errors import TealError
from teal.linear import SparseLinear
from teal.ops import native
from teal.ops.cpu import TiledWeight
from teal.ops.packed import MAX_SPARSE_ROWS
from teal.ops.reference import KEEP_ALL

_KEEP_ALL = torch.full((), KEEP_ALL, dtype=torch.float32)
_PROJECTIONS = ("query", "key", "value", "output", "gate", "up", "down")  # of native.Block, in the block's order
_Addresses = tuple[ctypes.Array[ctypes.c_void_p], ...]


def serves(blocks: Sequence[DecoderBlock], dtype: torch.dtype) -> bool:
    """Whether the native library can run these blocks."""
    weights = [layer.packed for block in blocks for layer in block.projections]
    return (
        native.available()
        and dtype in native.ACTIVATIONS
        and all(isinstance(weight, TiledWeight) and weight.storage[0].is_cpu for weight in weights)
        and all(block.self_attn.head_dim % 2 == 0 for block in blocks)
    )


class CpuDecodeStep:
    """`DecodeStep` for the blocks it is made of. More than MAX_SPARSE_ROWS sequences, and layers that are being
    observed, run through the reference. Threads may share it: their native calls take turns.

    Raises TealError, before anything is computed, for a hidden state, cache or position that does not fit.
    """

    def __init__(self, blocks: Sequence[DecoderBlock]) -> None:
        self.blocks = list(blocks)
        self.dtype = self.blocks[0].input_layernorm.weight.dtype
        self.layers = [_PreparedLayer(layer, self.dtype) for block in self.blocks for layer in block.projections]
        self.native_blocks = (native.Block * len(self.blocks))()
        layers = iter(self.layers)
        for native_block, block in zip(self.native_blocks, self.blocks, strict=True):
            _fill_block(native_block, block)
            for name in _PROJECTIONS:
                next(layers).target = getattr(native_block, name)
        self.phase_seconds: ctypes.Array[ctypes.c_double] | None = None  # set it to measure where time goes
        self._turn = threading.Lock()  # whoever has it may change what the native call reads
        self._last: tuple[KVCache, _Addresses] | None = None

    def __call__(
        self, blocks: Sequence[DecoderBlock], hidden: Tensor, cache: KVCache, position: TokenPosition
    ) -> Tensor:
        addresses = self._addresses(cache)
        self._check(hidden, cache, position)
        if 1 <= hidden.shape[0] <= MAX_SPARSE_ROWS:
            with self._turn:
                if all([layer.refresh() for layer in self.layers]):
                    return self._run(hidden, cache, addresses, position)
        return reference_decode_step(blocks, hidden, cache, position)

    def _run(self, hidden: Tensor, cache: KVCache, addresses: _Addresses, position: TokenPosition) -> Tensor:
        hidden, index = hidden.contiguous(), position.index.contiguous()
        cos, sin = position.cos.contiguous(), position.sin.contiguous()
        out, seconds = torch.empty_like(hidden), self.phase_seconds
        step = native.Step(
            hidden.shape[0], hidden.data_ptr(), out.data_ptr(), *(ctypes.addressof(array) for array in addresses),
            *cache.blocks[0].keys.stride()[:3], index.data_ptr(), cos.data_ptr(), sin.data_ptr(),
            None if seconds is None else ctypes.addressof(seconds),
        )  # fmt: skip
        library = native.library()
        assert library is not None
        native.check(library.teal_decode_blocks(self.native_blocks, len(self.blocks), ctypes.byref(step)))
        return out

    def _addresses(self, cache: KVCache) -> _Addresses:
        """Of the keys and of the values of each block. Raises TealError for a cache that is not for these blocks."""
        last = self._last
        if last is not None and last[0] is cache:
            return last[1]
        attention = self.blocks[0].self_attn
        tensors = [tensor for block in cache.blocks for tensor in block]
        fits = len(cache.blocks) == len(self.blocks) and all(
            tensor.is_cpu
            and tensor.dtype == self.dtype
            and tensor.ndim == 4
            and (tensor.shape[1], tensor.shape[3]) == (attention.kv_heads, attention.head_dim)
            and (tensor.shape, tensor.stride()) == (tensors[0].shape, tensors[0].stride())
            and tensor.stride(3) == 1
            for tensor in tensors
        )
        if not fits:
            raise TealError(
                f"the KV cache is not for this model: it must hold {len(self.blocks)} blocks of {self.dtype} with "
                f"{attention.kv_heads} heads of {attention.head_dim}; make it with new_cache"
            )
        addresses = tuple(
            (ctypes.c_void_p * len(self.blocks))(*(block[which].data_ptr() for block in cache.blocks))
            for which in (0, 1)
        )
        self._last = cache, addresses
        return addresses

    def _check(self, hidden: Tensor, cache: KVCache, position: TokenPosition) -> None:
        rows, width = hidden.shape[0], self.blocks[0].self_attn.q_proj.in_features
        sequences, _, capacity, head_dim = cache.blocks[0].keys.shape
        _check_tensor("hidden state", hidden, (rows, width), self.dtype)
        _check_tensor("position", position.index, (rows,), torch.int64)
        _check_tensor("rotary cosine", position.cos, (rows, head_dim), self.dtype)
        _check_tensor("rotary sine", position.sin, (rows, head_dim), self.dtype)
        if sequences < rows:
            raise TealError(f"the KV cache holds {sequences} sequences, the batch has {rows}")
        index = position.index.tolist()
        if rows and not 0 <= min(index) <= max(index) < capacity:
            raise TealError(f"positions {index} do not fit into a KV cache of {capacity} positions")

    def measure_phases(self) -> None:
        """Start adding up the seconds of each phase, for `phases`."""
        self.phase_seconds = (ctypes.c_double * native.PHASES)()

    def phases(self) -> dict[str, float]:
        """Seconds in each phase since `measure_phases`, all blocks together."""
        library = native.library()
        assert library is not None
        assert self.phase_seconds is not None
        names = [library.teal_phase_name(index) for index in range(native.PHASES)]
        return {name.decode(): seconds for name, seconds in zip(names, self.phase_seconds, strict=True) if name}


class _PreparedLayer:
    """One projection's addresses, brought up to date when its tensors are replaced."""

    def __init__(self, layer: SparseLinear, dtype: torch.dtype) -> None:
        self.layer = layer
        self.dtype = dtype
        self.target: native.Projection
        self._seen: tuple[object, ...] = (None,) * 4

    def refresh(self) -> bool:
        """Whether the native call may serve; False while the layer is observed."""
        layer = self.layer
        buffers = layer._buffers  # attributes of a module cost a search, here for each projection and token
        threshold, sparse_bias, revision, dense = self._seen
        if (
            buffers["threshold"] is not threshold
            or buffers["sparse_bias"] is not sparse_bias
            or layer.revision != revision
            or layer.always_dense != dense
        ):
            weight, dense = layer.packed, layer.always_dense
            assert isinstance(weight, TiledWeight)
            tensors = (weight, layer.bias, layer.sparse_bias)
            if any(tensor is not None and tensor.dtype != self.dtype for tensor in tensors):
                raise TealError(f"a projection is no longer {self.dtype}; cast the whole engine, not a part of it")
            projection = native.projection(
                weight.native_weight(),
                _KEEP_ALL if dense else layer.threshold,
                layer.bias,
                None if dense else layer.sparse_bias,
            )
            ctypes.pointer(self.target)[0] = projection
            self._seen = buffers["threshold"], buffers["sparse_bias"], layer.revision, dense
        return layer.observer is None


def _check_tensor(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if tensor.shape != shape or tensor.dtype != dtype or not tensor.is_cpu:
        raise TealError(
            f"the {name} must be {dtype} {list(shape)} on the CPU, "
            f"got {tensor.dtype} {list(tensor.shape)} on {tensor.device}"
        )


def _fill_block(target: native.Block, block: DecoderBlock) -> None:
    attention = block.self_attn
    for name, norm in {
        "input_norm": block.input_layernorm, "mlp_norm": block.post_attention_layernorm,
        "query_norm": attention.q_norm, "key_norm": attention.k_norm,
    }.items():  # fmt: skip
        setattr(target, name, None if norm is None else norm.weight.data_ptr())
    target.hidden, target.intermediate = attention.q_proj.in_features, block.mlp.gate_proj.out_features
    target.heads, target.kv_heads, target.head_dim = attention.heads, attention.kv_heads, attention.head_dim
    target.window = attention.window or 0
    target.epsilon = block.input_layernorm.eps
    target.format = native.ACTIVATIONS[block.input_layernorm.weight.dtype]
