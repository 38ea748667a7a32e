"""Weights for the native CPU kernels: tiles [ceil(N / T), K, T], so that a kept channel is one run of some kilobytes.

Without the native library, or on another device, the same storage is multiplied through PyTorch, slowly.
"""

import ctypes
from abc import abstractmethod
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from teal.errors import TealError
from teal.ops import native
from teal.ops.packed import MAX_SPARSE_ROWS, PackedWeight
from teal.ops.quantize import (
    GROUP,
    dequantize_groups,
    dequantize_int8,
    quantize_groups,
    quantize_int8,
)
from teal.ops.reference import KEEP_ALL, drop_small

RUN_BYTES = 4096  # what is read of a kept channel at a time: shorter runs lose bandwidth when channels are skipped
MOST_OUTPUTS = 4096  # of a tile: the sums of more would leave the first-level cache
LITTLE_ROWS = 32  # up to here the kernel, 8 rows at a time, is faster than a matrix product


def tile_outputs(n: int, bits: int) -> int:
    """T: a run of at most RUN_BYTES and MOST_OUTPUTS, tiles as equal as whole lines allow."""
    line = native.LINE_BYTES * 8 // bits
    tiles = -(-n // min(RUN_BYTES * 8 // bits, MOST_OUTPUTS))
    return -(-n // (tiles * line)) * line


class TiledWeight(PackedWeight):
    """What the formats share. The last of `storage` is an empty [N, 0]: it carries N and the dtype of activations."""

    bits: ClassVar[int]  # of one weight

    @property
    def skips_channels(self) -> bool:
        return self._is_native

    @property
    def _is_native(self) -> bool:
        """Whether the native library multiplies this weight, or PyTorch."""
        return native.available() and self.storage[0].is_cpu and self.dtype in native.ACTIVATIONS

    @property
    def dtype(self) -> torch.dtype:
        return self.storage[-1].dtype

    @property
    def shape(self) -> tuple[int, int]:
        return self.storage[-1].shape[0], self.storage[0].shape[1]

    @property
    def tile_outputs(self) -> int:
        return self.storage[0].shape[2] * self.storage[0].element_size() * 8 // self.bits

    def bytes_read(self, kept: float = 1.0) -> float:
        n, k = self.shape
        line = native.LINE_BYTES * 8 // self.bits
        scales = sum(tensor.numel() * tensor.element_size() for tensor in self.storage[1:])
        runs = -(-n // line) * native.LINE_BYTES * k  # the padding of the last tile is not read
        return kept * runs + (scales if kept else 0)  # one kept channel of a group makes its scales necessary

    def unpack(self) -> Tensor:
        return self.rows(self.out_features)

    def rows(self, count: int) -> Tensor:
        tiles = -(-count // self.tile_outputs)
        return torch.cat([self._tile(index) for index in range(tiles)])[:count] if tiles else self._empty(0)

    @abstractmethod
    def _tile(self, index: int) -> Tensor:
        """The weights of one tile as [outputs of the tile, K] in `dtype`; may share memory."""

    @abstractmethod
    def native_weight(self) -> native.Weight:
        """For the library; valid while `storage` is alive."""

    def _struct(self, code: int, scales: Tensor | None = None) -> native.Weight:
        (n, k), tiles = self.shape, self.storage[0]
        if not all(tensor.is_contiguous() for tensor in self.storage):
            raise TealError(f"the storage of a weight in layout {self.layout} must be contiguous")
        if tiles.shape[0] * self.tile_outputs < n:
            raise TealError(f"{tiles.shape[0]} tiles of {self.tile_outputs} outputs do not hold {n}")
        for index, dtype in self.fixed_dtypes.items():
            if self.storage[index].dtype != dtype:
                raise TealError(f"storage {index} of layout {self.layout} is {self.storage[index].dtype}, not {dtype}")
        address = None if scales is None else scales.data_ptr()
        return native.Weight(tiles.data_ptr(), address, n, k, self.tile_outputs, code)

    def _empty(self, rows: int) -> Tensor:
        return torch.empty(rows, self.in_features, dtype=self.dtype, device=self.storage[0].device)

    def sparse_gemv(self, x: Tensor, threshold: Tensor, bias: Tensor | None) -> Tensor:
        library = native.library()
        if library is None or not self._is_native:
            return F.linear(drop_small(x, threshold), self.unpack(), bias)
        y = x.new_empty(x.shape[0], self.out_features)
        if x.shape[0] == 0:
            return y
        if x.stride(1) != 1:
            x = x.contiguous()
        threshold = threshold.contiguous()
        bias = None if bias is None else bias.contiguous()
        projection = native.projection(self.native_weight(), threshold, bias)
        code, address = native.ACTIVATIONS[x.dtype], ctypes.byref(projection)
        native.check(library.teal_sparse_gemv(address, code, x.data_ptr(), x.shape[0], x.stride(0), y.data_ptr()))
        return y

    def dense_gemm(self, x: Tensor, bias: Tensor | None) -> Tensor:
        rows = x.reshape(-1, self.in_features)
        if 0 < rows.shape[0] <= LITTLE_ROWS and self._is_native:
            keep_all = torch.full((), KEEP_ALL, dtype=torch.float32)
            parts = [self.sparse_gemv(part, keep_all, bias) for part in rows.split(MAX_SPARSE_ROWS)]
            y = parts[0] if len(parts) == 1 else torch.cat(parts)
        else:
            y = self._matrix_product(rows, bias)
        return y.view(*x.shape[:-1], self.out_features)

    def _matrix_product(self, rows: Tensor, bias: Tensor | None) -> Tensor:
        """One tile at a time, so that no more than a tile is ever unpacked."""
        y = rows.new_empty(rows.shape[0], self.out_features)
        biases = [None] * self.out_features if bias is None else bias.split(self.tile_outputs)
        for index, part in enumerate(y.split(self.tile_outputs, dim=1)):
            part.copy_(F.linear(rows, self._tile(index), biases[index]))
        return y


class CpuWeight(TiledWeight):
    """float32, bfloat16 or float16 weights: (tiles [ceil(N / T), K, T], [N, 0])."""

    layout = "cpu"

    @property
    def bits(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.storage[0].element_size() * 8

    @classmethod
    def pack(cls, weight: Tensor) -> "CpuWeight":
        n, k = weight.shape
        size = tile_outputs(n, weight.element_size() * 8)
        tiles = native.new_tensor((-(-n // size), k, size), weight.dtype)
        for tile, rows in zip(tiles, weight.split(size), strict=True):
            tile[:, : len(rows)] = rows.t()
            tile[:, len(rows) :] = 0
        return cls((tiles.to(weight.device), weight.new_empty(n, 0)))

    def after_cast(self) -> PackedWeight:
        good = self.tile_outputs == tile_outputs(self.out_features, self.bits)
        return self if good or self.storage[0].is_meta else self.pack(self.unpack())

    def _tile(self, index: int) -> Tensor:
        first = index * self.tile_outputs
        return self.storage[0][index, :, : self.out_features - first].t()

    def native_weight(self) -> native.Weight:
        if self.storage[0].dtype != self.dtype:
            raise TealError(f"the tiles are {self.storage[0].dtype}, the activations {self.dtype}")
        return self._struct(native.ACTIVATIONS[self.dtype])


class CpuInt8Weight(TiledWeight):
    """int8 with a scale per output: (tiles [ceil(N / T), K, T] int8, scales [N] float32, [N, 0])."""

    layout = "cpu_int8"
    fixed_dtypes: ClassVar = {0: torch.int8, 1: torch.float32}
    bits = 8

    @classmethod
    def pack(cls, weight: Tensor) -> "CpuInt8Weight":
        n, k = weight.shape
        size = tile_outputs(n, 8)
        tiles = native.new_tensor((-(-n // size), k, size), torch.int8)
        scales = torch.empty(n, dtype=torch.float32)
        for index, rows in enumerate(weight.split(size)):
            integers, scales[index * size : index * size + len(rows)] = quantize_int8(rows)
            tiles[index, :, : len(rows)] = integers.t()
            tiles[index, :, len(rows) :] = 0
        return cls((tiles.to(weight.device), scales.to(weight.device), weight.new_empty(n, 0)))

    def _tile(self, index: int) -> Tensor:
        part = slice(index * self.tile_outputs, (index + 1) * self.tile_outputs)
        scales = self.storage[1][part].float()
        return dequantize_int8(self.storage[0][index, :, : len(scales)].t(), scales, self.dtype)

    def native_weight(self) -> native.Weight:
        return self._struct(native.INT8, self.storage[1])


class CpuInt4Weight(TiledWeight):
    """int4 in groups of 128 inputs: (tiles [ceil(N / T), K, T / 2] uint8, scales [.., groups, T] bfloat16, [N, 0]).

    A run is lines of 64 bytes for 128 outputs; nibble i of the 32-bit word w is output 16 i + w, plus 8.
    """

    layout = "cpu_int4"
    fixed_dtypes: ClassVar = {0: torch.uint8, 1: torch.bfloat16}
    bits = 4

    @classmethod
    def pack(cls, weight: Tensor) -> "CpuInt4Weight":
        n, k = weight.shape
        size = tile_outputs(n, 4)
        count = -(-n // size)
        tiles = native.new_tensor((count, k, size // 2), torch.uint8)
        scales = torch.zeros(count, -(-k // GROUP), size, dtype=torch.bfloat16)
        for index, rows in enumerate(weight.split(size)):
            integers, part = quantize_groups(rows, 4)
            scales[index, :, : len(rows)] = part.t()
            padded = torch.zeros(k, size, dtype=torch.int8)
            padded[:, : len(rows)] = integers.t()
            tiles[index] = _pack_nibbles(padded)
        return cls((tiles.to(weight.device), scales.to(weight.device), weight.new_empty(n, 0)))

    def _tile(self, index: int) -> Tensor:
        outputs = min(self.tile_outputs, self.out_features - index * self.tile_outputs)
        integers = _unpack_nibbles(self.storage[0][index])[:, :outputs]
        return dequantize_groups(integers.t(), self.storage[1][index, :, :outputs].t(), self.dtype)

    def native_weight(self) -> native.Weight:
        return self._struct(native.INT4, self.storage[1])


def _pack_nibbles(integers: Tensor) -> Tensor:
    """Integers [K, T] in -8 ... 7, T a multiple of 128 -> bytes [K, T / 2]."""
    nibbles = (integers + 8).to(torch.int32).view(len(integers), -1, 8, 16)  # [K, line, nibble, word]
    words = torch.zeros_like(nibbles[:, :, 0])
    for place in range(8):
        words |= nibbles[:, :, place] << 4 * place
    return words.view(len(integers), -1).view(torch.uint8)


def _unpack_nibbles(packed: Tensor) -> Tensor:
    """Bytes [K, T / 2] -> integers [K, T] int8."""
    words = packed.contiguous().view(torch.int32).view(len(packed), -1, 1, 16)
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=packed.device).view(8, 1)
    return (((words >> shifts) & 15) - 8).to(torch.int8).view(len(packed), -1)
