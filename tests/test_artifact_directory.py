"""What is ours in a directory is found by what it says of itself, never by its name; all else is left alone."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import random_plan, random_tokens, tiny_model, tiny_plan
from safetensors.torch import save_file

from teal.artifact_directory import Artifacts
from teal.artifacts import write_json
from teal.calibration import calibrate
from teal.errors import TealError
from teal.evaluation import evaluate, texts_to_json
from teal.plan import SparsityPlan
from teal.samples import write_samples
from teal.sparse_model import save_settings
from teal.structure import identify


@pytest.fixture(scope="module")
def plan() -> SparsityPlan:
    return tiny_plan(tiny_model())


def names(found: Artifacts) -> dict[str, list[str]]:
    """The files of each kind that is there."""
    return {kind: [artifact.name for artifact in files] for kind, files in vars(found).items() if files}


def test_kinds(tmp_path: Path, plan: SparsityPlan) -> None:
    (tmp_path / "results").mkdir()
    calibrate(tiny_model(), random_tokens(2, 16)).save(tmp_path / "counted.safetensors")
    random_plan(plan.identity, vectors=True).save(tmp_path / "channels.json")
    plan.save(tmp_path / "b.json")
    result = evaluate(tiny_model(), random_tokens(2, 16), plan, (0.25,))
    write_json(tmp_path / "results" / "a.json", result.to_json())
    write_json(tmp_path / "results" / "several.json", texts_to_json({"wiki": result}))
    write_samples(tmp_path / "s.json", [{"level": 0, "prompt": "The", "text": " fox"}], "one draw")
    found = Artifacts.of(tmp_path)
    assert names(found) == {
        "statistics": ["counted.safetensors"],
        "plans": ["b.json", "channels.json"],
        "evaluations": ["results/a.json"],
        "texts": ["results/several.json"],
        "samples": ["s.json"],
    }
    assert found.evaluations[0].content == result
    assert found.plans[1].content.has_vectors
    assert list(found.missing()) == ["tasks", "tunings", "benchmarks"]
    assert found.identities() == {"counted.safetensors": plan.identity}


def test_a_copy_of_a_plan_is_not_shown_again(tmp_path: Path, plan: SparsityPlan) -> None:
    plan.save(tmp_path / "plan.json")
    save_settings(plan, 0.5, tmp_path / "tuned")
    assert names(Artifacts.of(tmp_path)) == {"plans": ["plan.json"]}


@pytest.mark.parametrize("format_name", ["llama", "teal.plan.vectors", None, 1, ["teal.plan"], {"teal.plan": 1}])
def test_what_is_not_ours(tmp_path: Path, plan: SparsityPlan, format_name: Any) -> None:
    plan.save(tmp_path / "plan.json")
    (tmp_path / "config.json").write_text(json.dumps({"format": format_name}))
    (tmp_path / "notes.txt").write_text("teal.plan")
    save_file({"weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    assert names(Artifacts.of(tmp_path)) == {"plans": ["plan.json"]}


def test_several_models(tmp_path: Path, plan: SparsityPlan) -> None:
    other = identify(tiny_model(intermediate_size=64))
    plan.save(tmp_path / "a.json")
    plan.save(tmp_path / "b.json")
    random_plan(other, vectors=False).save(tmp_path / "c.json")
    assert Artifacts.of(tmp_path).identities() == {"a.json": plan.identity, "c.json": other}


def test_nothing_of_ours(tmp_path: Path) -> None:
    with pytest.raises(TealError, match="holds no statistics, plan or result of teal; run `teal calibrate` first"):
        Artifacts.of(tmp_path)
    with pytest.raises(TealError, match="is not a directory; name one that holds statistics, plans or results"):
        Artifacts.of(tmp_path / "nowhere")
