"""Finding projections by structure, identities and fingerprints."""

import json
import re
from typing import Any

import pytest
import torch
from helpers import tiny_model
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, MixtralConfig, Qwen2MoeConfig

from teal.errors import TealError
from teal.structure import INPUTS, ModelIdentity, ModelStructure, fingerprint, identify

MIXTURE = {
    "vocab_size": 32, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "num_experts_per_tok": 1,
}  # fmt: skip


class TestModelStructure:
    def test_llama(self) -> None:
        structure = ModelStructure.of(tiny_model())
        assert (structure.model_type, structure.path, len(structure.blocks)) == ("llama", "model.layers", 2)
        assert structure.shapes()[1] == {
            "self_attn.q_proj": [32, 32], "self_attn.k_proj": [16, 32], "self_attn.v_proj": [16, 32],
            "self_attn.o_proj": [32, 32], "mlp.gate_proj": [56, 32], "mlp.up_proj": [56, 32],
            "mlp.down_proj": [32, 56],
        }  # fmt: skip
        assert structure.input_features(0) == dict(zip(INPUTS, (32, 32, 32, 56), strict=True))

    def test_of_a_model_without_weights(self) -> None:
        with torch.device("meta"):
            model = tiny_model()
        assert ModelStructure.of(model) == ModelStructure.of(tiny_model())

    def test_names_lead_to_modules(self) -> None:
        model = tiny_model("phi3")
        structure = ModelStructure.of(model)
        for index, projection in structure.projections():
            module = model.get_submodule(structure.module_name(index, projection))
            assert tuple(module.weight.shape) == (projection.out_features, projection.in_features)
            assert module in set(structure.block_modules(model)[index].modules())

    @pytest.mark.parametrize(
        "config",
        [
            pytest.param(GPT2Config(vocab_size=32, n_embd=8, n_layer=1, n_head=2, n_positions=16), id="gpt2"),
            pytest.param(MixtralConfig(**MIXTURE, num_local_experts=2), id="mixtral"),
            pytest.param(
                Qwen2MoeConfig(**MIXTURE, num_experts=2, moe_intermediate_size=8, shared_expert_intermediate_size=8),
                id="qwen2-moe-with-a-shared-expert",
            ),
        ],
    )
    def test_unknown_architectures(self, config: Any) -> None:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        message = f"unknown architecture '{config.model_type}': no decoder blocks .* dense Llama-like models"
        with pytest.raises(TealError, match=message):
            ModelStructure.of(model)

    def test_two_lists_of_blocks(self) -> None:
        model = nn.ModuleDict({"one": tiny_model(), "other": tiny_model()})
        with pytest.raises(
            TealError, match=r"several lists of decoder blocks \(one.model.layers, other.model.layers\)"
        ):
            ModelStructure.of(model)

    def test_no_model(self) -> None:
        with pytest.raises(TealError, match="unknown architecture 'Linear'"):
            ModelStructure.of(nn.Linear(2, 2))


class TestModelIdentity:
    IDENTITY = identify(tiny_model())

    def test_round_trip(self) -> None:
        payload = json.loads(json.dumps(self.IDENTITY.to_json()))
        assert [run["blocks"] for run in payload["shapes"]] == [2]  # equal blocks are written once
        assert ModelIdentity.from_json(payload, "here") == self.IDENTITY

    def test_round_trip_of_blocks_that_differ(self) -> None:
        (block, _), narrow = self.IDENTITY.shapes, {**self.IDENTITY.shapes[0], "mlp.down_proj": (32, 8)}
        identity = ModelIdentity("x", (block, narrow, narrow, block))
        assert ModelIdentity.from_json(identity.to_json(), "here") == identity

    @pytest.mark.parametrize(
        "change",
        [
            pytest.param({"shapes": None}, id="no-shapes"),
            pytest.param({"shapes": []}, id="no-blocks"),
            pytest.param({"shapes": [{"blocks": 2}]}, id="no-projections"),
            pytest.param({"shapes": [{"blocks": 2, "projections": {"q_proj": [1]}}]}, id="no-matrix"),
            pytest.param({"shapes": [{"blocks": 2, "projections": {"q_proj": [1, 1]}}]}, id="half-a-block"),
            pytest.param({"shapes": [{"blocks": 2, "projections": {"router": [1, 1]}}]}, id="unknown"),
        ],
    )
    def test_damaged(self, change: dict[str, Any]) -> None:
        with pytest.raises(TealError, match="here does not describe its model properly"):
            ModelIdentity.from_json(self.IDENTITY.to_json() | change, "here")

    def test_no_object(self) -> None:
        with pytest.raises(TealError, match="here does not describe its model properly"):
            ModelIdentity.from_json("llama", "here")

    def test_fits_whatever_the_weights(self) -> None:
        identify(tiny_model(seed=1)).check_fits(self.IDENTITY, "the plan")

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            pytest.param({"num_hidden_layers": 3}, "made for 3 blocks, the model has 2", id="blocks"),
            pytest.param(
                {"intermediate_size": 40},
                "block 0 mlp.down_proj has weight 32 x 40 in the plan and 32 x 56 in the model",
                id="shapes",
            ),
        ],
    )
    def test_other_shapes_are_named(self, changes: dict[str, int], message: str) -> None:
        with pytest.raises(TealError, match=message):
            identify(tiny_model(**changes)).check_fits(self.IDENTITY, "the plan")

    def test_other_projections_are_named(self) -> None:
        with pytest.raises(TealError, match=r"mlp.gate_proj has weight no such projection in the plan and 56 x 32"):
            identify(tiny_model("phi3")).check_fits(self.IDENTITY, "the plan")

    def test_weights_differ(self) -> None:
        mine, other, unknown = (
            self.IDENTITY,
            identify(tiny_model(seed=1)),
            ModelIdentity("x", self.IDENTITY.shapes),
        )
        assert mine.weights_differ(identify(tiny_model())) is None
        assert mine.weights_differ(unknown) == "the weights it was made for are not known"
        difference = mine.weights_differ(other) or ""
        assert re.fullmatch(r"it was made for other weights \(hash .{12}, the model's is .{12}\)", difference)


class TestFingerprint:
    def test_survives_a_wider_dtype(self) -> None:
        model = tiny_model(dtype=torch.bfloat16)
        assert identify(model.float()) == identify(tiny_model(dtype=torch.bfloat16))

    def test_changes_with_one_weight(self) -> None:
        model = tiny_model()
        before = identify(model).weights
        model.model.layers[1].mlp.up_proj.weight.data[3, 5] += 1e-3
        assert len(before) == 64
        assert identify(model).weights != before

    def test_is_empty_without_weights(self) -> None:
        with torch.device("meta"):
            assert identify(tiny_model()).weights == ""

    def test_reads_rows_by_weight_name(self) -> None:
        model, asked = tiny_model(), []

        def rows(name: str) -> torch.Tensor:
            asked.append(name)
            return model.state_dict()[name][:8]

        assert fingerprint(ModelStructure.of(model), rows) == identify(model).weights
        assert asked[0] == "model.layers.0.self_attn.q_proj.weight"
        assert len(asked) == 14
