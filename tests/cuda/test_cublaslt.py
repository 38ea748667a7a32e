"""The choice among cuBLASLt's algorithms, on a stand-in for the library (cublaslt.cpp)."""

import ctypes
import math
import subprocess
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from emulation import COMPILER, HERE, EmulatedDevice, needs_compiler
from exact import BRAIN, HALF

from teal.ops import cublaslt
from teal.ops.cublaslt import fastest, gemm, measured_tokens

pytestmark = needs_compiler


class Library:
    """The stand-in, its settings and its counters."""

    def __init__(self, path: Path) -> None:
        self.library = ctypes.CDLL(str(path))
        self.library.cublasLtGetVersion.restype = ctypes.c_size_t

    def __getattr__(self, name: str) -> ctypes.c_int:
        return ctypes.c_int.in_dll(self.library, name)

    @property
    def now(self) -> float:
        return ctypes.c_float.in_dll(self.library, "now").value

    @property
    def costs(self) -> "ctypes.Array[ctypes.c_float]":  # of the algorithms, at first 5, 3, 4
        return self.floats("costs")

    def floats(self, name: str) -> "ctypes.Array[ctypes.c_float]":
        return (ctypes.c_float * 8).in_dll(self.library, name)


@pytest.fixture
def library(
    device: EmulatedDevice, tmp_path: Path, library_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Library]:
    path = tmp_path / "cublaslt.so"
    subprocess.run([*COMPILER, str(HERE / "cublaslt.cpp"), "-o", str(path)], check=True)
    library = Library(path)

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            self.at = 0.0

        def record(self) -> None:
            self.at = library.now

        def synchronize(self) -> None:
            pass

        def elapsed_time(self, other: "Event") -> float:
            return other.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "emulated")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: types.SimpleNamespace(cuda_stream=5))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(cublaslt, "_library", lambda: library.library)
    monkeypatch.setattr(cublaslt, "ALIGNMENT", 64)  # all that memory on a CPU has
    monkeypatch.setenv("TEAL_CACHE", str(tmp_path / "cache"))
    forget()
    yield library
    forget()


def forget() -> None:
    """What a new process does not know."""
    cublaslt._chosen.clear()
    cublaslt._fastest.clear()
    cublaslt._handle_of.cache_clear()
    cublaslt._preference.cache_clear()


