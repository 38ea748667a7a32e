"""bench --kernels: figures that add up, and none without a correctness check."""

import json
from typing import Any

import pytest
import torch
from helpers import tiny_model

from teal import kernel_benchmark as module
from teal.errors import TealError
from teal.kernel_benchmark import KernelBenchmark, benchmark_kernels, kernel_rule, kernel_table, projection_shapes
from teal.ops import native
from teal.ops.cpu import TiledWeight
from teal.structure import ModelStructure

needs_library = pytest.mark.skipif(not native.available(), reason=native.describe())


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "last_level_cache", lambda: 1 << 16)


def test_shapes_are_listed_once() -> None:
    shapes = projection_shapes(ModelStructure.of(tiny_model()))
    assert shapes == {
        "q_proj o_proj": (32, 32), "k_proj v_proj": (16, 32), "gate_proj up_proj": (56, 32), "down_proj": (32, 56),
    }  # fmt: skip


@needs_library
@pytest.mark.parametrize("quantization", [None, "int8", "int4"])
def test_figures(quantization: str | None) -> None:
    result = benchmark_kernels({"gate": (256, 96)}, [0.5], quantization=quantization, repeats=2)
    dense, sparse = result.speeds
    assert (dense.level, dense.sparsity, dense.over_dense) == (0.0, 0.0, 1.0)
    assert sparse.sparsity == pytest.approx(0.5, abs=0.03)
    assert sparse.bytes_read == pytest.approx(dense.bytes_read / 2, rel=0.05)
    assert result.bandwidth > 0
    payload = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert payload["details"]["weights"] == (quantization or "bfloat16")
    again = KernelBenchmark.from_json(payload, "here")
    assert json.loads(json.dumps(again.to_json())) == payload
    assert kernel_table(again) == kernel_table(result)
    columns, rows = kernel_table(result)
    assert all(len(row) == len(columns) for row in rows)
    assert "plain read" in kernel_rule(result)


@needs_library
def test_a_wrong_product_gives_no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    product = TiledWeight.sparse_gemv

    def wrong(self: TiledWeight, *arguments: Any) -> torch.Tensor:
        return product(self, *arguments) * 1.5

    monkeypatch.setattr(TiledWeight, "sparse_gemv", wrong)
    with pytest.raises(TealError, match="differs from the reference"):
        benchmark_kernels({"gate": (64, 96)}, [0.5])


def test_needs_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "library", lambda: None)
    with pytest.raises(TealError, match="no native CPU kernels to measure"):
        benchmark_kernels({"gate": (64, 96)}, [0.5])
