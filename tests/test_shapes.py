"""Named shapes build real configurations; random models have weights that no cache or predictor can shorten."""

import pytest
import torch
from helpers import random_tokens, tiny_config, tiny_model
from transformers import AutoModelForCausalLM

from teal.engine.config import EngineConfig
from teal.errors import UsageError
from teal.shapes import SHAPES, random_model, shape_config
from teal.structure import ModelStructure

# Parameters in billions as published, embeddings included, tied ones once.
SIZES = {
    "llama-3.2-1b": 1.24, "llama-3.2-3b": 3.21, "llama-2-7b": 6.74, "llama-2-13b": 13.0, "llama-2-70b": 69.0,
    "llama-3-8b": 8.03, "llama-3-70b": 70.6, "mistral-7b": 7.25, "qwen2-7b": 7.62, "qwen3-8b": 8.19,
}  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
def test_named_shapes_are_what_their_names_say(name: str) -> None:
    config = shape_config(name)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert sum(parameter.numel() for parameter in model.parameters()) / 1e9 == pytest.approx(SIZES[name], rel=0.01)
    assert len(ModelStructure.of(model).blocks) == config.num_hidden_layers
    assert EngineConfig.of(config).blocks == config.num_hidden_layers


def test_unknown_shape() -> None:
    with pytest.raises(UsageError, match=r"unknown shape 'gpt-5'; choose from llama-3\.2-1b, "):
        shape_config("gpt-5")


class TestRandomModel:
    @pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
    def test_runs(self, family: str) -> None:
        model = random_model(tiny_config(family), torch.float32)
        assert not model.training
        assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
        assert model(input_ids=random_tokens(2, 12)).logits.isfinite().all()
        expected = dict(tiny_model(family).named_buffers())
        for name, buffer in model.named_buffers():
            assert torch.equal(buffer, expected[name]), name

    def test_weights(self) -> None:
        model = random_model(tiny_config(num_hidden_layers=3), torch.float32)
        weights = torch.cat([parameter.flatten() for parameter in model.parameters() if parameter.ndim > 1])
        assert weights.std().item() == pytest.approx(0.02, rel=0.02)
        assert weights.mean().item() == pytest.approx(0, abs=1e-3)
        assert all((parameter == 1).all() for parameter in model.parameters() if parameter.ndim == 1)
        blocks = [torch.cat([p.flatten() for p in block.parameters() if p.ndim > 1]) for block in model.model.layers]
        assert not any(torch.equal(blocks[0], other) for other in blocks[1:])
        assert len(weights.unique()) > 0.9 * len(weights)

    def test_the_same_seed_gives_the_same_weights(self) -> None:
        one, same, other = (random_model(tiny_config(), seed=seed).state_dict() for seed in (1, 1, 2))
        assert all(torch.equal(one[name], same[name]) for name in one)
        assert not torch.equal(one["lm_head.weight"], other["lm_head.weight"])
        assert one["lm_head.weight"].dtype == torch.bfloat16

    def test_tied_embeddings(self) -> None:
        model = random_model(tiny_config(tie_word_embeddings=True))
        assert model.lm_head.weight is model.model.embed_tokens.weight

    def test_a_weight_longer_than_the_random_values(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("teal.shapes._PERIOD", 101)
        weight = random_model(tiny_config(), torch.float32).lm_head.weight.flatten()
        assert torch.equal(weight[:101], weight[101:202])
        assert weight[:101].std().item() == pytest.approx(0.02, rel=0.3)
