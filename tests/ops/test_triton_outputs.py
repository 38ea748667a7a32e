"""The Triton product of picked outputs against ops/reference.py."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", reason="needs Triton: pip install triton")

from teal.ops import reference, triton_gemv, triton_outputs

interpreted = pytest.mark.skipif(not triton_gemv.INTERPRETED, reason="needs TRITON_INTERPRET=1")
devices = pytest.mark.parametrize(
    "device", [pytest.param("cpu", marks=interpreted), pytest.param("cuda", marks=pytest.mark.gpu)]
)
INPUTS = [0.0, -0.0, 0.5, -1.0, 2.0, float("inf"), float("nan")]


@devices
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_equals_the_reference_and_reads_no_dropped_row(device: str, data: st.DataObject) -> None:
    """Small integers: sums are exact in any order. Dropped rows, and what surrounds the weight, are NaN."""
    n, k = data.draw(st.integers(0, 20), label="N"), data.draw(st.sampled_from([1, 7, 1024, 1500]), label="K")
    dtype = data.draw(st.sampled_from(triton_gemv.DTYPES), label="dtype")
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99), label="seed"))
    special = data.draw(st.integers(3, len(INPUTS)), label="kinds of inputs")
    kinds = torch.randint(special, (k,), generator=generator, device="cpu")
    x = torch.tensor(INPUTS, device="cpu")[kinds].to(device, dtype)
    keep = (
        torch.rand(n, generator=generator, device="cpu") < data.draw(st.sampled_from([0.0, 0.5, 1.0]), label="kept")
    ).to(device)
    surrounded = torch.full((n + 2, k), float("nan"), device=device, dtype=dtype)
    weight = surrounded[1:-1]
    weight[keep] = torch.randint(-4, 5, (int(keep.sum()), k), generator=generator, device="cpu").to(device, dtype)
    got = triton_outputs.output_sparse_gemv(x, weight, keep)
    torch.testing.assert_close(got, reference.output_sparse_gemv(x, weight, keep), rtol=0, atol=0, equal_nan=True)
    assert not got[~keep].any()
