"""Projections of one token on an NVIDIA GPU: ops/cuda/projection.cu, and how its work is divided."""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from teal.errors import TealError
from teal.ops import nvrtc

KINDS = ("plain", "normalized", "gated")  # of inputs, in the order of projection.cu
MOST_VECTORS = 8  # of 4 input channels that a thread holds
MOST_SHARED_BYTES = 227 << 10  # that a block may use on an H100


@dataclass(frozen=True)
class Tuning:
    """How a projection is divided: `width` in chunks of 8 columns; see ops/cuda/common.cuh for the others."""

    width: int
    cluster: int
    threads: int = 512
    depth: int = 8


class _Projection(ctypes.Structure):
    """`Projection` of projection.cu."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("weight", "threshold", "bias", "sparse_bias", "y")),
        *((name, ctypes.c_int) for name in ("outputs", "threshold_each")),
    ]


class _Arguments(ctypes.Structure):
    """`Arguments` of projection.cu."""

    _fields_ = [
        ("projections", _Projection * 3),
        *((name, ctypes.c_void_p) for name in ("x", "norm", "residual")),
        ("next", ctypes.c_void_p * 4),
        ("next_bytes", ctypes.c_int * 4),
        ("count", ctypes.c_int),
        ("eps", ctypes.c_float),
    ]


@dataclass(frozen=True)
class Operands:
    """One projection's tensors: weight [K, N], threshold [] or [K], biases [N] or None, y [N]."""

    weight: Tensor
    threshold: Tensor
    y: Tensor
    bias: Tensor | None = None
    sparse_bias: Tensor | None = None


class Projection:
    """The compiled kernel for `channels` inputs and `outputs` of each of one to three projections side by side.

    `kind` is what becomes of the input first: "plain" nothing; "normalized" RMS norm; "gated" silu(gate) * up.
    """

    def __init__(
        self,
        channels: int,
        outputs: Sequence[int],
        dtype: torch.dtype,
        *,
        kind: str = "plain",
        tuning: Tuning | None = None,
    ) -> None:
        self.tuning = tuning or tuning_here(channels, outputs)
        common = nvrtc.common_macros(dtype, self.tuning.threads, self.tuning.depth, self.tuning.cluster)
        self.macros = common | {"TILE_WIDTH": self.tuning.width, "CHANNELS": channels, "INPUT": KINDS.index(kind)}
        self.blocks = blocks_of(outputs, self.tuning)
        # More than half of a multiprocessor's: each has one block, and the next kernel's blocks follow one by one.
        half = torch.cuda.get_device_properties(torch.cuda.current_device()).shared_memory_per_multiprocessor // 2
        self.shared_bytes = max(shared_bytes(channels, self.tuning), half)
        self.kernel = nvrtc.compile_kernel("projection.cu", "projection", self.macros, self.shared_bytes)

    def prepared(
        self,
        x: Tensor,
        operands: Sequence[Operands],
        norm: Tensor | None = None,
        residual: Tensor | None = None,
        eps: float = 0.0,
        *,
        following: Sequence[Tensor] = (),
        dependent: bool = False,
    ) -> nvrtc.Launch:
        """A launch with these addresses; x [K], or gate and up [2 K]; norm [K], residual [N]. They must outlive it.

        `following`: up to four tensors that the launch after it reads first, fetched into the second-level cache.
        `dependent`: see `nvrtc.Kernel.prepared`; weights, thresholds and norms must then be older.
        """
        arguments = _Arguments(x=_address(x), norm=_address(norm), residual=_address(residual))
        arguments.count, arguments.eps = len(operands), eps
        for slot, of in zip(arguments.projections, operands, strict=False):
            slot.weight, slot.threshold, slot.y = _address(of.weight), _address(of.threshold), _address(of.y)
            slot.bias, slot.sparse_bias = _address(of.bias), _address(of.sparse_bias)
            slot.outputs, slot.threshold_each = of.weight.shape[1], of.threshold.ndim
        for index, tensor in enumerate(following):
            arguments.next[index], arguments.next_bytes[index] = tensor.data_ptr(), tensor.nbytes
        return self.kernel.prepared(
            self.blocks, self.tuning.threads, arguments, cluster=self.tuning.cluster, dependent=dependent
        )


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def multiprocessors() -> int:
    """Of the current device."""
    return torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count


def blocks_of(outputs: Sequence[int], tuning: Tuning) -> int:
    """Blocks of threads for projections of these numbers of outputs."""
    return tuning.cluster * sum(-(-size // (8 * tuning.width)) for size in outputs)


def shared_bytes(channels: int, tuning: Tuning) -> int:
    """Size of `Shared` in projection.cu."""
    sums = 4 * 8 * tuning.width * tuning.cluster
    entries = channels // tuning.cluster + tuning.threads // 2
    return 16 * tuning.depth * tuning.threads + sums + tuning.threads // 4 + 4 * entries + 64


def limits_here() -> tuple[int, int, int]:
    """Of the current device: multiprocessors, blocks of a cluster that kernels use, shared memory of a block."""
    return multiprocessors(), 2 if nvrtc.has_clusters() else 1, nvrtc.most_shared_bytes()


def tuning_here(channels: int, outputs: Sequence[int]) -> Tuning:
    """On the current device. Raises TealError if a block cannot hold its part of so many channels."""
    tuning = choose_tuning(channels, outputs, *limits_here())
    if tuning is None:
        raise TealError(f"this GPU's shared memory does not hold a list of {channels} input channels")
    return tuning


def choose_tuning(
    channels: int,
    outputs: Sequence[int],
    multiprocessors: int,
    largest_cluster: int = 2,
    most_shared_bytes: int = MOST_SHARED_BYTES,
) -> Tuning | None:
    """One block for nearly every multiprocessor, with rows of whole lines of 128 bytes, as far as that goes together;
    None if the channels are too many.

    Measured on an H200: rows of 64 bytes reach two thirds of the bandwidth of rows of 128 bytes, of 256 a little more,
    consecutive kernels overlap best when each has one block on every multiprocessor, and blocks that own a tile alone
    want fewer weights on their way than those that share one.
    """
    best: tuple[float, Tuning] | None = None
    for cluster in range(1, largest_cluster + 1):
        for width, (threads, depth) in product(range(8, 33, 2), ((512, 6 if cluster == 1 else 8), (512, 4), (1024, 2))):
            tuning = Tuning(width, cluster, threads, depth)
            if channels % (8 * cluster) or -(-channels // (4 * cluster * threads)) > MOST_VECTORS:
                continue
            if shared_bytes(channels, tuning) > most_shared_bytes:
                continue
            waves = blocks_of(outputs, tuning) / multiprocessors
            unaligned = 0.3 if width % 4 else 0.2 if width % 8 else 0
            narrow = 0.02 if width < 16 else 0
            badness = (1 / waves if waves <= 1 else 2 * waves) + unaligned + narrow + 0.01 * cluster
            badness += 0 if threads == 512 and depth > 4 else 10  # where nothing else fits
            if best is None or badness < best[0]:
                best = (badness, tuning)
    return None if best is None else best[1]
