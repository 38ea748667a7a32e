"""SparseLinear as a module: its state dict, its buffers, its switch between dense and sparse."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from teal.errors import TealError
from teal.linear import SparseLinear, sparse_from, sparse_layers
from teal.ops import reference
from teal.ops.layouts import LAYOUTS

X = torch.randn(2, 1, 6, generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=list(LAYOUTS))
def layout(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("TEAL_LAYOUT", request.param)
    return request.param


def make(bias: bool = True, threshold: float | Tensor | None = 0.5) -> tuple[nn.Linear, SparseLinear]:
    linear = nn.Linear(6, 4, bias=bias)
    sparse = SparseLinear(linear.weight, linear.bias)
    if threshold is not None:
        sparse.set_threshold(threshold)
    return linear, sparse


@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
class TestForward:
    def test_a_new_layer_is_dense(self, layout: str, bias: bool) -> None:
        linear, sparse = make(bias, None)
        torch.testing.assert_close(sparse(X), linear(X))

    def test_one_token_is_sparse(self, layout: str, bias: bool) -> None:
        linear, sparse = make(bias)
        expected = reference.sparse_linear(X, linear.weight, torch.tensor(0.5), linear.bias)
        torch.testing.assert_close(sparse(X), expected)
        assert not torch.allclose(sparse(X), linear(X))

    def test_prompts_are_dense(self, layout: str, bias: bool) -> None:
        linear, sparse = make(bias)
        prompt = torch.randn(2, 5, 6)
        torch.testing.assert_close(sparse(prompt), linear(prompt))

    def test_compensation_on_sparse_tokens(self, layout: str, bias: bool) -> None:
        _, sparse = make(bias)
        before, prompt = sparse(X), torch.randn(1, 3, 6)
        dense = sparse(prompt)
        sparse.set_threshold(0.5, torch.full((4,), 0.25))
        torch.testing.assert_close(sparse(X), before + 0.25)
        assert torch.equal(sparse(prompt), dense)
        sparse.set_threshold(0.5)
        assert torch.equal(sparse(X), before)


class TestStateDict:
    def test_is_that_of_the_linear(self, layout: str) -> None:
        linear, sparse = make()
        mine, theirs = sparse.state_dict(), linear.state_dict()
        assert list(mine) == list(theirs)
        assert all(torch.equal(mine[name], theirs[name]) for name in theirs)

    def test_loads_in_place_what_a_linear_saved(self, layout: str) -> None:
        (_, sparse), (other, _) = make(), make()
        pointers = [parameter.data_ptr() for parameter in sparse.parameters()]
        assert not sparse.load_state_dict(other.state_dict()).missing_keys
        assert torch.equal(sparse.weight, other.weight)
        assert torch.equal(sparse.bias, other.bias)
        assert pointers == [parameter.data_ptr() for parameter in sparse.parameters()]

    def test_does_not_take_over_the_tensors_it_loads(self, layout: str) -> None:
        _, sparse = make()
        state = {"weight": torch.ones(4, 6), "bias": torch.zeros(4)}
        sparse.load_state_dict(state)
        state["weight"].zero_()
        assert torch.equal(sparse.weight, torch.ones(4, 6))

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            pytest.param({"weight": None}, 'Missing key.*"0.weight"', id="no-weight"),
            pytest.param({"bias": None}, 'Missing key.*"0.bias"', id="no-bias"),
            pytest.param({"weight": torch.ones(6, 4)}, r"0.weight: \(6, 4\) does not fit \(4, 6\)", id="weight"),
            pytest.param({"bias": torch.ones(1)}, r"0.bias: \(1,\) does not fit \(4,\)", id="bias"),
            pytest.param({"threshold": torch.ones(())}, 'Unexpected key.*"0.threshold"', id="unexpected"),
        ],
    )
    def test_bad_state(self, layout: str, change: dict[str, Tensor | None], message: str) -> None:
        linear, sparse = make()
        state = {key: value for key, value in (linear.state_dict() | change).items() if value is not None}
        with pytest.raises(RuntimeError, match=message):
            nn.Sequential(sparse).load_state_dict({f"0.{key}": value for key, value in state.items()})


class TestThreshold:
    def test_changes_in_place(self) -> None:
        _, sparse = make()
        sparse.set_threshold(0.1, torch.zeros(4))
        buffers = (sparse.threshold, sparse.sparse_bias)
        sparse.set_threshold(0.2, torch.ones(4))
        assert (sparse.threshold, sparse.sparse_bias) == buffers  # the same objects
        assert buffers[0].item() == pytest.approx(0.2)

    @pytest.mark.parametrize("kind", ["threshold", "compensation"])
    def test_never_writes_into_the_callers_tensor(self, kind: str) -> None:
        _, sparse = make()
        given = torch.full((6,), 0.5) if kind == "threshold" else torch.full((4,), 0.5)
        for value in (given, torch.zeros_like(given)):
            sparse.set_threshold(*((value,) if kind == "threshold" else (0.5, value)))
        assert (given == 0.5).all()

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            pytest.param((float("nan"),), "threshold is NaN", id="nan"),
            pytest.param((torch.zeros(4),), r"1 or 6 values, got \(4,\)", id="other-length"),
            pytest.param((torch.zeros(1, 6),), r"got \(1, 6\)", id="matrix"),
            pytest.param((0.5, torch.zeros(6)), r"compensation must have 4 values, got \(6,\)", id="compensation"),
        ],
    )
    def test_bad_threshold(self, arguments: tuple[Any, ...], message: str) -> None:
        _, sparse = make()
        with pytest.raises(TealError, match=message):
            sparse.set_threshold(*arguments)
        assert sparse.threshold.item() == 0.5

    def test_keeps_its_object_and_bits_through_casts(self) -> None:
        _, sparse = make(threshold=0.1)
        sparse.set_threshold(0.1, torch.ones(4))
        threshold = sparse.threshold
        sparse.bfloat16().float()
        assert sparse.threshold is threshold
        assert sparse.sparse_bias is not None
        assert sparse.sparse_bias.dtype == torch.float32


def test_takes_no_gradients_and_trains_nothing() -> None:
    _, sparse = make()
    assert not any(parameter.requires_grad for parameter in sparse.parameters())


def test_copies_are_independent() -> None:
    _, sparse = make()
    clone = copy.deepcopy(sparse)
    clone.set_threshold(0.1)
    assert sparse.threshold.item() == 0.5
    assert torch.equal(clone.weight, sparse.weight)


def test_describes_itself(layout: str) -> None:
    _, sparse = make()
    assert repr(sparse) == f"SparseLinear(in_features=6, out_features=4, bias=True, layout={layout})"


class TestSparseFrom:
    def test_prompts_become_sparse_from_a_position_on(self) -> None:
        _, sparse = make()
        model, x = nn.Sequential(sparse), torch.randn(2, 5, 6)
        with sparse_from(model, 2):
            y = model(x)
        expected = reference.sparse_linear(x, sparse.weight, torch.tensor(0.5), sparse.bias, dense_tokens=2)
        torch.testing.assert_close(y, expected)

    def test_is_undone_also_after_an_error(self) -> None:
        _, sparse = make()

        def fail() -> None:
            with sparse_from(nn.Sequential(sparse), 2):
                raise ValueError

        with pytest.raises(ValueError):  # noqa: PT011
            fail()
        assert sparse.dense_tokens == -1

    def test_needs_a_sparse_model(self) -> None:
        with pytest.raises(TealError, match=r"no sparse projections; call teal\.sparsify"):
            sparse_layers(nn.Sequential(nn.Linear(6, 4)))
