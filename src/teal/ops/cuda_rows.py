"""Projections of two to eight tokens on an NVIDIA GPU: ops/cuda/rows.cu, and how its work is divided."""

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from teal.ops import nvrtc
from teal.ops.cuda_projection import MOST_SHARED_BYTES, MOST_VECTORS

ROWS = (2, 4, 8)  # that kernels are compiled for; fewer are filled up with zeros
STEP_BYTES = 2048  # of weights that a warp reads at a time: 16 channels of 64 columns
MOST_DEPTH = {1: 2, 2: 6}  # by the cluster: blocks that own a tile alone want less on its way
MOST_CHANNELS = {2: 16384, 4: 16384, 8: 8192}  # of a block, by the rows: what its threads' registers hold
THREADS = {8: 512, 16: 512, 24: 384, 32: 512}  # of a block, by the width of its tile


@dataclass(frozen=True)
class RowsTuning:
    """How a projection is divided: `width` in chunks of 8 columns; see ops/cuda/rows.cu for the others."""

    width: int
    cluster: int
    depth: int

    @property
    def threads(self) -> int:
        return THREADS[self.width]


class _Arguments(ctypes.Structure):
    """`Arguments` of rows.cu."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("weight", "threshold", "bias", "x", "y")),
        *((name, ctypes.c_int) for name in ("outputs", "threshold_each", "rows")),
    ]


class RowsProjection:
    """The compiled kernel for `channels` inputs and `outputs` of one projection, and `rows` of tokens, one of ROWS."""

    def __init__(self, channels: int, outputs: int, rows: int, dtype: torch.dtype, tuning: RowsTuning) -> None:
        self.tuning, self.rows = tuning, rows
        self.blocks = tuning.cluster * -(-outputs // (8 * tuning.width))
        common = nvrtc.common_macros(dtype, tuning.threads, tuning.depth, tuning.cluster)
        macros = common | {"TILE_WIDTH": tuning.width, "CHANNELS": channels, "TOKENS": rows}
        self.kernel = nvrtc.compile_kernel("rows.cu", "rows", macros, shared_bytes(channels, rows, tuning))

    def prepared(
        self, x: Tensor, weight: Tensor, threshold: Tensor, y: Tensor, bias: Tensor | None, *, dependent: bool = False
    ) -> nvrtc.Launch:
        """A launch for x [R, K], contiguous, R <= `rows`, weight [K, N], threshold [] or [K], bias [N]; y [R, N].

        They must outlive it. `dependent`: see `nvrtc.Kernel.prepared`; weights and thresholds must then be older.
        """
        arguments = _Arguments(
            weight.data_ptr(), threshold.data_ptr(), 0 if bias is None else bias.data_ptr(), x.data_ptr(), y.data_ptr(),
            weight.shape[1], threshold.ndim, x.shape[0],
        )  # fmt: skip
        return self.kernel.prepared(
            self.blocks, self.tuning.threads, arguments, cluster=self.tuning.cluster, dependent=dependent
        )


def rows_compiled(rows: int) -> int:
    """Of the kernel that serves this many rows, at most the last of ROWS."""
    return next(most for most in ROWS if rows <= most)


def shared_bytes(channels: int, rows: int, tuning: RowsTuning) -> int:
    """Size of `Shared` in rows.cu."""
    warps, received = tuning.threads // 32, 4 * rows * 8 * tuning.width * max(1, tuning.cluster - 1)
    part = channels // tuning.cluster
    return STEP_BYTES * tuning.depth * warps + received + 2 * rows * (part + 8) + 2 * (part + 16) + 4 * warps + 48


def choose_rows_tuning(
    channels: int,
    outputs: int,
    rows: int,
    multiprocessors: int,
    largest_cluster: int = 2,
    most_shared_bytes: int = MOST_SHARED_BYTES,
) -> RowsTuning | None:
    """One block for nearly every multiprocessor, few channels for each block to list, and as much on its way as fits;
    None if the channels are too many.

    Clusters of four and more lose a third on an H200: masking the inputs and cuBLAS are faster then.
    """
    best: tuple[float, RowsTuning] | None = None
    for cluster in range(1, largest_cluster + 1):
        for width in THREADS:
            held = min(MOST_CHANNELS[rows], 4 * MOST_VECTORS * THREADS[width])
            if channels % (8 * cluster) or channels // cluster > held:
                continue
            for depth in range(MOST_DEPTH[cluster], 1, -1):
                tuning = RowsTuning(width, cluster, depth)
                if shared_bytes(channels, rows, tuning) > most_shared_bytes:
                    continue
                waves = cluster * -(-outputs // (8 * width)) / multiprocessors
                badness = (1 / waves if waves <= 1 else 2 * waves) + 0.01 * cluster
                badness += 0.02 * (max(MOST_DEPTH.values()) - depth) + 0.03 * channels / cluster / 4096
                if best is None or badness < best[0]:
                    best = (badness, tuning)
    return None if best is None else best[1]
