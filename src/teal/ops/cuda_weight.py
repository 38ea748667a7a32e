"""The layout of the CUDA kernels."""

from functools import cache

import torch
from torch import Tensor

from teal.errors import TealError
from teal.ops import cublaslt, nvrtc
from teal.ops.cuda_projection import Operands, Projection, limits_here, tuning_here
from teal.ops.cuda_rows import RowsProjection, choose_rows_tuning, rows_compiled
from teal.ops.packed import ChannelMajorWeight
from teal.ops.reference import drop_small


class CudaWeight(ChannelMajorWeight):
    """[K, N] on an NVIDIA GPU: one row goes through projection.cu, two to eight through rows.cu.

    Where the channels are too many for rows.cu, several rows are masked and multiplied densely, by cuBLASLt.
    """

    layout = "cuda"

    @classmethod
    def refusal(cls, weight: Tensor) -> str | None:
        n, k = weight.shape
        if not weight.is_cuda:
            return nvrtc.unavailable() or "it is not on a CUDA device"
        with torch.accelerator.device_index(weight.device.index):
            if reason := nvrtc.unavailable():
                return reason
            if weight.dtype not in (torch.bfloat16, torch.float16):
                return f"the kernel multiplies bfloat16 and float16, not {weight.dtype}"
            if n % 8 or k % 8 or k > 32768:
                return f"its shape {n} x {k} is not of multiples of 8 with at most 32768 input channels"
            try:
                tuning_here(k, (n,))
            except TealError as error:
                return str(error)
        return None

    def sparse_gemv(self, x: Tensor, threshold: Tensor, bias: Tensor | None) -> Tensor:
        n, k = self.shape
        x = x.contiguous()
        if x.data_ptr() % 8:  # the kernels read four inputs at a time
            x = x.clone()
        y = torch.empty((x.shape[0], n), dtype=x.dtype, device=x.device)
        if x.shape[0] == 0:
            return y
        with torch.accelerator.device_index(x.device.index):
            device = torch.cuda.current_device()
            if x.shape[0] == 1:
                kernel = _kernel(k, n, x.dtype, device)
                launch = kernel.prepared(x[0], [Operands(self.storage[0], threshold, y[0], bias)])
            elif (kernel := _rows_kernel(k, n, rows_compiled(x.shape[0]), x.dtype, device)) is not None:
                launch = kernel.prepared(x, self.storage[0], threshold, y, bias)
            else:
                return self.dense_gemm(drop_small(x, threshold), bias)
            launch.start(torch.cuda.current_stream().cuda_stream)
        return y

    def dense_gemm(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if x.is_cuda and x.numel() > x.shape[-1]:
            with torch.accelerator.device_index(x.device.index):
                y = cublaslt.gemm(x, self.storage[0], bias)
            if y is not None:
                return y
        return super().dense_gemm(x, bias)


@cache
def _kernel(channels: int, outputs: int, dtype: torch.dtype, device: int) -> Projection:
    return Projection(channels, (outputs,), dtype)


@cache
def _rows_kernel(channels: int, outputs: int, rows: int, dtype: torch.dtype, device: int) -> RowsProjection | None:
    """None where a block cannot hold its part of the channels."""
    tuning = choose_rows_tuning(channels, outputs, rows, *limits_here())
    return None if tuning is None else RowsProjection(channels, outputs, rows, dtype, tuning)
