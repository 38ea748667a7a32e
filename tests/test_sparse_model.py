"""sparsify, set_sparsity, save and load; every plan that must be refused, and that nothing changes then."""

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import decode_logits, random_plan, random_tokens, tiny_model, tiny_plan
from torch import nn

from teal.errors import TealError
from teal.linear import sparse_layers
from teal.ops.reference import KEEP_ALL
from teal.plan import SparsityPlan
from teal.sparse_model import PLAN_FILE, SETTINGS_FILE, load, plan_of, save, set_sparsity, sparsify
from teal.structure import identify

IDS = random_tokens(rows=2, length=8)


@pytest.fixture(scope="module")
def plan() -> SparsityPlan:
    return tiny_plan(tiny_model())


def thresholds(model: nn.Module) -> list[float]:
    return [layer.threshold.item() for layer in sparse_layers(model).values()]


class TestSparsify:
    def test_works_in_place_and_returns_the_model(self, plan: SparsityPlan) -> None:
        model = tiny_model()
        assert sparsify(model, plan) is model
        assert plan_of(model) is plan
        assert model.sparsity_level == 0.5

    def test_default_level_is_the_highest_of_a_low_plan(self) -> None:
        model = tiny_model()
        low = tiny_plan(model, levels=(0.0, 0.3))
        assert sparsify(model, low).sparsity_level == 0.3

    def test_again_with_another_plan(self, plan: SparsityPlan) -> None:
        model = sparsify(tiny_model(), plan, 0.5)
        other = random_plan(plan.identity)
        sparsify(model, other, 0.25)
        assert plan_of(model) is other
        assert torch.equal(decode_logits(model, IDS), decode_logits(sparsify(tiny_model(), other, 0.25), IDS))

    @pytest.mark.parametrize("layout", ["row_major", "channel_major"])
    @pytest.mark.parametrize("loaded_inside", [False, True])
    def test_in_inference_mode(self, loaded_inside: bool, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """And then used, turned, moved and loaded outside of it, and the other way round."""
        monkeypatch.setenv("TEAL_LAYOUT", layout)
        plan = random_plan(identify(tiny_model()), vectors=True)
        model = None if loaded_inside else tiny_model()
        with torch.inference_mode():
            model = sparsify(model or tiny_model(), plan, 0.5)
            decode_logits(model, IDS)
        set_sparsity(model, 0.25)
        expected = sparsify(tiny_model(), plan, 0.25)
        assert torch.equal(decode_logits(model, IDS), decode_logits(expected, IDS))
        with torch.inference_mode():
            model.to(torch.bfloat16).to(torch.float32)
            set_sparsity(model, 0.0)
        set_sparsity(model, 0.75)
        buffers = [buffer for layer in sparse_layers(model).values() for buffer in layer.buffers()]
        assert not any(buffer.is_inference() for buffer in buffers)

    def test_state_dict_stays_that_of_the_dense_model(self, plan: SparsityPlan) -> None:
        dense, sparse = tiny_model(), sparsify(tiny_model(), plan)
        assert list(sparse.state_dict()) == list(dense.state_dict())
        dense.load_state_dict(sparse.state_dict())
        sparse.load_state_dict(tiny_model(seed=3).state_dict())
        assert torch.equal(sparse.lm_head.weight, tiny_model(seed=3).lm_head.weight)

    def test_zero_is_dense(self, plan: SparsityPlan) -> None:
        model = sparsify(tiny_model(), plan, 0)
        assert set(thresholds(model)) == {KEEP_ALL}
        torch.testing.assert_close(decode_logits(model, IDS), decode_logits(tiny_model(), IDS))


class TestSetSparsity:
    def test_works_between_tokens(self, plan: SparsityPlan) -> None:
        model = sparsify(tiny_model(), plan, 0.0)
        before = thresholds(model)
        set_sparsity(model, 0.75)
        half_way = thresholds(model)
        set_sparsity(model, 0.0)
        assert thresholds(model) == before
        assert all(high > low for high, low in zip(half_way, before, strict=True))
        assert model.sparsity_level == 0.0

    @pytest.mark.parametrize("level", [-0.1, 1.0, 0.8, float("nan"), 50])
    def test_bad_level_changes_nothing(self, plan: SparsityPlan, level: float) -> None:
        model = sparsify(tiny_model(), plan, 0.5)
        before = thresholds(model)
        with pytest.raises(TealError, match=f"got {level}"):
            set_sparsity(model, level)
        assert thresholds(model) == before
        assert model.sparsity_level == 0.5

    def test_dense_model(self) -> None:
        with pytest.raises(TealError, match=r"has no sparsity plan; call teal\.sparsify"):
            set_sparsity(tiny_model(), 0.5)


class TestPlansThatDoNotFit:
    def check_refused(self, plan: SparsityPlan, message: str, model: Any = None, **options: Any) -> None:
        model = model or tiny_model()
        with pytest.raises(TealError, match=message):
            sparsify(model, plan, **options)
        with pytest.raises(TealError, match="no sparse projections"):
            sparse_layers(model)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            pytest.param(
                {"num_hidden_layers": 3},
                "the plan cannot be of this model: made for 3 blocks, the model has 2",
                id="blocks",
            ),
            pytest.param({"intermediate_size": 40}, "32 x 40 in the plan and 32 x 56 in the model", id="shapes"),
        ],
    )
    def test_other_shapes(self, changes: dict[str, int], message: str) -> None:
        self.check_refused(tiny_plan(tiny_model(**changes)), message)

    def test_level_outside_the_plan(self, plan: SparsityPlan) -> None:
        self.check_refused(plan, "covers sparsity 0.0 to 0.75, got 0.8", level=0.8)

    @pytest.mark.parametrize(
        ("weights", "message"),
        [
            pytest.param("", "the weights it was made for are not known", id="unknown"),
            pytest.param("ab" * 32, "made for other weights", id="others"),
        ],
    )
    def test_other_weights_warn_and_fail_if_strict(self, plan: SparsityPlan, weights: str, message: str) -> None:
        other = replace(plan, identity=replace(plan.identity, weights=weights))
        with pytest.warns(UserWarning, match=f"the plan may not belong to this model: .*{message}") as caught:
            sparsify(tiny_model(), other)
        assert caught[0].filename == __file__
        self.check_refused(other, f"the plan may not belong to this model: .*{message}", strict=True)

    def test_own_weights_do_not_warn(self, plan: SparsityPlan) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            sparsify(tiny_model(), plan, strict=True)

    def test_unknown_architecture(self, plan: SparsityPlan) -> None:
        with pytest.raises(TealError, match="unknown architecture 'Linear'"):
            sparsify(nn.Linear(2, 2), plan)

    def test_projection_of_another_kind(self, plan: SparsityPlan) -> None:
        class Adapted(nn.Linear):
            pass

        model = tiny_model()
        model.model.layers[1].mlp.down_proj.__class__ = Adapted
        self.check_refused(plan, "model.layers.1.mlp.down_proj is a Adapted; only plain nn.Linear", model)


