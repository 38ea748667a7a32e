"""The loss that is claimed was measured, on text that played no part in the search, and is within the budget."""

import json
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import random_plan, random_tokens, tiny_model, tiny_plan

from teal import report
from teal.data import TokenBlocks, hash_tokens
from teal.errors import TealError, UsageError
from teal.evaluation import Evaluation, evaluate, mean_and_error
from teal.structure import identify
from teal.tuning import CONFIDENCE, LEAST_SEQUENCES, LossBudget, PairedLoss, Trial, Tuning, student_quantile, tune

SEQUENCES = 24


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model()


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return random_tokens(SEQUENCES, 20, seed=3)


@pytest.fixture(scope="module")
def found(model: Any, tokens: torch.Tensor) -> Tuning:
    return tune(model, tokens, tiny_plan(tiny_model()), "0.02nats", metric="kl")


@pytest.mark.parametrize(
    ("text", "metric", "limit"),
    [
        ("2%", "perplexity", math.log(1.02)),
        (" 2.5 % ", "perplexity", math.log(1.025)),
        ("0.02nats", "perplexity", 0.02),
        (".02 nats", "kl", 0.02),
    ],
)
def test_budget(text: str, metric: str, limit: float) -> None:
    budget = LossBudget.parse(text, metric)
    assert budget.limit == pytest.approx(limit)
    assert LossBudget.parse(budget.text, metric) == budget


