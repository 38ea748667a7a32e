"""The native CPU kernels: every instruction set against the reference, the same bits on any number of threads."""

import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from fuzz_cpu import fuzz
from torch import Tensor

from teal.errors import TealError, UsageError
from teal.linear import SparseLinear
from teal.ops import native, reference
from teal.ops.cpu import MOST_OUTPUTS, RUN_BYTES, tile_outputs
from teal.ops.layouts import LAYOUTS
from teal.ops.quantize import (
    dequantize_groups,
    dequantize_int8,
    quantize_groups,
    quantize_int8,
    round_to_nearest,
    rounding_error,
)
from teal.ops.sparse_gemv import QUANTIZATIONS, pack, sparse_gemv

needs_library = pytest.mark.skipif(not native.available(), reason=native.describe())
TILED = ["cpu", *QUANTIZATIONS.values()]


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.fixture
def threads() -> Any:
    """Sets the number of threads, and back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@needs_library
class TestKernels:
    def test_random_calls(self) -> None:
        fuzz(3000)

    @pytest.mark.slow
    def test_many_random_calls(self) -> None:
        fuzz(100_000, seed=1)

    @pytest.mark.parametrize("rows", [1, 2, 5, 8])
    @pytest.mark.parametrize("layout", TILED)
    def test_same_bits_on_any_number_of_threads(self, layout: str, rows: int, threads: Any) -> None:
        weight = LAYOUTS[layout].pack(normal(4200, 1000, dtype=torch.bfloat16))
        x, results = normal(rows, 1000, dtype=torch.bfloat16, seed=1), []
        for count in (1, 2, 3, 7, 2):
            threads(count)
            results.append(sparse_gemv(x, weight, torch.tensor(0.5)))
        assert all(torch.equal(result, results[0]) for result in results)

    @pytest.mark.parametrize("threshold", [0.5, 0.0, -1.0])
    @pytest.mark.parametrize("special", [float("inf"), float("-inf"), float("nan")])
    @pytest.mark.parametrize("rows", [2, 3, 8])
    @pytest.mark.parametrize("layout", TILED)
    def test_a_row_does_not_see_weights_that_only_others_keep(
        self, layout: str, rows: int, special: float, threshold: float
    ) -> None:
        library, dtype = native.library(), torch.bfloat16
        assert library is not None
        weight = LAYOUTS[layout].pack(normal(2100, 400, dtype=dtype))
        tiles, *scales, outputs = (tensor.clone() for tensor in weight.storage)
        if layout == "cpu":
            tiles[1, 3, 17] = tiles[0, 9] = special
        elif layout == "cpu_int4":
            scales[0][0, 1, 5] = special
        weight, x = type(weight)((tiles, *scales, outputs)), normal(rows, 400, dtype=dtype, seed=1)
        x[::2, [3, 9]], x[::2, 128:256] = 0, 0
        before = library.teal_chosen_instruction_set()
        try:
            for name in library.teal_instruction_sets().split():
                assert library.teal_choose_instruction_set(name) == 0
                together = sparse_gemv(x, weight, torch.tensor(threshold))
                alone = torch.cat([sparse_gemv(row[None], weight, torch.tensor(threshold)) for row in x])
                assert layout == "cpu_int8" or not alone.isfinite().all()
                torch.testing.assert_close(together, alone, equal_nan=True, atol=1e-2, rtol=1e-2)
        finally:
            library.teal_choose_instruction_set(before)

    def test_threads_are_those_of_torch(self, threads: Any) -> None:
        library = native.library()
        assert library is not None
        for count in (1, 2, 3):
            threads(count)
            assert library.teal_threads() in (count, 0)  # 0: built without OpenMP

    def test_a_plain_read_sees_every_byte(self) -> None:
        library, data = native.library(), torch.zeros(1 << 20, dtype=torch.int64)
        assert library is not None
        assert library.teal_read(data.data_ptr(), data.nbytes) == 0
        data[777_777] = 5
        assert library.teal_read(data.data_ptr(), data.nbytes) == 5

    def test_storage_need_not_be_aligned(self) -> None:
        weight = LAYOUTS["cpu"].pack(normal(70, 40))
        tiles, outputs = weight.storage
        moved = torch.empty(tiles.numel() + 1)[1:].view(tiles.shape).copy_(tiles)
        x = normal(2, 40, seed=1)
        assert torch.equal(
            sparse_gemv(x, type(weight)((moved, outputs)), torch.tensor(0.5)),
            sparse_gemv(x, weight, torch.tensor(0.5)),
        )


class TestChoice:
    def in_a_process(self, code: str, choice: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, native.ENVIRONMENT: choice}
        source = str(Path(native.__file__).parents[2])
        environment["PYTHONPATH"] = os.pathsep.join([source, environment.get("PYTHONPATH", "")])
        return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)

    @needs_library
    def test_by_environment(self) -> None:
        library = native.library()
        assert library is not None
        code = "from teal.ops import native; print(native.library().teal_chosen_instruction_set().decode())"
        for name in library.teal_instruction_sets().decode().split():
            assert self.in_a_process(code, name).stdout.strip() == name

    @needs_library
    def test_unknown(self) -> None:
        done = self.in_a_process("from teal.ops import native; native.library()", "mmx")
        assert "TEAL_CPU='mmx' does not run here; choose from" in done.stderr

    @pytest.mark.parametrize("source", ["int teal_interface(void) { return 0; }", "int other;"])
    def test_a_library_of_another_version(self, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        compiler = shutil.which("cc") or shutil.which("gcc")
        if compiler is None:
            pytest.skip("needs a C compiler")
        (tmp_path / "old.c").write_text(source)
        subprocess.run([compiler, "-shared", "-fPIC", "old.c", "-o", "old.so"], cwd=tmp_path, check=True)
        monkeypatch.delenv(native.ENVIRONMENT, raising=False)
        monkeypatch.setattr(native, "find", lambda: tmp_path / "old.so")
        with pytest.raises(TealError, match="this version needs 2; reinstall: pip install --no-cache-dir"):
            native.library.__wrapped__()

    def test_none_leaves_pytorch(self) -> None:
        code = (
            "import torch; from teal.ops import native; from teal.ops.sparse_gemv import pack; "
            "print(pack(torch.ones(2, 3)).layout, pack(torch.ones(2, 3), 'int8').layout); print(native.describe())"
        )
        first, second = self.in_a_process(code, "none").stdout.splitlines()
        assert first == "row_major cpu_int8"
        assert "TEAL_CPU=none" in second or "--no-cache-dir --force-reinstall --no-deps" in second

    @pytest.mark.parametrize("layout", TILED)
    def test_tiles_are_multiplied_without_the_library_too(self, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(native, "library", lambda: None)
        weight, x = LAYOUTS[layout].pack(normal(30, 50)), normal(3, 50, seed=1)
        expected = reference.sparse_gemv(x, weight.unpack(), torch.tensor(0.5))
        torch.testing.assert_close(sparse_gemv(x, weight, torch.tensor(0.5)), expected)


class TestStorage:
    @needs_library
    @pytest.mark.parametrize("index", [0, 1])
    @pytest.mark.parametrize("layout", TILED)
    def test_storage_that_the_library_cannot_read(self, layout: str, index: int) -> None:
        weight, x = LAYOUTS[layout].pack(normal(300, 500)), normal(2, 500, seed=1)
        spread = list(weight.storage)
        spread[index] = torch.stack((spread[index], spread[index]), dim=-1)[..., 0]
        if spread[index].numel():  # what is empty has no gaps
            with pytest.raises(TealError, match="must be contiguous"):
                sparse_gemv(x, type(weight)(spread), torch.tensor(0.5))
        other = list(weight.storage)
        other[index] = other[index].half()
        with pytest.raises(TealError):
            sparse_gemv(x, type(weight)(other), torch.tensor(0.5))

    @pytest.mark.parametrize("target", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
    @pytest.mark.parametrize("layout", TILED)
    def test_casts_of_a_layer_leave_scales(self, layout: str, target: torch.dtype) -> None:
        layer = SparseLinear(LAYOUTS[layout].pack(normal(300, 500)), normal(300)).eval()
        layer.set_threshold(0.5)
        wide = layer.weight.clone()
        layer.to(target)
        assert torch.equal(layer.weight, wide.to(target))
        x = normal(3, 500, dtype=target, seed=1)
        expected = reference.sparse_gemv(x.double(), wide.to(target).double(), layer.threshold, layer.bias.double())
        wrong = (layer.decode(x).double() - expected).norm() / expected.norm()
        assert wrong < 2 * torch.finfo(target).eps + 1e-6
        assert layer.forward(x).dtype == target

    def test_whether_channels_are_skipped(self, monkeypatch: pytest.MonkeyPatch) -> None:
        weight = LAYOUTS["cpu"].pack(normal(30, 50))
        assert weight.skips_channels == native.available()
        monkeypatch.setattr(native, "library", lambda: None)
        assert not weight.skips_channels
        assert LAYOUTS["channel_major"].pack(normal(30, 50)).skips_channels

    @pytest.mark.parametrize("default", [torch.bfloat16, torch.float64], ids=str)
    @pytest.mark.parametrize("layout", TILED)
    def test_the_default_dtype_changes_nothing(self, layout: str, default: torch.dtype) -> None:
        weight, x = normal(300, 500, dtype=torch.bfloat16), normal(3, 500, dtype=torch.bfloat16, seed=1)
        before = LAYOUTS[layout].pack(weight)
        expected = before.sparse_gemv(x, torch.tensor(0.5), None), before.dense_gemm(x, None)
        threshold = torch.tensor(0.5)
        torch.set_default_dtype(default)
        try:
            after = LAYOUTS[layout].pack(weight)
            actual = after.sparse_gemv(x, threshold, None), after.dense_gemm(x, None)
            assert SparseLinear(after).threshold.dtype == torch.float32
        finally:
            torch.set_default_dtype(torch.float32)
        assert all(torch.equal(new, old) for new, old in zip(after.storage, before.storage, strict=True))
        assert [tensor.dtype for tensor in after.storage] == [tensor.dtype for tensor in before.storage]
        assert all(torch.equal(new, old) for new, old in zip(actual, expected, strict=True))

    @pytest.mark.parametrize("bits", [4, 8, 16, 32])
    @pytest.mark.parametrize("n", [1, 31, 512, 1025, 4096, 14336])
    def test_tiles_hold_all_outputs_in_runs_of_at_most_a_page(self, n: int, bits: int) -> None:
        size = tile_outputs(n, bits)
        tiles = -(-n // size)
        assert size * bits % (8 * native.LINE_BYTES) == 0
        assert size * bits <= 8 * RUN_BYTES
        assert (tiles - 1) * size < n <= tiles * size
        assert size <= MOST_OUTPUTS
        assert tiles == 1 or 2 * size * bits >= min(8 * RUN_BYTES, MOST_OUTPUTS * bits)

    @pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the allocator decides")
    @pytest.mark.parametrize("layout", TILED)
    def test_large_weights_begin_at_a_huge_page(self, layout: str) -> None:
        tiles = LAYOUTS[layout].pack(torch.ones(4096, 1100)).storage[0]
        assert tiles.data_ptr() % native.HUGE_PAGE == 0
        assert tiles.untyped_storage().nbytes() == tiles.nbytes

    @pytest.mark.parametrize("shape", [(1, 1), (3, 130), (130, 3), (2050, 257)])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_quantized_storage_gives_back_what_was_rounded(self, shape: tuple[int, int], dtype: torch.dtype) -> None:
        weight = normal(*shape, dtype=dtype)
        assert torch.equal(pack(weight, "int8").unpack(), dequantize_int8(*quantize_int8(weight), dtype))
        assert torch.equal(pack(weight, "int4").unpack(), dequantize_groups(*quantize_groups(weight, 4), dtype))

    def test_bytes_read(self) -> None:
        """Of every kept channel its weights, and all scales: a group of inputs without a kept one is rare."""
        for kept in (0.25, 1.0):
            assert pack(normal(4096, 1024, dtype=torch.bfloat16)).bytes_read(kept) == kept * 4096 * 1024 * 2
            assert pack(normal(4096, 1024), "int8").bytes_read(kept) == kept * 4096 * 1024 + 4096 * 4
            assert pack(normal(4096, 1024), "int4").bytes_read(kept) == kept * 2048 * 1024 + 4096 * 2 * 8
        assert pack(normal(4096, 1024), "int4").bytes_read(0.0) == 0

    def test_unknown_quantization(self) -> None:
        with pytest.raises(TealError, match="unknown quantization 'int3'; choose from int8, int4"):
            pack(normal(4, 4), "int3")


class TestRounding:
    def test_int8_is_within_half_a_step(self) -> None:
        weight = normal(50, 300)
        integers, scales = quantize_int8(weight)
        assert (integers.abs().amax(dim=1) == 127).all()
        assert ((integers.float() * scales[:, None] - weight).abs() <= 0.5001 * scales[:, None]).all()

    @pytest.mark.parametrize("bits", [4, 3, 2])
    def test_groups_are_within_half_a_step_and_what_their_scale_was_rounded_by(self, bits: int) -> None:
        weight = normal(50, 300)
        integers, scales = quantize_groups(weight, bits)
        wide = scales.float().repeat_interleave(128, dim=1)[:, :300]
        assert integers.unique().tolist() == list(range(-(2 ** (bits - 1)) + 1, 2 ** (bits - 1)))
        assert ((integers.float() * wide - weight).abs() <= 0.53 * wide).all()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_simulated_weights_are_those_that_a_packed_one_reads_back(self, dtype: torch.dtype) -> None:
        weight = normal(50, 300, dtype=dtype)
        for bits in (8, 4):
            assert torch.equal(round_to_nearest(weight, bits), pack(weight, f"int{bits}").unpack())

    def test_fewer_bits_are_further_away(self) -> None:
        weight = normal(50, 300)
        distances = [float((round_to_nearest(weight, bits) - weight).norm()) for bits in (8, 4, 3, 2)]
        assert 0 < distances[0] < distances[1] / 10
        assert distances[1] < distances[2] / 2 < distances[3] / 4

    def test_unknown_width(self) -> None:
        with pytest.raises(UsageError, match="weights can be rounded to 8, 4, 3, 2 bits, got 5"):
            round_to_nearest(normal(4, 4), 5)

    @pytest.mark.parametrize(
        "quantize", [quantize_int8, partial(quantize_groups, bits=4), partial(quantize_groups, bits=2)]
    )
    def test_zeros_stay_zeros(self, quantize: Any) -> None:
        integers, scales = quantize(torch.zeros(3, 130))
        assert not integers.any()
        assert not scales.any()

    def test_error_is_relative_to_the_weights(self) -> None:
        weight = torch.tensor([[127.0, 1.5, 0.0, -3.0]])  # 1.5 becomes 2
        assert rounding_error(weight, "int8") == pytest.approx(0.5 / float(weight.norm()))
        assert rounding_error(2 * weight, "int8") == pytest.approx(0.5 / float(weight.norm()))
        assert rounding_error(torch.tensor([[7.0, -3.0, 1.0]]), "int4") == 0
        assert rounding_error(torch.zeros(2, 3), "int4") == 0
