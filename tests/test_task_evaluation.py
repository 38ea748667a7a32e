"""Evaluation of tasks: its figures follow from scores and texts item by item, dense and sparse on the same items."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import byte_tokenizer, random_plan, random_tokens, tiny_model, tiny_plan
from torch import nn

from teal.errors import TealError, UsageError
from teal.evaluation import mean_and_error
from teal.linear import sparse_from, sparse_layers
from teal.plan import SparsityPlan
from teal.report import tasks_rule, tasks_table
from teal.scoring import encode, encode_request, score
from teal.sparse_model import set_sparsity, sparsify
from teal.structure import identify
from teal.task_evaluation import TaskEvaluation, TaskRun, evaluate_tasks
from teal.tasks import ANSWER, CHOICE, STOP, WORD, Item, Task, is_right

CHOICES = Task("choices", CHOICE, tuple(
    Item(tuple((context, rest) for rest in (" blue.", " a kind of cheese.", " up")), index % 3, (5, 17, 2))
    for index, context in enumerate(["The sky is", "It is", "They all were", "What you see is", "A", "Then came"])
))  # fmt: skip
CONTEXTS = Task("contexts", CHOICE, (Item((("so the box", " is small."), ("so the bag", " is small.")), 1),) * 2)
WORDS = Task("words", WORD, tuple(Item(((text, " no"),)) for text in ("she said", "and he", "a longer one, but")))
ANSWERS = Task("sums", ANSWER, tuple(Item(((f"Question: 2 + {n}?\nAnswer:", f" {2 + n}"),)) for n in range(3)))


def run(model: nn.Module, *tasks: Task, **options: Any) -> TaskEvaluation:
    plans = options.pop("plans", None) or tiny_plan(model)
    return evaluate_tasks(
        model, byte_tokenizer(), tasks, plans, (0.5,), **{"dense_tokens": 4, "max_new_tokens": 8, **options}
    )


def likelihoods(task: Task, level: float) -> list[list[float]]:
    """Of every pair of every item, each scored alone."""
    model = tiny_model()
    sparsify(model, tiny_plan(model), level)
    with sparse_from(model, 4):
        return [
            [score(model, [encode_request(byte_tokenizer(), *pair)], 4)[0].log_likelihood for pair in item.pairs]
            for item in task.items
        ]


def picked(values: list[float]) -> int:
    return torch.tensor(values).argmax().item()  # pyright: ignore[reportReturnType]


class TestFigures:
    def test_multiple_choice(self) -> None:
        (result,) = run(tiny_model(), CHOICES).tasks
        by_level = {}
        for level, found in ((0.0, result.dense), (0.5, result.runs[0])):
            values = likelihoods(CHOICES, level)
            gold = [item.gold for item in CHOICES.items]
            by_character = [[v / n for v, n in zip(of, (5, 17, 2), strict=True)] for of in values]
            assert found.correct == [int(picked(of) == g) for of, g in zip(values, gold, strict=True)]
            assert found.correct_normalized == [int(picked(of) == g) for of, g in zip(by_character, gold, strict=True)]
            assert found.loss == pytest.approx([-of[g] for of, g in zip(values, gold, strict=True)], rel=1e-4)
            by_level[level] = found.correct
        accuracy = result.accuracy(result.runs[0])
        assert (accuracy.value, accuracy.error) == mean_and_error(by_level[0.5])
        differences = [a - b for a, b in zip(by_level[0.5], by_level[0.0], strict=True)]
        assert (accuracy.difference, accuracy.difference_error) == mean_and_error(differences)
        normalized = result.normalized_accuracy(result.runs[0])
        assert normalized is not None
        assert normalized.value == sum(result.runs[0].correct_normalized) / 6
        assert result.perplexity(result.runs[0]) is None
        loss = result.mean_loss(result.runs[0])
        assert loss is not None
        assert loss.value == pytest.approx(sum(result.runs[0].loss) / 6)
        changes = [a - b for a, b in zip(result.runs[0].loss, result.dense.loss, strict=True)]
        assert (loss.difference, loss.difference_error) == mean_and_error(changes)
        assert result.chance == pytest.approx(1 / 3)

    def test_choices_of_contexts_are_not_normalized(self) -> None:
        (result,) = run(tiny_model(), CONTEXTS).tasks
        assert result.normalized_accuracy(result.dense) is None
        values = likelihoods(CONTEXTS, 0.0)
        assert result.dense.correct == [int(picked(of) == 1) for of in values]

    def test_last_words(self) -> None:
        (result,) = run(tiny_model(), WORDS).tasks
        dense, sparse = ([-of[0] for of in likelihoods(WORDS, level)] for level in (0.0, 0.5))
        assert result.runs[0].loss == pytest.approx(sparse, rel=1e-4)
        figure = result.perplexity(result.runs[0])
        assert figure is not None
        assert figure.value == pytest.approx(math.exp(sum(sparse) / 3), rel=1e-3)
        assert figure.difference == pytest.approx(100 * math.expm1((sum(sparse) - sum(dense)) / 3), rel=1e-2)
        assert result.normalized_accuracy(result.dense) is None

    def test_exact_answers_are_decoded(self) -> None:
        model = tiny_model()
        (result,) = run(model, ANSWERS).tasks
        for level, found in ((0.0, result.dense), (0.5, result.runs[0])):
            sparsify(model, tiny_plan(tiny_model()), level)
            right = []
            for item in ANSWERS.items:
                prompt = torch.tensor([encode(byte_tokenizer(), item.pairs[0][0])])
                ids = model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=8)
                text = byte_tokenizer().decode(ids[0, prompt.shape[1] :], skip_special_tokens=True)
                right.append(int(is_right(text.partition(STOP[0])[0], item.pairs[0][1])))
            assert found.correct == right
        assert (result.dense.sparsity, result.mean_loss(result.runs[0])) == (0, None)
        assert 0.3 < result.runs[0].sparsity < 0.7

    def test_an_answer_is_right_by_its_last_number(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("teal.task_evaluation.continue_greedily", lambda *_: [" 1, no, 2.0\n", "4", "none"])
        (result,) = run(tiny_model(), ANSWERS, batch=3).tasks
        assert result.dense.correct == [1, 0, 0]

    def test_the_mean_gives_every_task_the_same_weight(self) -> None:
        result = run(tiny_model(), CHOICES, WORDS)
        figures = [task.accuracy(task.runs[0]) for task in result.tasks]
        mean = result.mean_accuracy(0)
        assert mean.value == pytest.approx((figures[0].value + figures[1].value) / 2)
        assert mean.difference_error == pytest.approx(
            math.sqrt(figures[0].difference_error ** 2 + figures[1].difference_error ** 2) / 2
        )


class TestRuns:
    @pytest.mark.parametrize("batch", [1, 3, 100])
    def test_how_many_texts_at_a_time_changes_nothing(self, batch: int) -> None:
        tasks = (CHOICES, CONTEXTS, WORDS, ANSWERS)
        plan = random_plan(identify(tiny_model()), vectors=True)
        expected, found = (run(tiny_model(), *tasks, plans=plan, batch=size) for size in (16, batch))
        for one, other in zip(expected.tasks, found.tasks, strict=True):
            assert one.runs[0].correct == other.runs[0].correct
            assert one.runs[0].loss == pytest.approx(other.runs[0].loss, rel=1e-4)
            assert one.runs[0].sparsity == pytest.approx(other.runs[0].sparsity, abs=2e-3)

    def test_several_plans_and_levels(self) -> None:
        plans = {"one": tiny_plan(tiny_model()), "other": tiny_plan(tiny_model(), seed=8)}
        result = evaluate_tasks(tiny_model(), byte_tokenizer(), [CHOICES], plans, (0.25, 0.5, 0.25), dense_tokens=4)
        runs = result.tasks[0].runs
        assert [(r.plan, r.level) for r in runs] == [("one", 0.25), ("one", 0.5), ("other", 0.25), ("other", 0.5)]
        alone = run(tiny_model(), CHOICES, plans={"other": plans["other"]}).tasks[0]
        assert runs[3] == alone.runs[0]
        assert result.tasks[0].dense == alone.dense

    @pytest.mark.parametrize("task", [CHOICES, WORDS, ANSWERS], ids=lambda task: task.kind)
    def test_dense_runs_of_an_earlier_result_serve_again(self, task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
        model, levels = tiny_model(), []
        earlier = run(model, task)
        monkeypatch.setattr("teal.task_evaluation.apply_plan", lambda *turned: levels.append(turned[2]))
        lent = run(model, task, dense=earlier)
        assert set(levels) == {0.5}
        assert lent.tasks[0].dense == earlier.tasks[0].dense
        monkeypatch.undo()
        assert run(model, task, dense=earlier).to_json() == earlier.to_json()

    def test_dense_runs_of_something_else(self) -> None:
        model = tiny_model()
        earlier = run(model, CHOICES)
        for tasks, options in (((WORDS,), {}), ((CHOICES, WORDS), {}), ((CHOICES,), {"dense_tokens": 5})):
            with pytest.raises(UsageError, match="the dense results are of other items, another model or another rule"):
                run(model, *tasks, **options, dense=earlier)
        with pytest.raises(UsageError, match="the dense results are of other items"):
            run(tiny_model(seed=1), CHOICES, plans=tiny_plan(tiny_model(seed=1)), dense=earlier)

    def test_a_sparse_model_keeps_its_plan_and_level(self) -> None:
        model, step = tiny_model(), random_tokens(1, 1)
        sparsify(model, tiny_plan(model), 0.6)
        before = model(input_ids=step).logits
        run(model, CHOICES, ANSWERS, plans=tiny_plan(tiny_model(), seed=9))
        assert torch.equal(model(input_ids=step).logits, before)
        assert all(layer.dense_tokens == -1 and layer.observer is None for layer in sparse_layers(model).values())
        set_sparsity(model, 0.6)
        assert torch.equal(model(input_ids=step).logits, before)

    def test_contexts_too_long_are_shortened_and_reported(self) -> None:
        long = Task("long", WORD, (Item((("word " * 30 + "said", " no"),)), Item((("said", " no"),))))
        (result,) = run(tiny_model(), long).tasks
        assert result.shortened == 1
        cut = Task("cut", WORD, (Item(((("word " * 30 + "said")[-61:], " no"),)),))  # 65 tokens, one not read
        (shorter,) = run(tiny_model(), cut).tasks
        assert shorter.shortened == 0
        assert result.dense.loss[0] == pytest.approx(shorter.dense.loss[0], rel=1e-4)

    def test_prompts_too_long_are_shortened(self) -> None:
        (result,) = run(tiny_model(), Task("long", ANSWER, (Item((("word " * 30, " 5"),)),)), max_new_tokens=60).tasks
        assert result.shortened == 1


class TestRefused:
    def refuses(self, says: str, *tasks: Task, kind: type[TealError] = UsageError, **options: Any) -> None:
        with pytest.raises(kind, match=says):
            run(tiny_model(), *tasks, **options)

    def test_requests(self) -> None:
        self.refuses("there is no task to evaluate")
        self.refuses("at least 1 and dense_tokens at least 0, got 0, 8 and 4", CHOICES, batch=0)
        self.refuses("got 16, 0 and 4", CHOICES, max_new_tokens=0)
        self.refuses("got 16, 8 and -1", CHOICES, dense_tokens=-1)

    def test_no_plan(self) -> None:
        with pytest.raises(UsageError, match="there is no plan to evaluate"):
            evaluate_tasks(tiny_model(), byte_tokenizer(), [CHOICES], {})

    def test_a_level_outside_the_plan(self) -> None:
        with pytest.raises(TealError, match=r"the plan covers sparsity 0\.0 to 0\.75, got 0\.8"):
            evaluate_tasks(tiny_model(), byte_tokenizer(), [CHOICES], tiny_plan(tiny_model()), (0.8,))

    def test_what_no_context_holds(self) -> None:
        self.refuses(
            "task x, item 1 of 1: the model's context has room for 65 tokens of a text, too little for 65",
            Task("x", WORD, (Item((("a", " " + "b" * 64),)),)),
            kind=TealError,
        )


class TestResult:
    @pytest.fixture
    def result(self) -> TaskEvaluation:
        return run(tiny_model(), CHOICES, WORDS, ANSWERS)

    def test_round_trip(self, result: TaskEvaluation) -> None:
        payload = json.loads(json.dumps(result.to_json(), allow_nan=False))
        assert TaskEvaluation.from_json(payload, "here") == result
        task = payload["tasks"][0]
        assert task["runs"][0]["accuracy"]["value"] == result.tasks[0].accuracy(result.tasks[0].runs[0]).value
        assert task["dense"]["perplexity"] is None
        assert payload["tasks"][1]["dense"]["perplexity"]["value"] > 1

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"version": 99}, "here has version 99, this teal reads up to 1"),
            ({"extra": 1}, r"here has unknown keys \['extra'\]"),
            ({"tasks": [{"name": "x"}]}, "here is damaged"),
            ({"tasks": 3}, "here is damaged"),
        ],
    )
    def test_damaged(self, change: dict[str, Any], message: str, result: TaskEvaluation) -> None:
        with pytest.raises(TealError, match=message):
            TaskEvaluation.from_json(result.to_json() | change, "here")

    def test_table(self, result: TaskEvaluation) -> None:
        columns, rows = tasks_table(result)
        assert columns[:4] == ["task", "plan", "nominal", "realised"]
        assert columns[4:] == [
            "accuracy %",
            "to dense",
            "per character %",
            "to dense",
            "perplexity",
            "loss to dense (nats)",
        ]
        assert [row[0] for row in rows] == ["choices", "", "words", "", "sums", "", "mean of 3", ""]
        assert [bool(cell) for cell in rows[0]] == [True] * 5 + [False, True, False, False, False]
        assert [bool(cell) for cell in rows[1]] == [False] + [True] * 7 + [False, True]
        assert [bool(cell) for cell in rows[3]] == [False] + [True] * 5 + [False, False, True, True]
        assert not any(rows[5][6:])
        found = result.tasks[0].accuracy(result.tasks[0].runs[0])
        assert rows[1][4:6] == [
            f"{100 * found.value:.2f} ± {100 * found.error:.2f}",
            f"{100 * found.difference:+.2f} ± {100 * found.difference_error:.2f}",
        ]

    def test_columns_that_nothing_fills_are_left_out(self, result: TaskEvaluation) -> None:
        only = TaskEvaluation(result.tasks[2:], result.rule, result.identity)
        columns, rows = tasks_table(only)
        assert columns == ["task", "plan", "nominal", "realised", "accuracy %", "to dense"]
        assert len(rows) == 2

    def test_the_rule_is_stated(self, result: TaskEvaluation) -> None:
        lines = tasks_rule(result)
        assert lines[0] == "choices: 6 items, multiple choice; guessing gives 33.3 %"
        assert lines[2] == "sums: 3 items, exact answer"
        assert lines[3].startswith("scored: positions from 4 on sparse, as if decoded")
        assert lines[4].startswith("written: prompts dense, up to 8 tokens decoded greedily")
        assert lines[5].startswith("float32, weights as loaded; ± is one standard error over items")
        shown = TaskEvaluation(result.tasks[:1], result.rule, result.identity)
        assert not any(line.startswith("written") for line in tasks_rule(shown))

    def test_a_task_in_which_nothing_was_sparse_says_so(self, result: TaskEvaluation) -> None:
        choices = result.tasks[0]
        short = replace(choices, runs=[replace(run, sparsity=0.0) for run in choices.runs])
        said = "choices: nothing was sparse, its items end among the dense tokens (--dense-tokens)"
        assert said in tasks_rule(TaskEvaluation([short], result.rule, result.identity))
        assert said not in tasks_rule(result)


def test_vectors_of_a_plan_apply(tmp_path: Path) -> None:
    """A compensation changes the scores, as it is added on the sparse tokens."""
    model = tiny_model()
    plan = random_plan(identify(model), vectors=True)
    plan.save(tmp_path / "plan.json")
    found = run(model, CHOICES, plans=SparsityPlan.load(tmp_path / "plan.json")).tasks[0]
    assert isinstance(found.runs[0], TaskRun)
    assert found.runs[0].loss != found.dense.loss
