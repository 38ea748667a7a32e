"""Attention of one token on an NVIDIA GPU: ops/cuda/attention.cu, and how its work is divided."""

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from teal.ops import nvrtc

THREADS = 384
UNDIVIDED = 320  # positions that one block attends to faster than several that add up their shares
POSITIONS_PER_SHARE = 128  # attention splits no finer


class _Arguments(ctypes.Structure):
    """`Arguments` of attention.cu."""

    _fields_ = [
        *(
            (name, ctypes.c_void_p)
            for name in (
                "qkv", "norm_q", "norm_k", "cosine", "sine", "position",
                "keys", "values", "attended", "partial", "arrivals",
            )
        ),
        *((name, ctypes.c_int) for name in ("capacity", "window", "undivided", "positions_per_share")),
        ("eps", ctypes.c_float),
    ]  # fmt: skip


@dataclass(frozen=True)
class Heads:
    """What attention is of: query heads, key heads, dimensions of each, and whether queries and keys are normalized."""

    heads: int
    kv_heads: int
    head_dim: int
    normalized: bool = False


class AttentionKernel:
    """The compiled kernel: `shares` blocks of `threads` for each key head (None: what suits the current device).

    `partial` [floats] float32 and `arrivals` [kv_heads] int32, at first zero, are its scratch memory.
    """

    def __init__(
        self, heads: Heads, dtype: torch.dtype, *, shares: int | None = None, threads: int | None = None
    ) -> None:
        device = torch.cuda.current_device()
        if shares is None:
            shares = max(1, torch.cuda.get_device_properties(device).multi_processor_count // heads.kv_heads)
        self.threads = threads or threads_fitting(heads, shares, nvrtc.most_shared_bytes())
        self.blocks = heads.kv_heads * shares
        self.partial_floats = self.blocks * heads.heads // heads.kv_heads * (heads.head_dim + 4)
        self._heads = heads
        macros = nvrtc.common_macros(dtype, self.threads) | {
            "HEADS": heads.heads, "KV_HEADS": heads.kv_heads, "HEAD_DIM": heads.head_dim,
            "NORM_QK": heads.normalized, "MAX_SHARES": shares,
        }  # fmt: skip
        bytes_shared = shared_bytes(heads, shares, self.threads)
        self._kernel = nvrtc.compile_kernel("attention.cu", "attention", macros, bytes_shared)

    def prepared(
        self,
        qkv: Tensor,
        norms: tuple[Tensor | None, Tensor | None],
        rotation: tuple[Tensor, Tensor],
        position: Tensor,
        cache: tuple[Tensor, Tensor],
        attended: Tensor,
        scratch: tuple[Tensor, Tensor],
        *,
        window: int | None = None,
        eps: float = 0.0,
        undivided: int | None = None,
        positions_per_share: int | None = None,
    ) -> nvrtc.Launch:
        """A launch with these addresses, which must outlive it: query, key and value of all heads one after the other,
        the norms [head_dim] of query and key, cosine and sine [head_dim] at position [1] int64, keys and values
        [1, kv_heads, S, head_dim] -> attended [heads * head_dim]; `scratch` is partial and arrivals.

        Key and value are written into the cache; positions up to this one, or the last `window`, are attended to, up to
        `undivided` by one block, else shares of at least `positions_per_share` by several (None: UNDIVIDED and so on).
        Depends on the launch before it (see `nvrtc.Kernel.prepared`).
        """
        tensors = (qkv, *norms, *rotation, position, *cache, attended, *scratch)
        arguments = _Arguments(*(0 if tensor is None else tensor.data_ptr() for tensor in tensors))
        arguments.capacity = cache[0].stride(-3) // self._heads.head_dim
        arguments.window, arguments.eps = window or 0, eps
        arguments.undivided = UNDIVIDED if undivided is None else undivided
        arguments.positions_per_share = positions_per_share or POSITIONS_PER_SHARE
        return self._kernel.prepared(self.blocks, self.threads, arguments, dependent=True)


def threads_fitting(heads: Heads, shares: int, most_shared_bytes: int) -> int:
    """THREADS, or as many as a GPU with less shared memory can run."""
    fitting = (
        threads for threads in range(THREADS, 32, -32) if shared_bytes(heads, shares, threads) <= most_shared_bytes
    )
    return next(fitting, 32)


def shared_bytes(heads: Heads, shares: int, threads: int) -> int:
    """Size of `Shared` in attention.cu."""
    group, warps, dim = heads.heads // heads.kv_heads, threads // 32, heads.head_dim
    own = max(2 * 16 * 2 * dim, 4 * group * (dim + 4))  # of a warp
    inputs = 2 * (-(-group // 8) * 8 * (dim + 8) + 2 * dim)
    return warps * own + inputs + 4 * group * (2 * warps + max(warps, shares) + 2) + 64
