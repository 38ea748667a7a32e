"""The harness on local tasks: its figures are those of `evaluate_tasks` on the same items."""

import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import byte_tokenizer, save_tiny, tiny_model, tiny_plan

from teal.checkpoint import load_model
from teal.errors import TealError, UsageError
from teal.evaluation import evaluate
from teal.task_evaluation import TaskResult, evaluate_tasks
from teal.tasks import read_task

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # the harness's own
    pytest.mark.timeout(300),
]

ITEMS = {
    "choices": [
        {"query": context, "choices": ["blue.", "a kind of cheese.", "up"], "gold": index % 3}
        for index, context in enumerate(["The sky is", "It is", "They all were", "What you see is", "A", "Then came"])
    ],
    "words": [{"context": text, "continuation": "no"} for text in ("she said", "and he", "a longer one, but")],
    "sums": [{"question": f"2 + {n}?", "answer": str(2 + n)} for n in range(3)],
    "texts": [{"text": "The quick brown fox jumps. " * 2}, {"text": "short"}],
}
SETTINGS = {
    "choices": 'output_type: multiple_choice\ndoc_to_text: "{{query}}"\ndoc_to_choice: choices\ndoc_to_target: gold\n'
    "metric_list: [{metric: acc}, {metric: acc_norm}]",
    "words": 'output_type: loglikelihood\ndoc_to_text: "{{context}}"\ndoc_to_target: " {{continuation}}"\n'
    "metric_list: [{metric: perplexity}, {metric: acc}]",
    "sums": 'output_type: generate_until\ndoc_to_text: "Question: {{question}}\\nAnswer:"\n'
    'doc_to_target: "{{answer}}"\nmetric_list: [{metric: exact_match}]\n'
    'generation_kwargs: {until: ["Question:"], max_gen_toks: 8, do_sample: false}',
    "texts": 'output_type: loglikelihood_rolling\ndoc_to_text: ""\ndoc_to_target: "{{text}}"\n'
    "metric_list: [{metric: byte_perplexity}]",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a plan, and the tasks as files of items and of the harness."""
    folder = tmp_path_factory.mktemp("harness")
    save_tiny(folder / "model")
    tiny_plan(load_model(folder / "model")).save(folder / "plan.json")
    (folder / "tasks").mkdir()
    for name, items in ITEMS.items():
        file = folder / f"{name}.jsonl"
        file.write_text("".join(json.dumps(item) + "\n" for item in items))
        (folder / "tasks" / f"{name}.yaml").write_text(
            f"task: {name}\ndataset_path: json\ndataset_kwargs:\n  data_files: {{test: {file}}}\n"
            f"test_split: test\n{SETTINGS[name]}\n"
        )
    return folder


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
        import teal.integrations.lm_eval

        yield teal.integrations.lm_eval


@pytest.fixture(scope="module")
def found(adapter: Any, place: Path) -> Any:
    """What the command line finds, by level; once, as the harness takes long to look through its own tasks."""
    arguments = ["--model", place / "model", "--plan", place / "plan.json", "--include-path", place / "tasks"]
    arguments += ["--level", "0", "0.5", "--tasks", *ITEMS, "--json", place / "out.json"]
    assert adapter.main([str(argument) for argument in arguments]) == 0
    return json.loads((place / "out.json").read_text())["levels"]


def ours(place: Path, name: str) -> TaskResult:
    model = load_model(place / "model")
    task = read_task(place / f"{name}.jsonl")
    return evaluate_tasks(model, byte_tokenizer(), [task], tiny_plan(tiny_model()), (0.5,), max_new_tokens=8).tasks[0]


class TestFigures:
    def test_multiple_choice(self, found: Any, place: Path) -> None:
        expected = ours(place, "choices")
        for level, result in (("0", expected.dense), ("0.5", expected.runs[0])):
            figures = found[level]["results"]["choices"]
            normalized = expected.normalized_accuracy(result)
            assert normalized is not None
            assert figures["acc,none"] == pytest.approx(expected.accuracy(result).value)
            assert figures["acc_norm,none"] == pytest.approx(normalized.value)
            assert figures["acc_stderr,none"] == pytest.approx(expected.accuracy(result).error)

    def test_last_words(self, found: Any, place: Path) -> None:
        expected = ours(place, "words")
        for level, result in (("0", expected.dense), ("0.5", expected.runs[0])):
            perplexity = expected.perplexity(result)
            assert perplexity is not None
            assert found[level]["results"]["words"]["perplexity,none"] == pytest.approx(perplexity.value, rel=1e-4)
            assert found[level]["results"]["words"]["acc,none"] == expected.accuracy(result).value

    def test_generated_and_rolling(self, found: Any) -> None:
        assert found["0.5"]["results"]["sums"]["exact_match,none"] == 0  # a random model
        dense, sparse = (found[level]["results"]["texts"]["byte_perplexity,none"] for level in ("0", "0.5"))
        assert 1 < dense != sparse
        assert math.isfinite(sparse)
        assert found["0"]["sparsity"] == 0
        assert 0.3 < found["0.5"]["sparsity"] < 0.7

    def test_realised_sparsity(self, adapter: Any, place: Path) -> None:
        model = adapter.TealLM(str(place / "model"), str(place / "plan.json"), 0.5)
        pairs = [_Request((item["query"], f" {choice}")) for item in ITEMS["choices"] for choice in item["choices"]]
        model.loglikelihood(pairs)
        assert model.sparsity() == pytest.approx(ours(place, "choices").runs[0].sparsity, abs=1e-3)

    def test_generated_text_is_what_we_decode(self, adapter: Any, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        written: list[list[str]] = []
        decode = adapter.continue_greedily
        monkeypatch.setattr(adapter, "continue_greedily", lambda *rest: written.append(decode(*rest)) or written[-1])
        monkeypatch.setattr("teal.task_evaluation.continue_greedily", adapter.continue_greedily)
        result = ours(place, "sums")
        model = adapter.TealLM(str(place / "model"), str(place / "plan.json"), 0.5)
        texts = model.generate_until([_request(f"Question: 2 + {n}?\nAnswer:") for n in range(3)])
        dense, sparse, by_harness = written
        assert texts == by_harness == sparse != dense
        assert model.sparsity() == pytest.approx(result.runs[0].sparsity)

    def test_rolling_likelihood_of_a_text_that_fits_is_that_of_evaluate(self, adapter: Any, place: Path) -> None:
        text = ITEMS["texts"][0]["text"]
        model = adapter.TealLM(str(place / "model"), str(place / "plan.json"), 0.5, dense_tokens=0)
        ids = torch.tensor([model.tok_encode(text)])
        result = evaluate(tiny_model(), ids, tiny_plan(tiny_model()), (0.5,), dense_tokens=0)
        (likelihood,) = model.loglikelihood_rolling([_Request((text,))])
        assert likelihood == pytest.approx(-result.measurements[0].nll[0] * (ids.shape[1] - 1), rel=1e-4)

    def test_without_a_plan_it_is_dense(self, adapter: Any, place: Path, found: Any) -> None:
        model = adapter.TealLM(str(place / "model"))
        item = ITEMS["words"][0]
        ((likelihood, _),) = model.loglikelihood([_Request((item["context"], f" {item['continuation']}"))])
        assert -likelihood == pytest.approx(ours(place, "words").dense.loss[0], rel=1e-5)
        assert model.sparsity() == 0


class _Request(tuple[Any, ...]):
    """What the harness hands over: arguments under the name `args`."""

    @property
    def args(self) -> tuple[Any, ...]:
        return tuple(self)


def _request(prompt: str) -> _Request:
    return _Request((prompt, {"until": ["Question:"], "max_gen_toks": 8, "do_sample": False, "temperature": 0.0}))


class TestRefused:
    def refuses(self, adapter: Any, capsys: pytest.CaptureFixture[str], *arguments: object, says: str) -> None:
        assert adapter.main([str(argument) for argument in arguments]) in (1, 2)
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("teal: ")
        assert says in error

    def test_arguments(self, adapter: Any, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
        model = ["--model", place / "model"]
        self.refuses(adapter, capsys, *model, "--tasks", "no_such", says="the harness knows no task no_such")
        self.refuses(adapter, capsys, *model, "--tasks", "x", "--level", "0.5", says="--level needs --plan")
        with pytest.raises(UsageError, match="a level needs a plan"):
            adapter.TealLM(str(place / "model"), level=0.5)
        with pytest.raises(UsageError, match="the batch size must be a number, got 'auto'"):
            adapter.TealLM(str(place / "model"), batch_size="auto")

    @pytest.mark.parametrize(
        ("options", "says"),
        [
            ({"do_sample": True}, "the task samples"),
            ({"temperature": 0.7}, "the task samples"),
            ({"num_beams": 4}, "generation options that are not known: num_beams"),
        ],
    )
    def test_what_is_not_greedy(self, options: dict[str, Any], says: str, adapter: Any) -> None:
        with pytest.raises(TealError, match=says):
            adapter._generation_options(options)

    def test_greedy_options(self, adapter: Any) -> None:
        assert adapter._generation_options({"until": "x", "do_sample": False, "temperature": 1.0}) == (("x",), 256)
        assert adapter._generation_options({"until": ["a", "b"], "max_gen_toks": 5}) == (("a", "b"), 5)


def test_without_the_harness_one_line_says_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "lm_eval.py").write_text("raise ImportError('not here')")  # found before an installed one
    command = [sys.executable, "-m", "teal.integrations.lm_eval", "--model", "x", "--tasks", "y"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == (
        "teal: lm-evaluation-harness cannot be imported (not here): pip install 'teal-llm[lm-eval]'\n"
    )
