"""What of the CUDA layout runs on every device."""

import pytest
import torch

from teal.ops import cuda_weight
from teal.ops.cuda_weight import CudaWeight


@pytest.mark.parametrize("outputs", [16, 24, 8])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("tokens", [64, 65, 128, 129])
def test_products_of_halves_are_the_whole(outputs, has_bias, tokens, monkeypatch):
    """Of integers, whose sums are exact in any order."""
    monkeypatch.setattr(cuda_weight, "HALVED_WEIGHTS", 16 * 16)
    generator = torch.Generator().manual_seed(outputs + tokens)
    x = torch.randint(-4, 5, (1, tokens, 16), generator=generator).float()
    weight = torch.randint(-4, 5, (outputs, 16), generator=generator).float()
    bias = torch.arange(float(outputs)) if has_bias else None
    calls = []
    linear = torch.nn.functional.linear
    monkeypatch.setattr(cuda_weight.F, "linear", lambda *given: calls.append(given) or linear(*given))
    got = CudaWeight.pack(weight).dense_gemm(x, bias)
    assert torch.equal(got, linear(x, weight, bias))
    assert len(calls) == (2 if outputs >= 16 and tokens in (65, 128) else 1)
