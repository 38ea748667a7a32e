"""Weight-only quantization by rounding to nearest: symmetric int8 per output, symmetric int4 in groups of inputs."""

import torch
from torch import Tensor

GROUP = 128  # inputs that share an int4 scale


def quantize_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight [N, K] -> integers [N, K] int8 in -127 ... 127 and scales [N] in float32."""
    wide = weight.float()
    scales = wide.abs().amax(dim=1) / 127
    return _round(wide, scales[:, None], 127), scales


def quantize_int4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight [N, K] -> integers [N, K] int8 in -7 ... 7 and scales [N, ceil(K / 128)] in bfloat16."""
    n, k = weight.shape
    wide = torch.zeros(n, -(-k // GROUP) * GROUP, dtype=torch.float32)
    wide[:, :k] = weight
    grouped = wide.view(n, -1, GROUP)
    scales = (grouped.abs().amax(dim=2) / 7).bfloat16()
    return _round(grouped, scales.float()[..., None], 7).view(n, -1)[:, :k], scales


def dequantize_int8(integers: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """[N, K] in `dtype`."""
    return (integers.float() * scales[:, None]).to(dtype)


def dequantize_int4(integers: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """[N, K] in `dtype`."""
    wide = scales.float().repeat_interleave(GROUP, dim=1)[:, : integers.shape[1]]
    return (integers.float() * wide).to(dtype)


def rounding_error(weight: Tensor, quantization: str) -> float:
    """How far rounding moves a weight [N, K] to `int8` or `int4`: the norm of the difference over the weight's."""
    wide = weight.float()
    if quantization == "int8":
        rounded = dequantize_int8(*quantize_int8(wide), torch.float32)
    else:
        rounded = dequantize_int4(*quantize_int4(wide), torch.float32)
    return float((rounded - wide).norm() / wide.norm().clamp(min=torch.finfo(torch.float32).tiny))


def _round(values: Tensor, scales: Tensor, largest: int) -> Tensor:
    """An all-zero row has scale 0 and becomes zeros."""
    return (
        (values / scales.clamp(min=torch.finfo(torch.float32).tiny)).round_().clamp_(-largest, largest).to(torch.int8)
    )
