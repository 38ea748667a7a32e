"""The benchmark's figures: interleaved times, bytes by hand, and no speed without a correctness check."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import random_plan, save_tiny, tiny_model, tiny_plan

from teal import benchmark as module
from teal.benchmark import Benchmark, benchmark, bytes_per_token, check_products, read_bandwidth
from teal.engine.load import load_engine
from teal.engine.model import DecoderModel
from teal.errors import TealError, UsageError
from teal.ops import native
from teal.sparse_model import set_sparsity, sparsify
from teal.structure import identify

PROMPT = [0, 5, 6, 7]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model"))


@pytest.fixture
def engine(directory: Path) -> DecoderModel:
    return load_engine(directory)


@pytest.fixture(autouse=True)
def _small_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "READ_BYTES", 1 << 16)


def run(engine: DecoderModel, levels: tuple[float, ...] = (0.25, 0.5), **options: Any) -> Benchmark:
    return benchmark(engine, tiny_plan(tiny_model()), levels, PROMPT, **{"new_tokens": 8, "repeats": 2, **options})


class TestFigures:
    def test_dense_comes_first_and_every_level_once(self, engine: DecoderModel) -> None:
        assert [speed.level for speed in run(engine, (0.5, 0.0, 0.25, 0.5)).speeds] == [0.0, 0.5, 0.25]

    def test_sparsity_is_realised_and_dense_reads_everything(self, engine: DecoderModel) -> None:
        dense, low, high = run(engine).speeds
        assert dense.sparsity == 0
        assert 0.05 < low.sparsity < high.sparsity < 0.8
        assert dense.bytes_needed == dense.bytes_read
        assert high.bytes_needed < low.bytes_needed < dense.bytes_needed

    def test_medians_and_spread(self, engine: DecoderModel, monkeypatch: pytest.MonkeyPatch) -> None:
        """Dense and sparse take turns; the first decode of each level is not timed."""
        seconds = iter([9.0, 9.0, 1.0, 0.5, 4.0, 1.0, 2.0, 2.0])
        bandwidths = iter([1e9, 3e9, 1e9, 2e9])
        monkeypatch.setattr(module, "_decode_seconds", lambda *_: next(seconds))
        monkeypatch.setattr(module, "read_bandwidth", lambda _: next(bandwidths))
        result = run(engine, (0.5,), new_tokens=5, repeats=3)
        dense, sparse = result.speeds
        assert (dense.tokens_per_second, dense.slowest, dense.fastest) == (2.0, 1.0, 4.0)
        assert (sparse.tokens_per_second, sparse.slowest, sparse.fastest) == (4.0, 2.0, 8.0)
        assert (dense.speedup, dense.speedup_slowest, dense.speedup_fastest) == (1.0, 1.0, 1.0)
        assert (sparse.speedup, sparse.speedup_slowest, sparse.speedup_fastest) == (2.0, 1.0, 4.0)
        assert result.bandwidth == 2e9
        assert sparse.bandwidth_share == pytest.approx(sparse.bytes_read * 4.0 / 2e9)

    def test_what_is_recorded(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("TEAL_LAYOUT", "row_major")
        engine = load_engine(directory)
        details = run(engine, name="tiny").details
        assert details["model"] == "tiny"
        assert (details["prompt_tokens"], details["new_tokens"], details["repeats"]) == (4, 8, 2)
        assert (details["dtype"], details["device"], details["layout"]) == ("float32", "cpu", "row_major")
        assert details["largest_relative_error"] <= details["tolerance"] == 1e-5

    def test_round_trip(self, engine: DecoderModel) -> None:
        result = run(engine)
        assert Benchmark.from_json(json.loads(json.dumps(result.to_json(), allow_nan=False)), "here") == result

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"version": 99}, "here has version 99, this teal reads up to 1"),
            ({"format": "teal.plan"}, "here has format 'teal.plan', expected 'teal.benchmark'"),
            ({"extra": 1}, r"here has unknown keys \['extra'\]"),
            ({"speeds": [{"level": 0}]}, "here is damaged"),
        ],
    )
    def test_damaged(self, engine: DecoderModel, change: dict[str, Any], message: str) -> None:
        with pytest.raises(TealError, match=message):
            Benchmark.from_json(run(engine).to_json() | change, "here")


class TestBytes:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("tied", [False, True])
    def test_by_hand(self, tied: bool, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("TEAL_LAYOUT", "row_major")
        engine = load_engine(save_tiny(tmp_path, tie_word_embeddings=tied, dtype=dtype))
        block = 32 * 32 + 2 * 16 * 32 + 32 * 32 + 3 * 32 * 56
        fixed = 258 * 32 + 5 * 32 + 2 * 2 * 2 * 8 * 10  # LM head, norms, keys and values of 10 positions
        for sparsity in (0.0, 0.5):
            needed, read = bytes_per_token(engine, sparsity, 10)
            assert needed == pytest.approx(dtype.itemsize * (2 * block * (1 - sparsity) + fixed), abs=1)
            assert read == dtype.itemsize * (2 * block + fixed)

    def test_a_layout_that_skips_channels_reads_what_is_needed(
        self, directory: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("TEAL_LAYOUT", "channel_major")
        result = run(load_engine(directory))
        assert result.details["layout"] == "channel_major"
        assert all(speed.bytes_read == speed.bytes_needed for speed in result.speeds)

    def test_the_cpu_layouts_skip_channels_through_the_native_library_only(
        self, directory: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("TEAL_LAYOUT", "cpu")
        engine = load_engine(directory)
        needed, read = bytes_per_token(engine, 0.5, 10)
        assert (read == needed) == native.available()
        monkeypatch.setattr(native, "library", lambda: None)
        assert bytes_per_token(engine, 0.5, 10)[1] > needed


class TestCorrectness:
    @pytest.mark.parametrize("layout", ["row_major", "channel_major"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_right_products(
        self, layout: str, dtype: torch.dtype, directory: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("TEAL_LAYOUT", layout)
        engine = load_engine(directory, dtype)
        sparsify(engine, random_plan(identify(engine), vectors=True), 0.5)
        assert check_products(engine) <= module.TOLERANCE[dtype]

    @pytest.mark.parametrize(
        "wrong", [lambda y: y * 1.001, lambda y: y * float("nan"), lambda y: torch.zeros_like(y)],
        ids=["inaccurate", "nan", "zero"],
    )  # fmt: skip
    def test_wrong_products_give_no_figure(
        self, wrong: Any, engine: DecoderModel, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        product = module.sparse_gemv
        monkeypatch.setattr(module, "sparse_gemv", lambda *arguments: wrong(product(*arguments)))
        with pytest.raises(TealError, match=r"block 0 .*q_proj differs from the reference by"):
            run(engine)

    def test_all_levels_are_checked(self, engine: DecoderModel, monkeypatch: pytest.MonkeyPatch) -> None:
        product = module.sparse_gemv

        def wrong_when_sparse(x: Any, weight: Any, threshold: Any, bias: Any) -> Any:
            return product(x, weight, threshold, bias) + (threshold > 0)

        monkeypatch.setattr(module, "sparse_gemv", wrong_when_sparse)
        with pytest.raises(TealError, match="differs from the reference"):
            run(engine)


class TestRefused:
    @pytest.mark.parametrize(("new_tokens", "repeats"), [(1, 1), (2, 0)])
    def test_nothing_to_time(self, engine: DecoderModel, new_tokens: int, repeats: int) -> None:
        with pytest.raises(UsageError, match=f"1 repeat are the least, got {new_tokens} and {repeats}"):
            run(engine, new_tokens=new_tokens, repeats=repeats)

    def test_more_tokens_than_the_context(self, engine: DecoderModel) -> None:
        with pytest.raises(TealError, match="context must be between 1 and the engine's 64, got 84"):
            run(engine, new_tokens=80)

    def test_a_level_outside_the_plan(self, engine: DecoderModel) -> None:
        with pytest.raises(TealError, match=r"the plan covers sparsity 0\.0 to 0\.75, got 0\.9"):
            run(engine, (0.9,))

    def test_a_plan_of_other_weights(self, engine: DecoderModel) -> None:
        plan = tiny_plan(tiny_model(seed=1))
        with pytest.warns(UserWarning, match="may not belong to this model") as warned:
            benchmark(engine, plan, (0.5,), PROMPT, new_tokens=2, repeats=1)
        assert len(warned) == 1
        with pytest.raises(TealError, match="may not belong to this model"):
            benchmark(engine, plan, (0.5,), PROMPT, new_tokens=2, repeats=1, strict=True)


def test_bandwidth_counts_the_bytes_of_the_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([10.0, 12.0])
    monkeypatch.setattr(module.time, "perf_counter", lambda: next(ticks))
    assert read_bandwidth(torch.ones(1000, dtype=torch.float64)) == 4000.0


def test_levels_turn_without_rebuilding(engine: DecoderModel) -> None:
    sparsify(engine, tiny_plan(tiny_model()), 0.5)
    layers = {name: id(layer) for name, layer in engine.named_modules()}
    run(engine)
    assert {name: id(layer) for name, layer in engine.named_modules()} == layers
    set_sparsity(engine, 0.0)
