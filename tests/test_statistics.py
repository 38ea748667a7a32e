"""ActivationStatistics: exact counts and thresholds, merging, files."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from teal.artifacts import read_tensors, write_tensors
from teal.errors import TealError
from teal.statistics import BINS, ActivationStatistics, InputStatistics, upper_edge
from teal.structure import INPUTS, ModelIdentity

SHAPES = {
    "self_attn.qkv_proj": (8, 4),
    "self_attn.o_proj": (4, 5),
    "mlp.gate_up_proj": (12, 4),
    "mlp.down_proj": (4, 6),
}
IDENTITY = ModelIdentity("tiny", (SHAPES, SHAPES), "ab" * 32)


def counted(x: Tensor) -> InputStatistics:
    statistics = InputStatistics.empty(x.shape[-1])
    statistics.add(x)
    return statistics


def make(seed: int = 0, rows: int = 9, **changes: Any) -> ActivationStatistics:
    generator = torch.Generator().manual_seed(seed)
    blocks = [
        {name: counted(torch.randn(rows, k, generator=generator)) for name, k in IDENTITY.input_features(b).items()}
        for b in range(2)
    ]
    arguments: dict[str, Any] = {
        "identity": IDENTITY,
        "dense_tokens": 8,
        "blocks": blocks,
        "details": {"text": seed},
    }
    return ActivationStatistics(**(arguments | changes))


def assert_equal(one: ActivationStatistics, other: ActivationStatistics) -> None:
    for mine, theirs in zip(one.blocks, other.blocks, strict=True):
        assert list(mine) == list(theirs) == list(INPUTS)
        for name, entry in mine.items():
            assert torch.equal(entry.counts, theirs[name].counts)
            torch.testing.assert_close(entry.sum, theirs[name].sum)
            torch.testing.assert_close(entry.sum_of_squares, theirs[name].sum_of_squares)
            assert entry.tokens == theirs[name].tokens


def sorted_magnitudes(x: Tensor) -> list[float]:
    return sorted(x.abs().double().flatten().tolist())


LEVELS = [0.001, 0.1, 0.25, 1 / 3, 0.5, 0.65, 0.9, 0.999]


class TestThreshold:
    @pytest.mark.parametrize("sparsity", LEVELS)
    def test_is_exact_for_bf16(self, sparsity: float) -> None:
        x = torch.randn(63, 31).bfloat16()
        values, threshold = sorted_magnitudes(x), counted(x).threshold(sparsity)
        wanted = values[math.ceil(sparsity * len(values)) - 1]  # the smallest threshold that drops enough
        dropped = [value for value in values if value <= threshold]
        assert dropped == [value for value in values if value <= wanted]
        assert counted(x).sparsity(threshold) == pytest.approx(len(dropped) / len(values))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
    @pytest.mark.parametrize("sparsity", LEVELS)
    def test_is_within_a_bin_for_other_dtypes(self, sparsity: float, dtype: torch.dtype) -> None:
        x = torch.randn(63, 31).to(dtype)
        values, threshold = sorted_magnitudes(x), counted(x).threshold(sparsity)
        wanted = values[math.ceil(sparsity * len(values)) - 1]
        assert wanted <= threshold <= wanted * (1 + 2**-7)
        share = sum(value <= threshold for value in values) / len(values)
        assert share >= sparsity
        if dtype == torch.float32:
            assert counted(x).sparsity(threshold) == pytest.approx(share)

    @given(st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=30), st.floats(0.01, 0.99))
    def test_drops_at_least_the_share_and_the_fewest_that_do(self, values: list[float], sparsity: float) -> None:
        statistics = counted(torch.tensor([values]))
        threshold = statistics.threshold(sparsity)
        rounded = torch.tensor(values).bfloat16().abs().double()
        dropped = rounded[rounded <= threshold]
        assert len(dropped) >= sparsity * len(values) - 1e-6
        below_the_last_bin = (dropped < dropped.max()).sum()
        assert below_the_last_bin < sparsity * len(values)

    def test_zero_is_dense(self) -> None:
        assert counted(torch.zeros(3, 4)).threshold(0.0) == -1.0

    def test_zeros_alone_suffice(self) -> None:
        x = torch.tensor([[0.0, 0.0, 0.0, 1.0]])
        threshold = counted(x).threshold(0.5)
        assert 0 < threshold < 1e-38
        assert counted(x).sparsity(threshold) == 0.75

    def test_is_exact_beyond_what_float32_counts(self) -> None:
        statistics = InputStatistics.empty(1)
        statistics.counts[100], statistics.counts[200] = 2**30 + 1, 2**30
        assert statistics.threshold((2**30 + 1) / (2**31 + 1)) == upper_edge(100)
        assert statistics.threshold((2**30 + 2) / (2**31 + 1)) == upper_edge(200)

    def test_nothing_counted(self) -> None:
        with pytest.raises(TealError, match="no activations were counted; calibrate on more text"):
            InputStatistics.empty(4).threshold(0.5)

    @pytest.mark.parametrize("index", [0, 1, 0x3F80, 0x3F81, 0x7F7F])
    def test_upper_edge_is_the_last_float32_of_its_bin(self, index: int) -> None:
        edge = torch.tensor(upper_edge(index))
        above = torch.nextafter(edge, torch.tensor(float("inf")))
        bins = torch.stack([edge, above]).bfloat16().view(torch.int16)
        assert bins.tolist() == [index, index + 1]


class TestAdd:
    def test_counts_sums_and_tokens(self) -> None:
        statistics = counted(torch.tensor([[[1.0, -2.0], [-1.0, 0.5]]]))
        assert statistics.tokens == 2
        assert statistics.counts.sum() == 4
        assert statistics.counts[0x3F80] == 2
        assert statistics.sum.tolist() == [0.0, -1.5]
        assert statistics.sum_of_squares.tolist() == [2.0, 4.25]

    def test_input_that_is_not_contiguous(self) -> None:
        x = torch.randn(7, 10)
        assert torch.equal(counted(x.t()).counts, counted(x).counts)
        assert torch.equal(counted(x[:, ::2]).counts, counted(x[:, ::2].clone()).counts)

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 3.4e38], ids=str)
    def test_not_finite_is_refused_and_not_counted(self, value: float) -> None:
        x = torch.ones(3, 4)
        x[1, 2] = value
        statistics = InputStatistics.empty(4)
        with pytest.raises(TealError, match="1 of 12 activations are NaN or infinite"):
            statistics.add(x)
        assert statistics.tokens == statistics.counts.sum() == 0
        assert statistics.sum.tolist() == [0.0] * 4


class TestMerge:
    def test_equals_one_pass(self) -> None:
        x = {name: torch.randn(11, k) for name, k in IDENTITY.input_features(0).items()}

        def over(rows: slice) -> ActivationStatistics:
            return make(blocks=[{name: counted(values[rows]) for name, values in x.items()} for _ in range(2)])

        merged = over(slice(0, 4)).merge(over(slice(4, None)))
        assert_equal(merged, over(slice(None)))

    def test_keeps_what_went_in(self) -> None:
        merged = make(1).merge(make(2)).merge(make(3))
        assert merged.details == {"merged": [{"text": 1}, {"text": 2}, {"text": 3}]}
        assert merged.blocks[0]["mlp_input"].tokens == 27

    def test_leaves_its_parts_alone(self) -> None:
        one, other = make(1), make(2)
        one.merge(other)
        assert_equal(one, make(1))

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            pytest.param({"identity": ModelIdentity("tiny", (SHAPES,), "")}, "made for 1 blocks", id="blocks"),
            pytest.param({"identity": ModelIdentity("tiny", (SHAPES,) * 2, "cd")}, "different weights", id="weights"),
            pytest.param({"dense_tokens": 4}, "skip 8 and 4 dense tokens", id="dense-tokens"),
        ],
    )
    def test_of_what_does_not_belong_together(self, changes: dict[str, Any], message: str) -> None:
        with pytest.raises(TealError, match=message):
            make().merge(make(**changes))


class TestFiles:
    def test_round_trip(self, tmp_path: Path) -> None:
        statistics = make(details={"text": "wiki", "blocks": 3})
        statistics.save(tmp_path / "s.safetensors")
        loaded = ActivationStatistics.load(tmp_path / "s.safetensors")
        assert_equal(loaded, statistics)
        assert loaded.identity == IDENTITY
        assert (loaded.dense_tokens, loaded.details) == (8, {"text": "wiki", "blocks": 3})

    def test_size_does_not_grow_with_the_text(self, tmp_path: Path) -> None:
        for name, rows in (("short", 2), ("long", 200)):
            make(rows=rows, details={}).save(tmp_path / name)
        assert (tmp_path / "short").stat().st_size == (tmp_path / "long").stat().st_size

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            pytest.param({"format": "teal.plan"}, "format 'teal.plan', expected 'teal.statistics'", id="format"),
            pytest.param({"version": 2}, "version 2, this teal reads up to 1; upgrade", id="newer"),
            pytest.param({"samples": 1}, r"unknown keys \['samples'\]", id="unknown-key"),
            pytest.param({"dense_tokens": "some"}, "is damaged", id="dense-tokens"),
            pytest.param({"model": {}}, "does not describe its model", id="model"),
        ],
    )
    def test_bad_header(self, tmp_path: Path, change: dict[str, Any], message: str) -> None:
        path = tmp_path / "s.safetensors"
        make().save(path)
        tensors, header = read_tensors(path)
        write_tensors(path, tensors, header | change)
        with pytest.raises(TealError, match=message):
            ActivationStatistics.load(path)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            pytest.param({"1.mlp_input.sum": None}, "lacks tensor '1.mlp_input.sum'", id="missing"),
            pytest.param({"2.mlp_input.sum": torch.ones(4)}, "unknown tensors, e.g. 2.mlp_input.sum", id="unknown"),
            pytest.param({"odd": torch.ones(4)}, "unknown tensors, e.g. odd", id="unknown-name"),
            pytest.param({"1.mlp_input.sum": torch.ones(4) * torch.nan}, "block 1 mlp_input holds NaN", id="nan"),
            pytest.param({"1.mlp_input.sum": torch.ones(5)}, "has 5 channels, its model 4", id="channels"),
            pytest.param({"1.mlp_input.counts": torch.ones(9).long()}, "holds no histogram", id="short"),
            pytest.param({"1.mlp_input.counts": -torch.ones(BINS).long()}, "holds no histogram", id="negative"),
            pytest.param({"1.mlp_input.counts": torch.ones(BINS)}, "holds no histogram", id="float-counts"),
            pytest.param({"1.mlp_input.tokens": torch.ones(2)}, "is damaged", id="tokens"),
        ],
    )
    def test_bad_tensors(self, tmp_path: Path, change: dict[str, Tensor | None], message: str) -> None:
        path = tmp_path / "s.safetensors"
        make().save(path)
        tensors, header = read_tensors(path)
        write_tensors(path, {key: value for key, value in (tensors | change).items() if value is not None}, header)
        with pytest.raises(TealError, match=message):
            ActivationStatistics.load(path)

    def test_truncated(self, tmp_path: Path) -> None:
        path = tmp_path / "s.safetensors"
        make().save(path)
        path.write_bytes(path.read_bytes()[:-1])
        with pytest.raises(TealError, match="is truncated, corrupt or not safetensors"):
            ActivationStatistics.load(path)

    def test_safetensors_of_someone_else(self, tmp_path: Path) -> None:
        make().save(tmp_path / "s.safetensors")
        save_file(load_file(tmp_path / "s.safetensors"), tmp_path / "bare.safetensors")
        with pytest.raises(TealError, match=r"has format None, expected 'teal.statistics'"):
            ActivationStatistics.load(tmp_path / "bare.safetensors")
