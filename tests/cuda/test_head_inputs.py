"""ops/cuda/head_inputs.cu against what torch drops, bit for bit."""

import pytest
import torch
from emulation import EmulatedDevice, needs_compiler
from exact import BRAIN, HALF
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from teal.linear import _drop_smallest
from teal.ops.cuda_token import HeadInputsKernel

pytestmark = needs_compiler
THREADS = 64


def head_inputs(hidden: torch.Tensor, norm: torch.Tensor, dropped: int) -> torch.Tensor:
    """With an eps that leaves the root of the mean square at 1, so that the norm only multiplies; in three orders."""
    kernel = HeadInputsKernel(hidden.numel(), hidden.dtype, THREADS)
    eps, results = 1 - float(hidden.double().square().mean()), []
    for order in range(3):
        results.append(torch.full_like(hidden, 7.0))
        kernel.prepared(hidden, norm, results[-1], dropped, eps).start(order)
    assert torch.equal(results[0].view(torch.int16), results[1].view(torch.int16))
    assert torch.equal(results[0].view(torch.int16), results[2].view(torch.int16))
    return results[0]


def expected(hidden: torch.Tensor, norm: torch.Tensor, dropped: int) -> torch.Tensor:
    return _drop_smallest((hidden * norm)[None], dropped)[0]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_what_is_dropped(data: st.DataObject, device: EmulatedDevice) -> None:
    dtype = data.draw(st.sampled_from([HALF, BRAIN]))
    size = data.draw(st.sampled_from([8, 96, 256, 1000]))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    hidden = (0.1 * torch.randn(size, generator=generator)).to(dtype)
    if data.draw(st.booleans(), label="many equal"):
        hidden = (16 * hidden).round() / 16
    norm = torch.tensor([0.5, 1.0, 2.0, -1.0]).to(dtype)[torch.randint(4, (size,), generator=generator)]
    norm[: data.draw(st.sampled_from([0, 0, 1, size // 2, size]), label="NaN")] = float("nan")
    dropped = data.draw(st.integers(1, size))
    got, want = head_inputs(hidden, norm, dropped), expected(hidden, norm, dropped)
    assert torch.equal(got.nan_to_num(9.0), want.nan_to_num(9.0))


@pytest.mark.parametrize("dtype", [HALF, BRAIN], ids=str)
def test_all_equal(dtype: torch.dtype, device: EmulatedDevice) -> None:
    hidden = torch.full((64,), -0.25, dtype=dtype)
    assert not head_inputs(hidden, torch.ones_like(hidden), 1).any()
