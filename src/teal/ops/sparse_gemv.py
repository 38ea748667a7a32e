"""The public ops: checks, schemas, fakes and the only choice of a backend.

`sparse_gemv` serves a few rows (decode). `sparse_linear` is a projection inside a model: the branch between
decode and prefill depends on the number of tokens, so it sits inside one opaque op and compiled graphs hold.
"""

import os

import torch
from torch import Tensor

from teal.errors import TealError
from teal.ops import native
from teal.ops.cuda_weight import CudaWeight
from teal.ops.layouts import LAYOUTS, restore, triton_serves
from teal.ops.packed import MAX_SPARSE_ROWS, PackedWeight
from teal.ops.reference import drop_small, first_sparse_token

QUANTIZATIONS = {"int8": "cpu_int8", "int4": "cpu_int4"}  # the layout of each


def pack(weight: Tensor, quantization: str | None = None) -> PackedWeight:
    """Pack a weight [N, K] in the layout of the best backend for its device and dtype.

    `quantization` "int8" or "int4" rounds it (`ops.quantize`). TEAL_LAYOUT names a layout to force it (tests,
    comparisons). Raises TealError for a weight that is not a floating-point matrix with at least one row and
    one column, for an unknown quantization, and for one of a weight that is not on the CPU.
    """
    if weight.ndim != 2 or 0 in weight.shape or not weight.is_floating_point():
        raise TealError(f"a weight must be a floating-point matrix [N, K], got {tuple(weight.shape)} {weight.dtype}")
    forced = os.environ.get("TEAL_LAYOUT")
    if forced is not None and forced not in LAYOUTS:
        raise TealError(f"TEAL_LAYOUT={forced!r} is no layout; choose from {', '.join(LAYOUTS)}")
    layout = LAYOUTS[_quantized(weight, quantization) if quantization else forced or _best(weight)]
    if reason := layout.refusal(weight):
        raise TealError(f"the layout {layout.layout} cannot hold this weight: {reason}")
    return layout.pack(weight)


def _best(weight: Tensor) -> str:
    if not CudaWeight.refusal(weight):
        return "cuda"
    if triton_serves(weight):
        return "triton"
    return "cpu" if weight.is_cpu and weight.dtype in native.ACTIVATIONS and native.available() else "row_major"


def _quantized(weight: Tensor, quantization: str) -> str:
    if quantization not in QUANTIZATIONS:
        raise TealError(f"unknown quantization {quantization!r}; choose from {', '.join(QUANTIZATIONS)}")
    if not weight.is_cpu:
        raise TealError(f"{quantization} weights run on the CPU only, this one is on {weight.device}")
    return QUANTIZATIONS[quantization]


def sparse_gemv(x: Tensor, weight: PackedWeight, threshold: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = W where(|x| > threshold, x, 0) + bias, each row of x with a mask of its own.

    x [R, K] in the weight's dtype; threshold [K] or [] in float32; bias [N] or None -> y [R, N] in x's
    dtype, accumulated in float32. Beyond MAX_SPARSE_ROWS rows the dense product of the masked input serves.
    Raises TealError where shapes, dtypes or devices do not fit.
    """
    return torch.ops.teal.sparse_gemv(x, list(weight.storage), weight.layout, threshold, bias)


def sparse_linear(
    x: Tensor,
    weight: PackedWeight,
    threshold: Tensor,
    bias: Tensor | None = None,
    sparse_bias: Tensor | None = None,
    dense_tokens: int = -1,
) -> Tensor:
    """`ops.reference.sparse_linear` on a packed weight: x [..., T, K] -> [..., T, N], or x [K] -> [N].

    One token per sequence (T = 1) is sparse, more are dense, unless dense_tokens >= 0 asks for sparse
    tokens from that position on. sparse_bias [N] is added on sparse tokens only.
    """
    return torch.ops.teal.sparse_linear(
        x, list(weight.storage), weight.layout, threshold, bias, sparse_bias, dense_tokens
    )


def _check(x: Tensor, weight: PackedWeight, threshold: Tensor, *biases: Tensor | None) -> None:
    n, k = weight.shape
    if x.ndim < 1 or x.shape[-1] != k:
        raise TealError(f"input of shape {tuple(x.shape)} does not fit a weight of {n} x {k}")
    if threshold.dtype != torch.float32 or threshold.shape not in ((), (k,)):
        raise TealError(
            f"threshold must be float32 of shape [] or [{k}], got {threshold.dtype} {tuple(threshold.shape)}"
        )
    if x.dtype != weight.dtype:
        raise TealError(f"input is {x.dtype}, the weight {weight.dtype}; cast one of them")
    for bias in biases:
        if bias is not None and (bias.shape != (n,) or bias.dtype != weight.dtype):
            raise TealError(f"bias must be {weight.dtype} of shape [{n}], got {bias.dtype} {tuple(bias.shape)}")
    tensors = [threshold, *weight.storage, *(bias for bias in biases if bias is not None)]
    devices = {str(tensor.device) for tensor in (x, *tensors)}
    if len(devices) > 1:
        raise TealError(f"input, weight, threshold and bias must be on one device, got {', '.join(sorted(devices))}")


def _sparse_rows(x: Tensor, weight: PackedWeight, threshold: Tensor, bias: Tensor | None) -> Tensor:
    """x [R, K] -> [R, N], any R."""
    if x.shape[0] <= MAX_SPARSE_ROWS:
        return weight.sparse_gemv(x, threshold, bias)
    return weight.dense_gemm(drop_small(x, threshold), bias)


@torch.library.custom_op("teal::sparse_gemv", mutates_args=())
def _sparse_gemv(x: Tensor, storage: list[Tensor], layout: str, threshold: Tensor, bias: Tensor | None) -> Tensor:
    weight = restore(storage, layout)
    _check(x, weight, threshold, bias)
    if x.ndim != 2:
        raise TealError(f"input must be [R, K], got {tuple(x.shape)}")
    return _sparse_rows(x, weight, threshold, bias)


@_sparse_gemv.register_fake
def _(x: Tensor, storage: list[Tensor], layout: str, threshold: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((x.shape[0], restore(storage, layout).out_features))


@torch.library.custom_op("teal::sparse_linear", mutates_args=())
def _sparse_linear(
    x: Tensor,
    storage: list[Tensor],
    layout: str,
    threshold: Tensor,
    bias: Tensor | None,
    sparse_bias: Tensor | None,
    dense_tokens: int,
) -> Tensor:
    weight = restore(storage, layout)
    _check(x, weight, threshold, bias, sparse_bias)
    tokens = x.shape[-2] if x.ndim > 1 else 1
    first_sparse = first_sparse_token(tokens, dense_tokens)
    if first_sparse == tokens:
        return weight.dense_gemm(x, bias)
    total_bias = bias if sparse_bias is None else sparse_bias if bias is None else bias + sparse_bias
    rows = x if first_sparse == 0 else x[..., first_sparse:, :]
    sparse = _sparse_rows(rows.reshape(-1, weight.in_features), weight, threshold, total_bias)
    sparse = sparse.view(*rows.shape[:-1], weight.out_features)
    if first_sparse == 0:
        return sparse
    return torch.cat([weight.dense_gemm(x[..., :first_sparse, :], bias), sparse], dim=-2)


@_sparse_linear.register_fake
def _(
    x: Tensor,
    storage: list[Tensor],
    layout: str,
    threshold: Tensor,
    bias: Tensor | None,
    sparse_bias: Tensor | None,
    dense_tokens: int,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], restore(storage, layout).out_features))
