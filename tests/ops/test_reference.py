"""The definition itself: what is kept, what is dropped, which tokens are sparse."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from teal.ops.reference import drop_small, keep_mask, sparse_gemv, sparse_linear

NAN, INF = float("nan"), float("inf")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float32)


class TestKeepMask:
    X = torch.tensor([0.0, -0.0, 0.5, -0.5, 0.75, -1.0, NAN, INF, -INF])

    @pytest.mark.parametrize(
        ("threshold", "kept"),
        [
            pytest.param(-1.0, [1, 1, 1, 1, 1, 1, 1, 1, 1], id="negative-keeps-all"),
            pytest.param(0.0, [0, 0, 1, 1, 1, 1, 1, 1, 1], id="zero-drops-zeros"),
            pytest.param(0.5, [0, 0, 0, 0, 1, 1, 1, 1, 1], id="ties-are-dropped"),
            pytest.param(0.4999, [0, 0, 1, 1, 1, 1, 1, 1, 1], id="just-below-a-tie"),
            pytest.param(INF, [0, 0, 0, 0, 0, 0, 1, 0, 0], id="infinite-drops-all-but-nan"),
        ],
    )
    def test_scalar_threshold(self, threshold: float, kept: list[int]) -> None:
        assert keep_mask(self.X, scalar(threshold)).tolist() == [bool(value) for value in kept]

    def test_threshold_per_channel(self) -> None:
        x = torch.tensor([[1.0, 1.0, 1.0], [2.0, -2.0, NAN]])
        threshold = torch.tensor([1.0, 0.5, -1.0])
        assert keep_mask(x, threshold).tolist() == [[False, True, True], [True, True, True]]

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_compares_in_float32(self, dtype: torch.dtype) -> None:
        x = torch.tensor([0.1], dtype=dtype)
        exact = x.float().abs()
        assert not keep_mask(x, exact).any()
        assert keep_mask(x, torch.nextafter(exact, scalar(0))).all()

    @given(st.lists(st.floats(width=32), min_size=1, max_size=20), st.floats(-1, 10, width=32))
    def test_drops_exactly_what_is_small(self, values: list[float], threshold: float) -> None:
        x = torch.tensor(values, dtype=torch.float32)
        dropped = drop_small(x, scalar(threshold))
        for value, left in zip(values, dropped.tolist(), strict=True):
            small = abs(value) <= threshold
            assert left == 0 if small else (left == value or value != value)


class TestSparseGemv:
    def test_small_example(self) -> None:
        weight = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
        x = torch.tensor([[0.1, -1.0, 0.5], [1.0, 0.2, 0.6]])
        y = sparse_gemv(x, weight, scalar(0.5), torch.tensor([10.0, 20.0]))
        torch.testing.assert_close(y, torch.tensor([[8.0, 15.0], [12.8, 27.6]]))

    def test_rows_do_not_see_each_other(self) -> None:
        x, weight = torch.randn(5, 7), torch.randn(3, 7)
        together = sparse_gemv(x, weight, scalar(0.5))
        apart = [sparse_gemv(x[row : row + 1], weight, scalar(0.5)) for row in range(5)]
        assert torch.equal(together, torch.cat(apart))

    def test_nan_and_infinity_propagate(self) -> None:
        y = sparse_gemv(torch.tensor([[NAN, 1.0], [INF, 1.0], [-INF, 1.0]]), torch.ones(1, 2), scalar(0.5))
        assert y[0].isnan()
        assert y[1:].flatten().tolist() == [INF, -INF]

    def test_everything_dropped_leaves_the_bias(self) -> None:
        y = sparse_gemv(torch.full((2, 4), 0.1), torch.randn(3, 4), scalar(1.0), torch.tensor([1.0, 2.0, 3.0]))
        assert y.tolist() == [[1.0, 2.0, 3.0]] * 2

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_no_rows(self, dtype: torch.dtype) -> None:
        y = sparse_gemv(torch.empty(0, 4, dtype=dtype), torch.randn(3, 4, dtype=dtype), scalar(0.5))
        assert y.shape == (0, 3)
        assert y.dtype == dtype

    def test_accumulates_in_float32(self) -> None:
        k = 4096  # a bfloat16 sum of ones stops growing at 256
        y = sparse_gemv(torch.ones(1, k, dtype=torch.bfloat16), torch.ones(1, k, dtype=torch.bfloat16), scalar(0.5))
        assert y.item() == k


class TestSparseLinear:
    """Which tokens of x [2, 5, 6] are sparse."""

    WEIGHT = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
    X = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(2))
    THRESHOLD = torch.tensor(0.7)

    def sparse(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return sparse_gemv(x.reshape(-1, 6), self.WEIGHT, self.THRESHOLD, bias).view(*x.shape[:-1], 4)

    def test_one_token_is_sparse(self) -> None:
        x = self.X[:, :1]
        assert torch.equal(sparse_linear(x, self.WEIGHT, self.THRESHOLD), self.sparse(x))

    def test_a_prompt_is_dense(self) -> None:
        y = sparse_linear(self.X, self.WEIGHT, self.THRESHOLD)
        assert torch.equal(y, self.X @ self.WEIGHT.t())

    @pytest.mark.parametrize("dense_tokens", [0, 2, 5, 9])
    def test_tokens_from_a_position_on_are_sparse(self, dense_tokens: int) -> None:
        y = sparse_linear(self.X, self.WEIGHT, self.THRESHOLD, dense_tokens=dense_tokens)
        dense, sparse = self.X[:, :dense_tokens], self.X[:, dense_tokens:]
        expected = torch.cat([dense @ self.WEIGHT.t(), self.sparse(sparse)], dim=1)
        torch.testing.assert_close(y, expected)

    def test_one_token_below_dense_tokens_is_dense(self) -> None:
        x = self.X[:, :1]
        y = sparse_linear(x, self.WEIGHT, self.THRESHOLD, dense_tokens=1)
        torch.testing.assert_close(y, x @ self.WEIGHT.t())

    @pytest.mark.parametrize("bias", [None, torch.arange(4.0)], ids=["no-bias", "bias"])
    def test_compensation_is_added_on_sparse_tokens_only(self, bias: Tensor | None) -> None:
        compensation = torch.full((4,), 0.5)
        y = sparse_linear(self.X, self.WEIGHT, self.THRESHOLD, bias, compensation, dense_tokens=2)
        plain = sparse_linear(self.X, self.WEIGHT, self.THRESHOLD, bias, dense_tokens=2)
        torch.testing.assert_close(y[:, :2], plain[:, :2])
        torch.testing.assert_close(y[:, 2:], plain[:, 2:] + 0.5)
