"""The native decode step: the reference's result, the same bits on any number of threads, and when it steps aside."""

import pytest
import torch
from engine_models import VARIANTS, random_model
from helpers import random_tokens, tiny_plan

from teal.engine import load_engine
from teal.engine.cpu_step import CpuDecodeStep
from teal.engine.decode_step import reference_decode_step
from teal.linear import always_dense
from teal.ops import native
from teal.sparse_model import set_sparsity

pytestmark = pytest.mark.skipif(not native.available(), reason=native.describe())
PROMPT = 9


def logits(engine, rows=1, steps=3):
    """Logits [rows, steps, V] of decoding random tokens after a random prompt."""
    ids, cache = random_tokens(rows=rows, length=PROMPT + steps), engine.new_cache(batch=rows)
    engine.prefill(ids[:, :PROMPT], cache)
    position = torch.full((rows,), PROMPT)
    return torch.stack([engine.decode(ids[:, PROMPT + step], position + step, cache) for step in range(steps)], dim=1)


def reference(engine, **options):
    step, engine.decode_step = engine.decode_step, reference_decode_step
    try:
        return logits(engine, **options)
    finally:
        engine.decode_step = step


@pytest.mark.parametrize("rows", [1, 3, 8, 9])
@pytest.mark.parametrize("quantization", [None, "int8", "int4"])
@pytest.mark.parametrize("name", VARIANTS)
def test_logits_equal_the_reference(name, quantization, rows, checkpoint):
    engine = load_engine(
        checkpoint(name), plan=tiny_plan(random_model(name)), level=0.5, quantization=quantization,
        head_quantization=quantization,
    )  # fmt: skip
    assert isinstance(engine.decode_step, CpuDecodeStep)
    torch.testing.assert_close(logits(engine, rows), reference(engine, rows=rows), atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_is_close(dtype, checkpoint):
    engine = load_engine(checkpoint("llama-llama3-biases-untied"), dtype)
    expected = logits(load_engine(checkpoint("llama-llama3-biases-untied")))
    error = (logits(engine).float() - expected).norm() / expected.norm()
    assert error < 1.5 * (reference(engine).float() - expected).norm() / expected.norm() + 1e-3


def test_the_same_bits_on_any_number_of_threads(checkpoint):
    engine = load_engine(checkpoint("qwen3-wide-heads"), plan=tiny_plan(random_model("qwen3-wide-heads")))
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            cache = engine.new_cache()
            position = position_at(engine, 5)
            hidden = torch.ones(1, engine.config.hidden_size)
            results.append(engine.decode_step(engine.blocks, hidden, cache, position))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)


def position_at(engine, index):
    from teal.engine.decode_step import TokenPosition

    at = torch.tensor([index])
    return TokenPosition(at, engine.cos[at], engine.sin[at])


def test_follows_levels_thresholds_and_the_dense_baseline(checkpoint):
    model = random_model("llama-linear")
    engine = load_engine(checkpoint("llama-linear"), plan=tiny_plan(model), level=0.5)
    sparse = logits(engine)
    for layer in engine.blocks[0].mlp.children():
        layer.set_threshold(torch.rand(layer.in_features), torch.ones(layer.out_features))
    torch.testing.assert_close(logits(engine), reference(engine), atol=1e-4, rtol=1e-4)
    set_sparsity(engine, 0.5)
    assert torch.equal(logits(engine), sparse)
    with always_dense(engine):
        dense = logits(engine)
    set_sparsity(engine, 0.0)
    assert torch.equal(logits(engine), dense)
    assert not torch.equal(dense, sparse)


def test_observers_see_every_input(checkpoint):
    engine, seen = load_engine(checkpoint("llama-linear")), []
    engine.blocks[1].mlp.down_proj.observer = lambda x: seen.append(x.shape)
    logits(engine, steps=2)
    assert seen == [(1, 56)] * 2


def test_seconds_of_each_phase(checkpoint):
    engine = load_engine(checkpoint("llama-linear"))
    assert isinstance(engine.decode_step, CpuDecodeStep)
    engine.decode_step.measure_phases()
    logits(engine)
    phases = engine.decode_step.phases()
    assert {"q k v", "attention", "gate up", "down"} <= set(phases)
    assert all(seconds > 0 for seconds in phases.values())


def test_nan_spreads_and_does_not_crash(checkpoint):
    engine = load_engine(checkpoint("llama-linear"))
    hidden = torch.full((1, engine.config.hidden_size), float("nan"))
    out = engine.decode_step(engine.blocks, hidden, engine.new_cache(), position_at(engine, 5))
    assert out.isnan().all()
