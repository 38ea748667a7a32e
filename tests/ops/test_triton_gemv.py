"""What the Triton kernels must hold beyond the grid of test_sparse_gemv: any tiling, and no more reads than needed."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton", reason="needs Triton: pip install triton")

from teal.ops import reference, triton_gemv
from teal.ops.packed import ChannelMajorWeight
from teal.ops.triton_gemv import DTYPES, Tiling, TritonWeight, choose_tiling

NAN, INF = float("nan"), float("inf")
INPUTS = [0.0, -0.0, 0.5, -0.5, 1.0, -1.0, 1.5, -2.0, 3.0]  # thresholds are among them: ties
THRESHOLDS = [-1.0, 0.0, 0.5, 1.0, 1.5, 9.0, INF]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
MODELS = [(6144, 4096), (4096, 4096), (14336, 4096), (4096, 14336), (28672, 8192), (8192, 28672), (128256, 4096)]

interpreted = pytest.mark.skipif(not triton_gemv.INTERPRETED, reason="needs TRITON_INTERPRET=1")
devices = pytest.mark.parametrize(
    "device", [pytest.param("cpu", marks=interpreted), pytest.param("cuda", marks=pytest.mark.gpu)]
)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def named(shape: tuple[int, int]) -> str:
    return "x".join(map(str, shape))


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """New uninitialized tensors are full of NaN, or of the largest integer."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(4).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def multiply(x: Tensor, weight: Tensor, threshold: Tensor, bias: Tensor | None, tiling: Tiling | None = None) -> Tensor:
    """weight [N, K] -> y, with NaN in and around the stored weight wherever no kept channel is."""
    kept = reference.keep_mask(x, threshold).any(dim=0)
    surrounded = weight.new_full((weight.shape[1] + 2, weight.shape[0]), NAN)
    stored = surrounded[1:-1]
    stored[kept] = weight.t()[kept]
    with poisoned_memory():
        return triton_gemv.triton_gemv(x, stored, threshold, bias, tiling)


def drawn(data: st.DataObject, values: list[float], *shape: int) -> Tensor:
    size = torch.Size(shape).numel()
    picks = data.draw(st.lists(st.sampled_from(values), min_size=size, max_size=size))
    return torch.tensor(picks, device="cpu").reshape(shape)


@devices
class TestAnyTiling:
    @settings(max_examples=60, deadline=None)
    @given(data=st.data())
    def test_exact_sums(self, device: str, data: st.DataObject) -> None:
        """Sums of a few halves are exact in float32, so that every tiling gives the reference's bits."""
        rows, n, k = (data.draw(st.integers(1, most), label=name) for name, most in [("R", 8), ("N", 40), ("K", 70)])
        dtype = data.draw(st.sampled_from(DTYPES), label="dtype")
        columns, channels = (data.draw(st.sampled_from([16, 32]), label=name) for name in ("columns", "channels"))
        tiling = Tiling(columns, channels, data.draw(st.sampled_from([16, 48, 128]), label="slice"))
        each = data.draw(st.booleans(), label="threshold per channel")
        special = data.draw(st.sampled_from([[], [NAN], [INF, -INF], [NAN, INF]]), label="special")
        x = drawn(data, INPUTS + special, rows, k).to(device, dtype)
        if data.draw(st.booleans(), label="transposed"):
            x = x.t().contiguous().t()
        threshold = drawn(data, THRESHOLDS, *((k,) if each else ())).to(device)
        generator = torch.Generator().manual_seed(data.draw(st.integers(0, 9), label="seed"))
        weight = torch.randint(-4, 5, (n, k), generator=generator, device="cpu").to(device, dtype)
        halves = torch.randint(-9, 10, (n, 2), generator=generator, device="cpu").to(device, dtype) / 2
        bias = halves[:, 0] if data.draw(st.booleans(), label="bias") else None
        expected = reference.sparse_gemv(x, weight, threshold, bias)
        torch.testing.assert_close(
            multiply(x, weight, threshold, bias, tiling), expected, rtol=0, atol=0, equal_nan=True
        )

    @pytest.mark.parametrize("rows", [1, 5])
    def test_a_slice_longer_than_is_compacted_at_once(self, device: str, rows: int) -> None:
        x, weight = torch.randn(rows, 1300, device=device), torch.randn(20, 1300, device=device)
        tiling = Tiling(32, 64, 1152)
        assert tiling.slice > triton_gemv.MOST_COMPACTED
        threshold = torch.tensor(0.7, device=device)
        expected = reference.sparse_gemv(x, weight, threshold)
        torch.testing.assert_close(multiply(x, weight, threshold, None, tiling), expected, rtol=1e-5, atol=1e-4)

    @dtypes
    def test_rows_agree_with_each_alone(self, device: str, dtype: torch.dtype) -> None:
        x, weight = torch.randn(8, 300, device=device).to(dtype), torch.randn(24, 300, device=device).to(dtype)
        threshold = torch.rand(300, device=device)
        together = multiply(x, weight, threshold, None)
        alone = torch.cat([multiply(x[row : row + 1], weight, threshold, None) for row in range(8)])
        torch.testing.assert_close(together, alone, rtol=TOLERANCE[dtype], atol=1e-4)


