"""What a sparse projection computes, in plain PyTorch. Every kernel is tested against this file."""

import torch
import torch.nn.functional as F
from torch import Tensor

KEEP_ALL = -1.0  # a threshold that keeps everything, as every negative one does


def keep_mask(x: Tensor, threshold: Tensor) -> Tensor:
    """Which inputs are kept: `not (|x| <= threshold)`, so NaN is kept and propagates.

    x [..., K] of any floating dtype, threshold [K] or [] in float32; the comparison is made in float32.
    A negative threshold keeps everything, zero drops exact zeros only.
    """
    return ~(x.abs().float() <= threshold)


def drop_small(x: Tensor, threshold: Tensor) -> Tensor:
    """x [..., K] with the inputs that are not kept set to zero; same shape and dtype."""
    return torch.where(keep_mask(x, threshold), x, torch.zeros((), dtype=x.dtype, device=x.device))


def sparse_gemv(x: Tensor, weight: Tensor, threshold: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = W where(keep, x, 0) + b for each row of x on its own (TEAL, arXiv 2408.14690, section 4).

    x [R, K], weight [N, K], threshold [K] or [] in float32, bias [N] or None -> y [R, N] in x's dtype,
    accumulated in float32. Weights are finite; inputs that are NaN or infinite are kept and propagate.
    """
    kept = keep_mask(x, threshold)
    rows = []
    for row, keep in zip(x.float(), kept, strict=True):
        y = weight.float()[:, keep] @ row[keep]
        rows.append(y if bias is None else y + bias.float())
    empty = x.new_empty((0, weight.shape[0]))
    return torch.stack(rows).to(x.dtype) if rows else empty


def output_sparse_gemv(x: Tensor, weight: Tensor, keep: Tensor) -> Tensor:
    """y_n = (W x)_n where output n is kept, else 0: what methods compute that mask outputs (CATS, arXiv 2404.08763).

    x [K], weight [N, K], keep [N] of booleans -> y [N] in x's dtype, accumulated in float32.
    """
    y = torch.zeros(weight.shape[0], device=x.device)
    y[keep] = weight[keep].float() @ x.float()
    return y.to(x.dtype)


def first_sparse_token(tokens: int, dense_tokens: int) -> int:
    """Position of the first sparse token among `tokens`; `tokens` if all are dense (see sparse_linear)."""
    if dense_tokens < 0:
        return 0 if tokens == 1 else tokens
    return min(dense_tokens, tokens)


def sparse_linear(
    x: Tensor,
    weight: Tensor,
    threshold: Tensor,
    bias: Tensor | None = None,
    sparse_bias: Tensor | None = None,
    dense_tokens: int = -1,
) -> Tensor:
    """A projection inside a model: decode is sparse, prefill is dense.

    x [..., T, K] -> [..., T, N]. With dense_tokens < 0, T = 1 is decode and sparse, T > 1 is prefill and
    dense. With dense_tokens >= 0 the tokens from that position on are sparse whatever T is (evaluation).
    sparse_bias [N] (compensation) is added on sparse tokens only.
    """
    first_sparse = first_sparse_token(x.shape[-2], dense_tokens)
    dense, sparse = x[..., :first_sparse, :], x[..., first_sparse:, :]
    total_bias = bias if sparse_bias is None else sparse_bias if bias is None else bias.float() + sparse_bias.float()
    dense_out = F.linear(dense.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)
    sparse_out = sparse_gemv(sparse.reshape(-1, x.shape[-1]), weight, threshold, total_bias)
    return torch.cat([dense_out, sparse_out.view(*sparse.shape[:-1], weight.shape[0])], dim=-2)
