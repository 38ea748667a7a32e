"""The command line from end to end, and one clear line for everything that can be wrong with its input."""

import errno
import html
import io
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import save_tiny
from safetensors.torch import load_file, save_file

from teal import cli
from teal.errors import TealError
from teal.ops import native
from teal.plan import SparsityPlan
from teal.samples import write_samples
from teal.statistics import ActivationStatistics

LEVELS = (0.0, 0.25, 0.5, 0.75)
STATISTICS, PLAN = Path("teal-model/statistics.safetensors"), Path("teal-model/plan.json")
ITEMS = "".join(json.dumps({"query": "The", "choices": ["fox", "dog"], "gold": n % 2}) + "\n" for n in range(6))
TEXT = "The quick brown fox jumps over the lazy dog. " * 20  # 900 tokens


@dataclass
class Outcome:
    code: int
    out: str
    err: str

    @property
    def complaints(self) -> list[str]:
        """Our lines on standard error, warnings apart."""
        lines = [line for line in self.err.splitlines() if line.startswith("teal: ")]
        return [line for line in lines if not line.startswith("teal: warning: ")]

    @property
    def warnings(self) -> list[str]:
        return [line for line in self.err.splitlines() if line.startswith("teal: warning: ")]


@pytest.fixture(autouse=True)
def _environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # `snapshot` must not see what other workers write into the repository
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "error")  # the command line sets it; other tests must not see that


@pytest.fixture
def teal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Outcome]:
    """Run the command line in this process."""

    def run(*arguments: object, stdin: bytes = b"") -> Outcome:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        code = cli.main([str(argument) for argument in arguments])
        return Outcome(code, *capsys.readouterr())

    return run


@pytest.fixture
def refuses(teal: Callable[..., Outcome]) -> Callable[..., Outcome]:
    """Run what must fail: with exit code 1 or 2, one line that says why, and nothing on disk changed."""

    def run(*arguments: object, says: str, code: int = 1, stdin: bytes = b"", changes: bool = False) -> Outcome:
        before = snapshot()
        outcome = teal(*arguments, stdin=stdin)
        assert len(outcome.complaints) == 1, outcome.err
        assert says in outcome.complaints[0]
        assert outcome.err.endswith(f"{outcome.complaints[0]}\n"), "nothing follows the error"
        assert outcome.code == code
        assert "Traceback" not in outcome.err + outcome.out
        assert changes or snapshot() == before
        return outcome

    return run


def snapshot() -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a text, and the statistics and the plan that the command line makes of them."""
    place = tmp_path_factory.mktemp("prepared")
    save_tiny(place / "model")
    save_tiny(place / "other", seed=1)  # other weights
    save_tiny(place / "wider", intermediate_size=64)  # other shapes
    (place / "text.txt").write_text(TEXT)
    (place / "held.txt").write_text(TEXT[:800].upper())
    (place / "items.jsonl").write_text(ITEMS)
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("TRANSFORMERS_VERBOSITY", "error")
        patched.chdir(place)
        for name in ("model", "wider"):
            assert cli.main(["calibrate", name, "--text", "text.txt", "--tokens", "256"]) == 0
            assert cli.main(["allocate", name, "--method", "uniform", "--levels", *map(str, LEVELS)]) == 0
    return place


@pytest.fixture
def home(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of `prepared` to damage, as the working directory."""
    place = Path(shutil.copytree(prepared, tmp_path / "home"))
    monkeypatch.chdir(place)
    return place


def rewrite(path: Path, edit: Callable[[Any], object]) -> None:
    """Edit a JSON file in place; NaN may be put in."""
    payload = json.loads(path.read_text())
    edit(payload)
    path.write_text(json.dumps(payload))


