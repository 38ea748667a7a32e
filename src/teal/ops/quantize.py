"""Weight-only quantization by rounding to nearest, symmetric: int8 per output, 2 to 4 bits in groups of inputs."""

import torch
from torch import Tensor

from teal.errors import UsageError

GROUP = 128  # inputs that share a scale below 8 bits
WIDTHS = (8, 4, 3, 2)  # bits of a weight


def quantize_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight [N, K] -> integers [N, K] int8 in -127 ... 127 and scales [N] in float32."""
    wide = weight.float()
    scales = wide.abs().amax(dim=1) / 127
    return _round(wide, scales[:, None], 127), scales


def quantize_groups(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """weight [N, K] -> integers [N, K] int8 and scales [N, ceil(K / 128)] in bfloat16.

    `bits` 4: -7 ... 7; 3: -3 ... 3; 2: -1, 0 and 1.
    """
    n, k = weight.shape
    largest = 2 ** (bits - 1) - 1
    wide = torch.zeros(n, -(-k // GROUP) * GROUP, dtype=torch.float32, device=weight.device)
    wide[:, :k] = weight
    grouped = wide.view(n, -1, GROUP)
    scales = (grouped.abs().amax(dim=2) / largest).bfloat16()
    return _round(grouped, scales.float()[..., None], largest).view(n, -1)[:, :k], scales


def dequantize_int8(integers: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """[N, K] in `dtype`."""
    return (integers.float() * scales[:, None]).to(dtype)


def dequantize_groups(integers: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """[N, K] in `dtype`."""
    wide = scales.float().repeat_interleave(GROUP, dim=1)[:, : integers.shape[1]]
    return (integers.float() * wide).to(dtype)


def round_to_nearest(weight: Tensor, bits: int) -> Tensor:
    """weight [N, K] as it reads back after it was stored in `bits`, one of WIDTHS; same dtype and device.

    8 bits have a scale per output, fewer one per group of 128 inputs. Raises UsageError for other widths.
    """
    if bits not in WIDTHS:
        raise UsageError(f"weights can be rounded to {', '.join(map(str, WIDTHS))} bits, got {bits}")
    if bits == 8:
        return dequantize_int8(*quantize_int8(weight), weight.dtype)
    return dequantize_groups(*quantize_groups(weight, bits), weight.dtype)


def _round(values: Tensor, scales: Tensor, largest: int) -> Tensor:
    """An all-zero row has scale 0 and becomes zeros."""
    return (
        (values / scales.clamp(min=torch.finfo(torch.float32).tiny)).round_().clamp_(-largest, largest).to(torch.int8)
    )
