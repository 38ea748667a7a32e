"""ops/cuda/greedy.cu against torch's argmax."""

import pytest
import torch
from emulation import EmulatedDevice, needs_compiler
from exact import BRAIN, HALF, INFINITY

from teal.ops import cuda_greedy

pytestmark = needs_compiler


@pytest.fixture(autouse=True)
def _device(device: EmulatedDevice) -> None: ...


def choose(logits: torch.Tensor) -> tuple[int, int]:
    token = torch.tensor([-5])
    checked = cuda_greedy.choose(logits[None], token, -7)
    return int(token), int(checked)


@pytest.mark.parametrize("dtype", [HALF, BRAIN], ids=str)
@pytest.mark.parametrize("size", [1, 7, 8, 300, 20011])
def test_the_largest(size: int, dtype: torch.dtype) -> None:
    for sign in (1, -1):
        logits = (sign * torch.rand(size)).to(dtype)
        first = int((logits == logits.max()).nonzero()[0])
        assert choose(logits) == (first, first)


def test_without_clusters(device: EmulatedDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    device.install(monkeypatch, clusters=False)
    logits = torch.rand(3001).to(HALF)
    first = int((logits == logits.max()).nonzero()[0])
    assert choose(logits) == (first, first)


@pytest.mark.parametrize("dtype", [HALF, BRAIN], ids=str)
def test_the_first_of_equals(dtype: torch.dtype) -> None:
    logits = torch.full((9000,), -1.0, dtype=dtype)
    assert choose(logits) == (0, 0)
    logits[[17, 4000, 8999]] = 0.5
    assert choose(logits) == (17, 17)
    logits[:] = 0.0
    logits[:3000] = -0.0
    assert choose(logits) == (0, 0)


@pytest.mark.parametrize("dtype", [HALF, BRAIN], ids=str)
@pytest.mark.parametrize("value", [INFINITY, -INFINITY, float("nan"), -float("nan")], ids=str)
@pytest.mark.parametrize("place", [0, 1234, 4098])
def test_what_is_not_finite(place: int, value: float, dtype: torch.dtype) -> None:
    logits = torch.randn(4099).to(dtype)
    logits[place] = value
    assert choose(logits)[1] == -7
