"""Every supported architecture: dense at level 0, and at 0.5 what a forward masked by hand computes."""

import pytest
import torch
from helpers import FAMILIES, MaskedByHand, decode_logits, generate, random_tokens, tiny_model, tiny_plan

from teal.linear import sparse_layers
from teal.sparse_model import set_sparsity, sparsify
from teal.structure import ModelStructure

IDS = random_tokens(rows=2, length=10)
TOLERANCE = {"row_major": 0.0, "channel_major": 1e-4}


@pytest.mark.parametrize("layout", list(TOLERANCE))
@pytest.mark.parametrize("family", FAMILIES)
def test_sparse_model_equals_masked_dense_model(family: str, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEAL_LAYOUT", layout)
    model = tiny_model(family)
    plan, dense = tiny_plan(model), decode_logits(model, IDS)
    with MaskedByHand(model, plan, 0.5):
        masked = decode_logits(model, IDS)
    assert (masked - dense).abs().max() > 0.1  # the masks matter

    sparsify(model, plan, 0.0)
    torch.testing.assert_close(decode_logits(model, IDS), dense, rtol=0, atol=TOLERANCE[layout])
    set_sparsity(model, 0.5)
    torch.testing.assert_close(decode_logits(model, IDS), masked, rtol=0, atol=TOLERANCE[layout])


@pytest.mark.parametrize("family", FAMILIES)
def test_generates_as_the_masked_dense_model(family: str) -> None:
    model = tiny_model(family)
    plan = tiny_plan(model)
    with MaskedByHand(model, plan, 0.5):
        expected = generate(model, IDS)
    assert torch.equal(generate(sparsify(model, plan, 0.5), IDS), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_all_projections_of_all_blocks_become_sparse(family: str) -> None:
    model = tiny_model(family)
    structure = ModelStructure.of(model)
    fused = {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}
    apart = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    expected = fused if family == "phi3" else apart
    assert [{p.name.rpartition(".")[2] for p in block} for block in structure.blocks] == [expected] * 2

    sparsify(model, tiny_plan(model))
    names = [structure.module_name(index, projection) for index, projection in structure.projections()]
    assert sorted(sparse_layers(model)) == sorted(names)
    assert ModelStructure.of(model) == structure
