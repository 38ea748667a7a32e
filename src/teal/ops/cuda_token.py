"""What starts and ends a token on an NVIDIA GPU: ops/cuda/embed.cu and ops/cuda/head_inputs.cu."""

import ctypes

import torch
from torch import Tensor

from teal.ops import nvrtc

EMBED_THREADS, HEAD_INPUTS_THREADS = 512, 1024


class _EmbedArguments(ctypes.Structure):
    """`Arguments` of embed.cu."""

    _fields_ = [
        (name, ctypes.c_void_p)
        for name in (
            "token", "position", "embeddings", "cosines", "sines", "hidden", "own_position", "cosine", "sine",
        )
    ]  # fmt: skip


class _HeadInputsArguments(ctypes.Structure):
    """`Arguments` of head_inputs.cu."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("hidden", "norm", "x")),
        ("dropped", ctypes.c_int),
        ("eps", ctypes.c_float),
    ]


class EmbedKernel:
    """Copies a token's embedding, position and rotation to where the kernels of the blocks read them."""

    def __init__(self, hidden_size: int, head_dim: int, dtype: torch.dtype) -> None:
        macros = nvrtc.common_macros(dtype, EMBED_THREADS) | {"HIDDEN": hidden_size, "HEAD_DIM": head_dim}
        self._kernel = nvrtc.compile_kernel("embed.cu", "embed", macros, 0)

    def prepared(
        self, token: Tensor, position: Tensor, tables: tuple[Tensor, Tensor, Tensor], own: tuple[Tensor, ...]
    ) -> nvrtc.Launch:
        """A launch with these addresses: token and position [1] int64; tables of embeddings [V, hidden], cosines and
        sines [S, head_dim] -> own hidden state, position, cosine and sine.
        """
        arguments = _EmbedArguments(*(tensor.data_ptr() for tensor in (token, position, *tables, *own)))
        return self._kernel.prepared(1, EMBED_THREADS, arguments)


class HeadInputsKernel:
    """The final norm, and what of it a sparse LM head reads."""

    def __init__(self, hidden_size: int, dtype: torch.dtype, threads: int = HEAD_INPUTS_THREADS) -> None:
        macros = nvrtc.common_macros(dtype, threads) | {"HIDDEN": hidden_size}
        shared_bytes = 2 * 4 * threads // 32  # size of `Shared` in head_inputs.cu
        self._threads = threads
        self._kernel = nvrtc.compile_kernel("head_inputs.cu", "head_inputs", macros, shared_bytes)

    def prepared(self, hidden: Tensor, norm: Tensor, x: Tensor, dropped: int, eps: float) -> nvrtc.Launch:
        """A launch with these addresses: hidden state and norm [hidden] -> x [hidden], in which the `dropped` smallest
        magnitudes, at least one, are zero. Depends on the launch before it (see `nvrtc.Kernel.prepared`).
        """
        arguments = _HeadInputsArguments(hidden.data_ptr(), norm.data_ptr(), x.data_ptr(), dropped, eps)
        return self._kernel.prepared(1, self._threads, arguments, dependent=True)
