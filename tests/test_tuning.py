"""The loss that is claimed was measured, on text that played no part in the search, and is within the budget."""

import json
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import byte_tokenizer, random_plan, random_tokens, tiny_model, tiny_plan

from teal import report
from teal.data import TokenBlocks, hash_tokens
from teal.errors import TealError, UsageError
from teal.evaluation import Evaluation, evaluate, mean_and_error
from teal.held_out import HeldOutText
from teal.loss_budget import LossBudget, Trial
from teal.paired_loss import LEAST, student_quantile
from teal.structure import identify
from teal.task_evaluation import TaskEvaluation, evaluate_tasks
from teal.tasks import ANSWER, CHOICE, Item, Task
from teal.tuning import Tuning, tune

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
        ("1%", "accuracy", 0.01),
        ("1points", "accuracy", 0.01),
        ("2.5 points", "accuracy", 0.025),
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
        ("2%", "taste", "choose from perplexity, kl, accuracy"),
        ("0.02nats", "accuracy", "accuracy is in percentage points, not in nats"),
        ("100%", "accuracy", "allow fewer than 100"),
        ("1points", "perplexity", "points are of accuracy; perplexity is bounded in % or nats"),
        ("1points", "kl", "points are of accuracy; kl is bounded in nats"),
    ],
)
def test_a_budget_that_is_none(text: str, metric: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        LossBudget.parse(text, metric)


def test_losses_are_shown_in_the_unit_of_the_budget() -> None:
    assert LossBudget.parse("2%").show(math.log(1.0163)) == "+1.63 %"
    assert LossBudget.parse("0.02nats", "kl").show(0.0163) == "0.0163 nats"
    assert LossBudget.parse("1%", "accuracy").show(0.0163) == "+1.63 points"
    assert LossBudget.parse("1%", "accuracy").text == "1 point"


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
    result = tune(model, tokens[: 2 * LEAST], tiny_plan(tiny_model()), "0.0001nats")
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


def trials(found: Tuning, losses: dict[float, tuple[float, float]]) -> list[Trial]:
    """What confirming these levels, each with its loss and error, would give."""
    assert isinstance(found.confirmation, Evaluation)
    first = found.confirmation.measurements[0]
    measured = [replace(first, level=level, kl=kl, kl_error=error) for level, (kl, error) in losses.items()]
    return found.budget.trials(replace(found.confirmation, measurements=measured))


def test_rising_through_the_candidates_stops_at_the_first_that_does_not_fit(found: Tuning) -> None:
    from teal.tuning import _highest_confirmed

    losses = {0.1: 0.001, 0.2: 0.002, 0.3: 0.2, 0.4: 0.003}
    measured = trials(found, {level: (kl, 0.0001) for level, kl in losses.items()})
    chosen = _highest_confirmed(measured)
    assert chosen is not None
    assert chosen.level == 0.2
    assert _highest_confirmed(measured[2:]) is None


def test_stepping_down_is_said(model: Any, tokens: torch.Tensor, found: Tuning) -> None:
    from teal.tuning import _notes

    class Searched:
        budget, trials = found.budget, [Trial("uniform", 0.4, 0.4, 0.01, 0.001, 12, True)]
        on = HeldOutText(model, tokens, {})

    notes = _notes(Searched, trials(found, {0.3: (0.01, 0.0001), 0.4: (0.019, 0.002)}), 0.3)  # pyright: ignore[reportArgumentType]
    assert "level 0.4, which the search found, is not confirmed" in notes[0]
    assert "stepped down to 0.3" in notes[0]
    assert "tokens would be needed" in notes[1]


def test_text_that_the_plan_was_made_on_is_refused(model: Any, tokens: torch.Tensor) -> None:
    plan = tiny_plan(tiny_model())
    made_on = replace(plan, details={"statistics": {"merged": [{"tokens_sha256": hash_tokens(tokens)}]}})
    with pytest.raises(TealError, match="made on this very text"):
        tune(model, TokenBlocks(tokens, ("text",), 0), made_on, "2%")


@pytest.mark.parametrize("sequences", [1, 2 * LEAST - 1])
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
    accuracy = payload["budget"] | {"metric": "accuracy"}
    with pytest.raises(TealError, match=r"here, its confirmation has format 'teal\.evaluation'"):
        Tuning.from_json({**payload, "budget": accuracy}, "here")


def test_a_result_of_a_time_without_tasks(found: Tuning) -> None:
    assert isinstance(found.confirmation, Evaluation)
    payload = {
        "format": "teal.tuning", "version": 1, "budget": {"metric": "kl", "text": "0.02nats", "limit": 0.02},
        "plan": "uniform", "level": 0.14, "sparsity": 0.15, "loss": 0.0135, "loss_error": 0.0024, "bound": 0.0179,
        "dense_bytes": 100, "sparse_bytes": 90, "notes": ["a note"],
        "trials": [
            {"plan": "uniform", "level": 0.14, "sparsity": 0.15, "loss": 0.01, "loss_error": 0.001, "sequences": 8,
             "fits": True},
        ],
        "confirmation": found.confirmation.to_json(), "tokens_evaluated": 4000, "seconds": 1.5,
        "details": {"tokens_sha256": "0", "search_sequences": 12, "confirmation_sequences": 12, "sequence_length": 20},
        "speed": None, "confidence": 0.95,
    }  # fmt: skip
    old = Tuning.from_json(payload, "here")
    assert old.to_json() == payload
    assert "measured on 12 sequences" in report.tuning_summary(old)[0]
    assert len(report.tuning_table(old)[1]) == 1 + len(found.confirmation.measurements)
    assert report.tuning_parts(old) == "12 sequences to search, 12 to confirm, of 20 tokens"


def test_summary(found: Tuning) -> None:
    lines = report.tuning_summary(found)
    assert lines[0].startswith(f"uniform at level {found.level:g}: KL divergence from dense {found.loss:.4f} nats")
    assert f"with 95 % confidence at most {found.bound:.4f} nats (allowed: 0.02nats)" in lines[0]
    assert f"measured on {SEQUENCES // 2} sequences that played no part in the search" in lines[0]
    columns, rows = report.tuning_table(found)
    assert isinstance(found.confirmation, Evaluation)
    assert len(rows) == len(found.trials) + len(found.confirmation.measurements)
    assert all(len(row) == len(columns) for row in rows)
    assert [row[6] == "yes" for row in rows[: len(found.trials)]] == [trial.fits for trial in found.trials]


WORDS = ("fox", "dog", "lazy", "brown", "quick", "over", "jumps")


def choices(name: str, items: int, seed: int = 0) -> Task:
    """Items about nothing, of which the tiny model finds some right."""
    generator = torch.Generator().manual_seed(seed)
    picked = torch.randint(len(WORDS), (items, 4), generator=generator).tolist()
    made = tuple(
        Item(((f"The {WORDS[a]} {WORDS[b]}", f" {WORDS[c]}"), (f"The {WORDS[a]} {WORDS[b]}", f" {WORDS[d]}s")), a % 2)
        for a, b, c, d in picked
    )
    return Task(name, CHOICE, made)


def tune_tasks(*tasks: Task, allowed: str = "20%", **options: Any) -> Tuning:
    return tune(
        tiny_model(), tasks, tiny_plan(tiny_model()), allowed, metric="accuracy", tokenizer=byte_tokenizer(), **options
    )


@pytest.fixture(scope="module")
def of_tasks() -> Tuning:
    return tune_tasks(choices("few", 31), choices("many", 90, seed=1))


class TestTasks:
    def test_the_claim_is_measured_on_the_other_items(self, of_tasks: Tuning) -> None:
        tasks = [choices("few", 31), choices("many", 90, seed=1)]
        others = [replace(task, items=task.items[1::2]) for task in tasks]
        assert of_tasks.level > 0
        again = evaluate_tasks(tiny_model(), byte_tokenizer(), others, tiny_plan(tiny_model()), [of_tasks.level])
        lost = [
            dense - sparse
            for task in again.tasks
            for dense, sparse in zip(task.dense.correct, task.runs[0].correct, strict=True)
        ]
        assert len(lost) == 15 + 45
        assert of_tasks.loss == pytest.approx(sum(lost) / 60)
        assert of_tasks.loss_error == pytest.approx(mean_and_error(lost)[1])
        few, many = (task.runs[0].sparsity for task in again.tasks)
        assert of_tasks.sparsity == pytest.approx((15 * few + 45 * many) / 60, abs=1e-3)
        assert of_tasks.loss < of_tasks.bound <= of_tasks.budget.limit == 0.2
        assert of_tasks.details["tasks"][0] == {"name": "few", "kind": CHOICE, "items": 31, "shots": 0}
        assert (of_tasks.details["search_items"], of_tasks.details["confirmation_items"]) == (61, 60)
        assert of_tasks.tokens_evaluated > 0

    def test_a_part_of_the_search_holds_every_task(self) -> None:
        from teal.held_out import HeldOutTasks

        on = HeldOutTasks(None, byte_tokenizer(), [choices("few", 20), choices("many", 100)], {})  # pyright: ignore[reportArgumentType]
        assert [sum(number == 0 for number, _ in on.search[:part]) for part in (12, 24, 60)] == [2, 4, 10]
        assert on.amount(30) == "60 items"
        asked = [item for half in (on.search, on.confirmation) for _, item in half]
        assert len(asked) == len({id(item) for item in asked}) == 120

    def test_items_are_run_dense_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        asked: list[tuple[int, bool]] = []  # items, and whether their dense runs were at hand

        def counting(*arguments: Any, **options: Any) -> TaskEvaluation:
            asked.append((sum(len(task.items) for task in arguments[2]), options["dense"] is not None))
            return evaluate_tasks(*arguments, **options)

        monkeypatch.setattr("teal.held_out.evaluate_tasks", counting)
        found = tune_tasks(choices("few", 31), choices("many", 90, seed=1))
        dense = sum(items for items, at_hand in asked if not at_hand)
        searched = max(trial.sequences for trial in found.trials)
        assert dense == searched + 60, "those that the search came to, and the other half"
        assert sum(items for items, _ in asked) == sum(trial.sequences for trial in found.trials) + 60
        assert len(found.trials) > 2

    def test_exact_answers(self) -> None:
        items = tuple(Item(((f"Question: 2 + {n}?\nAnswer:", f" {2 + n}"),)) for n in range(40))
        result = tune_tasks(Task("sums", ANSWER, items), allowed="30points", max_new_tokens=3)
        assert (result.level, result.loss) == (0.75, 0), "the tiny model is never right"
        assert result.bound == pytest.approx(1 - 0.05 ** (1 / 20)), "and 20 items do not tell that it never would be"

    def test_few_items_are_no_proof(self) -> None:
        """Ten items of which none changes leave a loss of 26 points possible."""
        result = tune_tasks(choices("few", 20))
        assert (result.level, result.trials, result.confirmation) == (0, [], None)
        assert "even if none of 10 were lost, the loss could be +25.89 points; at least 28 items" in result.notes[0]
        assert report.tuning_summary(result) == result.notes

    def test_too_few_items_to_tell_is_said(self) -> None:
        result = tune_tasks(choices("some", 120, seed=1), allowed="7%")
        assert any("too few items to tell; about" in note and "items would be needed" in note for note in result.notes)

    def test_too_few_items(self) -> None:
        with pytest.raises(UsageError, match="15 items are too few to search on one half and confirm on the other"):
            tune_tasks(choices("few", 15))

    def test_what_does_not_go_together(self, model: Any, tokens: torch.Tensor) -> None:
        plan, task = tiny_plan(tiny_model()), choices("some", 20)
        with pytest.raises(UsageError, match="accuracy is measured on tasks"):
            tune(model, tokens, plan, "1%", metric="accuracy")
        with pytest.raises(UsageError, match="perplexity is measured on text"):
            tune(model, [task], plan, "1%")
        with pytest.raises(UsageError, match="tasks need the model's tokenizer"):
            tune(model, [task], plan, "1%", metric="accuracy")

    def test_json(self, of_tasks: Tuning) -> None:
        payload = json.loads(json.dumps(of_tasks.to_json(), allow_nan=False))
        again = Tuning.from_json(payload, "here")
        assert again.to_json() == of_tasks.to_json()
        assert isinstance(again.confirmation, TaskEvaluation)

    def test_summary(self, of_tasks: Tuning) -> None:
        lines = report.tuning_summary(of_tasks)
        assert f"accuracy lost {100 * of_tasks.loss:+.2f} points, with 95 % confidence at most" in lines[0]
        assert "(allowed: 20 points), measured on 60 items that played no part in the search" in lines[0]
        assert lines[2].startswith("accuracy there: few ")
        columns, rows = report.tuning_table(of_tasks)
        assert columns[-1] == "items"
        assert all(len(row) == len(columns) for row in rows)
        assert rows[-1][0] == "confirm"
        parts = "few (31 items, multiple choice), many (90 items, multiple choice); 61 items to search, 60 to confirm"
        assert report.tuning_parts(of_tasks) == parts