class TestChooseTiling:
    @pytest.mark.parametrize("shape", [(1, 1), (5, 7), (100, 5000), *MODELS], ids=named)
    @pytest.mark.parametrize("rows", [1, 8])
    def test_fits_the_kernel(self, rows: int, shape: tuple[int, int]) -> None:
        for bytes_per_weight, multiprocessors in product((2, 4), (1, 16, 132)):
            tiling = choose_tiling(rows, *shape, bytes_per_weight, multiprocessors)
            for size in (tiling.columns, tiling.channels):
                assert size >= 16
                assert size & (size - 1) == 0
            assert tiling.slice >= tiling.channels

    @pytest.mark.parametrize("shape", MODELS, ids=named)
    def test_long_runs_and_busy_multiprocessors(self, shape: tuple[int, int]) -> None:
        n, k = shape
        tiling = choose_tiling(1, n, k, 2, 132)
        programs = -(-n // tiling.columns) * -(-k // tiling.slice)
        assert tiling.columns * 2 == 256
        assert programs >= 3 * 132


class TestFallback:
    """Where the kernels cannot run the parent's product serves."""

    @pytest.fixture(autouse=True)
    def _not_interpreted(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        monkeypatch.setattr(triton_gemv, "INTERPRETED", False)
        triton_gemv.serves.cache_clear()
        yield
        triton_gemv.serves.cache_clear()

    def test_processors(self) -> None:
        x, weight, threshold = torch.randn(2, 20), torch.randn(6, 20), torch.tensor(0.5)
        assert not triton_gemv.serves(x.device, x.dtype)
        expected = ChannelMajorWeight.pack(weight).sparse_gemv(x, threshold, None)
        assert torch.equal(TritonWeight.pack(weight).sparse_gemv(x, threshold, None), expected)

    @pytest.mark.parametrize(
        ("capability", "served"), [pytest.param((7, 5), False, id="7.5"), pytest.param((8, 0), True, id="8.0")]
    )
    def test_old_gpus(self, capability: tuple[int, int], served: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.version, "hip", None)
        assert triton_gemv.serves(torch.device("cuda", 0), torch.float16) == served

    def test_double_precision(self) -> None:
        assert not triton_gemv.serves(torch.device("cuda", 0), torch.float64)


COMPILE = """
import sys
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from teal.ops import triton_gemv as kernels

backend, arch, warp = sys.argv[1:]
target = GPUTarget(backend, int(arch) if arch.isdigit() else arch, int(warp))


def assembly(kernel, pointers, constants, warps=4):
    names = kernel.arg_names
    signature = {name: "*" + pointers[name] if name in pointers else "i32" for name in names}
    signature |= dict.fromkeys(constants, "constexpr")
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in names if name in pointers or name == "n"}
    values = {(names.index(name),): value for name, value in constants.items()}
    code = compile(ASTSource(kernel, signature, values, aligned), target=target, options={"num_warps": warps}).asm
    return code.get("ptx") or code["amdgcn"]


for dtype, size in (("bf16", 2), ("fp16", 2), ("fp32", 4)):
    pointers = dict.fromkeys(("weight", "bias", "values", "x", "y"), dtype) | dict(threshold="fp32", sums="fp32")
    pointers |= dict.fromkeys(("counts", "finished", "channels"), "i32")
    for rows in (1, 8):
        tiling = kernels.choose_tiling(rows, 4096, 4096, size, 132)
        common = dict(ROWS=rows, SLICES=4, SLICE=tiling.slice)
        compact = dict(TILES=112, PADDED_ROWS=rows, CHUNK=256, PADDED_TILES=128)
        assembly(kernels._compact, pointers, common | compact)
        multiply = dict(PADDED_ROWS=1 if rows == 1 else 16, COLUMNS=tiling.columns, CHANNELS=tiling.channels)
        multiply |= dict(BIAS=True, STAGES=tiling.stages)
        code = assembly(kernels._multiply, pointers, common | multiply, tiling.warps)
        print(dtype, rows, any(load in code for load in ("ld.global.v4.b32", "cp.async.cg", "load_dwordx4")))
"""


@pytest.mark.parametrize("target", ["cuda 80 32", "cuda 90 32", "hip gfx942 64"])
def test_compiles_without_a_gpu(tmp_path: Path, target: str) -> None:
    """The interpreter accepts more than the compiler does; and weights are to be read 16 bytes at a time."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", COMPILE, *target.split()]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = done.stdout.splitlines()
    assert found == [f"{dtype} {rows} True" for dtype in ("bf16", "fp16", "fp32") for rows in (1, 8)]


@pytest.mark.gpu
class TestOnAGpu:
    """What the interpreter, which runs one program after the other, cannot show."""

    @pytest.mark.parametrize("rows", [1, 2, 8])
    @pytest.mark.parametrize("shape", MODELS, ids=named)
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
    def test_real_shapes_and_the_same_bits_every_run(
        self, shape: tuple[int, int], dtype: torch.dtype, rows: int
    ) -> None:
        n, k = shape
        x, weight = torch.randn(rows, k).to(dtype), (torch.randn(k, n) / k**0.5).to(dtype)
        for threshold in (torch.tensor(-1.0), torch.tensor(0.6745), torch.rand(k), torch.tensor(9.0)):
            y = triton_gemv.triton_gemv(x, weight, threshold)
            exact = reference.drop_small(x, threshold).double() @ weight.double()
            torch.testing.assert_close(y.double(), exact, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
            assert all(torch.equal(triton_gemv.triton_gemv(x, weight, threshold), y) for _ in range(50))

    def test_captured_and_replayed(self) -> None:
        x, weight, threshold = torch.randn(1, 4096), torch.randn(4096, 4096), torch.tensor(0.5)
        triton_gemv.triton_gemv(x, weight, threshold)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = triton_gemv.triton_gemv(x, weight, threshold)
        for value in (0.1, 1.0):
            x.normal_()
            threshold.fill_(value)
            graph.replay()
            assert torch.equal(y, triton_gemv.triton_gemv(x, weight, threshold))