class TestFiles:
    @pytest.mark.parametrize("vectors", [False, True], ids=["plain", "vectors"])
    def test_round_trip(self, plan: SparsityPlan, tmp_path: Path, vectors: bool) -> None:
        chosen = random_plan(plan.identity, vectors=True) if vectors else plan
        model = sparsify(tiny_model(), chosen, 0.3)
        save(model, tmp_path / "sparse")
        loaded = load(tiny_model(), tmp_path / "sparse", strict=True)
        assert loaded.sparsity_level == 0.3
        assert torch.equal(decode_logits(loaded, IDS), decode_logits(model, IDS))
        names = {path.name for path in (tmp_path / "sparse").iterdir()}
        assert names == {SETTINGS_FILE, PLAN_FILE} | ({"plan.vectors.safetensors"} if vectors else set())

    def test_over_an_existing_directory(self, plan: SparsityPlan, tmp_path: Path) -> None:
        model = sparsify(tiny_model(), plan, 0.5)
        save(model, tmp_path)
        set_sparsity(model, 0.25)
        save(model, tmp_path)
        assert load(tiny_model(), tmp_path).sparsity_level == 0.25

    def test_a_dense_model(self, tmp_path: Path) -> None:
        with pytest.raises(TealError, match="no sparsity plan"):
            save(tiny_model(), tmp_path / "sparse")
        assert not (tmp_path / "sparse").exists()

    def test_a_file_in_place_of_the_directory(self, plan: SparsityPlan, tmp_path: Path) -> None:
        (tmp_path / "sparse").write_text("")
        with pytest.raises(TealError, match=r"cannot write .*sparse/plan.json"):
            save(sparsify(tiny_model(), plan), tmp_path / "sparse")

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            pytest.param({"format": "teal.plan"}, "expected 'teal.sparse_model'", id="format"),
            pytest.param({"version": 2}, "reads up to 1; upgrade teal-llm", id="newer"),
            pytest.param({"layout": "x"}, r"unknown keys \['layout'\]", id="unknown-key"),
            pytest.param({"plan": "other.json"}, "other.json does not exist", id="plan-missing"),
            pytest.param({"level": 1.5}, "at least 0 and below 1, got 1.5", id="level"),
            pytest.param({"level": "half"}, "got half", id="level-text"),
        ],
    )
    def test_bad_settings(self, plan: SparsityPlan, tmp_path: Path, change: dict[str, Any], message: str) -> None:
        save(sparsify(tiny_model(), plan), tmp_path)
        path = tmp_path / SETTINGS_FILE
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
        with pytest.raises(TealError, match=message):
            load(tiny_model(), tmp_path)

    def test_missing(self, tmp_path: Path) -> None:
        with pytest.raises(TealError, match=f"{SETTINGS_FILE} does not exist"):
            load(tiny_model(), tmp_path)

    def test_of_another_model(self, plan: SparsityPlan, tmp_path: Path) -> None:
        save(sparsify(tiny_model(), plan), tmp_path)
        with pytest.warns(UserWarning, match="made for other weights"):
            load(tiny_model(seed=1), tmp_path)
        with pytest.raises(TealError, match="made for other weights"):
            load(tiny_model(seed=1), tmp_path, strict=True)
        with pytest.raises(TealError, match="cannot be of this model"):
            load(tiny_model(intermediate_size=40), tmp_path)
