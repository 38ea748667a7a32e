"""The sparse product in Triton, for every GPU that Triton supports: reads only the kept channels of a [K, N] weight.

Two kernels. `_compact` lists, for each slice of the channels, those that any row keeps. `_multiply` gives each program
a tile of columns and one slice: it reads the listed channels only, so that every load is useful. The last program of a
tile to finish adds the slices' sums in their order: the result does not depend on which program that is.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from teal.ops.packed import ChannelMajorWeight

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
INTERPRETED: bool = knobs.runtime.interpret  # TRITON_INTERPRET=1 when this module is imported
jit: Any = triton.jit  # its types know no launches
OLDEST_CAPABILITY = (8, 0)  # of NVIDIA GPUs: the first that Triton supports in full
LEAST_SLICE = 256  # channels; shorter ones cost more in partial sums than they gain in balance
MOST_COMPACTED = 1024  # channels that a program of `_compact` looks at together
DOT_ROWS = 16  # the fewest that a matrix instruction takes


@dataclass(frozen=True)
class Tiling:
    """How the work is divided: a program multiplies `columns` by one slice of the channels, `channels` at a time.

    All but `slice` are powers of two, `columns` and `channels` at least 16.
    """

    columns: int
    channels: int
    slice: int
    warps: int = 4
    stages: int = 1


def _ceil_divide(value: int, divisor: int) -> int:
    return -(-value // divisor)


def _power_of_two(value: int) -> int:
    """The smallest that is not less than `value`."""
    return 1 << (value - 1).bit_length()


def choose_tiling(rows: int, n: int, k: int, bytes_per_weight: int, multiprocessors: int) -> Tiling:
    """Runs of 256 bytes per kept channel, and about four programs for each multiprocessor.

    Without stages, as for one row, loads go straight to registers; Triton stages only loads on their way to a dot well.
    """
    columns = max(16, min(256 // bytes_per_weight, _power_of_two(n)))
    slices = max(1, 4 * multiprocessors // _ceil_divide(n, columns))
    size = max(LEAST_SLICE, _ceil_divide(k, slices))
    return Tiling(columns, 64, 64 * _ceil_divide(size, 64), stages=1 if rows == 1 else 3)


class TritonWeight(ChannelMajorWeight):
    """`ChannelMajorWeight` whose sparse product is a Triton kernel.

    On devices and dtypes that it does not serve (a CPU without TRITON_INTERPRET=1, NVIDIA GPUs before capability 8.0,
    float64) the parent's product does.
    """

    layout = "triton"

    def sparse_gemv(self, x: Tensor, threshold: Tensor, bias: Tensor | None) -> Tensor:
        if not serves(x.device, x.dtype):
            return super().sparse_gemv(x, threshold, bias)
        return triton_gemv(x, self.storage[0], threshold, bias)


@cache
def serves(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernels run on this device and dtype."""
    if dtype not in DTYPES:
        return False
    if INTERPRETED or device.type == "xpu":
        return True
    if device.type != "cuda":
        return False
    return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= OLDEST_CAPABILITY


