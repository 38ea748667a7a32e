"""ops/cuda/projection.cu against ops/reference.py.

Inputs and weights are small integers and quarters: their sums are exact in float32 in any order, so the kernel must
give the reference's bits.
"""

from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from emulation import EmulatedDevice, needs_compiler
from exact import BRAIN, HALF, INFINITY, integers, threshold_of
from torch import Tensor

from teal.ops import reference
from teal.ops.cuda_projection import Operands, Projection, Tuning, choose_tuning, shared_bytes

pytestmark = needs_compiler
TOLERANCE = {HALF: 2e-3, BRAIN: 1.6e-2}  # of the largest output


@dataclass(frozen=True)
class Shape:
    """A kernel: what it is compiled for."""

    channels: int
    outputs: tuple[int, ...]
    tuning: Tuning
    dtype: torch.dtype
    kind: str = "plain"


def shape(channels: int, outputs: tuple[int, ...], tuning: tuple[int, ...], dtype: torch.dtype, kind="plain"):
    """tuning: width, cluster, threads, depth"""
    name = "-".join(map(str, (kind, channels, "x".join(map(str, outputs)), *tuning, str(dtype).removeprefix("torch."))))
    return pytest.param(Shape(channels, outputs, Tuning(*tuning), dtype, kind), id=name)


SHAPES = [
    shape(72, (40,), (6, 1, 64, 2), HALF),
    shape(176, (104, 24, 8), (12, 2, 96, 3), BRAIN),
    shape(1040, (200,), (24, 2, 192, 4), HALF),
    shape(528, (232, 72), (28, 2, 224, 8), BRAIN),
    shape(600, (136,), (8, 1, 64, 8), BRAIN),
    shape(8, (8,), (1, 1, 64, 2), HALF),
    shape(16, (16, 8, 48), (2, 2, 64, 5), HALF),
    shape(2048, (56,), (6, 1, 64, 2), BRAIN),
    shape(96, (264,), (32, 2, 256, 2), BRAIN),
    shape(1000, (88,), (10, 1, 128, 6), HALF),
    shape(120, (72,), (5, 3, 64, 7), HALF),
    shape(72, (40, 16, 16), (4, 1, 64, 3), HALF, "normalized"),
    shape(304, (88, 24), (6, 2, 64, 3), BRAIN, "normalized"),
    shape(2080, (64, 64), (8, 2, 64, 8), HALF, "normalized"),
    shape(88, (48,), (3, 1, 64, 4), BRAIN, "gated"),
    shape(208, (112,), (12, 2, 128, 8), HALF, "gated"),
    shape(3008, (136,), (16, 4, 128, 2), HALF, "gated"),
]
EVERY_KIND = [SHAPES[1], SHAPES[2], SHAPES[12], SHAPES[13], SHAPES[14], SHAPES[15]]


@dataclass(frozen=True)
class Problem:
    """Inputs of a kernel: `given` is what it gets as x, `x` [K] what becomes of it before the products."""

    given: Tensor
    norm: Tensor | None
    x: Tensor
    weights: tuple[Tensor, ...]  # [K, N] each
    thresholds: tuple[Tensor, ...]
    biases: tuple[tuple[Tensor | None, Tensor | None], ...]
    residual: Tensor | None = None
    eps: float = 0.0


