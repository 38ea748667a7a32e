"""ops/cuda/rows.cu against ops/reference.py, in the reference's bits (see exact.py), and the layout that chooses it."""

from dataclasses import dataclass
from itertools import product

import pytest
import torch
from emulation import EmulatedDevice, needs_compiler
from exact import BRAIN, HALF, INFINITY, integers, threshold_of
from torch import Tensor

from teal.ops import reference
from teal.ops.cuda_projection import MOST_VECTORS
from teal.ops.cuda_rows import (
    MOST_CHANNELS,
    ROWS,
    RowsProjection,
    RowsTuning,
    choose_rows_tuning,
    rows_compiled,
    shared_bytes,
)
from teal.ops.cuda_weight import CudaWeight

pytestmark = needs_compiler


@dataclass(frozen=True)
class Shape:
    channels: int
    outputs: int
    tuning: RowsTuning
    dtype: torch.dtype


def shape(channels: int, outputs: int, tuning: tuple[int, int, int], dtype: torch.dtype):
    """tuning: width, cluster, depth"""
    name = "-".join(map(str, (channels, outputs, *tuning, str(dtype).removeprefix("torch."))))
    return pytest.param(Shape(channels, outputs, RowsTuning(*tuning), dtype), id=name)


SHAPES = [
    shape(8, 8, (8, 1, 2), HALF),
    shape(16, 72, (8, 2, 4), BRAIN),
    shape(1096, 64, (8, 1, 2), HALF),  # the last step is not full
    shape(600, 200, (16, 1, 3), BRAIN),
    shape(2080, 136, (16, 4, 2), BRAIN),
    shape(1040, 264, (32, 2, 2), HALF),
    shape(704, 520, (32, 8, 4), BRAIN),
]


def results(shape: Shape, x: Tensor, weight: Tensor, threshold: Tensor, bias: Tensor | None) -> Tensor:
    """The outputs; checks that nothing else is written and that no order of the threads changes a bit."""
    rows = rows_compiled(x.shape[0])
    projection = RowsProjection(shape.channels, shape.outputs, rows, shape.dtype, shape.tuning)
    assert projection.kernel.library.shared_size() <= shared_bytes(shape.channels, rows, shape.tuning)  # pyright: ignore
    buffer = torch.empty(x.shape[0] * shape.outputs + 32, dtype=shape.dtype)
    y = buffer[16:-16].view(x.shape[0], shape.outputs)
    launch = projection.prepared(x, weight, threshold, y, bias)
    every = []
    for order in (0, 1, 2):
        buffer.fill_(float("nan"))
        launch.start(order)
        assert torch.cat((buffer[:16], buffer[-16:])).isnan().all()
        every.append(y.clone())
        assert torch.equal(every[-1].view(torch.int16), every[0].view(torch.int16))
    return every[0]


def check(shape: Shape, rows: int, thresholds: str, bias: bool, special: float | None = None) -> None:
    x = integers(rows, shape.channels, parts=4, dtype=shape.dtype)
    x[torch.rand(x.shape) < 0.1] = -0.0
    threshold = threshold_of(thresholds, x[rows // 2], 0)
    if special is not None:
        x[rows // 2, torch.tensor([shape.channels // 2 + 1, shape.channels - 1])] = special
    weight = integers(shape.channels, shape.outputs, dtype=shape.dtype)
    biases = integers(shape.outputs, most=99, parts=8, dtype=shape.dtype) if bias else None
    got = results(shape, x, weight, threshold, biases)
    want = reference.sparse_gemv(x, weight.t(), threshold, biases)
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


@pytest.fixture(autouse=True)
def _device(device: EmulatedDevice) -> None: ...


@pytest.mark.parametrize("shape", SHAPES)
class TestExactly:
    @pytest.mark.parametrize("thresholds", ["all", "zero", "tie", "none", "infinite", "each"])
    def test_thresholds(self, shape: Shape, thresholds: str) -> None:
        check(shape, 4, thresholds, bias=False)

    @pytest.mark.parametrize("rows", [1, 2, 3, 7, 8])
    def test_rows(self, shape: Shape, rows: int) -> None:
        check(shape, rows, "tie", bias=True)


@pytest.mark.parametrize("special", [float("nan"), INFINITY, -INFINITY], ids=str)
@pytest.mark.parametrize("thresholds", ["tie", "each"])
@pytest.mark.parametrize("shape", SHAPES[2:4])
def test_not_finite_inputs_stay_in_their_row(shape: Shape, thresholds: str, special: float) -> None:
    check(shape, 5, thresholds, bias=False, special=special)


class TestChooseTuning:
    @pytest.mark.parametrize("largest_cluster", [1, 2])
    @pytest.mark.parametrize("rows", ROWS)
    @pytest.mark.parametrize(("channels", "outputs"), [(4096, 14336), (14336, 4096), (28672, 8192), (18944, 3584)])
    def test_models(self, channels: int, outputs: int, rows: int, largest_cluster: int) -> None:
        tuning = choose_rows_tuning(channels, outputs, rows, 132, largest_cluster)
        if channels > MOST_CHANNELS[rows] * largest_cluster:
            assert tuning is None
        else:
            assert tuning is not None
            assert channels // tuning.cluster <= MOST_CHANNELS[rows]
            assert tuning.cluster * -(-outputs // (8 * tuning.width)) <= 2 * 132

    @pytest.mark.parametrize("rows", ROWS)
    def test_threads_hold_their_channels(self, rows: int) -> None:
        for channels, outputs in product(range(8, 32769, 1024), range(1024, 40001, 512)):
            for largest_cluster in (1, 2):
                tuning = choose_rows_tuning(channels, outputs, rows, 132, largest_cluster)
                if tuning is not None:
                    assert channels // tuning.cluster <= 4 * MOST_VECTORS * tuning.threads

    @pytest.mark.parametrize("most", [99 << 10, 163 << 10])
    @pytest.mark.parametrize("rows", ROWS)
    def test_gpus_with_less_shared_memory(self, rows: int, most: int) -> None:
        for channels in range(8, 32769, 1024):
            tuning = choose_rows_tuning(channels, 4096, rows, 108, 1, most)
            assert tuning is None or shared_bytes(channels, rows, tuning) <= most
        assert choose_rows_tuning(4096, 4096, rows, 108, 1, 163 << 10) is not None

    @pytest.mark.parametrize("channels", [8, 24, 4104])
    def test_it_runs(self, channels: int) -> None:
        tuning = choose_rows_tuning(channels, 40, 4, 4)
        assert tuning is not None
        check(Shape(channels, 40, tuning, BRAIN), 3, "tie", bias=False)


@pytest.mark.parametrize(
    ("rows", "channels"), [(0, 64), (1, 64), (2, 64), (8, 64), (2, 65544)]
)  # too many for a kernel
def test_the_layout(rows: int, channels: int) -> None:
    x, weight = integers(channels, rows, parts=4, dtype=HALF).t(), integers(40, channels, dtype=HALF)
    threshold = torch.tensor(1.0)
    got = CudaWeight.pack(weight).sparse_gemv(x, threshold, None)
    torch.testing.assert_close(got, reference.sparse_gemv(x, weight, threshold), rtol=2e-3, atol=0)
