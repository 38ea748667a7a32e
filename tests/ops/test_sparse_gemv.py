"""The public ops on every layout against the definition in ops.reference."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from teal.errors import TealError
from teal.ops import native, reference
from teal.ops.layouts import LAYOUTS, restore, triton_serves
from teal.ops.packed import MAX_SPARSE_ROWS, PackedWeight
from teal.ops.sparse_gemv import QUANTIZATIONS, pack, sparse_gemv, sparse_linear

TOLERANCE = {  # of a sum over a few hundred products of unit normals
    torch.float32: {"rtol": 1e-5, "atol": 1e-4},
    torch.bfloat16: {"rtol": 2e-2, "atol": 8e-2},
    torch.float16: {"rtol": 3e-3, "atol": 1e-2},
}
DTYPES = [pytest.param(dtype, id=str(dtype).removeprefix("torch.")) for dtype in TOLERANCE]
SHAPES = [
    pytest.param(shape, id="x".join(map(str, shape)))
    for shape in [(1, 1), (1, 130), (130, 1), (3, 5), (64, 64), (127, 257), (256, 96)]
]
# Those that hold CPU tensors; the others have tests of their own.
ON_CPU = [name for name, kind in LAYOUTS.items() if not kind.refusal(torch.ones(8, 8))]
EXACT = [name for name in ON_CPU if name not in QUANTIZATIONS.values()]
layouts = pytest.mark.parametrize("layout", ON_CPU)


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def packed(layout: str, n: int, k: int, dtype: torch.dtype = torch.float32) -> PackedWeight:
    return LAYOUTS[layout].pack(normal(n, k, dtype=dtype, seed=1))


def threshold_at(x: Tensor, sparsity: float) -> Tensor:
    """A threshold that is one of the values of |x|, a tie, or -1 at sparsity 0."""
    values = x.abs().float().flatten().sort().values
    return torch.tensor(-1.0) if sparsity == 0 else values[min(int(sparsity * len(values)), len(values) - 1)]


def check(x: Tensor, weight: PackedWeight, threshold: Tensor, bias: Tensor | None = None) -> None:
    actual = sparse_gemv(x, weight, threshold, bias)
    expected = reference.sparse_gemv(x, weight.unpack(), threshold, bias)
    torch.testing.assert_close(actual, expected, equal_nan=True, **TOLERANCE[x.dtype])


@layouts
class TestSparseGemv:
    @pytest.mark.parametrize("sparsity", [0.0, 0.4, 0.99, 1.0])
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("shape", SHAPES)
    def test_shapes_dtypes_sparsities(
        self, layout: str, shape: tuple[int, int], dtype: torch.dtype, sparsity: float
    ) -> None:
        n, k = shape
        x = normal(1, k, dtype=dtype)
        check(x, packed(layout, n, k, dtype), threshold_at(x, sparsity), normal(n, dtype=dtype, seed=2))

    @pytest.mark.parametrize("rows", [0, 1, 2, MAX_SPARSE_ROWS, MAX_SPARSE_ROWS + 1, 33])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_rows(self, layout: str, dtype: torch.dtype, rows: int) -> None:
        x = normal(rows, 70, dtype=dtype)
        y = sparse_gemv(x, packed(layout, 45, 70, dtype), torch.tensor(0.6))
        assert y.shape == (rows, 45)
        assert y.dtype == dtype
        check(x, packed(layout, 45, 70, dtype), torch.tensor(0.6))

    @pytest.mark.parametrize("with_bias", [False, True], ids=["no-bias", "bias"])
    def test_threshold_per_channel(self, layout: str, with_bias: bool) -> None:
        threshold = normal(70, seed=3).abs()
        threshold[::7], threshold[1::7] = -1.0, float("inf")
        check(normal(3, 70), packed(layout, 45, 70), threshold, normal(45, seed=2) if with_bias else None)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("rows", [1, 3, MAX_SPARSE_ROWS + 1])
    def test_the_bias_is_added_before_rounding(self, layout: str, rows: int, dtype: torch.dtype) -> None:
        """Sums of small integers and eighths are exact in float32: rounded once, every layout gives the same bits."""
        if layout not in EXACT:
            pytest.skip("rounds its weights")
        generator = torch.Generator().manual_seed(0)
        weight, x = (torch.randint(-9, 10, size, generator=generator).to(dtype) for size in [(45, 70), (rows, 70)])
        bias = (torch.randint(-99, 99, (45,), generator=generator) / 8).to(dtype)
        kept = LAYOUTS[layout].pack(weight)
        expected = reference.sparse_gemv(x, weight, torch.tensor(1.5), bias)
        assert torch.equal(sparse_gemv(x, kept, torch.tensor(1.5), bias), expected)
        dense = reference.sparse_gemv(x, weight, torch.tensor(-1.0), bias)
        assert torch.equal(kept.dense_gemm(x, bias), dense)

    def test_ties_are_dropped(self, layout: str) -> None:
        x = torch.tensor([[0.5, -0.5, 0.5000001, 1.0]])
        weight = LAYOUTS[layout].pack(torch.eye(4))
        y = sparse_gemv(x, weight, torch.tensor(0.5))
        assert y[0, :2].tolist() == [0.0, 0.0]
        torch.testing.assert_close(y[0, 2:], x[0, 2:], rtol=0.01, atol=0)

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
    def test_not_finite_inputs_propagate_in_their_row_only(self, layout: str, value: float) -> None:
        x = normal(3, 20)
        x[1, 4] = value
        weight = packed(layout, 6, 20)
        check(x, weight, torch.tensor(0.5))
        y = sparse_gemv(x, weight, torch.tensor(0.5))
        assert not y[1].isfinite().any()
        assert y[[0, 2]].isfinite().all()

    @pytest.mark.parametrize(
        "view",
        [
            pytest.param(lambda: normal(20, 3).t(), id="transposed"),
            pytest.param(lambda: normal(3, 40)[:, ::2], id="every-second-channel"),
            pytest.param(lambda: normal(6, 20)[::2], id="every-second-row"),
            pytest.param(lambda: normal(1, 20).expand(3, 20), id="expanded"),
        ],
    )
    def test_input_that_is_not_contiguous(self, layout: str, view: Any) -> None:
        check(view(), packed(layout, 6, 20), torch.tensor(0.5))

    def test_weight_that_is_not_contiguous(self, layout: str) -> None:
        weight = normal(20, 6).t()
        kept = LAYOUTS[layout].pack(weight)
        assert torch.equal(kept.unpack(), LAYOUTS[layout].pack(weight.contiguous()).unpack())
        assert torch.equal(kept.rows(2), kept.unpack()[:2])
        check(normal(2, 20), kept, torch.tensor(0.5))

    def test_same_bits_every_run(self, layout: str) -> None:
        x, weight = normal(4, 257), packed(layout, 127, 257)
        runs = [sparse_gemv(x, weight, torch.tensor(0.5)) for _ in range(3)]
        assert all(torch.equal(run, runs[0]) for run in runs)

    @settings(max_examples=40, deadline=None)
    @given(data=st.data())
    def test_any_shape_and_threshold(self, layout: str, data: st.DataObject) -> None:
        rows, n, k = (data.draw(st.integers(low, 40), label=name) for name, low in [("R", 0), ("N", 1), ("K", 1)])
        dtype = data.draw(st.sampled_from(list(TOLERANCE)), label="dtype")
        value = data.draw(st.sampled_from([-1.0, 0.0, 0.3, 1.0, 9.0]), label="threshold")
        threshold = torch.full((k,) if data.draw(st.booleans(), label="per channel") else (), value)
        check(normal(rows, k, dtype=dtype), packed(layout, n, k, dtype), threshold)

    def test_opcheck(self, layout: str) -> None:
        weight = packed(layout, 6, 20)
        for bias in (None, normal(6)):
            arguments = (normal(2, 20), list(weight.storage), layout, torch.tensor(0.5), bias)
            torch.library.opcheck(torch.ops.teal.sparse_gemv.default, arguments)


@layouts
class TestSparseLinear:
    @pytest.mark.parametrize("dense_tokens", [-1, 0, 2, 4, 9])
    @pytest.mark.parametrize("tokens", [0, 1, 4], ids=lambda count: f"{count}-tokens")
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_against_the_reference(self, layout: str, dtype: torch.dtype, tokens: int, dense_tokens: int) -> None:
        x, weight = normal(3, tokens, 30, dtype=dtype), packed(layout, 11, 30, dtype)
        biases = (normal(11, dtype=dtype, seed=2), normal(11, dtype=dtype, seed=3))
        actual = sparse_linear(x, weight, torch.tensor(0.6), *biases, dense_tokens)
        expected = reference.sparse_linear(x, weight.unpack(), torch.tensor(0.6), *biases, dense_tokens)
        torch.testing.assert_close(actual, expected, **TOLERANCE[dtype])

    def test_a_vector_is_one_token(self, layout: str) -> None:
        x, weight = normal(30), packed(layout, 11, 30)
        y = sparse_linear(x, weight, torch.tensor(0.6))
        assert torch.equal(y, sparse_gemv(x[None], weight, torch.tensor(0.6))[0])

    def test_opcheck(self, layout: str) -> None:
        weight = packed(layout, 6, 20)
        for x, dense_tokens in ((normal(2, 1, 20), -1), (normal(2, 5, 20), 2)):
            arguments = (x, list(weight.storage), layout, torch.tensor(0.5), normal(6), None, dense_tokens)
            torch.library.opcheck(torch.ops.teal.sparse_linear.default, arguments)


@pytest.mark.parametrize("op", [sparse_gemv, sparse_linear], ids=["sparse_gemv", "sparse_linear"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"x": normal(2, 19)}, r"\(2, 19\) does not fit a weight of 6 x 20", id="other-K"),
        pytest.param({"x": torch.tensor(1.0)}, r"\(\) does not fit", id="scalar-x"),
        pytest.param({"x": normal(2, 20).half()}, "input is torch.float16, the weight torch.float32", id="dtype"),
        pytest.param({"threshold": torch.zeros(19)}, r"got torch.float32 \(19,\)", id="threshold-shape"),
        pytest.param({"threshold": torch.zeros(1, 20)}, r"got torch.float32 \(1, 20\)", id="threshold-rank"),
        pytest.param({"threshold": torch.zeros((), dtype=torch.float64)}, "got torch.float64", id="threshold-dtype"),
        pytest.param({"bias": normal(7)}, r"bias must be torch.float32 of shape \[6\], got .* \(7,\)", id="bias"),
        pytest.param({"bias": normal(6).half()}, "bias must be torch.float32 .* got torch.float16", id="bias-dtype"),
    ],
)
def test_bad_input(op: Any, changes: dict[str, Tensor], message: str) -> None:
    arguments = {"x": normal(2, 20), "weight": packed("row_major", 6, 20), "threshold": torch.tensor(0.5)}
    with pytest.raises(TealError, match=message):
        op(**(arguments | changes))


def test_sparse_gemv_takes_rows() -> None:
    with pytest.raises(TealError, match=r"input must be \[R, K\], got \(1, 2, 20\)"):
        sparse_gemv(normal(1, 2, 20), packed("row_major", 6, 20), torch.tensor(0.5))


def test_bad_compensation() -> None:
    weight = packed("row_major", 6, 20)
    with pytest.raises(TealError, match=r"bias must be torch.float32 of shape \[6\]"):
        sparse_linear(normal(1, 20), weight, torch.tensor(0.5), None, normal(7))


needs_triton = pytest.mark.skipif("triton" not in LAYOUTS, reason="Triton is not installed")


class TestPack:
    def test_default_layout_shares_the_checkpoints_memory(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("TEAL_LAYOUT", raising=False)
        monkeypatch.setattr(native, "available", lambda: False)
        weight = normal(6, 20)
        assert pack(weight).unpack().data_ptr() == weight.data_ptr()

    @pytest.mark.parametrize("layout", EXACT)
    def test_layout_by_environment(self, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("TEAL_LAYOUT", layout)
        weight = normal(6, 20)
        result = pack(weight)
        assert result.layout == layout
        assert result.shape == (result.out_features, result.in_features) == (6, 20)
        assert result.bytes_read() == result.in_features * (64 if layout == "cpu" else 6 * 4)  # which reads whole lines
        assert torch.equal(restore(result.storage, layout).unpack(), weight)

    @pytest.mark.parametrize(
        "weight",
        [
            pytest.param(normal(6), id="vector"),
            pytest.param(normal(0, 6), id="no-rows"),
            pytest.param(normal(6, 0), id="no-columns"),
            pytest.param(torch.ones(6, 6, dtype=torch.int8), id="integers"),
        ],
    )
    def test_bad_weight(self, weight: Tensor) -> None:
        with pytest.raises(TealError, match=r"must be a floating-point matrix \[N, K\]"):
            pack(weight)

    @needs_triton
    def test_triton_serves_gpus_where_the_cuda_kernels_do_not(self, monkeypatch: pytest.MonkeyPatch) -> None:
        weight = normal(6, 20)
        assert pack(weight).layout != "triton"
        monkeypatch.setattr("teal.ops.sparse_gemv.triton_serves", lambda _: True)
        assert pack(weight).layout == "triton"

    def test_triton_serves_no_cpu(self) -> None:
        assert not triton_serves(normal(6, 20))

    def test_unknown_layout(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("TEAL_LAYOUT", "diagonal")
        with pytest.raises(TealError, match="'diagonal' is no layout; choose from row_major, channel_major"):
            pack(normal(6, 20))
