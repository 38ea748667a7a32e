"""Evaluation: the dense figures at level 0, hand-counted perplexity and sparsity, and the token rule."""

import math

import pytest
import torch
from helpers import projection_inputs, random_tokens, tiny_model, tiny_plan

from teal.errors import TealError, UsageError
from teal.evaluation import evaluate, mean_and_error
from teal.linear import SparseLinear, sparse_from
from teal.sparsify import set_sparsity, sparsify
from teal.structure import ModelStructure

IDS = random_tokens(rows=5, length=20)
DENSE_TOKENS = 4


def mean_nll(model, ids, dense_tokens):
    """Mean loss of the predictions made at positions dense_tokens ... L - 2, sequence by sequence."""
    values = []
    for row in ids:
        log_p = model(input_ids=row[None, :-1]).logits[0].log_softmax(-1)
        positions = range(dense_tokens, len(row) - 1)
        values.append(-sum(log_p[t, row[t + 1]].item() for t in positions) / len(positions))
    return values


@pytest.fixture(params=["llama", "qwen2", "gemma3_text", "phi3"])
def model(request):
    return tiny_model(request.param)


@torch.no_grad()
def test_level_0_is_the_dense_model(model):
    dense = mean_nll(model, IDS, DENSE_TOKENS)
    result = evaluate(model, IDS, tiny_plan(model), [0.0], dense_tokens=DENSE_TOKENS)
    (zero,) = result.measurements
    assert result.dense_nll == pytest.approx(dense, abs=1e-5)
    assert result.dense_perplexity == pytest.approx(math.exp(sum(dense) / len(dense)), rel=1e-5)
    assert zero.perplexity == pytest.approx(result.dense_perplexity, rel=1e-6)
    assert zero.kl == pytest.approx(0, abs=1e-6)
    assert (zero.top1_agreement, zero.sparsity, zero.expected_sparsity) == (1, 0, 0)


@torch.no_grad()
def test_sparse_figures_equal_those_computed_by_hand(model):
    dense = [model(input_ids=row[None, :-1]).logits[0, DENSE_TOKENS:] for row in IDS]
    plan = tiny_plan(model)
    result = evaluate(model, IDS, plan, [0.5], dense_tokens=DENSE_TOKENS)
    sparsify(model, plan, 0.5)
    with sparse_from(model, DENSE_TOKENS):
        by_hand = mean_nll(model, IDS, DENSE_TOKENS)
        sparse = [model(input_ids=row[None, :-1]).logits[0, DENSE_TOKENS:] for row in IDS]
    (half,) = result.measurements
    assert half.nll == pytest.approx(by_hand, abs=1e-5)
    pairs = list(zip(sparse, dense, strict=True))
    kl = [(q.softmax(-1) * (q.log_softmax(-1) - p.log_softmax(-1))).sum(-1).mean().item() for p, q in pairs]
    assert half.kl == pytest.approx(sum(kl) / len(kl), rel=1e-3)
    agree = [(p.argmax(-1) == q.argmax(-1)).float().mean().item() for p, q in pairs]
    assert half.top1_agreement == pytest.approx(sum(agree) / len(agree))
    mean, error = mean_and_error(by_hand)
    assert half.perplexity_error == pytest.approx(math.exp(mean) * error, rel=1e-4)
    assert half.kl > 0


@torch.no_grad()
def test_realised_sparsity_is_the_share_of_weight_bytes_of_dropped_inputs():
    model = tiny_model()
    plan = tiny_plan(model)
    result = evaluate(model, IDS[:1], plan, [0.5], dense_tokens=0)
    sparsify(model, plan, 0.5)
    with sparse_from(model, 0):
        inputs = projection_inputs(model, IDS[:1, :-1])
    structure = ModelStructure.of(model)
    dropped = total = 0
    for index, projection in structure.projections():
        name = structure.module_name(index, projection)
        layer = model.get_submodule(name)
        assert isinstance(layer, SparseLinear)
        share = (inputs[name].abs() <= layer.threshold).double().mean().item()
        assert result.measurements[0].projections[f"{index}.{projection.name}"] == pytest.approx(share)
        dropped, total = dropped + share * projection.size, total + projection.size
    assert result.measurements[0].sparsity == pytest.approx(dropped / total)


def test_several_plans_share_one_dense_run_and_the_rule_is_stated():
    model = tiny_model()
    plans = {"one": tiny_plan(model), "two": tiny_plan(model, seed=11)}
    result = evaluate(model, IDS, plans, [0.25, 0.5], dense_tokens=DENSE_TOKENS)
    assert [(m.plan, m.level) for m in result.measurements] == [
        ("one", 0.25),
        ("one", 0.5),
        ("two", 0.25),
        ("two", 0.5),
    ]
    rule = result.rule
    assert rule["dense_tokens"] == DENSE_TOKENS
    assert rule["tokens_counted"] == 5 * (20 - 1 - DENSE_TOKENS)
    assert "positions 4 to 18" in rule["counted"]
    alone = evaluate(tiny_model(), IDS, plans["two"], [0.5], dense_tokens=DENSE_TOKENS)
    assert alone.measurements[0].nll == result.measurements[3].nll


def test_the_model_keeps_its_level():
    model = tiny_model()
    plan = tiny_plan(model)
    sparsify(model, plan, 0.25)
    before = [layer.threshold.clone() for layer in model.modules() if isinstance(layer, SparseLinear)]
    evaluate(model, IDS, plan, [0.5])
    after = [layer.threshold for layer in model.modules() if isinstance(layer, SparseLinear)]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    set_sparsity(model, 0.0)


@pytest.mark.parametrize("dense_tokens", [-1, 19, 100])
def test_a_rule_that_counts_nothing_is_refused(dense_tokens):
    model = tiny_model()
    with pytest.raises(UsageError, match="dense_tokens must be between 0 and 18"):
        evaluate(model, IDS, tiny_plan(model), [0.5], dense_tokens=dense_tokens)


def test_a_level_outside_the_plan_is_refused_before_anything_is_computed():
    model = tiny_model()
    with pytest.raises(TealError, match="covers sparsity"):
        evaluate(model, IDS, tiny_plan(model), [0.5, 0.99])


def test_infinite_logits_are_refused():
    model = tiny_model()
    plan = tiny_plan(model)
    torch.nn.init.constant_(model.model.norm.weight, float("inf"))
    with pytest.raises(TealError, match="NaN or infinite"):
        evaluate(model, IDS, plan, [0.5])


def test_mean_and_error():
    assert mean_and_error([1.0, 2.0, 3.0]) == pytest.approx((2.0, 1 / math.sqrt(3)))
    assert mean_and_error([4.0]) == (4.0, 0.0)
