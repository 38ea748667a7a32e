"""The benchmark: bytes counted by hand, realised sparsity, and a correctness check that can fail."""

import pytest
import torch
from helpers import random_tokens, save_tiny, tiny_model, tiny_plan

from teal.benchmark import Benchmark, benchmark, bytes_per_token, check_products, read_bandwidth
from teal.engine.load import load_engine
from teal.errors import TealError, UsageError
from teal.ops.packed import RowMajorWeight
from teal.report import speed_section
from teal.shapes import SHAPES, random_model, shape_config
from teal.sparsify import sparsify
from teal.structure import ModelStructure

PROMPT = random_tokens(length=8)[0].tolist()


@pytest.fixture
def engine(tmp_path):
    return load_engine(save_tiny(tmp_path))


@pytest.fixture
def plan():
    return tiny_plan(tiny_model())


def test_levels_are_measured_in_one_run_with_their_realised_sparsity(engine, plan):
    result = benchmark(engine, plan, [0.25, 0.5], PROMPT, new_tokens=6, repeats=3)
    assert [speed.level for speed in result.speeds] == [0.0, 0.25, 0.5]
    dense, quarter, half = result.speeds
    assert dense.sparsity == 0
    assert 0 < quarter.sparsity < half.sparsity < 1
    assert dense.speedup == 1
    for speed in result.speeds:
        assert 0 < speed.slowest <= speed.tokens_per_second <= speed.fastest
        assert speed.speedup_slowest <= speed.speedup <= speed.speedup_fastest
        assert speed.bandwidth_share == pytest.approx(
            speed.bytes_read * speed.tokens_per_second / result.bandwidth, rel=1e-6
        )
    assert result.details["largest_relative_error"] <= result.details["tolerance"]
    assert "LM head is dense" in speed_section(result)
    assert Benchmark.from_json(result.to_json(), "here") == result


def test_bytes_are_those_of_the_weights_that_a_token_needs(engine, plan, monkeypatch):
    sparsify(engine, plan, 0.5)
    structure = ModelStructure.of(engine)
    blocks = 4 * sum(projection.size for _, projection in structure.projections())
    norms = 4 * sum(p.numel() for name, p in engine.named_parameters() if "norm" in name)
    cache = 4 * 2 * 2 * (2 * 8) * 10  # float32, keys and values, blocks, heads x width, positions
    fixed = 4 * engine.lm_head.numel() + norms + cache
    needed, read = bytes_per_token(engine, 0.5, mean_position=10)
    assert needed == blocks // 2 + fixed
    assert read == blocks + fixed  # row-major weights are read whole
    monkeypatch.setattr(RowMajorWeight, "skips_channels", True)
    assert bytes_per_token(engine, 0.5, mean_position=10) == (needed, needed)


def test_a_wrong_product_stops_the_benchmark(engine, plan, monkeypatch):
    assert check_products(engine) < 1e-5
    right = RowMajorWeight.sparse_gemv
    monkeypatch.setattr(RowMajorWeight, "sparse_gemv", lambda self, *inputs: 1.01 * right(self, *inputs))
    with pytest.raises(TealError, match="differs from the reference"):
        benchmark(engine, plan, [0.5], PROMPT, new_tokens=4, repeats=1)


@pytest.mark.parametrize(("new_tokens", "repeats"), [(1, 3), (4, 0)])
def test_too_few_tokens_or_repeats(engine, plan, new_tokens, repeats):
    with pytest.raises(UsageError):
        benchmark(engine, plan, [0.5], PROMPT, new_tokens=new_tokens, repeats=repeats)


def test_bandwidth_is_a_positive_rate():
    assert read_bandwidth(torch.ones(1 << 18)) > 1e6


class TestShapes:
    @pytest.mark.parametrize("name", SHAPES)
    def test_a_shape_has_blocks_the_engine_knows(self, name):
        from transformers import AutoModelForCausalLM

        from teal.engine.config import EngineConfig

        config = shape_config(name)
        assert EngineConfig.of(config).blocks == config.num_hidden_layers
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        billions = sum(p.numel() for p in model.parameters()) / 1e9
        stated = float(name.rpartition("-")[2].removesuffix("b"))
        assert billions == pytest.approx(stated, rel=0.25)
        assert len(ModelStructure.of(model).blocks) == config.num_hidden_layers

    def test_random_weights_do_not_repeat_and_norms_are_one(self):
        config = tiny_model().config
        model = random_model(config, torch.float32)
        weight = model.model.layers[0].self_attn.q_proj.weight
        assert weight.std().item() == pytest.approx(0.02, rel=0.1)
        assert torch.equal(model.model.norm.weight, torch.ones(config.hidden_size))
        assert len(torch.unique(weight)) > 0.99 * weight.numel()
        logits = model(input_ids=random_tokens()).logits
        assert torch.isfinite(logits).all()

    def test_an_unknown_shape(self):
        with pytest.raises(UsageError, match=r"unknown shape 'llama-9b'; choose from llama-3.2-1b"):
            shape_config("llama-9b")
