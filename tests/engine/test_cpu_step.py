"""The native decode step: the reference's result, the same bits on any number of threads, and when it steps aside."""

import threading

import pytest
import torch
from engine_models import VARIANTS, random_model
from helpers import random_tokens, tiny_plan

from teal.engine import load_engine
from teal.engine.cache import BlockCache, KVCache
from teal.engine.cpu_step import CpuDecodeStep
from teal.engine.decode_step import TokenPosition, reference_decode_step
from teal.engine.generate import DecodeState, decode_tokens
from teal.errors import TealError
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


def test_threads_share_an_engine(checkpoint):
    engine = load_engine(checkpoint("llama-linear"), plan=tiny_plan(random_model("llama-linear")), level=0.5)
    prompts = ([1, 2, 3], [4, 5, 6, 7])

    def decode(prompt):
        return list(decode_tokens(engine, prompt, 40, ignore_eos=True, state=DecodeState.of(engine)))

    expected, results = [decode(prompt) for prompt in prompts], {}
    workers = [threading.Thread(target=lambda i=i: results.update({i: decode(prompts[i % 2])})) for i in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert results == {i: expected[i % 2] for i in range(8)}


@pytest.mark.parametrize("quantization", [None, "int8", "int4"])
@pytest.mark.parametrize("target", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_casts_of_an_engine(target, quantization, checkpoint):
    name = "llama-llama3-biases-untied"
    engine = load_engine(checkpoint(name), quantization=quantization)
    before = logits(engine)
    engine.to(target)
    assert isinstance(engine.decode_step, CpuDecodeStep) == (target in native.ACTIVATIONS)
    error, expected = (logits(engine) - before).norm(), (reference(engine) - before).norm()
    assert error < 1.5 * expected + 1e-3 * before.norm()
    engine.float()
    assert isinstance(engine.decode_step, CpuDecodeStep)
    if target == torch.float64:
        assert torch.equal(logits(engine), before)


def test_a_cast_of_a_part_of_an_engine(checkpoint):
    engine = load_engine(checkpoint("llama-linear"))
    engine.blocks[1].mlp.half()
    with pytest.raises(TealError, match="cast the whole engine"):
        run_step(engine)


def run_step(engine, rows=1, cache=None, hidden=None, index=None, **changes):
    """One step with arguments that fit, but for those given."""
    index = torch.full((rows,), 5) if index is None else index
    hidden = torch.ones(rows, engine.config.hidden_size, dtype=engine.dtype) if hidden is None else hidden
    tables = torch.ones(rows, engine.config.head_dim, dtype=engine.dtype)
    position = TokenPosition(index, tables, tables)._replace(**changes)
    return engine.decode_step(engine.blocks, hidden, engine.new_cache(rows) if cache is None else cache, position)


@pytest.mark.parametrize("index", [16, 40, 10**9, -1])
@pytest.mark.parametrize("rows", [1, 3, 9])
def test_a_position_outside_the_cache(index, rows, checkpoint):
    engine = load_engine(checkpoint("llama-linear"))
    cache, positions = engine.new_cache(rows, 16), torch.full((rows,), 15)
    run_step(engine, rows, cache, index=positions.clone())
    before = cache.blocks[0].keys.clone()
    positions[-1] = index
    with pytest.raises(TealError, match="do not fit into a KV cache of 16 positions"):
        run_step(engine, rows, cache, index=positions)
    assert torch.equal(cache.blocks[0].keys, before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda engine: {"cache": half_cache(engine)}, "KV cache is not for this model"),
        (lambda engine: {"cache": KVCache(engine.new_cache(2).blocks[:1], 16)}, "KV cache is not for this model"),
        (lambda engine: {"cache": KVCache((), 16)}, "KV cache is not for this model"),
        (lambda engine: {"cache": spread(engine.new_cache(2))}, "KV cache is not for this model"),
        (lambda engine: {"cache": engine.new_cache(1)}, "holds 1 sequences, the batch has 2"),
        (lambda engine: {"index": torch.tensor([5])}, "position must be torch.int64 \\[2\\]"),
        (lambda engine: {"index": torch.tensor([5, 5], dtype=torch.int32)}, "position must be torch.int64"),
        (lambda engine: {"hidden": torch.ones(2, engine.config.hidden_size).half()}, "hidden state must be"),
        (lambda engine: {"hidden": torch.ones(2, 3)}, "hidden state must be"),
        (lambda engine: {"cos": torch.ones(1, engine.config.head_dim)}, "rotary cosine must be"),
        (lambda engine: {"sin": torch.ones(2, engine.config.head_dim).half()}, "rotary sine must be"),
    ],
)  # fmt: skip
def test_arguments_that_do_not_fit(change, message, checkpoint):
    engine = load_engine(checkpoint("llama-linear"))
    with pytest.raises(TealError, match=message):
        run_step(engine, 2, **change(engine))


def half_cache(engine):
    return KVCache.allocate(engine.config, 2, 16, torch.float16, engine.device)


def spread(cache):
    """The same cache with gaps between the numbers."""
    blocks = [BlockCache(*(torch.zeros(*t.shape, 2)[..., 0] for t in block)) for block in cache.blocks]
    return KVCache(tuple(blocks), cache.context)