def edit_weights(edit: Callable[[dict[str, torch.Tensor]], object], file: str = "model/model.safetensors") -> None:
    tensors = load_file(file)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    edit(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def interrupt(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


class TestUsage:
    @pytest.mark.parametrize("verb", cli.VERBS)
    def test_help_shows_an_example(self, verb: str, teal: Callable[..., Outcome]) -> None:
        outcome = teal(verb, "--help")
        assert (outcome.code, outcome.err) == (0, "")
        assert f"\n  teal {verb}" in outcome.out or f"| teal {verb}" in outcome.out
        assert max(map(len, outcome.out.splitlines())) <= 120

    def test_help_lists_the_verbs(self, teal: Callable[..., Outcome]) -> None:
        outcome = teal("--help")
        assert outcome.code == 0
        assert all(f"    {verb}" in outcome.out for verb in cli.VERBS)

    @pytest.mark.parametrize(
        ("arguments", "says"),
        [
            ([], "see teal --help"),
            (["calibrat"], "invalid choice: 'calibrat'"),
            (["--level", "0.5"], "see teal --help"),
            (["calibrate", "--bogus"], "unknown arguments: --bogus; see teal calibrate --help"),
            (["calibrate", "--dense"], "unknown arguments: --dense; see teal calibrate --help"),  # no abbreviations
            (["generate", "model", "another"], "unknown arguments: another; see teal generate --help"),
            (["allocate", "--method", "best"], "invalid choice: 'best'"),
            (["calibrate", "--tokens", "0"], "expected a whole number from 1, got '0'"),
            (["calibrate", "--tokens", "many"], "expected a whole number from 1, got 'many'"),
            (["calibrate", "--dense-tokens", "-1"], "--dense-tokens"),
            (["generate", "--temperature", "hot"], "--temperature: invalid float value: 'hot'"),
            (["import-published", "directory"], "the following arguments are required: --model"),
        ],
    )
    def test_wrong_usage(self, arguments: list[str], says: str, refuses: Callable[..., Outcome]) -> None:
        refuses(*arguments, says=says, code=2)

    @pytest.mark.parametrize(
        "arguments", [["generate", "--level"], ["inspect", "--level"], ["evaluate", "--levels"], ["bench", "--levels"]]
    )
    @pytest.mark.parametrize("level", ["1", "50", "-0.1", "nan", "half"])
    def test_sparsity_outside_its_range(
        self, arguments: list[str], level: str, refuses: Callable[..., Outcome]
    ) -> None:
        says = {"half": "'half' is no number", "-0.1": "-0.1"}.get(level, "must be at least 0 and below 1")
        refuses(*arguments, level, says=says, code=2)

    def test_as_a_process(self, home: Path) -> None:
        command = [sys.executable, "-m", "teal", "inspect", str(PLAN), "--json", "-"]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["method"] == "uniform"
        done = subprocess.run([*command[:3], "inspect", "--level", "2"], capture_output=True, text=True)
        assert done.returncode == 2
        assert done.stderr.startswith("teal: argument --level: sparsity must be")

    def test_a_reader_that_goes_away(self, home: Path) -> None:
        command = f"set -o pipefail; {sys.executable} -m teal inspect {PLAN} | true"
        done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.usefixtures("home")
class TestPipeline:
    """What `prepared` began goes on, each verb for people and as pure JSON."""

    def test_calibrate_and_allocate(self, teal: Callable[..., Outcome]) -> None:
        statistics, plan = ActivationStatistics.load(STATISTICS), SparsityPlan.load(PLAN)
        assert statistics.details["text"] == ["text.txt"]
        assert statistics.blocks[0]["attention_input"].tokens == 4 * (64 - 8)  # blocks as long as the context
        assert (plan.method, plan.levels) == ("uniform", LEVELS)
        assert not list(Path("teal-model").glob("*.partial"))
        result = teal("calibrate", "model", "--text", "text.txt", "--tokens", 100, "--output", "s", "--json", "-")
        assert result.code == 0
        assert json.loads(result.out)["tokens"] == 2 * (64 - 8)
        result = teal("allocate", "model", "--statistics", "s", "--method", "uniform", "--output", "p", "--json", "-")
        assert json.loads(result.out)["levels"][-1] == 0.9
        assert "uniform plan for 2 blocks, levels 0 to 0.9 -> p" in result.err

    def test_a_short_calibration_has_short_blocks(self, teal: Callable[..., Outcome]) -> None:
        result = teal("calibrate", "model", "--text", "text.txt", "--tokens", 30, "--output", "s", "--json", "-")
        assert json.loads(result.out)["text"]["block_length"] == 30

    def test_allocate_blockwise(self, teal: Callable[..., Outcome]) -> None:
        options = ["--text", "text.txt", "--tokens", "128", "--step", "0.05", "--levels", "0.5", "0", "0.25", "0.5"]
        assert teal("allocate", "model", "--method", "blockwise", *options, "--output", "greedy.json").code == 0
        plan = SparsityPlan.load("greedy.json")
        assert (plan.method, plan.levels) == ("blockwise", (0.0, 0.25, 0.5))
        assert plan.expected_sparsity(0.5) == pytest.approx(0.5)

    def test_allocate_globally_with_choices(self, teal: Callable[..., Outcome]) -> None:
        options = [
            "--text",
            "text.txt",
            "--tokens",
            "128",
            "--levels",
            "0.25",
            "0.5",
            "--stride",
            "0.3",
            "--batch",
            "2",
        ]
        assert teal("allocate", "model", *options, "--score", "l2", "--no-compensate", "--output", "l2.json").code == 0
        plan = SparsityPlan.load("l2.json")
        assert (plan.method, plan.details["score"], plan.details["compensated"]) == ("global", "l2", False)
        assert plan.expected_sparsity(0.5) == pytest.approx(0.5, abs=0.05)
        evaluate = ["evaluate", "model", "--plan", "l2.json", "--text", "text.txt", "--length", "32"]
        assert teal(*evaluate, "--levels", "0.5").code == 0

    def test_merged_statistics(self, teal: Callable[..., Outcome]) -> None:
        options = ["--text", "text.txt", "--tokens", "128", "--seed", "3", "--output", "both", "--merge", STATISTICS]
        assert teal("calibrate", "model", *options).code == 0
        merged = ActivationStatistics.load("both")
        assert merged.blocks[1]["mlp_input"].tokens == 6 * (64 - 8)
        assert len(merged.details["merged"]) == 2

    @pytest.mark.parametrize(
        ("path", "shown", "kind"),
        [
            (PLAN, "uniform, levels 0 to 0.75", "plan"),
            (STATISTICS, "threshold for a sparsity of 0.5", "statistics"),
            ("model", "2 blocks", "model"),
        ],
    )
    def test_inspect(self, path: Path, shown: str, kind: str, teal: Callable[..., Outcome]) -> None:
        result = teal("inspect", path)
        assert (result.code, result.err) == (0, "")
        assert shown in result.out
        assert "q_proj" in result.out or "attention_input" in result.out
        result = teal("inspect", path, "--json", "-")
        assert json.loads(result.out)["kind"] == kind
        assert shown in result.err

    def test_inspect_tells_what_rounding_changes(self, teal: Callable[..., Outcome]) -> None:
        weights = load_file("model/model.safetensors")
        weights["model.layers.0.self_attn.k_proj.weight"][0, 0] = float("nan")
        save_file(weights, "model/model.safetensors", {"format": "pt"})
        errors = json.loads(teal("inspect", "model", "--json", "-").out)["rounding_error"]
        assert 0 < errors["mlp.up_proj"]["int8"] < 0.02 < errors["mlp.up_proj"]["int4"] < 0.2
        assert errors["self_attn.k_proj"]["int8"] is None

    def test_inspect_names_projections_in_order(self, teal: Callable[..., Outcome]) -> None:
        (head,) = [line for line in teal("inspect", PLAN).out.splitlines() if line.startswith("block")]
        assert head.split() == ["block", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

    @pytest.mark.parametrize("level", ["0.3", "0.75"])
    def test_inspect_at_a_level(self, level: str, teal: Callable[..., Outcome]) -> None:
        assert f"level {level}" in teal("inspect", PLAN, "--level", level).out

    def test_evaluate_and_inspect_its_result(self, teal: Callable[..., Outcome]) -> None:
        arguments = ["evaluate", "model", "--text", "text.txt", "--tokens", "128", "--length", "64"]
        result = teal(*arguments, "--levels", "0", "0.5", "0.5", "--json", "e.json")
        assert result.code == 0
        payload = json.loads(Path("e.json").read_text())
        assert [m["level"] for m in payload["measurements"]] == [0, 0.5]
        assert payload["rule"]["sequences"] == 2
        assert teal("inspect", "e.json").out == result.out
        assert json.loads(teal(*arguments, "--json", "-").out)["format"] == "teal.evaluation"

    def test_tasks_and_inspect_their_result(self, teal: Callable[..., Outcome]) -> None:
        Path("sums.jsonl").write_text('{"question": "2 + 2?", "answer": "4"}\n' * 3)
        arguments = ["tasks", "model", "--task", "items.jsonl", "sums.jsonl", "--limit", "2", "--shots", "1"]
        result = teal(*arguments, "--max-new-tokens", "4", "--levels", "0.5", "0.25", "--json", "t.json")
        assert result.code == 0, result.err
        payload = json.loads(Path("t.json").read_text())
        assert [(task["name"], task["items"], task["shots"]) for task in payload["tasks"]] == [
            ("items", 2, 1), ("sums", 2, 1),
        ]  # fmt: skip
        assert [run["level"] for run in payload["tasks"][0]["runs"]] == [0.5, 0.25]
        assert teal("inspect", "t.json").out == result.out
        assert "guessing gives 50.0 %; after 1 example" in result.out

    def test_tasks_of_one_name(self, teal: Callable[..., Outcome]) -> None:
        shutil.copy("items.jsonl", "other/items.jsonl")
        result = teal("tasks", "model", "--task", "items.jsonl", "other/items.jsonl", "--json", "-")
        assert [task["name"] for task in json.loads(result.out)["tasks"]] == ["items.jsonl", "other/items.jsonl"]

    def test_evaluate_by_position(self, teal: Callable[..., Outcome]) -> None:
        arguments = ["evaluate", "model", "--text", "text.txt", "--tokens", "128", "--length", "64", "--levels", "0.5"]
        lines = teal(*arguments, "--by-position").out.splitlines()
        assert [line.split()[0] for line in lines[4:7]] == ["positions", "8-15", "16-31"]
        assert len(teal(*arguments).out.splitlines()) < len(lines)

    def test_evaluate_each_text(self, teal: Callable[..., Outcome]) -> None:
        Path("code.txt").write_text("x = [y for y in range(3)]\n" * 40)
        arguments = ["evaluate", "model", "--text", "text.txt", "code.txt", "--tokens", "128", "--levels", "0.5"]
        result = teal(*arguments, "--each-text", "--simulate-bits", "4", "--json", "e.json")
        assert result.code == 0, result.err
        texts = json.loads(Path("e.json").read_text())["texts"]
        assert {name: text["details"]["text"] for name, text in texts.items()} == {
            "text": ["text.txt"], "code": ["code.txt"],
        }  # fmt: skip
        assert [text["details"]["weights"] for text in texts.values()] == ["int4 (simulated)"] * 2
        assert teal("inspect", "e.json").out == result.out
        lines = teal(*arguments, "--each-text", "--by-position").out.splitlines()
        assert [lines[at + 1].split()[0] for at, line in enumerate(lines) if line in texts] == ["positions"] * 2
        alone = teal("evaluate", "model", "--text", "code.txt", *arguments[5:], "--simulate-bits", "4", "--json", "-")
        assert json.loads(alone.out)["measurements"] == texts["code"]["measurements"]

    def test_evaluate_several_plans_of_one_name(self, teal: Callable[..., Outcome]) -> None:
        shutil.copytree("teal-model", "copy")
        options = ["--text", "text.txt", "--tokens", "64", "--levels", "0.5", "--json", "-"]
        result = teal("evaluate", "model", "--plan", PLAN, "copy/plan.json", *options)
        assert [m["plan"] for m in json.loads(result.out)["measurements"]] == [str(PLAN), "copy/plan.json"]

    @pytest.mark.parametrize("options", [[], ["--level", "0.25"], ["--dense"]])
    def test_generate(self, options: list[str], teal: Callable[..., Outcome]) -> None:
        arguments = ["generate", "model", "--prompt", "The quick", "--max-new-tokens", "12", *options]
        result = teal(*arguments)
        assert result.code == 0
        assert result.out.startswith("The quick")
        level = 0.0 if "--dense" in options else float(options[1]) if options else 0.5
        assert (f"sparsity {level:g}" if level else "dense") in result.err
        payload = json.loads(teal(*arguments, "--json", "-").out)
        assert payload["prompt"] + payload["text"] == result.out.rstrip("\n")
        assert (payload["level"], payload["engine"]) == (level, "teal")
        assert (
            json.loads(teal(*arguments[:2], *arguments[4:], "--json", "-", stdin=b"The quick\n").out)["text"]
            == (payload["text"])
        )

    @pytest.mark.parametrize("options", [["--weights", "int4"], ["--head-weights", "int4"], ["--head-sparsity", "0.9"]])
    def test_generate_with_rounded_weights_or_a_sparse_head(
        self, options: list[str], teal: Callable[..., Outcome]
    ) -> None:
        command = ["generate", "model", "--prompt", "The", "--temperature", "1", "--seed", "0", "--json", "-"]
        plain, changed = (json.loads(teal(*command, *more).out) for more in ([], options))
        assert changed["engine"] == "teal"
        assert changed["text"] != plain["text"]

    def test_generate_samples_by_seed(self, teal: Callable[..., Outcome]) -> None:
        def text(seed: int) -> str:
            options = ["--temperature", "1", "--top-p", "0.9", "--top-k", "50", "--seed", str(seed), "--json", "-"]
            return json.loads(teal("generate", "model", "--prompt", "The", *options).out)["text"]

        assert text(1) == text(1) != text(2)

    def test_chat(self, teal: Callable[..., Outcome]) -> None:
        lines = b"Hello\n\n/level 0.25\n/level 2\n/quit\nAgain\n/clear now\n/clear\nAnew\n/exit\nnever read\n"
        rewrite(Path("model/config.json"), lambda config: config.update(max_position_embeddings=256))
        result = teal("chat", "model", "--max-new-tokens", 5, "--json", "chat.json", stdin=lines)
        assert result.code == 0
        turns = json.loads(Path("chat.json").read_text())["turns"]
        assert [turn["user"] for turn in turns] == ["Hello", "Again", "Anew"]
        assert [turn["level"] for turn in turns] == [0.5, 0.25, 0.25]
        assert turns[1]["prompt_tokens"] > turns[2]["prompt_tokens"]
        assert result.complaints == [
            "teal: sparsity must be at least 0 and below 1, got 2; 0.5 means half",
            "teal: /quit is not a command: there are /level S, /clear and /exit",
            "teal: /clear now is not a command: there are /level S, /clear and /exit",
        ]
        assert "sparsity 0.25\n" in result.err

    def test_a_failing_turn_does_not_end_a_chat(self, teal: Callable[..., Outcome]) -> None:
        lines = b"A question that is much longer than the context of this model can hold.\n\xff\nHi\n"
        result = teal("chat", "model", "--max-new-tokens", 5, "--json", "-", stdin=lines)
        assert result.code == 0
        assert [turn["user"] for turn in json.loads(result.out)["turns"]] == ["Hi"]
        assert "leaves no room in a context of 64" in result.complaints[0]
        assert "no UTF-8" in result.complaints[1]

    def test_bench_and_inspect_its_result(self, teal: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("teal.benchmark.READ_BYTES", 1 << 16)
        arguments = ["bench", "model", "--context", "8", "--tokens", "4", "--repeats", "1", "--levels", "0.5", "0.5"]
        result = teal(*arguments, "--json", "b.json")
        assert result.code == 0
        assert "correct: products differ from the reference by at most" in result.out
        assert [speed["level"] for speed in json.loads(Path("b.json").read_text())["speeds"]] == [0, 0.5]
        assert teal("inspect", "b.json").out == result.out
        assert json.loads(teal(*arguments, "--json", "-").out)["details"]["model"] == "model"

    def test_inspect_shows_samples(self, teal: Callable[..., Outcome]) -> None:
        texts = [{"level": 0.0, "prompt": "A", "text": " b."}, {"level": 0.5, "prompt": "A", "text": " c."}]
        write_samples(Path("samples.json"), texts, "greedy")
        result = teal("inspect", "samples.json")
        assert result.out == "greedy\n\ndense: A b.\n\nsparsity 0.5: A c.\n"

    @pytest.mark.parametrize(
        ("options", "layout"),
        [
            (["--weights", "int8"], "cpu_int8"),
            (["--weights", "int4", "--head-weights", "int4", "--head-sparsity", "0.5"], "cpu_int4"),
        ],
    )
    def test_bench_of_rounded_weights(
        self, options: list[str], layout: str, teal: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("teal.benchmark.READ_BYTES", 1 << 16)
        command = [
            "bench",
            "model",
            "--context",
            "8",
            "--tokens",
            "4",
            "--repeats",
            "1",
            "--levels",
            "0.5",
            "--json",
            "-",
        ]
        plain, rounded = (json.loads(teal(*command, *more).out) for more in ([], options))
        assert rounded["details"]["layout"] == layout
        assert rounded["speeds"][0]["bytes_needed"] < plain["speeds"][0]["bytes_needed"]

    def test_bench_of_a_shape(self, teal: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch) -> None:
        sizes = dict(vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4)
        monkeypatch.setattr("teal.benchmark.READ_BYTES", 1 << 16)
        monkeypatch.setitem(__import__("teal.shapes").shapes.SHAPES, "tiny", ("llama", sizes))
        result = teal("bench", "--shape", "tiny", "--tokens", 3, "--repeats", 1, "--context", 4, "--json", "-")
        assert result.code == 0
        assert json.loads(result.out)["details"]["model"] == "random weights of tiny"

    def test_a_saved_sparse_model_is_inspected_as_its_plan(self, teal: Callable[..., Outcome]) -> None:
        from teal import load, save, sparsify
        from teal.checkpoint import load_model

        save(sparsify(load_model(Path("model")), SparsityPlan.load(PLAN), 0.25), "sparse")
        assert "uniform" in teal("inspect", "sparse").out
        assert load(load_model(Path("model")), "sparse").sparsity_level == 0.25

    def test_doctor(self, teal: Callable[..., Outcome]) -> None:
        result = teal("doctor")
        assert result.code == 0
        assert "row_major              works" in result.out
        findings = json.loads(teal("doctor", "--json", "-").out)
        assert set(findings) == {"versions", "processor", "GPUs", "backends"}
        assert "WRONG" not in json.dumps(findings)

    def test_doctor_without_the_native_library(
        self, teal: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(native, "library", lambda: None)
        monkeypatch.setattr(native, "find", lambda: None)
        backends = json.loads(teal("doctor", "--json", "-").out)["backends"]
        for layout in ("cpu", "cpu_int8", "cpu_int4"):
            assert backends[layout] == "works (zeroes inputs, reads every weight)"
        assert "pip install --no-cache-dir --force-reinstall --no-deps" in backends["native CPU kernels"]

    @pytest.mark.filterwarnings("always::UserWarning")
    @pytest.mark.parametrize("family", ["gemma2", "phi3"])
    def test_what_the_engine_cannot_serve_goes_through_transformers(
        self, family: str, teal: Callable[..., Outcome]
    ) -> None:
        save_tiny(Path(family), family)
        arguments = ["--prompt", "The", "--max-new-tokens", "6", "--json", "-"]
        dense = teal("generate", family, "--dense", *arguments)
        assert dense.code == 0
        assert dense.complaints == []
        (warning,) = dense.warnings
        assert "decoding through transformers" in warning
        assert family in warning
        assert json.loads(dense.out)["engine"] == "transformers"
        assert teal("calibrate", family, "--text", "text.txt", "--tokens", 256).code == 0
        assert teal("allocate", family, "--method", "uniform").code == 0
        sparse = json.loads(teal("generate", family, "--level", 0.5, *arguments).out)
        assert (sparse["level"], sparse["new_tokens"]) == (0.5, 6)
        options = ["--temperature", "1", "--top-p", "0.9", "--stop", "q"]
        sampled = [json.loads(teal("generate", family, "--dense", *arguments, *options).out) for _ in range(2)]
        assert sampled[0]["text"] == sampled[1]["text"]
        assert "q" not in sampled[0]["text"]
        too_long = teal("generate", family, "--dense", "--prompt", "x" * 70)
        assert "leaves no room in a context of 64" in too_long.complaints[0]
        assert too_long.code == 1


@pytest.mark.usefixtures("home")
class TestTune:
    """What it finds is what the other verbs use."""

    def test_the_result_is_used(self, teal: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("teal.benchmark.READ_BYTES", 1 << 16)
        arguments = list(READS_MODEL["tune"])
        del arguments[arguments.index("--output") : arguments.index("--output") + 2]
        outcome = teal(*arguments, "--bench", "--json", "-")
        assert outcome.code == 0, outcome.err
        result, tuned = json.loads(outcome.out), Path("teal-model/tuned")
        assert result == json.loads((tuned / "tuning.json").read_text())
        assert result["format"] == "teal.tuning"
        assert 0 < result["level"] < 0.75
        assert result["speed"]["speeds"][1]["level"] == result["level"]
        assert f"uniform at level {result['level']:g}: KL divergence from dense" in outcome.err
        assert "times (" in outcome.err
        assert SparsityPlan.load(tuned / "plan.json") == SparsityPlan.load(PLAN)
        generate = [*READS_MODEL["generate"], "--max-new-tokens", "3", "--json", "-"]
        outcome = teal(*generate)
        assert json.loads(outcome.out)["level"] == result["level"]
        assert outcome.err.startswith(f"{tuned}: level {result['level']:g}\n")
        assert json.loads(teal(*generate, "--level", "0.25").out)["level"] == 0.25
        assert json.loads(teal(*generate, "--plan", PLAN).out)["level"] == 0.5
        assert json.loads(teal(*generate, "--plan", tuned).out)["level"] == result["level"]
        assert json.loads(teal(*generate, "--dense").out)["level"] == 0
        bench = json.loads(teal(*READS_MODEL["bench"], "--json", "-").out)
        assert [speed["level"] for speed in bench["speeds"]] == [0, result["level"]]
        assert "played no part in the search" in teal("inspect", tuned / "tuning.json").out
        assert f"at level {result['level']:g}" not in teal("inspect", PLAN).out

    def test_a_plan_is_made(self, teal: Callable[..., Outcome]) -> None:
        shutil.rmtree("teal-model")
        outcome = teal(*READS_MODEL["tune"], "--json", "-")
        assert outcome.code == 0, outcome.err
        assert json.loads(outcome.out)["plan"] == SparsityPlan.load(PLAN).method == "global"
        assert "tokens counted at 4 inputs" in outcome.err

    def test_dense_is_the_answer(self, teal: Callable[..., Outcome]) -> None:
        outcome = teal(*READS_MODEL["tune"], "--max-loss", "0.000001nats", "--output", "teal-model/tuned")
        assert outcome.code == 0
        assert "dense is the answer: even level 0.01 costs" in outcome.out
        outcome = teal(*READS_MODEL["generate"], "--max-new-tokens", "3", "--json", "-")
        assert json.loads(outcome.out)["level"] == 0
        assert outcome.err.startswith("teal-model/tuned: dense\n")

    @pytest.mark.filterwarnings("always::UserWarning")
    def test_the_text_the_plan_was_made_on(self, refuses: Callable[..., Outcome], teal: Callable[..., Outcome]) -> None:
        arguments = ["text.txt" if argument == "held.txt" else argument for argument in READS_MODEL["tune"]]
        refuses(*arguments, says="the plan was made on this very text; name held-out text with --text")
        shutil.copy("text.txt", "renamed.txt")
        arguments = ["renamed.txt" if argument == "held.txt" else argument for argument in READS_MODEL["tune"]]
        refuses(*arguments, says="the plan was made on this very text; name held-out text with --text")
        Path("elsewhere").mkdir()
        shutil.copy("held.txt", "elsewhere/text.txt")
        arguments = ["elsewhere/text.txt" if argument == "held.txt" else argument for argument in READS_MODEL["tune"]]
        assert "a text called text.txt, too" in teal(*arguments).err

    def test_accuracy_of_tasks(self, teal: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("teal.benchmark.READ_BYTES", 1 << 16)
        for name in ("some", "more"):
            Path(f"{name}.jsonl").write_text(ITEMS * 5)
        arguments = ["tune", "model", "--metric", "accuracy", "--task", "some.jsonl", "more.jsonl", "--shots", "1"]
        outcome = teal(*arguments, "--limit", "20", "--max-loss", "30%", "--bench", "--json", "-")
        assert outcome.code == 0, outcome.err
        result = json.loads(outcome.out)
        assert result["budget"] == {"metric": "accuracy", "text": "30 points", "limit": 0.3}
        assert [(task["name"], task["items"], task["shots"]) for task in result["details"]["tasks"]] == [
            ("some", 20, 1), ("more", 20, 1),
        ]  # fmt: skip
        assert result["confirmation"]["format"] == "teal.tasks"
        assert result["level"] > 0
        assert result["speed"]["speeds"][1]["level"] == result["level"]
        assert "(allowed: 30 points), measured on 20 items that played no part in the search" in outcome.err
        assert "accuracy there: some " in teal("inspect", "teal-model/tuned/tuning.json").out
        assert teal("report", "teal-model").code == 0
        page = Path("teal-model/report.html").read_text(encoding="utf-8")
        assert "some (20 items, multiple choice), more (20 items, multiple choice); 20 items to search" in page
        assert "Task by task, on the items that confirm" in page
        outcome = teal(*arguments, "--max-loss", "1points", "--overwrite")
        assert "dense is the answer: too few items to tell; even if none of 28 were lost" in outcome.out
        assert teal("report", "teal-model", "--overwrite").code == 0

    def test_tasks_that_cannot_be(self, refuses: Callable[..., Outcome]) -> None:
        task, accuracy = ("--task", "items.jsonl"), ("tune", "model", "--metric", "accuracy", "--output", "new")
        for arguments, says in (
            (["--max-loss", "1%"], "--metric accuracy is measured on tasks; name their files with --task"),
            ([*task, "--max-loss", "1nats"], "accuracy is in percentage points, not in nats"),
            ([*task, "--max-loss", "1%", "--text", "held.txt"], "--text is for text; leave it out with --task"),
            ([*task, "--max-loss", "1%", "--tokens", "9"], "--tokens is for text; leave it out with --task"),
            ([*task, "--max-loss", "1%"], "6 items are too few to search on one half and confirm on the other"),
            (["--task", "no.jsonl", "--max-loss", "1%"], "no.jsonl does not exist"),
        ):
            refuses(*accuracy, *arguments, says=says, code=2)
        refuses("tune", "model", *task, "--max-loss", "1%", says="--task goes with --metric accuracy", code=2)
        refuses("tune", "model", "--limit", 3, "--max-loss", "1%", says="--limit is for --task", code=2)

    def test_what_cannot_be(self, refuses: Callable[..., Outcome], teal: Callable[..., Outcome]) -> None:
        arguments = READS_MODEL["tune"]
        refuses(*arguments, "--max-loss", "2", says="a number with its unit, such as 2% or 0.02nats", code=2)
        refuses(*arguments, "--max-loss", "2%", says="KL divergence is in nats", code=2)
        refuses(*arguments, "--metric", "taste", says="choose from perplexity, kl", code=2)
        refuses(*arguments, "--tokens", 480, says="15 sequences are too few", code=2)
        refuses(*arguments, "--json", "new/plan.json", says="--json would overwrite the output new/plan.json", code=2)
        refuses(*arguments, "--output", "text.txt", says="cannot write text.txt/plan.json")
        assert teal(*arguments).code == 0
        refuses(*arguments, says="new/plan.json exists; name another --output or pass --overwrite")
        assert teal(*arguments, "--overwrite").code == 0


@pytest.mark.usefixtures("home")
class TestSparsityLog:
    GENERATE = ("generate", "model", "--prompt", "The quick", "--max-new-tokens", "45", "--json", "-", "--log-sparsity")

    @pytest.mark.filterwarnings("always::UserWarning")
    def test_drift_is_told(self, teal: Callable[..., Outcome]) -> None:
        def edit(payload: dict[str, Any]) -> None:
            for block in payload["blocks"]:
                for projection in block.values():  # as if calibrated on text with larger activations
                    projection["threshold"] = [2 * value if value > 0 else value for value in projection["threshold"]]

        rewrite(PLAN, edit)
        outcome = teal(*self.GENERATE)
        log = json.loads(outcome.out)["sparsity"]
        assert len(log["tokens"]) == json.loads(outcome.out)["new_tokens"] - 1
        assert log["realised"] > log["expected"] + 0.1
        assert outcome.warnings == [f"teal: warning: {log['warning']}"]
        assert f"realised {log['realised']:.3f} where 0.500 was expected" in outcome.err

    def test_only_if_asked_for(self, teal: Callable[..., Outcome]) -> None:
        outcome = teal(*self.GENERATE[:-1])
        assert "sparsity" not in json.loads(outcome.out)
        assert "realised" not in outcome.err

    def test_of_a_chat(self, teal: Callable[..., Outcome]) -> None:
        options = ["--max-new-tokens", "20", "--log-sparsity", "--json", "-"]
        outcome = teal("chat", "model", *options, stdin=b"Hello\n/clear\n/level 0\nHello\n")
        sparse, dense = json.loads(outcome.out)["turns"]
        assert len(sparse["sparsity"]["tokens"]) == sparse["new_tokens"] - 1
        assert "sparsity" not in dense

    def test_dense(self, refuses: Callable[..., Outcome]) -> None:
        refuses(*self.GENERATE, "--dense", says="there is none to log", code=2)
        refuses(*self.GENERATE, "--level", "0", says="there is none to log", code=2)


@pytest.mark.usefixtures("home")
class TestReport:
    def test_of_what_there_is(self, teal: Callable[..., Outcome]) -> None:
        outcome = teal("report", "teal-model", "--json", "-")
        assert outcome.code == 0, outcome.err
        found = json.loads(outcome.out)
        assert found["output"] == "teal-model/report.html"
        assert found["shown"]["statistics"] == ["statistics.safetensors"]
        assert found["shown"]["plans"] == ["plan.json"]
        page = Path("teal-model/report.html").read_text(encoding="utf-8")
        assert (
            "Not here: no evaluations (`teal evaluate --json FILE`), no tasks (`teal tasks --json FILE`), no tunings"
            in page
        )

    def test_of_all_verbs(self, teal: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("teal.benchmark.READ_BYTES", 1 << 16)
        for verb, output in (("evaluate", "e.json"), ("bench", "b.json"), ("tasks", "t.json")):
            assert teal(*READS_MODEL[verb], "--levels", "0.25", "0.5", "--json", f"teal-model/{output}").code == 0
        assert teal(*READS_MODEL["tune"], "--output", "teal-model/tuned").code == 0
        outcome = teal("report", "teal-model", "--json", "-")
        shown = json.loads(outcome.out)["shown"]
        assert {kind: len(names) for kind, names in shown.items()} == {
            **dict.fromkeys(shown, 1), "texts": 0, "samples": 0,
        }  # fmt: skip
        page = Path("teal-model/report.html").read_text(encoding="utf-8")
        assert "Not here" not in page
        assert "What the loss buys" in page

    def test_what_cannot_be(self, refuses: Callable[..., Outcome], teal: Callable[..., Outcome]) -> None:
        refuses("report", "nowhere", says="nowhere is not a directory")
        refuses("report", "text.txt", says="text.txt is not a directory")
        refuses("report", says="the following arguments are required: DIR", code=2)
        refuses("report", "other", says="other holds no statistics, plan or result of teal")
        refuses("report", "teal-model", "--level", 0.9, says="the plan covers sparsity 0.0 to 0.75, got 0.9")
        refuses("report", "teal-model", "--output", "model", says="cannot write model: it is a directory")
        assert teal("report", "teal-model").code == 0
        refuses("report", "teal-model", says="teal-model/report.html exists; name another --output or pass --overwrite")
        assert teal("report", "teal-model", "--overwrite").code == 0

    @pytest.mark.parametrize("damage", [b"", b"{", b'{"format": "teal.plan", "version": 1}', b"\xff\xfe"])
    def test_a_damaged_file(self, damage: bytes, refuses: Callable[..., Outcome]) -> None:
        Path("teal-model/x.json").write_bytes(damage)
        refuses("report", "teal-model", says="teal-model/x.json")

    @pytest.mark.parametrize("content", ["[1, 2]", '{"a": NaN}', '{"format": "another"}', "3"])
    def test_files_of_other_programs_are_left_alone(self, content: str, teal: Callable[..., Outcome]) -> None:
        Path("teal-model/x.json").write_text(content)
        assert teal("report", "teal-model").code == 0

    def test_what_is_no_page_is_not_replaced(self, refuses: Callable[..., Outcome]) -> None:
        before = STATISTICS.read_bytes()
        refuses(
            "report",
            "teal-model",
            "--output",
            STATISTICS,
            "--overwrite",
            says="is not a page, and would be lost",
            code=2,
        )
        assert STATISTICS.read_bytes() == before

    def test_damaged_statistics(self, refuses: Callable[..., Outcome]) -> None:
        STATISTICS.write_bytes(STATISTICS.read_bytes()[:1000])
        refuses("report", "teal-model", says=f"{STATISTICS} is truncated, corrupt or not safetensors")


@pytest.fixture
def short_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole pipeline on the embedded model, with less of everything."""
    from teal import benchmark, data

    blocks, measure = data.token_blocks, benchmark.benchmark
    monkeypatch.setattr(data, "token_blocks", lambda *a, **o: blocks(*a, **{**o, "length": 48, "count": 2}))
    monkeypatch.setattr(benchmark, "benchmark", lambda *a, **o: measure(*a, **o, new_tokens=3, repeats=1))
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("short_demo")
def test_demo(teal: Callable[..., Outcome]) -> None:
    result = teal("demo", "--json", "-")
    assert result.code == 0
    assert set(json.loads(result.out)) == {"output", "seconds", "evaluation", "bench", "samples"}
    page = Path("teal-demo/report.html").read_text(encoding="utf-8")
    titles = ("Quality against sparsity", "Decode speed", "Generated text", "Sparsity of each projection")
    assert all(f"{title}</h2>" in page for title in titles)
    assert json.loads(result.out)["samples"][1]["text"].strip()[:20] in html.unescape(page)
    assert (
        teal("report", "teal-demo", "--output", "again.html", "--title", re.findall("<h1>(.*?)</h1>", page)[0]).code
        == 0
    )
    assert Path("again.html").read_text(encoding="utf-8") == page, "the demo's page is that of teal report"
    for name in ("evaluation.json", "bench.json", "uniform.json", "global.json", "statistics.safetensors", "model"):
        assert teal("inspect", f"teal-demo/{name}").code == 0
    again = teal("demo")
    assert again.complaints == ["teal: teal-demo exists and is not empty; name another --output or pass --overwrite"]


@pytest.mark.usefixtures("short_demo")
def test_an_interrupted_demo_continues(teal: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch) -> None:
    """At each of its steps in turn; what was finished is not done again."""
    out = Path("teal-demo")
    steps = {
        "statistics.ActivationStatistics.save": [],
        "evaluation._logits": ["statistics.safetensors", "uniform.json", "global.json", "global.vectors.safetensors"],
        "benchmark.read_bandwidth": [
            "statistics.safetensors",
            "uniform.json",
            "global.json",
            "global.vectors.safetensors",
            "evaluation.json",
        ],
    }
    for target, finished in steps.items():
        with monkeypatch.context() as patched:
            patched.setattr(f"teal.{target}", interrupt)
            outcome = teal("demo")
        assert outcome.complaints == [
            "teal: interrupted; finished steps are kept, repeat the command without --overwrite to continue"
        ]
        kept = {path.name for path in out.iterdir() if path.suffix != ".partial"}
        assert kept == {*finished, "model", "unfinished"}
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    assert teal("demo").code == 0
    assert not (out / "unfinished").exists()
    for name in ("statistics.safetensors", "global.json", "evaluation.json", "model"):
        assert (out / name).stat().st_mtime_ns == before[name]
    assert teal("demo", "--overwrite").code == 0
    assert all((out / name).stat().st_mtime_ns != before[name] for name in before if name != "unfinished")
    assert not [path for path in out.iterdir() if path.suffix == ".partial"]


READS_MODEL = {
    "calibrate": ["calibrate", "model", "--text", "text.txt", "--tokens", "64", "--output", "new"],
    "allocate": [
        *("allocate", "model", "--method", "blockwise", "--text", "text.txt", "--tokens", "64"),
        *("--output", "new", "--step", "0.1"),
    ],
    "evaluate": ["evaluate", "model", "--text", "text.txt", "--tokens", "64"],
    "tune": [
        *("tune", "model", "--text", "held.txt", "--tokens", "512", "--length", "32", "--output", "new"),
        *("--max-loss", "0.05nats", "--metric", "kl"),
    ],
    "tasks": ["tasks", "model", "--task", "items.jsonl"],
    "generate": ["generate", "model", "--prompt", "The"],
    "bench": ["bench", "model", "--context", "4", "--tokens", "2", "--repeats", "1"],
    "inspect": ["inspect", "model"],
}
READS_PLAN = ("evaluate", "tasks", "tune", "generate", "bench")
TAKES_LEVELS = ("evaluate", "tasks", "bench")
every_reader = pytest.mark.parametrize("arguments", READS_MODEL.values(), ids=READS_MODEL)
every_plan_reader = pytest.mark.parametrize("arguments", [READS_MODEL[verb] for verb in READS_PLAN], ids=READS_PLAN)


@pytest.mark.usefixtures("home")
class TestBadText:
    @pytest.mark.parametrize("verb", ["calibrate", "allocate", "evaluate"])
    @pytest.mark.parametrize(
        ("source", "content", "says", "code"),
        [
            ("nowhere.txt", None, "nowhere.txt does not exist", 2),
            ("empty.txt", b"", "empty.txt holds no text", 1),
            ("latin.txt", "grüße".encode("latin-1"), "latin.txt is not UTF-8 text", 1),
            ("bad.jsonl", b'{"text": "x"}\n{', "bad.jsonl, line 2 is not JSON", 1),
            ("short.txt", b"too short", "the text gives 9 tokens, 63 are needed (1 x 64)", 1),
            ("model", None, "model is a model, not a text", 2),
            ("hf:some", None, "pip install 'teal-llm[datasets]'", 1),
        ],
    )
    def test_of_each_verb(
        self,
        verb: str,
        source: str,
        content: bytes | None,
        says: str,
        code: int,
        refuses: Callable[..., Outcome],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setitem(sys.modules, "datasets", None)
        if content is not None:
            Path(source).write_bytes(content)
        arguments = [source if argument == "text.txt" else argument for argument in READS_MODEL[verb]]
        refuses(*arguments, "--length", 64, says=says, code=code)

    def test_tasks(self, refuses: Callable[..., Outcome]) -> None:
        refuses("tasks", "model", says="the following arguments are required: --task", code=2)
        refuses("tasks", "model", "--task", "nowhere.jsonl", says="nowhere.jsonl does not exist", code=2)
        refuses("tasks", "model", "--task", "text.txt", says="text.txt, line 1 is not JSON")
        refuses("tasks", "model", "--task", "items.jsonl", "--shots", 6, says="leaves none to ask", code=2)

    def test_fewer_tokens_than_asked(self, refuses: Callable[..., Outcome]) -> None:
        says = "the text gives 900 tokens, 1008 are needed (16 x 64); give more text"
        refuses("calibrate", "model", "--text", "text.txt", "--tokens", 1024, "--output", "new", says=says)

    def test_standard_input(self, refuses: Callable[..., Outcome]) -> None:
        arguments = ["calibrate", "model", "--text", "-", "--output", "new"]
        refuses(*arguments, says="- holds no text")
        refuses(*arguments, stdin=b"\xff", says="standard input is not UTF-8 text")

    def test_blocks_longer_than_the_context(self, refuses: Callable[..., Outcome]) -> None:
        says = "blocks of 65 tokens do not fit the model's context of 64"
        refuses(*READS_MODEL["evaluate"], "--length", 65, says=says, code=2)

    def test_no_tokens_left_to_count(self, refuses: Callable[..., Outcome]) -> None:
        says = "dense_tokens must be between 0 and 63"
        refuses(*READS_MODEL["calibrate"], "--dense-tokens", 64, says=says, code=2)
        refuses(*READS_MODEL["evaluate"], "--dense-tokens", 63, says="between 0 and 62", code=2)


@pytest.mark.usefixtures("home")
class TestBadModel:
    @every_reader
    @pytest.mark.parametrize(
        ("config", "says"),
        [
            ({"model_type": "perceptron"}, "config.json is not understood"),
            ({"model_type": "gpt2"}, "unknown architecture 'gpt2'"),
            (None, "is not understood"),
        ],
        ids=["unknown", "unsupported", "damaged"],
    )
    @pytest.mark.filterwarnings("always::UserWarning")
    def test_architecture(
        self, arguments: list[str], config: dict[str, str] | None, says: str, refuses: Callable[..., Outcome]
    ) -> None:
        if config is None:
            Path("model/config.json").write_text('{"model_type": ')
        else:
            rewrite(Path("model/config.json"), lambda payload: payload.update(config))
        if arguments[0] in READS_PLAN and config != {"model_type": "perceptron"}:
            says = "model"  # what is noticed first differs
        refuses(*arguments, says=says)

    @every_reader
    @pytest.mark.parametrize("damage", ["truncated", "corrupt", "pickled", "pickle-renamed", "missing-shard", "none"])
    def test_weights(self, arguments: list[str], damage: str, refuses: Callable[..., Outcome]) -> None:
        weights = Path("model/model.safetensors")
        content = weights.read_bytes()
        if damage == "truncated":
            weights.write_bytes(content[: len(content) // 2])
        elif damage == "corrupt":
            weights.write_bytes(b"\xff" * 8 + content[8:])
        elif damage == "pickle-renamed":
            weights.write_bytes(pickle.dumps({"x": 1}))
        else:
            weights.unlink()
        if damage == "pickled":
            Path("model/pytorch_model.bin").write_bytes(pickle.dumps({"x": 1}))
        if damage == "missing-shard":
            index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
            Path("model/model.safetensors.index.json").write_text(json.dumps(index))
        says = {
            "pickled": "holds only pickled weights (pytorch_model.bin)",
            "missing-shard": "names model-00001-of-00002.safetensors, which is missing; download the checkpoint again",
            "none": "holds no weights",
        }.get(damage, "model.safetensors is truncated, corrupt or unreadable")
        refuses(*arguments, says=says)

    @every_reader
    @pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight"])
    def test_a_missing_tensor(self, arguments: list[str], name: str, refuses: Callable[..., Outcome]) -> None:
        edit_weights(lambda tensors: tensors.pop(name))
        if arguments[0] == "inspect" and "embed" in name:
            return  # it reads the blocks only
        refuses(*arguments, says=name)

    @every_reader
    def test_weights_of_other_shapes(self, arguments: list[str], refuses: Callable[..., Outcome]) -> None:
        rewrite(Path("model/config.json"), lambda config: config.update(vocab_size=300))
        if arguments[0] != "inspect":
            refuses(*arguments, says="model")

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_weights_that_are_not_finite(self, value: float, refuses: Callable[..., Outcome]) -> None:
        edit_weights(lambda tensors: tensors["model.layers.0.self_attn.v_proj.weight"].fill_(value))
        refuses(*READS_MODEL["calibrate"], says="at the input of block 0 self_attn.o_proj")
        shutil.rmtree("new.partial", ignore_errors=True)
        refuses(*READS_MODEL["generate"], "--dense", says="logits are NaN or infinite")

    @pytest.mark.filterwarnings("always::UserWarning")
    def test_logits_that_are_not_finite(self, refuses: Callable[..., Outcome]) -> None:
        edit_weights(lambda tensors: tensors["lm_head.weight"].fill_(float("nan")))
        refuses(*READS_MODEL["evaluate"], says="logits are NaN or infinite")

    @pytest.mark.parametrize("verb", ["calibrate", "evaluate", "generate", "bench"])
    @pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"version": "1.0", "model": {"type": "BPE"}}'])
    def test_tokenizer(self, verb: str, content: str, refuses: Callable[..., Outcome]) -> None:
        Path("model/tokenizer.json").write_text(content)
        refuses(*READS_MODEL[verb], says="has no usable tokenizer")

    @pytest.mark.parametrize("verb", ["calibrate", "evaluate", "generate", "bench"])
    def test_no_tokenizer(self, verb: str, refuses: Callable[..., Outcome]) -> None:
        for path in Path("model").glob("tokenizer*"):
            path.unlink()
        refuses(*READS_MODEL[verb], says="has no usable tokenizer")

    @pytest.mark.parametrize("verb", ["calibrate", "evaluate", "generate", "bench"])
    def test_tokenizer_of_a_larger_vocabulary(self, verb: str, refuses: Callable[..., Outcome]) -> None:
        def shift(payload: Any) -> None:
            vocabulary = payload["model"]["vocab"]
            payload["model"]["vocab"] = {symbol: index + 900 * (index > 1) for symbol, index in vocabulary.items()}

        rewrite(Path("model/tokenizer.json"), shift)
        code = 2 if verb in ("generate", "bench") else 1
        refuses(*READS_MODEL[verb], says="outside the model's vocabulary of 258", code=code)

    @every_reader
    @pytest.mark.parametrize("name", ["./nowhere", "text.txt"])
    def test_no_directory(self, arguments: list[str], name: str, refuses: Callable[..., Outcome]) -> None:
        arguments = [name if argument == "model" else argument for argument in arguments]
        if arguments[0] in READS_PLAN:
            arguments = [*arguments, "--plan", str(PLAN)]
        if (arguments[0], name) == ("inspect", "text.txt"):
            refuses(*arguments, says="text.txt is not valid JSON")
        else:
            refuses(*arguments, says=f"{name} is not a directory", code=2)

    def test_a_name_that_cannot_be_downloaded(
        self, refuses: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import huggingface_hub

        def fail(*_: object, **__: object) -> None:
            raise ConnectionError("no network\nmore")

        monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
        refuses("inspect", "some/model", says="some/model is no local directory and could not be downloaded", code=2)


PLAN_DAMAGE: dict[str, tuple[Callable[[Any], object], str]] = {
    "newer-version": (lambda p: p.update(version=99), "has version 99, this teal reads up to 1; upgrade teal-llm"),
    "unknown-key": (lambda p: p.update(extra=1), "has unknown keys ['extra']"),
    "nan": (
        lambda p: p["blocks"][1]["mlp.up_proj"]["threshold"].__setitem__(2, float("nan")),
        "holds NaN; it is damaged",
    ),
    "missing-projection": (
        lambda p: p["blocks"][1].pop("mlp.up_proj"),
        "thresholds are missing for block 1 mlp.up_proj",
    ),
    "missing-level": (lambda p: p["blocks"][0]["mlp.up_proj"]["threshold"].pop(), "block 0 mlp.up_proj needs 4"),
    "other-format": (lambda p: p.update(format="x"), "has format 'x', expected 'teal.plan'"),
}


@pytest.mark.usefixtures("home")
class TestBadArtifacts:
    @every_plan_reader
    @pytest.mark.parametrize(("damage", "says"), PLAN_DAMAGE.values(), ids=PLAN_DAMAGE)
    def test_plan(
        self, arguments: list[str], damage: Callable[[Any], object], says: str, refuses: Callable[..., Outcome]
    ) -> None:
        rewrite(PLAN, damage)
        refuses(*arguments, says=says)
        refuses("inspect", PLAN, says=says)

    @every_plan_reader
    @pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe\x00"], ids=["empty", "cut", "list", "binary"])
    def test_plan_that_is_none(self, arguments: list[str], content: bytes, refuses: Callable[..., Outcome]) -> None:
        PLAN.write_bytes(content)
        refuses(*arguments, says=str(PLAN))

    @every_plan_reader
    def test_no_plan(self, arguments: list[str], refuses: Callable[..., Outcome]) -> None:
        PLAN.unlink()
        refuses(*arguments, "--plan", "nowhere.json", says="nowhere.json does not exist")
        if arguments[0] != "tune":  # which makes one
            refuses(*arguments, says=f"no plan at {PLAN}; run `teal calibrate model` and `teal allocate model` first")

    def test_a_plan_that_is_a_directory(self, refuses: Callable[..., Outcome]) -> None:
        says = "teal-model is a directory without teal.json, which teal tune and teal.save write; name one that has it"
        refuses("generate", "model", "--prompt", "The", "--plan", "teal-model", says=says)
        refuses("evaluate", "model", "--plan", "teal-model", says="teal-model is a directory; name the file in it")

    @every_plan_reader
    def test_plan_of_other_shapes(self, arguments: list[str], refuses: Callable[..., Outcome]) -> None:
        says = "32 x 64 in the plan and 32 x 56 in the model"
        refuses(*arguments, "--plan", "teal-wider/plan.json", says=says)

    @every_plan_reader
    @pytest.mark.filterwarnings("always::UserWarning")
    def test_plan_of_other_weights(
        self,
        arguments: list[str],
        teal: Callable[..., Outcome],
        refuses: Callable[..., Outcome],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr("teal.benchmark.READ_BYTES", 1 << 16)
        arguments = ["other" if argument == "model" else argument for argument in arguments]
        outcome = teal(*arguments, "--plan", PLAN, *(["--levels", "0.5"] if arguments[0] in TAKES_LEVELS else []))
        assert outcome.code == 0
        (warning,) = outcome.warnings
        assert "the plan may not belong to this model: it was made for other weights" in warning
        overwrite = ["--overwrite"] if arguments[0] == "tune" else []
        refuses(*arguments, *overwrite, "--plan", PLAN, "--strict", says="the plan may not belong to this model")

    @every_plan_reader
    def test_a_models_own_plan_under_another_dtype(
        self, arguments: list[str], teal: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The weights that count are the stored ones, float32 here. Warnings are errors."""
        monkeypatch.setattr("teal.benchmark.READ_BYTES", 1 << 16)
        levels = ["--levels", "0.5"] if arguments[0] in TAKES_LEVELS else []
        assert teal(*arguments, *levels, "--strict", "--dtype", "bfloat16").code == 0

    @every_plan_reader
    def test_statistics_passed_as_a_plan(self, arguments: list[str], refuses: Callable[..., Outcome]) -> None:
        refuses(*arguments, "--plan", STATISTICS, says=str(STATISTICS))

    def test_a_plan_passed_as_statistics(self, refuses: Callable[..., Outcome]) -> None:
        refuses(*READS_MODEL["allocate"], "--statistics", PLAN, says=f"{PLAN} is truncated, corrupt or not safetensors")
        refuses(*READS_MODEL["calibrate"], "--merge", PLAN, says=f"{PLAN} is truncated, corrupt or not safetensors")

    def test_weights_passed_as_statistics(self, refuses: Callable[..., Outcome]) -> None:
        arguments = [*READS_MODEL["allocate"], "--statistics", "model/model.safetensors"]
        refuses(*arguments, says="has format None, expected 'teal.statistics'")

    def test_no_statistics(self, refuses: Callable[..., Outcome]) -> None:
        STATISTICS.unlink()
        refuses(*READS_MODEL["allocate"], says=f"no statistics at {STATISTICS}; run `teal calibrate model` first, or")

    def test_statistics_of_other_shapes(self, refuses: Callable[..., Outcome]) -> None:
        other = "teal-wider/statistics.safetensors"
        says = "32 x 64 in the statistics and 32 x 56 in the model"
        refuses(*READS_MODEL["allocate"], "--statistics", other, says=says)
        refuses(*READS_MODEL["calibrate"], "--merge", other, says="mlp.down_proj has weight 32 x 56")

    @pytest.mark.filterwarnings("always::UserWarning")
    def test_statistics_of_other_weights(self, teal: Callable[..., Outcome], refuses: Callable[..., Outcome]) -> None:
        arguments = ["allocate", "other", "--statistics", STATISTICS, "--method", "uniform", "--output", "new"]
        refuses(*arguments, "--strict", says="the statistics may not belong to this model")
        outcome = teal(*arguments)
        assert outcome.code == 0
        assert ["the statistics may not belong" in line for line in outcome.warnings] == [True]
        calibrate = ["calibrate", "other", "--text", "text.txt", "--tokens", "64", "--output", "merged"]
        refuses(*calibrate, "--merge", STATISTICS, says="of different weights and cannot be added")

    def test_statistics_with_another_token_rule(self, refuses: Callable[..., Outcome]) -> None:
        arguments = [*READS_MODEL["calibrate"], "--merge", STATISTICS, "--dense-tokens", "4"]
        refuses(*arguments, says="skip 8 and 4 dense tokens and cannot be added")

    @pytest.mark.parametrize("kept", [0, 100, 5000])
    def test_truncated_statistics(self, kept: int, refuses: Callable[..., Outcome]) -> None:
        STATISTICS.write_bytes(STATISTICS.read_bytes()[:kept])
        for arguments in (READS_MODEL["allocate"], ["inspect", STATISTICS]):
            refuses(*arguments, says=f"{STATISTICS} is truncated, corrupt or not safetensors")

    @pytest.mark.parametrize("verb", ["generate", *TAKES_LEVELS])
    def test_a_level_above_the_grid(self, verb: str, refuses: Callable[..., Outcome]) -> None:
        option = "--levels" if verb in TAKES_LEVELS else "--level"
        refuses(*READS_MODEL[verb], option, 0.9, says="the plan covers sparsity 0.0 to 0.75, got 0.9")
        refuses("inspect", PLAN, "--level", 0.9, says="the plan covers sparsity 0.0 to 0.75, got 0.9")

    def test_a_damaged_result(self, refuses: Callable[..., Outcome]) -> None:
        for name, payload in {"e.json": {"format": "teal.evaluation", "version": 1}, "x.json": {"format": "x"}}.items():
            Path(name).write_text(json.dumps(payload))
            refuses("inspect", name, says=name)


@pytest.mark.usefixtures("home")
class TestBadOutput:
    @pytest.mark.parametrize(
        ("arguments", "output"),
        [
            (["calibrate", "model", "--text", "text.txt"], STATISTICS),
            (["allocate", "model", "--method", "uniform"], PLAN),
        ],
        ids=["calibrate", "allocate"],
    )
    def test_that_exists(
        self, arguments: list[str], output: Path, refuses: Callable[..., Outcome], teal: Callable[..., Outcome]
    ) -> None:
        refuses(*arguments, says=f"{output} exists; name another --output or pass --overwrite")
        refuses(*arguments, "--output", "text.txt", says="text.txt exists")
        refuses(*arguments, "--output", "model", says="cannot write model: it is a directory; name a file")
        refuses(*arguments, "--output", "x" * 300, says=f"cannot write {'x' * 300}: File name too long")
        if arguments[0] in ("calibrate", "allocate"):
            read = "text.txt" if arguments[0] == "calibrate" else STATISTICS
            kept = Path(read).read_bytes()
            says = f"the output {read} would overwrite what this command reads; name another --output"
            refuses(*arguments, "--output", read, "--overwrite", says=says, code=2)
            weights = "model/model.safetensors"
            refuses(
                *arguments, "--output", weights, "--overwrite", says=f"the output {weights} would overwrite", code=2
            )
            assert Path(read).read_bytes() == kept
        tokens = ["--tokens", "64"] if arguments[0] == "calibrate" else []
        before = output.read_bytes()
        assert teal(*arguments, *tokens, "--overwrite").code == 0
        assert output.read_bytes() != before

    @pytest.mark.parametrize("arguments", [*READS_MODEL.values(), ["doctor"]], ids=[*READS_MODEL, "doctor"])
    def test_json_that_cannot_be_written_fails_first(
        self, arguments: list[str], refuses: Callable[..., Outcome]
    ) -> None:
        refuses(*arguments, "--json", "model", says="cannot write model: it is a directory; name a file")
        refuses(*arguments, "--json", "text.txt/x.json", says="cannot write text.txt/x.json")

    @pytest.mark.parametrize(
        ("arguments", "target"),
        [
            (["calibrate", "model", "--text", "text.txt"], "text.txt"),
            (["calibrate", "model", "--text", "-", "text.txt"], "other/../text.txt"),
            (["calibrate", "model", "--text", "."], "text.txt"),
            (["calibrate", "model", "--merge", "teal-model/statistics.safetensors"], STATISTICS),
            (["allocate", "model"], STATISTICS),
            (["allocate", "model", "--statistics", "teal-wider/statistics.safetensors"], "link"),
            (["allocate", "model"], "model/config.json"),
            (["evaluate", "model"], PLAN),
            (["tasks", "model", "--task", "items.jsonl"], "items.jsonl"),
            (["evaluate", "model", "--plan", "teal-wider/plan.json", "teal-model/plan.json"], PLAN),
            (["evaluate", "model"], "model/model.safetensors"),
            (["generate", "model", "--prompt", "x"], PLAN),
            (["chat", "model"], "model/tokenizer.json"),
            (["bench", "model", "--plan", "teal-model/plan.json"], PLAN),
            (["bench", "model", "--plan", "teal-model/plan.json"], "teal-model/plan.vectors.safetensors"),
            (["inspect", "teal-model/plan.json"], PLAN),
            (["inspect", "model"], "model/config.json"),
            (["import-published", "model", "--model", "model/config.json"], "model/config.json"),
        ],
    )
    def test_json_over_an_input(self, arguments: list[str], target: str, refuses: Callable[..., Outcome]) -> None:
        Path("link").symlink_to("teal-wider/statistics.safetensors")
        refuses(*arguments, "--json", target, says=f"--json {target} would overwrite what this command reads", code=2)

    @pytest.mark.parametrize("verb", ["calibrate", "allocate"])
    def test_json_over_the_output(self, verb: str, refuses: Callable[..., Outcome]) -> None:
        refuses(*READS_MODEL[verb], "--json", "./new", says="--json would overwrite the output new", code=2)

    def test_json_over_an_earlier_result(self, teal: Callable[..., Outcome]) -> None:
        for _ in range(2):
            assert teal("inspect", "model", "--json", "model/result.json").code == 0

    @pytest.mark.parametrize("verb", ["calibrate", "allocate"])
    def test_no_permission(self, verb: str, refuses: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(os, "access", lambda *_: False)
        refuses(*READS_MODEL[verb], says="cannot write new: no permission to write in .")

    @pytest.mark.parametrize("verb", ["calibrate", "allocate"])
    @pytest.mark.parametrize("written", [0, 1, 2, 3, 4])
    def test_disk_full(
        self,
        verb: str,
        written: int,
        teal: Callable[..., Outcome],
        refuses: Callable[..., Outcome],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """After so many files. What was finished is kept, and the repeated command ends as if nothing had been."""
        from teal import artifacts

        arguments = READS_MODEL[verb]
        assert teal(*["expected" if argument == "new" else argument for argument in arguments]).code == 0
        written_files = []
        write = artifacts.write_atomically

        def full(path: Path, fill: Callable[[Path], object]) -> None:
            def fail(temporary: Path) -> None:
                temporary.write_bytes(b"half of it")
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

            write(path, fill if len(written_files) < written else fail)
            written_files.append(path)

        monkeypatch.setattr(artifacts, "write_atomically", full)
        outcome = refuses(*arguments, says="No space left on device", changes=True)
        assert "cannot write new" in outcome.complaints[0]
        assert not Path("new").exists()
        assert not [path for path in Path().rglob(".*.tmp")]
        assert len(list(Path("new.partial").glob("*.safetensors"))) == (0, 1, 2, 3, 3)[written]
        monkeypatch.setattr(artifacts, "write_atomically", write)
        assert teal(*arguments).code == 0
        assert Path("new").read_bytes() == Path("expected").read_bytes()
        assert not Path("new.partial").exists()

    @pytest.mark.parametrize(
        ("verb", "says"),
        [
            ("calibrate", "teal: interrupted; finished blocks are kept, repeat the command to continue"),
            ("allocate", "teal: interrupted; finished parts are kept, repeat the command to continue"),
            ("evaluate", "teal: interrupted"),
            ("tune", "teal: interrupted; statistics and plan are kept, repeat the command to search anew"),
            ("generate", "teal: interrupted"),
        ],
    )
    def test_interrupted(
        self, verb: str, says: str, refuses: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for target in ("blockwalk.StreamedBlocks.block", "evaluation._logits", "engine.model.DecoderModel.decode"):
            monkeypatch.setattr(f"teal.{target}", interrupt)
        outcome = refuses(*READS_MODEL[verb], says="interrupted")
        assert outcome.complaints == [says]

    @pytest.mark.parametrize("error", [ValueError("incomplete JSON"), TealError("it is truncated"), None])
    def test_interrupted_within_native_code(
        self, error: Exception | None, refuses: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Which makes another error of KeyboardInterrupt."""

        def interrupted(*_: object) -> None:
            try:
                signal.raise_signal(signal.SIGINT)
            except KeyboardInterrupt:
                if error is not None:
                    raise error from None
                raise

        monkeypatch.setattr("teal.blockwalk.StreamedBlocks.block", interrupted)
        outcome = refuses(*READS_MODEL["calibrate"], says="interrupted")
        assert outcome.complaints == ["teal: interrupted; finished blocks are kept, repeat the command to continue"]
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler

    def test_an_error_of_ours_to_mend_keeps_its_traceback(
        self, teal: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(*_: object) -> None:
            raise ValueError("a bug")

        monkeypatch.setattr("teal.blockwalk.StreamedBlocks.block", fail)
        with pytest.raises(ValueError, match="a bug"):
            teal(*READS_MODEL["calibrate"])

    def test_a_handler_of_others_stays(self, teal: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch) -> None:
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            assert teal("inspect", "model").code == 0
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        finally:
            signal.signal(signal.SIGINT, before)

    def test_in_another_thread(self, home: Path) -> None:
        codes: list[int] = []
        thread = threading.Thread(target=lambda: codes.append(cli.main(["inspect", "model"])))
        thread.start()
        thread.join()
        assert codes == [0]

    def test_ctrl_c_in_a_chat_ends_the_answer(
        self, teal: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from teal.commands import chat

        answer, asked = chat._answer, []

        def interrupted_once(*arguments: Any) -> dict[str, object]:
            asked.append(arguments)
            if len(asked) > 1:
                return answer(*arguments)
            try:
                signal.raise_signal(signal.SIGINT)
            except KeyboardInterrupt:
                raise ValueError("from the tokenizer") from None
            return {}

        monkeypatch.setattr(chat, "_answer", interrupted_once)
        lines = b"Hello\nAgain\n/level 2\n"
        outcome = teal("chat", "model", "--max-new-tokens", "3", "--json", "chat.json", stdin=lines)
        assert outcome.code == 0
        assert "(ended and forgotten)" in outcome.err
        (complaint,) = outcome.complaints
        assert "sparsity must be" in complaint
        assert [turn["user"] for turn in json.loads(Path("chat.json").read_text())["turns"]] == ["Again"]

    def test_a_spool_of_another_job(
        self, teal: Callable[..., Outcome], refuses: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with monkeypatch.context() as patched:
            patched.setattr(ActivationStatistics, "save", interrupt)
            assert teal(*READS_MODEL["calibrate"]).code == 1
        says = "new.partial holds an unfinished run with other settings (different: tokens)"
        refuses(*READS_MODEL["calibrate"], "--length", 32, says=says)
        assert teal(*READS_MODEL["calibrate"]).code == 0


@pytest.mark.usefixtures("home")
class TestBadRequests:
    def test_a_full_gpu(self, refuses: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch) -> None:
        def full(*_: object, **__: object) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore.")

        monkeypatch.setattr("teal.engine.model.DecoderModel.prefill", full)
        says = "teal: CUDA out of memory. Tried to allocate 2.00 GiB. Ask for less context, or use --device cpu."
        refuses("generate", "model", "--prompt", "The", says=says)

    @pytest.mark.parametrize("options", [["--prompt", ""], ["--prompt", " \n"], []])
    def test_empty_prompt(self, options: list[str], refuses: Callable[..., Outcome]) -> None:
        says = "the prompt is empty; pass --prompt TEXT or pipe text in"
        refuses("generate", "model", *options, says=says, code=2)

    @pytest.mark.parametrize(
        ("options", "says"),
        [
            (["--prompt", "x" * 63], "the prompt of 64 tokens leaves no room in a context of 64"),
            (["--prompt", "x" * 20, "--context", "20"], "the prompt of 21 tokens leaves no room in a context of 20"),
            (["--prompt", "x", "--context", "65"], "context must be between 1 and the model's 64, got 65"),
        ],
    )
    def test_prompt_longer_than_the_context(
        self, options: list[str], says: str, refuses: Callable[..., Outcome]
    ) -> None:
        refuses("generate", "model", *options, says=says)

    def test_prompt_that_is_no_unicode(self, refuses: Callable[..., Outcome]) -> None:
        refuses("generate", "model", "--prompt", "a\udcff", says="bytes that are no UTF-8", code=2)
        refuses("generate", "model", stdin=b"a\xff", says="standard input is not UTF-8 text (byte 1)")

    @pytest.mark.parametrize(
        ("options", "says"),
        [
            (["--temperature", "-1"], "temperature must be at least 0"),
            (["--top-p", "0"], "top_p must be above 0"),
            (["--min-p", "2"], "min_p must be between 0"),
            (["--repetition-penalty", "0"], "repetition_penalty must be above 0"),
            (["--seed", "-1"], "seed must be between 0"),
            (["--stop", ""], "a stop string is empty"),
        ],
    )
    def test_sampling(self, options: list[str], says: str, refuses: Callable[..., Outcome]) -> None:
        refuses(*READS_MODEL["generate"], *options, says=says, code=2)

    @pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
    @every_plan_reader
    @pytest.mark.parametrize("device", ["cuda", "cuda:1"])
    def test_no_gpu(self, arguments: list[str], device: str, refuses: Callable[..., Outcome]) -> None:
        refuses(*arguments, "--device", device, says="no CUDA device is available here; use --device cpu")

    @every_plan_reader
    def test_unknown_device(self, arguments: list[str], refuses: Callable[..., Outcome]) -> None:
        refuses(*arguments, "--device", "gpu", says="unknown device 'gpu'; use cpu or cuda", code=2)
        refuses(*arguments, "--device", "meta", says="nothing can be computed on the device meta", code=2)

    @pytest.mark.parametrize(
        ("arguments", "says"),
        [
            ([*READS_MODEL["generate"], "--dense", "--level", "0.5"], "--dense is without sparsity"),
            ([*READS_MODEL["generate"], "--dense", "--plan", str(PLAN)], "--dense is without sparsity"),
            (["bench", "model", "--tokens", "1"], "--tokens must be at least 2"),
            (["bench", "model", "--shape", "llama-3.2-1b"], "--shape stands alone"),
            (["bench", "--shape", "gpt-5"], "unknown shape 'gpt-5'"),
            (["bench", "model", "--context", "65"], "--context and --tokens need 97 positions, the model has 64"),
            (["bench", "model", "--kernels", "--device", "cuda"], "--kernels is for --device cpu"),
            ([*READS_MODEL["allocate"], "--step", "0.5"], "the greedy step must be above 0"),
            ([*READS_MODEL["allocate"], "--step", "nan"], "the greedy step must be above 0"),
        ],
    )
    def test_options_that_do_not_fit(self, arguments: list[str], says: str, refuses: Callable[..., Outcome]) -> None:
        refuses(*arguments, says=says, code=2)

    def test_a_level_that_greedy_cannot_reach(self, refuses: Callable[..., Outcome]) -> None:
        refuses(*READS_MODEL["allocate"], "--levels", 0.97, says="level 0.97 cannot be reached", code=2)
