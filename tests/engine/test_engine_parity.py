"""The engine computes what the Hugging Face model computes."""

import pytest
import torch
from engine_models import VARIANTS, random_model
from helpers import decode_logits, generate, random_tokens, tiny_plan

from teal.engine import SamplingConfig, decode_tokens, load_engine
from teal.sparse_model import set_sparsity, sparsify

TOLERANCE = {"atol": 2e-5, "rtol": 1e-4}
PROMPT, TOTAL = 11, 18


def engine_logits(engine, ids, prompt=PROMPT):
    """Logits of all positions of ids [B, T]: the first `prompt` by prefill, the others by decode."""
    cache = engine.new_cache(batch=ids.shape[0])
    logits = [engine.prefill(ids[:, :prompt], cache, all_positions=True)]
    position = torch.full((ids.shape[0],), prompt)
    for index in range(prompt, ids.shape[1]):
        logits.append(engine.decode(ids[:, index], position, cache)[:, None])
        position += 1
    return torch.cat(logits, dim=1)


@torch.no_grad()
def transformers_logits(model, ids):
    return model(ids).logits


@pytest.mark.parametrize("name", VARIANTS)
def test_dense_logits_equal_transformers(name, checkpoint):
    ids = random_tokens(length=TOTAL)
    expected = transformers_logits(random_model(name), ids)
    assert expected.std() > 0.3
    torch.testing.assert_close(engine_logits(load_engine(checkpoint(name)), ids), expected, **TOLERANCE)


@pytest.mark.parametrize("name", VARIANTS)
def test_sparse_logits_and_tokens_equal_transformers(name, checkpoint):
    model = random_model(name)
    plan = tiny_plan(model)
    ids = random_tokens(length=TOTAL)
    dense = transformers_logits(model, ids)[:, PROMPT:]
    sparsify(model, plan, 0.5)
    engine = load_engine(checkpoint(name), plan=plan, level=0.5)
    expected = decode_logits(model, ids, PROMPT)
    assert (expected - dense).abs().max() > 0.1
    torch.testing.assert_close(engine_logits(engine, ids)[:, PROMPT:], expected, **TOLERANCE)
    tokens = list(decode_tokens(engine, ids[0].tolist(), 12, ignore_eos=True))
    assert tokens == generate(model, ids, 12)[0].tolist()


@pytest.mark.parametrize("name", ["llama-llama3-biases-untied", "mistral-window", "qwen3-wide-heads"])
def test_dense_tokens_equal_transformers(name, checkpoint):
    ids = random_tokens(length=PROMPT, seed=5)
    tokens = list(decode_tokens(load_engine(checkpoint(name)), ids[0].tolist(), 16, ignore_eos=True))
    assert tokens == generate(random_model(name), ids, 16)[0].tolist()


def test_repetition_penalty_equals_transformers(checkpoint):
    ids, sampling = random_tokens(length=PROMPT, seed=5), SamplingConfig(repetition_penalty=1.3)
    engine = load_engine(checkpoint("qwen2-tied"))
    tokens = list(decode_tokens(engine, ids[0].tolist(), 16, sampling, ignore_eos=True))
    assert tokens == generate(random_model("qwen2-tied"), ids, 16, repetition_penalty=1.3)[0].tolist()


def test_level_turns_between_steps(checkpoint):
    model, ids = random_model("llama-linear"), random_tokens(length=TOTAL)
    engine = load_engine(checkpoint("llama-linear"), plan=tiny_plan(model), level=0.75)
    set_sparsity(engine, 0)
    torch.testing.assert_close(engine_logits(engine, ids), transformers_logits(model, ids), **TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_is_close(dtype, checkpoint):
    engine = load_engine(checkpoint("qwen3-wide-heads"), dtype=dtype)
    assert engine.dtype == dtype
    ids = random_tokens(length=TOTAL)
    expected = transformers_logits(random_model("qwen3-wide-heads").to(dtype), ids).float()
    assert (engine_logits(engine, ids).float() - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize("name", ["llama-linear", "mistral-window"])
def test_a_prompt_may_come_in_parts(name, checkpoint):
    engine, ids = load_engine(checkpoint(name)), random_tokens(length=TOTAL)
    whole = engine.prefill(ids, engine.new_cache(), all_positions=True)
    cache, bounds = engine.new_cache(), ((0, 7), (7, 8), (8, TOTAL))
    parts = [engine.prefill(ids[:, start:end], cache, start, all_positions=True) for start, end in bounds]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, **TOLERANCE)
    torch.testing.assert_close(engine.prefill(ids, engine.new_cache()), whole[:, -1], **TOLERANCE)


def test_a_prompt_of_one_token_is_dense(checkpoint):
    model, ids = random_model("llama-linear"), random_tokens(length=1)
    engine = load_engine(checkpoint("llama-linear"), plan=tiny_plan(model), level=0.75)
    logits = engine.prefill(ids, engine.new_cache(), all_positions=True)
    torch.testing.assert_close(logits, transformers_logits(model, ids), **TOLERANCE)


@pytest.mark.parametrize("name", ["mistral-window", "qwen2-tied"])
def test_sequences_of_a_batch_stand_at_positions_of_their_own(name, checkpoint):
    engine, ids, lengths = load_engine(checkpoint(name)), random_tokens(rows=2, length=TOTAL), (8, 13)
    batched, expected = engine.new_cache(batch=2), []
    for row, length in enumerate(lengths):
        alone = engine.new_cache()
        engine.prefill(ids[row : row + 1, :length], alone)
        for target, source in zip(batched.blocks, alone.blocks, strict=True):
            target.keys[row], target.values[row] = source.keys[0], source.values[0]
        expected.append(engine.decode(ids[row : row + 1, length], torch.tensor([length]), alone))
    following = torch.stack([ids[row, length] for row, length in enumerate(lengths)])
    logits = engine.decode(following, torch.tensor(lengths), batched)
    torch.testing.assert_close(logits, torch.cat(expected), **TOLERANCE)


def test_decode_beyond_one_extent_sees_all_of_it(checkpoint):
    """Over 256 positions the views of the cache grow; tokens must not notice."""
    engine = load_engine(checkpoint("llama-linear"))
    ids = random_tokens(length=250)
    tokens = list(decode_tokens(engine, ids[0].tolist(), 12, ignore_eos=True))
    whole = torch.cat([ids, torch.tensor([tokens])], dim=1)
    logits = engine.prefill(whole, engine.new_cache(), all_positions=True)
    assert logits[0, 249:-1].argmax(dim=-1).tolist() == tokens