@cache
def _multiprocessors(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 64 if device.type == "xpu" else 1


def triton_gemv(
    x: Tensor, weight: Tensor, threshold: Tensor, bias: Tensor | None = None, tiling: Tiling | None = None
) -> Tensor:
    """`ops.reference.sparse_gemv` for a weight stored as [K, N], contiguous.

    x [R, K] with R <= 16, any strides; threshold [K] or [] in float32; bias [N] in x's dtype or None -> y [R, N].
    """
    if INTERPRETED and x.dtype == torch.bfloat16:  # which the interpreter truncates, and multiplies as integers
        wide = None if bias is None else bias.float()
        return triton_gemv(x.float(), weight.float(), threshold, wide, tiling).to(x.dtype)
    rows, k = x.shape
    n = weight.shape[1]
    y = x.new_empty((rows, n))
    if rows == 0:
        return y
    tiling = tiling or choose_tiling(rows, n, k, weight.element_size(), _multiprocessors(x.device))
    tiles, slices = _ceil_divide(n, tiling.columns), _ceil_divide(k, tiling.slice)
    counts = x.new_empty(slices, dtype=torch.int32)
    finished = x.new_empty(tiles, dtype=torch.int32)
    channels = x.new_empty((slices, tiling.slice), dtype=torch.int32)
    values = x.new_empty((rows, slices, tiling.slice))
    sums = x.new_empty((slices, rows, n) if slices > 1 else 0, dtype=torch.float32)
    with torch.accelerator.device_index(x.device.index):
        _compact[(slices,)](
            x, threshold, counts, finished, channels, values,
            k, x.stride(0), x.stride(1), threshold.stride(0) if threshold.ndim else 0,
            ROWS=rows, SLICES=slices, SLICE=tiling.slice, TILES=tiles,
            PADDED_ROWS=_power_of_two(rows),
            CHUNK=min(MOST_COMPACTED, _power_of_two(tiling.slice)),
            PADDED_TILES=_power_of_two(tiles),
        )  # fmt: skip
        _multiply[(tiles, slices)](
            weight, weight if bias is None else bias.contiguous(), counts, finished, channels, values, sums, y, n,
            ROWS=rows, SLICES=slices, SLICE=tiling.slice, BIAS=bias is not None,
            PADDED_ROWS=1 if rows == 1 else DOT_ROWS, COLUMNS=tiling.columns, CHANNELS=tiling.channels,
            STAGES=tiling.stages, num_warps=tiling.warps,
        )  # fmt: skip
    return y


@jit
def _compact(
    x, threshold, counts, finished, channels, values,
    k, x_row_stride, x_channel_stride, threshold_stride,
    ROWS: tl.constexpr, SLICES: tl.constexpr, SLICE: tl.constexpr, TILES: tl.constexpr,
    PADDED_ROWS: tl.constexpr, CHUNK: tl.constexpr, PADDED_TILES: tl.constexpr,
):  # fmt: skip
    """channels [SLICES, SLICE]: the kept channels of each slice first, in order; counts [SLICES]: how many they are;
    values [ROWS, SLICES, SLICE]: their inputs, zero where a row drops a channel that another keeps."""
    own = tl.program_id(0)
    row = tl.arange(0, PADDED_ROWS)[:, None]
    kept = 0
    for start in range(0, SLICE, CHUNK):
        offset = start + tl.arange(0, CHUNK)
        channel = own * SLICE + offset
        inside = (offset < SLICE) & (channel < k)
        present = (row < ROWS) & inside[None, :]
        place = row.to(tl.int64) * x_row_stride + channel.to(tl.int64)[None, :] * x_channel_stride
        value = tl.load(x + place, mask=present, other=0.0)
        limit = tl.load(threshold + channel.to(tl.int64) * threshold_stride, mask=inside, other=0.0)
        small = tl.abs(value.to(tl.float32)) <= limit[None, :]
        keep = present & (small == 0)  # not `>`: NaN is kept
        listed = tl.max(keep.to(tl.int32), axis=0)
        position = own * SLICE + kept + tl.cumsum(listed, axis=0) - listed
        tl.store(channels + position, channel, mask=listed != 0)
        value = tl.where(keep, value, 0.0)
        tl.store(values + row * (SLICES * SLICE) + position[None, :], value, mask=(row < ROWS) & (listed != 0)[None, :])
        kept += tl.sum(listed, axis=0)
    tl.store(counts + own, kept)
    tile = tl.arange(0, PADDED_TILES)
    tl.store(finished + tile, tl.zeros_like(tile), mask=(tile < TILES) & (own == 0))


@jit
def _multiply(
    weight, bias, counts, finished, channels, values, sums, y, n,
    ROWS: tl.constexpr, SLICES: tl.constexpr, SLICE: tl.constexpr, BIAS: tl.constexpr,
    PADDED_ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """y [ROWS, n]: the listed channels of weight [k, n] times their values. One row multiplies element by element,
    several use matrix instructions; sums [SLICES, ROWS, n] holds the slices' sums where there are several."""
    tile, own = tl.program_id(0), tl.program_id(1)
    column = tile * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    row = tl.arange(0, PADDED_ROWS)[:, None]
    count = tl.load(counts + own)
    total = tl.zeros((CHANNELS if PADDED_ROWS == 1 else PADDED_ROWS, COLUMNS), dtype=tl.float32)
    for start in tl.range(0, count, CHANNELS, num_stages=STAGES):
        offset = start + tl.arange(0, CHANNELS)
        live = offset < count
        channel = tl.load(channels + own * SLICE + offset, mask=live, other=0).to(tl.int64)[:, None]
        read = tl.load(weight + channel * n + column, mask=live[:, None] & (column < n), other=0.0)
        if PADDED_ROWS == 1:
            value = tl.load(values + own * SLICE + offset, mask=live, other=0.0)
            total += value.to(tl.float32)[:, None] * read.to(tl.float32)
        else:
            place = row * (SLICES * SLICE) + own * SLICE + offset[None, :]
            value = tl.load(values + place, mask=(row < ROWS) & live[None, :], other=0.0)
            total = tl.dot(value, read, total, input_precision="ieee")
    if PADDED_ROWS == 1:
        total = tl.sum(total, axis=0)[None, :]

    inside = (row < ROWS) & (column < n)
    last = True
    if SLICES > 1:
        tl.store(sums + (own * ROWS + row) * n + column, total, mask=inside)
        tl.debug_barrier()  # all of this program's sums are written before it counts itself as finished
        last = tl.atomic_add(finished + tile, 1) == SLICES - 1
    if last:
        if SLICES > 1:
            total = tl.zeros_like(total)
            for index in range(SLICES):
                place = sums + (index * ROWS + row) * n + column
                total += tl.load(place, mask=inside, other=0.0, cache_modifier=".cg")
        if BIAS:
            total += tl.load(bias + column, mask=column < n, other=0.0).to(tl.float32)
        tl.store(y + row.to(tl.int64) * n + column, total.to(y.dtype.element_ty), mask=inside)
