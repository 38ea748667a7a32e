"""The product whose outputs are picked by a mask, in Triton: reads only the kept rows of a [N, K] weight.

What methods need that know a projection's useful outputs beforehand, as the gate of an MLP tells those of `up` (CATS,
arXiv 2404.08763). A prototype: no decode step uses it.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from teal.ops.triton_gemv import INTERPRETED

jit: Any = triton.jit  # its types know no launches
WARPS = 1
CHANNELS = 512  # that a program multiplies at a time


def output_sparse_gemv(x: Tensor, weight: Tensor, keep: Tensor) -> Tensor:
    """`ops.reference.output_sparse_gemv` on devices that Triton serves.

    x [K], weight [N, K], keep [N] of booleans, all contiguous -> y [N] in x's dtype.
    """
    if INTERPRETED and x.dtype == torch.bfloat16:  # which the interpreter truncates
        return output_sparse_gemv(x.float(), weight.float(), keep).to(x.dtype)
    n, k = weight.shape
    y = x.new_empty(n)
    with torch.accelerator.device_index(x.device.index):
        _multiply_kept[(n,)](x, weight, keep, y, k, CHANNELS=CHANNELS, num_warps=WARPS)
    return y


@jit
def _multiply_kept(x, weight, keep, y, k, CHANNELS: tl.constexpr):
    """One output: a program of a dropped one ends at once, and the next takes its place."""
    own = tl.program_id(0)
    total = tl.zeros((CHANNELS,), dtype=tl.float32)
    if tl.load(keep + own) != 0:
        row = weight + own.to(tl.int64) * k
        for start in tl.range(0, k, CHANNELS):
            channel = start + tl.arange(0, CHANNELS)
            inside = channel < k
            read = tl.load(row + channel, mask=inside, other=0.0).to(tl.float32)
            total += read * tl.load(x + channel, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + own, tl.sum(total, axis=0).to(y.dtype.element_ty))