@pytest.mark.parametrize(
    ("text", "metric", "says"),
    [
        ("2", "perplexity", "a number with its unit"),
        ("-2%", "perplexity", "a number with its unit"),
        ("nan%", "perplexity", "a number with its unit"),
        ("0%", "perplexity", "must be above 0"),
        ("2%", "kl", "say 0.02nats"),
        ("2%", "accuracy", "choose from perplexity, kl"),
    ],
)
def test_a_budget_that_is_none(text: str, metric: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        LossBudget.parse(text, metric)


def test_losses_are_shown_in_the_unit_of_the_budget() -> None:
    assert LossBudget.parse("2%").show(math.log(1.0163)) == "+1.63 %"
    assert LossBudget.parse("0.02nats", "kl").show(0.0163) == "0.0163 nats"


@pytest.mark.parametrize(
    ("confidence", "degrees", "value"),  # tables of Student's t
    [(0.95, 7, 1.8946), (0.95, 30, 1.6973), (0.999, 7, 4.7853), (0.999, 30, 3.3852), (0.001, 30, -3.3852)],
)
def test_student_quantile(confidence: float, degrees: int, value: float) -> None:
    assert student_quantile(confidence, degrees) == pytest.approx(value, rel=0.01)


def test_losses_add_up() -> None:
    values = torch.randn(13, generator=torch.Generator().manual_seed(0), dtype=torch.float64).tolist()
    together = PairedLoss(*mean_and_error(values), 13)
    pieces = [PairedLoss(*mean_and_error(part), len(part)) for part in (values[:8], values[8:12], values[12:])]
    assert vars(pieces[0] + pieces[1] + pieces[2]) == pytest.approx(vars(together))


def test_sequences_needed_would_suffice() -> None:
    loss = PairedLoss(0.018, 0.004, 16)
    assert loss.bound(CONFIDENCE) > 0.02
    needed = loss.sequences_needed(0.02)
    assert needed is not None
    error = loss.error * math.sqrt(16 / needed)
    assert PairedLoss(0.018, error, needed).bound(CONFIDENCE) == pytest.approx(0.02, rel=0.02)
    assert PairedLoss(0.021, 0.004, 16).sequences_needed(0.02) is None


def test_the_claim_is_measured_on_the_other_half(model: Any, tokens: torch.Tensor, found: Tuning) -> None:
    assert 0 < found.level < 0.75
    again = evaluate(tiny_model(), tokens[SEQUENCES // 2 :], tiny_plan(tiny_model()), [found.level])
    (measured,) = again.measurements
    assert found.loss == pytest.approx(measured.kl, rel=1e-5)
    assert found.loss_error == pytest.approx(measured.kl_error, rel=1e-5)
    assert found.sparsity == pytest.approx(measured.sparsity)
    assert found.bound == pytest.approx(measured.kl + student_quantile(0.95, SEQUENCES // 2 - 1) * measured.kl_error)
    assert found.loss < found.bound <= found.budget.limit
    assert model.sparsity_level == 0, "the model is left dense"


def test_more_would_not_fit(found: Tuning) -> None:
    fitting = [trial.level for trial in found.trials if trial.fits]
    refused = [trial.level for trial in found.trials if not trial.fits]
    assert min(refused) == pytest.approx(max(fitting) + 0.01)
    assert found.level <= max(fitting)
    assert len(found.trials) <= 8
    assert found.tokens_evaluated > 20 * SEQUENCES


def test_bytes(model: Any, found: Tuning) -> None:
    block_weights = 4 * sum(
        p.numel() for name, p in model.named_parameters() if "layers" in name and "norm" not in name
    )
    head = model.lm_head.weight.numel() * 4
    assert found.dense_bytes == block_weights + head
    assert found.sparse_bytes == round(block_weights * (1 - found.sparsity)) + head


def test_a_budget_beyond_all_levels(model: Any, tokens: torch.Tensor) -> None:
    result = tune(model, tokens, tiny_plan(tiny_model()), "50nats")
    assert result.level == 0.75
    assert result.notes == []


def test_dense_is_the_answer(model: Any, tokens: torch.Tensor) -> None:
    result = tune(model, tokens, tiny_plan(tiny_model()), "0.0000001nats", metric="kl")
    assert (result.level, result.sparsity, result.loss, result.bound) == (0, 0, 0, 0)
    assert result.sparse_bytes == result.dense_bytes
    assert "dense is the answer: even level 0.01 costs" in result.notes[0]
    assert "with 95 % confidence" not in "\n".join(report.tuning_summary(result))


def test_too_little_text_to_tell_is_said(model: Any, tokens: torch.Tensor) -> None:
    """Random targets: the mean of the increase is near zero, its spread is not."""
    result = tune(model, tokens[: 2 * LEAST_SEQUENCES], tiny_plan(tiny_model()), "0.0001nats")
    needed = [note for note in result.notes if "too little text to tell" in note]
    wide = [t for t in result.trials if not t.fits and t.loss < result.budget.limit]
    assert bool(needed) == bool(wide)
    assert wide, "this text was chosen to be such a case"


def test_the_plan_that_reads_fewest_bytes_is_taken(model: Any, tokens: torch.Tensor) -> None:
    uniform = tiny_plan(tiny_model())
    other = replace(uniform, blocks=({**uniform.blocks[0]}, {**uniform.blocks[1]}))
    for block in other.blocks:
        block["mlp.down_proj"] = replace(
            block["mlp.down_proj"], threshold=tuple(9 * value for value in block["mlp.down_proj"].threshold)
        )
    plans, results = {"uniform": uniform, "other": other}, []
    for order in (["uniform", "other"], ["other", "uniform"]):
        result = tune(model, tokens, {name: plans[name] for name in order}, "0.02nats", metric="kl")
        fitting = {trial.plan: trial.sparsity for trial in result.trials if trial.fits}
        assert fitting[result.plan] == max(fitting.values())
        assert {trial.plan for trial in result.trials} == set(plans)
        results.append((result.plan, result.level, result.sparsity))
    assert results[0] == results[1]


def test_a_plan_with_vectors(model: Any, tokens: torch.Tensor) -> None:
    """Thresholds per channel and compensations are the plan's business; tune only turns its level."""
    plan = random_plan(identify(tiny_model()), vectors=True)
    result = tune(tiny_model(), tokens, plan, "2nats", metric="kl")
    assert result.plan == "weighted"
    assert 0 < result.level <= 0.75
    assert result.bound <= 2


def test_rising_through_the_candidates_stops_at_the_first_that_does_not_fit(found: Tuning) -> None:
    from teal.tuning import _highest_confirmed

    assert found.confirmation is not None
    first = found.confirmation.measurements[0]
    losses = {0.1: 0.001, 0.2: 0.002, 0.3: 0.2, 0.4: 0.003}
    measured = [replace(first, level=level, kl=kl, kl_error=0.0001) for level, kl in losses.items()]
    chosen = _highest_confirmed(replace(found.confirmation, measurements=measured), found.budget)
    assert chosen is not None
    assert chosen.level == 0.2
    assert _highest_confirmed(replace(found.confirmation, measurements=measured[2:]), found.budget) is None


def test_stepping_down_is_said(found: Tuning) -> None:
    from teal.tuning import _notes

    class Searched:
        budget, trials = found.budget, [Trial("uniform", 0.4, 0.4, 0.01, 0.001, 12, True)]

    assert found.confirmation is not None
    first = found.confirmation.measurements[0]
    measured = [
        replace(first, level=0.3, kl=0.01, kl_error=0.0001),
        replace(first, level=0.4, kl=0.019, kl_error=0.002),
    ]
    notes = _notes(Searched, replace(found.confirmation, measurements=measured), 0.3, 20)  # pyright: ignore[reportArgumentType]
    assert "level 0.4, which the search found, is not confirmed" in notes[0]
    assert "stepped down to 0.3" in notes[0]
    assert "tokens would be needed" in notes[1]


def test_text_that_the_plan_was_made_on_is_refused(model: Any, tokens: torch.Tensor) -> None:
    plan = tiny_plan(tiny_model())
    made_on = replace(plan, details={"statistics": {"merged": [{"tokens_sha256": hash_tokens(tokens)}]}})
    with pytest.raises(TealError, match="made on this very text"):
        tune(model, TokenBlocks(tokens, ("text",), 0), made_on, "2%")


@pytest.mark.parametrize("sequences", [1, 2 * LEAST_SEQUENCES - 1])
def test_too_few_sequences(model: Any, tokens: torch.Tensor, sequences: int) -> None:
    with pytest.raises(UsageError, match=f"{sequences} sequences are too few"):
        tune(model, tokens[:sequences], tiny_plan(tiny_model()), "2%")


def test_no_plan(model: Any, tokens: torch.Tensor) -> None:
    with pytest.raises(UsageError, match="no plan"):
        tune(model, tokens, {}, "2%")


def test_json(found: Tuning) -> None:
    payload = json.loads(json.dumps(found.to_json(), allow_nan=False))
    again = Tuning.from_json(payload, "here")
    assert again.to_json() == found.to_json()
    assert isinstance(again.confirmation, Evaluation)
    with pytest.raises(TealError, match=r"here has unknown keys \['more'\]"):
        Tuning.from_json({**payload, "more": 1}, "here")
    with pytest.raises(TealError, match="here is damaged"):
        Tuning.from_json({**payload, "trials": [{"plan": "x"}]}, "here")


def test_summary(found: Tuning) -> None:
    lines = report.tuning_summary(found)
    assert lines[0].startswith(f"uniform at level {found.level:g}: KL divergence from dense {found.loss:.4f} nats")
    assert f"with 95 % confidence at most {found.bound:.4f} nats (allowed: 0.02nats)" in lines[0]
    assert f"measured on {SEQUENCES // 2} sequences that played no part in the search" in lines[0]
    columns, rows = report.tuning_table(found)
    assert found.confirmation is not None
    assert len(rows) == len(found.trials) + len(found.confirmation.measurements)
    assert all(len(row) == len(columns) for row in rows)
    assert [row[6] == "yes" for row in rows[: len(found.trials)]] == [trial.fits for trial in found.trials]
