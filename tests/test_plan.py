"""SparsityPlan: interpolation between levels, files, and every file that must be refused."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import LEVELS, random_plan
from hypothesis import given
from hypothesis import strategies as st

from teal.errors import TealError
from teal.ops.reference import KEEP_ALL
from teal.plan import DROP_ALL, ProjectionPlan, SparsityPlan, check_level, drops_all, level_grid
from teal.structure import ModelIdentity

SHAPES = {
    "self_attn.qkv_proj": (8, 4),
    "self_attn.o_proj": (4, 4),
    "mlp.gate_up_proj": (12, 4),
    "mlp.down_proj": (4, 6),
}
IDENTITY = ModelIdentity("tiny", (SHAPES, SHAPES), "ab" * 32)


def plan_of(levels: tuple[float, ...], **projection: Any) -> SparsityPlan:
    """Every projection with the same plan."""
    blocks = tuple({name: ProjectionPlan(**projection) for name in shapes} for shapes in IDENTITY.shapes)
    return SparsityPlan(IDENTITY, "uniform", levels, blocks)


def one(plan: SparsityPlan, level: float) -> Any:
    return plan.settings(level)[1]["mlp.down_proj"]


class TestLevels:
    def test_grid(self) -> None:
        assert level_grid(0.2) == (0.0, 0.05, 0.1, 0.15, 0.2)
        assert level_grid()[-1] == 0.9

    @pytest.mark.parametrize("level", [-0.1, 1, 1.0, 40, float("nan"), float("inf"), "0.5", None])
    def test_bad_level(self, level: Any) -> None:
        with pytest.raises(TealError, match="at least 0 and below 1"):
            check_level(level)


class TestSettings:
    PLAN = plan_of((0.0, 0.5, 0.75), sparsity=(0.0, 0.4, 0.8), threshold=(KEEP_ALL, 0.2, 0.6))

    @pytest.mark.parametrize(
        ("level", "sparsity", "threshold"),
        [
            pytest.param(0, 0.0, KEEP_ALL, id="dense"),
            pytest.param(0.25, 0.2, 0.1, id="from-dense-the-threshold-rises-from-zero"),
            pytest.param(0.5, 0.4, 0.2, id="on-the-grid"),
            pytest.param(0.625, 0.6, 0.4, id="between"),
            pytest.param(0.75, 0.8, 0.6, id="highest"),
        ],
    )
    def test_interpolates(self, level: float, sparsity: float, threshold: float) -> None:
        setting = one(self.PLAN, level)
        assert setting.sparsity == pytest.approx(sparsity)
        assert setting.threshold == pytest.approx(threshold)
        assert self.PLAN.expected_sparsity(level) == pytest.approx(sparsity)

    @given(st.floats(0, 0.75), st.floats(0, 0.75))
    def test_more_sparsity_never_lowers_a_threshold(self, one_level: float, other_level: float) -> None:
        low, high = sorted((one_level, other_level))
        assert one(self.PLAN, low).threshold <= one(self.PLAN, high).threshold
        assert self.PLAN.expected_sparsity(low) <= self.PLAN.expected_sparsity(high)

    def test_expected_sparsity_weighs_by_size(self) -> None:
        blocks = tuple(
            {name: ProjectionPlan((0.6 if name == "mlp.down_proj" else 0.0,), (0.1,)) for name in SHAPES}
            for _ in range(2)
        )
        plan = SparsityPlan(IDENTITY, "uniform", (0.5,), blocks)
        assert plan.expected_sparsity(0.5) == pytest.approx(0.6 * 24 / (32 + 16 + 48 + 24))

    @pytest.mark.parametrize("level", [0.1, 0.8])
    def test_level_outside_the_grid(self, level: float) -> None:
        plan = plan_of((0.25, 0.5), sparsity=(0.2, 0.4), threshold=(0.1, 0.2))
        with pytest.raises(TealError, match=rf"covers sparsity 0.25 to 0.5, got {level}"):
            plan.settings(level)
        assert one(plan, 0).threshold == KEEP_ALL

    def test_a_threshold_per_channel(self) -> None:
        identity = ModelIdentity("tiny", ({name: (2, 3) for name in SHAPES},))
        threshold = torch.tensor([[KEEP_ALL, KEEP_ALL, 0.2], [0.5, KEEP_ALL, 0.6]])
        compensation = torch.tensor([[0.0, 0.0], [1.0, 2.0]])
        projection = ProjectionPlan((0.0, 0.5), threshold, compensation)
        plan = SparsityPlan(identity, "weighted", (0.0, 0.5), ({name: projection for name in SHAPES},))
        setting = plan.settings(0.5)[0]["mlp.down_proj"]
        assert torch.equal(setting.threshold, threshold[1])
        assert setting.compensation.tolist() == [1.0, 2.0]
        dense = plan.settings(0)[0]["mlp.down_proj"]
        assert dense.threshold.tolist() == [KEEP_ALL] * 3  # of one shape at every level
        assert dense.compensation.tolist() == [0.0, 0.0]
        between = plan.settings(0.25)[0]["mlp.down_proj"]
        assert between.threshold.tolist() == pytest.approx([0.25, KEEP_ALL, 0.4])  # the first rises from 0
        assert between.compensation.tolist() == [0.5, 1.0]

    @pytest.mark.parametrize("level", [0.1 + 2e-9, 0.3, 0.5 - 2e-9, 0.5])
    def test_what_drops_all_at_a_level_does_so_on_the_way_there(self, level: float) -> None:
        identity = ModelIdentity("tiny", ({name: (2, 4) for name in SHAPES},))
        threshold = torch.tensor([[KEEP_ALL, 0.5, DROP_ALL, 1.0], [DROP_ALL, DROP_ALL, DROP_ALL, 1e6]])
        projection = ProjectionPlan((0.1, 0.5), threshold)
        plan = SparsityPlan(identity, "weighted", (0.1, 0.5), ({name: projection for name in SHAPES},))
        setting = plan.settings(level)[0]["mlp.down_proj"]
        assert drops_all(setting.threshold).tolist() == [True, True, True, False]
        assert setting.threshold.isfinite().all()


class TestFiles:
    @pytest.mark.parametrize("vectors", [False, True], ids=["plain", "vectors"])
    def test_round_trip(self, tmp_path: Path, vectors: bool) -> None:
        plan = replace(random_plan(IDENTITY, vectors=vectors), details={"text": "some text", "tokens": 12})
        plan.save(tmp_path / "plan.json")
        assert sorted(path.name for path in tmp_path.iterdir()) == (
            ["plan.json", "plan.vectors.safetensors"] if vectors else ["plan.json"]
        )
        loaded = SparsityPlan.load(tmp_path / "plan.json")
        assert loaded.has_vectors is vectors
        assert (loaded.identity, loaded.method, loaded.levels) == (IDENTITY, plan.method, LEVELS)
        assert loaded.details == {"text": "some text", "tokens": 12}
        for level in (0.0, 0.3, 0.75):
            for mine, theirs in zip(plan.settings(level), loaded.settings(level), strict=True):
                for name, setting in mine.items():
                    torch.testing.assert_close(vars(theirs[name]), vars(setting), rtol=0, atol=0)

    def test_json_round_trip(self) -> None:
        plan = random_plan(IDENTITY)
        assert SparsityPlan.from_json(json.loads(json.dumps(plan.to_json())), "here") == plan

    def test_vectors_do_not_fit_into_json(self) -> None:
        with pytest.raises(TealError, match="holds vectors"):
            random_plan(IDENTITY, vectors=True).to_json()


def broken(change: Any) -> dict[str, Any]:
    payload = random_plan(IDENTITY).to_json()
    change(payload)
    return payload


def projection(payload: dict[str, Any]) -> dict[str, Any]:
    return payload["blocks"][1]["mlp.down_proj"]


BROKEN = {
    "other-format": (lambda p: p.update(format="gguf"), "has format 'gguf', expected 'teal.plan'"),
    "newer-version": (lambda p: p.update(version=99), "has version 99, this teal reads up to 1; upgrade"),
    "no-version": (lambda p: p.pop("version"), "has version None"),
    "unknown-key": (lambda p: p.update(thresholds=1), r"unknown keys \['thresholds'\]"),
    "missing-key": (lambda p: p.pop("levels"), r"lacks \['levels'\]"),
    "unknown-key-of-a-projection": (lambda p: projection(p).update(bias=1), r"block 1 mlp.down_proj has unknown keys"),
    "thresholds-missing": (lambda p: projection(p).pop("threshold"), r"block 1 mlp.down_proj lacks \['threshold'\]"),
    "projection-missing": (lambda p: p["blocks"][1].pop("mlp.down_proj"), "missing for block 1 mlp.down_proj"),
    "projection-unknown": (lambda p: p["blocks"][1].update(x=projection(p)), "block 1 has no projection x"),
    "block-missing": (lambda p: p["blocks"].pop(), "it has 1 blocks, its model 2"),
    "threshold-nan": (lambda p: projection(p)["threshold"].__setitem__(1, float("nan")), "NaN or infinite"),
    "threshold-infinite": (lambda p: projection(p)["threshold"].__setitem__(1, float("inf")), "NaN or infinite"),
    "threshold-text": (lambda p: projection(p)["threshold"].__setitem__(1, "much"), "is damaged"),
    "threshold-short": (lambda p: projection(p)["threshold"].pop(), "needs 4 sparsities and thresholds"),
    "threshold-scalar": (lambda p: projection(p).update(threshold=0.5), "is damaged"),
    "sparsity-above-one": (lambda p: projection(p)["sparsity"].__setitem__(1, 1.5), "below 1, got 1.5"),
    "sparsity-negative": (lambda p: projection(p)["sparsity"].__setitem__(1, -0.1), "got -0.1"),
    "sparsity-nan": (lambda p: projection(p)["sparsity"].__setitem__(1, float("nan")), "got nan"),
    "levels-fall": (lambda p: p["levels"].reverse(), "levels must rise strictly"),
    "levels-empty": (lambda p: p.update(levels=[]), "levels must rise strictly"),
    "level-one": (lambda p: p["levels"].__setitem__(3, 1.0), "below 1, got 1.0"),
    "blocks-no-list": (lambda p: p.update(blocks=3), "is damaged"),
    "block-no-object": (lambda p: p["blocks"].__setitem__(0, []), "is damaged"),
    "model-without-shapes": (lambda p: p["model"].pop("shapes"), "does not describe its model properly"),
    "model-of-unknown-projections": (
        lambda p: p["model"]["shapes"][0]["projections"].update(router=[1, 1]), "does not describe its model"
    ),
    "vectors-elsewhere": (lambda p: p.update(vectors="plan.vectors.safetensors"), "give the path of the plan file"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), BROKEN.values(), ids=BROKEN)
def test_broken_plan_is_refused_by_name(change: Any, message: str) -> None:
    with pytest.raises(TealError, match=message) as error:
        SparsityPlan.from_json(broken(change), "the plan here")
    assert str(error.value).startswith("the plan here")


class TestDamagedFiles:
    def save(self, directory: Path, vectors: bool = True) -> Path:
        random_plan(IDENTITY, vectors=vectors).save(directory / "plan.json")
        return directory / "plan.json"

    def test_truncated(self, tmp_path: Path) -> None:
        path = self.save(tmp_path)
        path.write_text(path.read_text()[:-20])
        with pytest.raises(TealError, match=r"plan.json is not valid JSON"):
            SparsityPlan.load(path)

    def test_vectors_missing(self, tmp_path: Path) -> None:
        path = self.save(tmp_path)
        (tmp_path / "plan.vectors.safetensors").unlink()
        with pytest.raises(TealError, match=r"plan.vectors.safetensors does not exist"):
            SparsityPlan.load(path)

    @pytest.mark.parametrize("name", ["../plan.vectors.safetensors", 5, ""])
    def test_vectors_elsewhere(self, name: object, tmp_path: Path) -> None:
        path = self.save(tmp_path)
        path.write_text(json.dumps(json.loads(path.read_text()) | {"vectors": name}))
        with pytest.raises(TealError, match=r"plan\.json is damaged: its vectors are not in a file beside it"):
            SparsityPlan.load(path)

    @pytest.mark.parametrize("blocks", [0, -1, 10**12])
    def test_blocks_that_cannot_be(self, blocks: int, tmp_path: Path) -> None:
        path = self.save(tmp_path)
        payload = json.loads(path.read_text())
        payload["model"]["shapes"][0]["blocks"] = blocks
        path.write_text(json.dumps(payload))
        with pytest.raises(TealError, match="does not describe its model properly"):
            SparsityPlan.load(path)

    def test_vectors_truncated(self, tmp_path: Path) -> None:
        path, vectors = self.save(tmp_path), tmp_path / "plan.vectors.safetensors"
        vectors.write_bytes(vectors.read_bytes()[:-8])
        with pytest.raises(TealError, match="is truncated, corrupt or not safetensors"):
            SparsityPlan.load(path)

    def test_vectors_of_another_plan(self, tmp_path: Path) -> None:
        path = self.save(tmp_path)
        shapes = {name: (n, k + 1) for name, (n, k) in SHAPES.items()}
        random_plan(ModelIdentity("tiny", (shapes, shapes)), vectors=True).save(tmp_path / "other.json")
        (tmp_path / "other.vectors.safetensors").replace(tmp_path / "plan.vectors.safetensors")
        with pytest.raises(TealError, match=r"threshold of shape \(4, 5\), expected \(4, 4\)"):
            SparsityPlan.load(path)

    def test_vectors_of_more_blocks(self, tmp_path: Path) -> None:
        path = self.save(tmp_path)
        random_plan(ModelIdentity("tiny", (SHAPES,) * 3), vectors=True).save(tmp_path / "other.json")
        (tmp_path / "other.vectors.safetensors").replace(tmp_path / "plan.vectors.safetensors")
        with pytest.raises(TealError, match=r"2\.mlp\.down_proj\.threshold.* belong to no projection"):
            SparsityPlan.load(path)

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_vectors_that_cannot_be(self, value: float) -> None:
        threshold = {"self_attn.o_proj": torch.full((1, 4), value)}
        blocks = tuple({name: ProjectionPlan((0.5,), threshold.get(name, (0.1,))) for name in SHAPES} for _ in range(2))
        with pytest.raises(TealError, match=r"block 0 self_attn\.o_proj has a threshold that is NaN or infinite"):
            SparsityPlan(IDENTITY, "weighted", (0.5,), blocks)