def operands(
    tokens: int = 5, k: int = 24, n: int = 16, dtype: torch.dtype = BRAIN
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of small integers: sums are exact."""
    x, weight = torch.randint(-3, 4, (tokens, k)).to(dtype), torch.randint(-3, 4, (k, n)).to(dtype)
    return x, weight, torch.randint(-9, 10, (n,)).to(dtype)


def assert_equal(got: torch.Tensor | None, want: torch.Tensor) -> None:
    assert got is not None
    assert torch.equal(got, want)


def cost(library: Library, x: torch.Tensor, weight: torch.Tensor) -> float:
    before = library.now
    assert_equal(gemm(x, weight, None), x @ weight)
    return library.now - before


def candidates() -> list[cublaslt.Candidate]:
    product = cublaslt.Product(5, 24, 16, BRAIN)
    return product.candidates(product.proposals())


MEASURING = 3 * (1 + cublaslt.TRIES + 1 + cublaslt.REPEATS) + 1  # products


@pytest.mark.parametrize("dtype", [HALF, BRAIN], ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 8), (5, 24, 16), (70, 16, 40)])
def test_the_product_is_right(shape: tuple[int, int, int], dtype: torch.dtype, library: Library) -> None:
    x, weight, bias = operands(*shape, dtype)
    for own in (None, bias):
        want = F.linear(x.float(), weight.float().t(), None if own is None else own.float()).to(dtype)
        assert_equal(gemm(x, weight, own), want)


def test_leading_dimensions_strides_and_unaligned_inputs(library: Library) -> None:
    x, weight, _ = operands(24, 24)
    for given in (x.view(2, 3, 4, 24), x.t(), x[1:]):  # 48 bytes from where it is aligned
        assert_equal(gemm(given, weight, None), given @ weight)


def test_the_fastest_is_measured_once_for_a_range_of_tokens(library: Library) -> None:
    weight = operands()[1]
    cost(library, operands(40)[0], weight)
    for tokens in (40, 33, 64):
        assert cost(library, operands(tokens)[0], weight) == 3.0
    assert library.products.value == MEASURING + 4
    cost(library, operands(65)[0], weight)
    assert library.products.value == 2 * MEASURING + 5


def test_later_processes_take_the_same(library: Library, tmp_path: Path) -> None:
    x, weight, _ = operands()
    cost(library, x, weight)
    (kept,) = (tmp_path / "cache").glob("*.gemm")
    assert kept.read_text() == "1 0"
    library.costs[2] = 1.0
    forget()
    assert cost(library, x, weight) == 3.0
    for damaged in (b"9 0", b"1", b"1" * 5000 + b" 0", b"1 1", b"1 -1", b"1 0 0", b"", b"\xff" * 64):
        kept.write_bytes(damaged)
        forget()
        cost(library, x, weight)
        assert kept.read_text() == "2 0"


def test_tiles_that_are_not_proposed(library: Library, tmp_path: Path) -> None:
    x, weight, _ = operands()
    library.tiles.value = 4
    library.floats("tile_costs")[:5] = [0, 5, 2, 1, 0.5]
    library.floats("tile_waves")[:5] = [0, 1, 0.9, 0.8, 4.1]  # the third leaves places, the fourth takes many waves
    cost(library, x, weight)
    assert cost(library, x, weight) == 2.0
    (kept,) = (tmp_path / "cache").glob("*.gemm")
    place, tile = kept.read_text().split()
    assert (int(place) < 3, tile) == (True, "2")
    forget()
    library.floats("tile_costs")[2] = 9.0
    assert cost(library, x, weight) == 9.0, "later processes take the same"
    library.tiles.value = 1  # another library, say
    forget()
    cost(library, x, weight)
    assert kept.read_text() == "1 0"
    kept.write_text("0 1")
    library.refused.value = 1
    forget()
    cost(library, x, weight)
    assert kept.read_text() == "1 0"


@pytest.mark.parametrize("waves", [math.nan, math.inf, 0.0, -1.0, 4.1, 0.8])
def test_tiles_that_leave_places_or_take_many_waves(waves: float, library: Library) -> None:
    library.tiles.value = 1
    library.floats("tile_waves")[1] = waves
    assert len(candidates()) == 3


def test_tiles_that_take_too_much_memory(library: Library) -> None:
    x, weight, _ = operands()
    library.tiles.value, library.floats("tile_costs")[1] = 1, 1.0
    ctypes.c_size_t.in_dll(library.library, "tile_workspace").value = cublaslt.MOST_WORKSPACE + 1
    cost(library, x, weight)
    assert cost(library, x, weight) == 3.0


def test_where_tiles_are_not_told_the_proposals_serve(library: Library) -> None:
    x, weight, _ = operands()
    library.tiles.value, library.silent.value = 1, 1
    cost(library, x, weight)
    assert cost(library, x, weight) == 3.0


def test_what_fewer_tokens_refuse(library: Library) -> None:
    weight = operands()[1]
    cost(library, operands(32)[0], weight)
    library.fewest_rows.value = 20
    assert cost(library, operands(20)[0], weight) == 3.0
    assert cost(library, operands(19)[0], weight) == 5.0, "the first proposal"


def test_each_device_is_measured(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, _ = operands()
    cost(library, x, weight)
    monkeypatch.setenv("TEAL_CACHE", "/proc/nowhere")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    cost(library, x, weight)
    assert library.products.value == 2 * (MEASURING + 1)


def test_measuring_draws_no_random_numbers_of_the_user(library: Library) -> None:
    x, weight, _ = operands()
    before = torch.get_rng_state()
    cost(library, x, weight)
    assert torch.equal(torch.get_rng_state(), before)


def test_weights_that_are_not_finite_choose_nothing(library: Library, tmp_path: Path) -> None:
    x, weight, _ = operands()
    assert gemm(x, weight.fill_(math.nan), None) is None
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("why", ["refused", "wrong"])
def test_a_tile_that_does_not_serve_is_not_taken(why: str, library: Library) -> None:
    x, weight, _ = operands()
    library.tiles.value = 1
    library.floats("tile_costs")[1] = 1.0
    getattr(library, why).value = 1
    cost(library, x, weight)
    assert cost(library, x, weight) == (3.0 if why == "refused" else 5.0)


def test_only_the_best_tiles_are_measured(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cublaslt, "MOST_VARIANTS", 4)
    library.proposed.value, library.tiles.value = 1, 7
    library.floats("tile_waves")[1:] = [0.9, 1.0, 1.9, 2.0, 0.95, 3.0, 4.0]
    assert [(each.place, each.tile) for each in candidates()] == [(0, 0), (0, 2), (0, 5), (0, 1), (0, 4)]


@pytest.mark.parametrize("about", ["device", "version", "dtype", "shape", "tiles"])
def test_what_is_kept_is_for_the_same_product(
    about: str, library: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, weight, _ = operands()
    cost(library, x, weight)
    forget()
    if about == "device":
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "another")
    elif about == "version":
        monkeypatch.setattr(library.library, "cublasLtGetVersion", lambda: 1)
    elif about == "tiles":
        monkeypatch.setattr(cublaslt, "MOST_VARIANTS", 1)
    elif about == "dtype":
        x, weight = x.half(), weight.half()
    else:
        weight = weight[:, :8].contiguous()
    cost(library, x, weight)
    assert len(list((tmp_path / "cache").glob("*.gemm"))) == 2


def test_without_a_cache_it_measures_once_in_a_process(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEAL_CACHE", "/proc/nowhere")
    for tokens in (40, 33, 64):
        cost(library, operands(tokens)[0], operands()[1])
    assert library.products.value == MEASURING + 3


def test_nothing_is_kept_where_all_fail(library: Library, tmp_path: Path) -> None:
    x, weight, _ = operands()
    library.proposed.value, library.failing.value = 1, 0
    assert gemm(x, weight, None) is None
    assert not (tmp_path / "cache").exists()


def test_an_algorithm_that_fails_is_not_taken(library: Library) -> None:
    x, weight, _ = operands()
    library.failing.value = 1
    cost(library, x, weight)
    assert cost(library, x, weight) == 4.0
    library.failing.value = 2  # for another number of tokens, say
    assert gemm(x, weight, None) is None
    library.failing.value = -1
    assert gemm(x, weight, None) is None, "tried once"


def test_nothing_is_asked_of_the_library_while_a_graph_is_captured(
    library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, weight, _ = operands()

    def capture(capturing: bool) -> None:
        library.capturing.value = capturing
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)

    capture(True)
    assert gemm(x, weight, None) is None
    capture(False)
    cost(library, x, weight)
    capture(True)
    assert cost(library, x, weight) == 3.0


def test_where_there_is_no_memory_to_measure_the_first_proposal_serves(
    library: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("full")

    x, weight, _ = operands()
    monkeypatch.setattr(cublaslt, "_times", full)
    assert cost(library, x, weight) == 5.0
    assert not (tmp_path / "cache").exists(), "a later process may measure"


def test_where_it_cannot_serve(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, _ = operands()
    assert gemm(x[:0], weight, None) is None
    assert gemm(x.float(), weight.float(), None) is None
    assert gemm(x.half(), weight, None) is None
    assert gemm(x, weight.t().contiguous().t(), None) is None
    assert gemm(x.float().requires_grad_().to(BRAIN), weight, None) is None
    assert gemm(x.expand(cublaslt.MOST_TOKENS // 5 + 1, 5, -1), weight, None) is None
    assert gemm(x, torch.cat([weight.flatten(), weight[0, :4]])[4:].view(24, 16), None) is None
    assert library.products.value == 0
    library.proposed.value = 0
    assert gemm(x, weight, None) is None
    library.proposed.value = 3
    assert gemm(x, weight, None) is None, "asked once"
    forget()
    cost(library, x, weight)


def test_no_library(device: EmulatedDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "0.0")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(cublaslt, "ALIGNMENT", 64)
    forget()
    x, weight, _ = operands()
    assert gemm(x, weight, None) is None
    forget()


def test_the_first_proposal_stays_unless_another_gains_enough() -> None:
    assert fastest([[1.0, 9.0, 1.0], [0.98, 0.98, 0.98]]) == 0
    assert fastest([[1.0, 1.0, 9.0], [0.99] * 3, [0.9, 0.96, 0.97]]) == 2
    assert fastest([[1.0, 0.8, 0.8], [0.7, 0.75, 0.79]]) == 1
    assert fastest([[1.0, 0.8, 0.7], [0.7, 0.7, 0.8]]) == 1
    assert fastest([[1.0, 1.0, 1.0, 0.8, 0.8], [0.7, 0.7, 0.9, 0.9, 0.9]]) == 0, "not clearly"
    assert fastest([[1.0, 1.0, 1.0, 0.8, 1.0], [0.7, 0.7, 0.9, 0.9, 0.9]]) == 1
    assert fastest([[2.0] * 3]) == 0
    assert fastest([[math.inf] * 3, [9.0] * 3]) == 1


def test_ranges_of_tokens() -> None:
    tokens = (1, 32, 33, 512, 513, 1024, 1025, 4096)
    assert [measured_tokens(each) for each in tokens] == [32, 32, 64, 512, 576, 1024, 1280, 4096]