def exact_inputs(shape: Shape) -> tuple[Tensor, Tensor | None, Tensor]:
    """given, norm and x: what happens to `given` is exact, too."""
    channels, dtype = shape.channels, shape.dtype
    x = integers(channels, parts=4, dtype=dtype)
    x[torch.rand(channels) < 0.1] = -0.0
    if shape.kind == "normalized":  # the mean square is 1
        given = torch.zeros(channels, dtype=dtype)
        given[torch.randperm(channels)[: channels // 4]] = 2
        given *= torch.randint(0, 2, (channels,)) * 2 - 1
        return given, x, given * x
    if shape.kind == "gated":  # silu(16) is 16
        gate = 16.0 * torch.randint(0, 2, (channels,)).to(dtype)
        return torch.cat((gate, x)), None, gate * x
    return x, None, x


def exact_problem(shape: Shape, thresholds: str, biases: str) -> Problem:
    given, norm, x = exact_inputs(shape)
    weights = tuple(integers(shape.channels, outputs, dtype=shape.dtype) for outputs in shape.outputs)
    both = [
        (
            integers(outputs, most=99, parts=8, dtype=shape.dtype) if biases in ("bias", "all") else None,
            integers(outputs, most=99, parts=8, dtype=shape.dtype) if biases in ("sparse-bias", "all") else None,
        )
        for outputs in shape.outputs
    ]
    residual = integers(shape.outputs[0], most=99, parts=8, dtype=shape.dtype) if biases == "all" else None
    every = tuple(threshold_of(thresholds, x, index) for index in range(len(weights)))
    return Problem(given, norm, x, weights, every, tuple(both), residual)


def kernel_results(shape: Shape, problem: Problem) -> list[Tensor]:
    """The outputs; checks that nothing else is written and that no order of the threads changes a bit."""
    projection = Projection(shape.channels, shape.outputs, shape.dtype, kind=shape.kind, tuning=shape.tuning)
    assert projection.kernel.library.shared_size() <= shared_bytes(shape.channels, shape.tuning)
    buffers = [torch.full((size + 32,), float("nan"), dtype=shape.dtype) for size in shape.outputs]
    operands = [
        Operands(weight, threshold, buffer[16:-16], *biases)
        for weight, threshold, buffer, biases in zip(
            problem.weights, problem.thresholds, buffers, problem.biases, strict=True
        )
    ]
    launch = projection.prepared(problem.given, operands, problem.norm, problem.residual, problem.eps)
    results: list[list[Tensor]] = []
    for order in (0, 1, 2):
        for buffer in buffers:
            buffer.fill_(float("nan"))
        launch.start(order)
        assert all(buffer[:16].isnan().all() and buffer[-16:].isnan().all() for buffer in buffers)
        results.append([buffer[16:-16].clone() for buffer in buffers])
        for one, first in zip(results[-1], results[0], strict=True):
            assert torch.equal(one.view(torch.int16), first.view(torch.int16))
    return results[0]


def reference_results(problem: Problem) -> list[Tensor]:
    results = []
    for weight, threshold, biases in zip(problem.weights, problem.thresholds, problem.biases, strict=True):
        y = reference.sparse_linear(problem.x[None], weight.t(), threshold, *biases)[0]
        results.append(y if problem.residual is None else problem.residual + y)
    return results


def check_exact(shape: Shape, problem: Problem) -> None:
    for got, want in zip(kernel_results(shape, problem), reference_results(problem), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


@pytest.fixture(autouse=True)
def _device(device: EmulatedDevice) -> None: ...


@pytest.mark.parametrize("shape", SHAPES)
class TestExactly:
    @pytest.mark.parametrize("thresholds", ["all", "zero", "tie", "below-a-tie", "none", "infinite", "each", "mixed"])
    def test_thresholds(self, shape: Shape, thresholds: str) -> None:
        check_exact(shape, exact_problem(shape, thresholds, "none"))

    @pytest.mark.parametrize("biases", ["bias", "sparse-bias", "all"])
    def test_biases(self, shape: Shape, biases: str) -> None:
        shape = replace(shape, outputs=shape.outputs if biases != "all" else shape.outputs[:1])
        check_exact(shape, exact_problem(shape, "tie", biases))


@pytest.mark.parametrize("value", [float("nan"), INFINITY, -INFINITY, 0.0], ids=str)
@pytest.mark.parametrize("thresholds", ["all", "tie", "each"])
@pytest.mark.parametrize("shape", SHAPES[:4])
def test_not_finite_inputs(shape: Shape, thresholds: str, value: float) -> None:
    """They propagate where they are kept: NaN always, infinity unless the threshold is infinite."""
    problem = exact_problem(shape, thresholds, "none")
    problem.given[torch.tensor([shape.channels // 2 + 1, shape.channels - 1])] = value  # given is x
    check_exact(shape, problem)
    if value != value:
        assert all(result.isnan().all() for result in kernel_results(shape, problem))


def gap(x: Tensor, sparsity: float) -> Tensor:
    """A threshold in the middle between two neighbouring |x|, far from rounding."""
    magnitudes = x.abs().float().sort().values
    at = int(sparsity * (len(magnitudes) - 1))
    lower = max(0, at - len(magnitudes) // 16)
    widest = lower + int((magnitudes[lower + 1 : at + 2] - magnitudes[lower : at + 1]).argmax())
    return (magnitudes[widest] + magnitudes[widest + 1]) / 2


@pytest.mark.parametrize("sparsity", [0.0, 0.5])
@pytest.mark.parametrize("shape", EVERY_KIND)
def test_random_numbers(shape: Shape, sparsity: float) -> None:
    dtype, channels = shape.dtype, shape.channels
    eps, norm = 1e-3, None
    given = torch.randn(channels * (2 if shape.kind == "gated" else 1)).to(dtype)
    x = given
    if shape.kind == "normalized":
        norm, wide = (torch.randn(channels) + 1).to(dtype), given.float()
        x = norm * (wide * torch.rsqrt(wide.pow(2).mean() + eps)).to(dtype)
    elif shape.kind == "gated":
        gate, up = given.chunk(2)
        x = F.silu(gate) * up
    threshold = gap(x, sparsity) if sparsity else torch.tensor(-1.0)
    problem = Problem(
        given, norm, x,
        tuple(torch.randn(channels, outputs).to(dtype) for outputs in shape.outputs),
        (threshold,) * len(shape.outputs),
        tuple((torch.randn(outputs).to(dtype), torch.randn(outputs).to(dtype)) for outputs in shape.outputs),
        eps=eps,
    )  # fmt: skip
    for got, want in zip(kernel_results(shape, problem), reference_results(problem), strict=True):
        assert (got.float() - want.float()).abs().max() <= TOLERANCE[dtype] * want.float().abs().max()


@pytest.mark.parametrize("index", [0, 4])
def test_thresholds_at_the_ends_of_the_format(index: int) -> None:
    """Between two 16-bit numbers, subnormal, and larger than the largest."""
    shape: Shape = SHAPES[index].values[0]  # pyright: ignore
    problem = exact_problem(shape, "all", "none")
    largest, least = torch.finfo(shape.dtype).max, 2.0**-24 if shape.dtype == HALF else 2.0**-133
    given = torch.tensor([largest, -largest, least, -least, 3 * least, 1.0]).to(shape.dtype)
    (weight,) = problem.weights
    weight.zero_()
    weight[:6, :6] = torch.eye(6)
    infinite = torch.full_like(given, INFINITY)
    for threshold in (largest, largest * 0.999, least, least * 1.5, 2e-45, 1e5, 3.4e38):
        for values in (given, infinite):
            problem.given[:6] = values
            check_exact(shape, replace(problem, thresholds=(torch.tensor(threshold),)))


@pytest.mark.parametrize(
    ("channels", "outputs", "kind"), [(192, (96, 32, 32), "normalized"), (88, (40,), "gated"), (64, (512,), "plain")]
)
@pytest.mark.parametrize("clusters", [1, 2])
def test_the_chosen_tuning(channels: int, outputs: tuple[int, ...], kind: str, clusters: int) -> None:
    tuning = choose_tuning(channels, outputs, 4, clusters)
    assert tuning is not None
    shape = Shape(channels, outputs, tuning, BRAIN, kind)
    check_exact(shape, exact_problem(shape, "mixed", "bias"))


@pytest.mark.parametrize(("channels", "most_shared_bytes"), [(14336, 99 << 10), (28672, 163 << 10), (32768, 227 << 10)])
def test_a_tuning_for_many_channels_fits_the_gpu(channels: int, most_shared_bytes: int) -> None:
    tuning = choose_tuning(channels, (4096,), 84, 1, most_shared_bytes)
    assert tuning is not None
    assert shared_bytes(channels, tuning) <= most_shared_bytes


def test_too_many_channels_for_a_gpu() -> None:
    assert choose_tuning(28672, (8192,), 84, 1, 99 << 10) is None


def test_many_threads_with_little_on_its_way() -> None:
    shape = Shape(200, (160,), Tuning(10, 1, threads=1024, depth=2), HALF, "plain")
    check_exact(shape, exact_problem(shape, "mixed", "bias"))


def test_a_block_with_fewer_threads_than_columns_to_finish_does_not_compile() -> None:
    with pytest.raises(AssertionError, match="more threads are needed"):
        Projection(72, (96,), HALF, tuning=Tuning(width=12, cluster=1, threads=64))
