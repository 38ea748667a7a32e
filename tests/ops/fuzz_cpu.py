"""Random calls of the native CPU kernels against the reference: python tests/ops/fuzz_cpu.py [CALLS] [SEED].

Shapes, dtypes, formats, rows, thresholds, biases, strides, thread counts and instruction sets are drawn; what a call
gives must equal the reference within the dtype's rounding, or the call must be refused with a TealError.
"""

import random
import sys

import torch
from torch import Tensor

from teal.errors import TealError
from teal.ops import native, reference
from teal.ops.layouts import LAYOUTS
from teal.ops.sparse_gemv import sparse_gemv

LAYOUT_NAMES = ("cpu", "cpu_int8", "cpu_int4")
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}  # half a unit in the last place, twice
SPECIAL = (float("nan"), float("inf"), float("-inf"), 0.0, -0.0)


def size(draw: random.Random, largest: int) -> int:
    """Mostly small, often beside a power of two."""
    if draw.random() < 0.5:
        return draw.randint(1, 70)
    return min(largest, max(1, 2 ** draw.randint(0, largest.bit_length()) + draw.randint(-1, 1)))


def call(draw: random.Random, generator: torch.Generator) -> None:
    """One random call. Raises AssertionError where it differs from the reference."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    dtype = draw.choice(list(ROUNDING))
    layout = draw.choice(LAYOUT_NAMES)
    n, k, rows = size(draw, 4200), size(draw, 400), draw.randint(0, 10)
    weight = LAYOUTS[layout].pack(normal(k, n).t() if draw.random() < 0.2 else normal(n, k))
    x = normal(rows, 2 * k)[:, ::2] if draw.random() < 0.2 else normal(rows, k)
    if rows and draw.random() < 0.1:
        x[draw.randrange(rows), draw.randrange(k)] = draw.choice(SPECIAL)
    threshold = torch.rand(k if draw.random() < 0.5 else (), generator=generator) * draw.choice((-1, 0, 1, 2, 9))
    if draw.random() < 0.3:
        threshold = x.abs().float().flatten()[:1].reshape(()) if x.numel() else threshold  # a tie
        threshold = threshold.nan_to_num(0.5)
    bias = normal(n) if draw.random() < 0.5 else None
    where = f"{layout} {dtype} {rows} x {k} -> {n}, threshold {tuple(threshold.shape)}, bias {bias is not None}"
    actual = sparse_gemv(x, weight, threshold, bias)
    exact = type(weight)((*weight.storage[:-1], torch.empty(n, 0))).unpack() if layout != "cpu" else weight.unpack()
    expected = reference.sparse_gemv(x.float(), exact.float(), threshold, None if bias is None else bias.float())
    kept = reference.drop_small(x.float(), threshold).abs().nan_to_num(0, 0, 0)
    scale = kept @ exact.float().abs().t() + (0 if bias is None else bias.float().abs())
    allowed = 2e-6 * scale + ROUNDING[dtype] * expected.abs() + 1e-6
    if rows > 8:  # through the dense product, whose inputs are rounded weights
        allowed = allowed + 3 * ROUNDING[dtype] * scale
    finite = expected.isfinite() & (expected.abs() < torch.finfo(dtype).max / 2)
    wrong = ((actual.float() - expected).abs() > allowed) & finite
    unlike = (actual.isnan() != expected.isnan()) | (actual.isinf() & expected.isfinite() & finite)
    assert not wrong.any(), f"{where}: differs by {(actual.float() - expected)[wrong].abs().max():.3g}"
    assert not (unlike & (expected.isnan() | finite)).any(), f"{where}: not finite where the reference is, or reversed"


def refused(draw: random.Random, generator: torch.Generator) -> None:
    """One call that must raise TealError."""
    n, k = draw.randint(1, 60), draw.randint(2, 60)
    weight = LAYOUTS[draw.choice(LAYOUT_NAMES)].pack(torch.randn(n, k, generator=generator))
    x, threshold, bias = torch.ones(2, k), torch.tensor(0.5), torch.ones(n)
    wrong = draw.choice(("width", "dtype", "rank", "threshold", "threshold dtype", "bias", "bias dtype"))
    x = {"width": torch.ones(2, k + 1), "dtype": x.half(), "rank": x[0]}.get(wrong, x)
    threshold = {"threshold": torch.ones(k - 1), "threshold dtype": threshold.double()}.get(wrong, threshold)
    bias = {"bias": torch.ones(n + 1), "bias dtype": bias.bfloat16()}.get(wrong, bias)
    try:
        sparse_gemv(x, weight, threshold, bias)
    except TealError:
        return
    raise AssertionError(f"a wrong {wrong} was accepted")


def fuzz(calls: int, seed: int = 0) -> None:
    """`calls` random calls over all instruction sets that run here."""
    library = native.library()
    assert library is not None, native.describe()
    sets = library.teal_instruction_sets().decode().split()
    before, threads = library.teal_chosen_instruction_set(), torch.get_num_threads()
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    try:
        for index in range(calls):
            if index % 50 == 0:
                assert library.teal_choose_instruction_set(draw.choice(sets).encode()) == 0
                torch.set_num_threads(draw.randint(1, 3))
            (refused if draw.random() < 0.05 else call)(draw, generator)
    finally:
        library.teal_choose_instruction_set(before)
        torch.set_num_threads(threads)


if __name__ == "__main__":
    count, seed = map(int, [*sys.argv[1:], *("100000", "0")[len(sys.argv) - 1 :]])
    fuzz(count, seed)
    print(f"{count} calls agree with the reference")
