"""The comparison with llama.cpp: same weights in the file, paired ratios, children that fail with one line."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import llama_cpp as script  # benchmarks/llama_cpp.py: that folder is on the tests' path
import numpy as np
import pytest
import torch
from helpers import tiny_config
from side_by_side import gguf_file, rounds
from side_by_side.gguf_file import ensure_gguf, interleave_rotary_rows, plan_gguf
from side_by_side.rounds import Agreement, Spread, Worker, rotated, speedup, tokens_per_second
from side_by_side.weights import SharedWeights, output_scale

from teal.engine.block import rotate
from teal.engine.config import EngineConfig
from teal.engine.model import DecoderModel
from teal.errors import TealError, UsageError

SCRIPT = Path(script.__file__)
WIDE = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "head_dim": 16}  # whole blocks of 32


def weights_and_config(family: str = "llama", **changes: Any) -> tuple[SharedWeights, Any]:
    if family == "mistral":
        changes["sliding_window"] = None
    config = tiny_config(family, **WIDE, **changes)
    return SharedWeights(config, 0), config


def test_weights_are_scaled_as_a_trained_model_is() -> None:
    weights, _ = weights_and_config()
    deviations = {name: float(weights[name].float().std()) for name in weights.shapes if len(weights.shapes[name]) > 1}
    assert deviations["model.embed_tokens.weight"] == pytest.approx(0.64, rel=0.1)
    assert deviations["model.layers.0.mlp.down_proj.weight"] == pytest.approx(0.0025, rel=0.1)
    assert deviations["model.layers.0.mlp.up_proj.weight"] == pytest.approx(0.02, rel=0.1)
    assert all((weights[name] == 1).all() for name, shape in weights.shapes.items() if len(shape) == 1)


class TestRotaryRows:
    def test_rotating_neighbours_equals_rotating_halves(self) -> None:
        """llama.cpp rotates neighbouring rows; on permuted rows that gives the permuted result of ours."""
        config = EngineConfig.of(tiny_config(**WIDE))
        weight, x = torch.randn(config.heads * config.head_dim, config.hidden_size), torch.randn(config.hidden_size)
        angles = torch.tensor(config.inverse_frequencies) * 7
        cos, sin = angles.cos(), angles.sin()
        ours = rotate((weight @ x).view(-1, config.head_dim), cos.repeat(2), sin.repeat(2))
        permuted = interleave_rotary_rows(weight, ".q_proj.", config) @ x
        even, odd = permuted.view(-1, config.head_dim // 2, 2).unbind(-1)
        theirs = torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1)
        assert torch.allclose(theirs.flatten(), interleave_rotary_rows(ours.flatten(), ".q_proj.", config), atol=1e-5)

    def test_only_queries_and_keys_of_the_llama_architecture(self) -> None:
        weight = torch.arange(128.0).view(64, 2)
        llama, qwen = (EngineConfig.of(tiny_config(family, **WIDE)) for family in ("llama", "qwen2"))
        for config, source, permuted in (
            (llama, "model.layers.0.self_attn.q_proj.weight", True),
            (llama, "model.layers.0.self_attn.k_proj.weight", True),
            (llama, "model.layers.0.self_attn.v_proj.weight", False),
            (llama, "model.layers.0.input_layernorm.weight", False),
            (qwen, "model.layers.0.self_attn.q_proj.weight", False),
        ):
            assert torch.equal(interleave_rotary_rows(weight, source, config), weight) != permuted, source

    def test_one_head_by_hand(self) -> None:
        config = EngineConfig.of(tiny_config(**WIDE))
        rows = interleave_rotary_rows(torch.arange(16)[:, None], ".k_proj.", config).flatten().tolist()
        assert rows == [0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15]


class TestGguf:
    @pytest.fixture(autouse=True)
    def _needs_gguf(self) -> None:
        pytest.importorskip("gguf", reason="the llama-cpp extra is not installed")

    @pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
    @pytest.mark.parametrize("tied", [False, True])
    def test_holds_every_weight(self, family: str, tied: bool, tmp_path: Path) -> None:
        import gguf

        weights, config = weights_and_config(family, tie_word_embeddings=tied)
        plan = plan_gguf(config, weights, "F16", "BF16", seed=0)
        path = tmp_path / "new" / "tiny.gguf"
        assert ensure_gguf(path, plan, weights)
        stored = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
        assert set(stored) == {tensor.name for tensor in plan.tensors}
        assert ("output.weight" in stored) != tied
        assert sum(int(tensor.n_bytes) for tensor in stored.values()) == plan.bytes
        for planned in plan.tensors:
            tensor = stored[planned.name]
            want = interleave_rotary_rows(weights[planned.source], planned.source, plan.config).float().numpy()
            np.testing.assert_allclose(gguf.dequantize(tensor.data, tensor.tensor_type), want, atol=1e-7)

    def test_formats_by_their_place(self) -> None:
        weights, config = weights_and_config()
        plan = plan_gguf(config, weights, "Q4_0", "Q8_0", seed=0)
        formats = {tensor.name: tensor.format for tensor in plan.tensors}
        assert formats["blk.1.ffn_down.weight"] == "Q4_0"
        assert formats["token_embd.weight"] == formats["output.weight"] == "Q8_0"
        assert formats["blk.0.attn_norm.weight"] == formats["output_norm.weight"] == "F32"

    @pytest.mark.parametrize(("format_", "error"), [("Q8_0", 0.005), ("Q4_0", 0.07)])
    def test_quantized(self, format_: str, error: float, tmp_path: Path) -> None:
        import gguf

        weights, config = weights_and_config()
        plan = plan_gguf(config, weights, format_, format_, seed=0)
        ensure_gguf(tmp_path / "tiny.gguf", plan, weights)
        (down,) = (t for t in gguf.GGUFReader(tmp_path / "tiny.gguf").tensors if t.name == "blk.0.ffn_down.weight")
        want = weights["model.layers.0.mlp.down_proj.weight"].float().numpy()
        assert np.abs(gguf.dequantize(down.data, down.tensor_type) - want).max() < error * np.abs(want).max() * 2

    def test_bytes_per_token(self) -> None:
        """By hand: a token reads one row of an embedding, all of a head, and of a tied one all."""
        weights, config = weights_and_config(tie_word_embeddings=False)
        untied = plan_gguf(config, weights, "F16", "F16", seed=0)
        tied = plan_gguf(*reversed(weights_and_config(tie_word_embeddings=True)), "F16", "F16", seed=0)
        assert untied.bytes_per_token == tied.bytes_per_token + 64 * 2
        assert tied.bytes_per_token == tied.bytes

    def test_reused_only_if_it_is_whole_and_the_same(self, tmp_path: Path) -> None:
        weights, config = weights_and_config()
        path, plan = tmp_path / "tiny.gguf", plan_gguf(config, weights, "F16", "F16", seed=0)
        assert ensure_gguf(path, plan, weights)
        written = path.read_bytes()
        assert not ensure_gguf(path, plan, weights)
        assert ensure_gguf(path, plan_gguf(config, weights, "F16", "F16", seed=1), weights)
        for damaged in (written[:-4096], written[:100], b"", b"no GGUF file"):
            path.write_bytes(damaged)
            assert ensure_gguf(path, plan, weights), len(damaged)
            assert path.read_bytes() == written
        assert [file.name for file in tmp_path.iterdir()] == ["tiny.gguf"]

    def test_a_failure_leaves_nothing_behind(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        weights, config = weights_and_config()
        monkeypatch.setattr(gguf_file, "interleave_rotary_rows", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            ensure_gguf(tmp_path / "tiny.gguf", plan_gguf(config, weights, "F16", "F16", seed=0), weights)
        assert not list(tmp_path.iterdir())

    def test_no_room(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        weights, config = weights_and_config()
        usage = gguf_file.shutil.disk_usage(tmp_path)._replace(free=1000)
        monkeypatch.setattr(gguf_file.shutil, "disk_usage", lambda _: usage)
        with pytest.raises(TealError, match=r"tiny.gguf takes .* GB and .* has 0.0 GB free; make room or name another"):
            ensure_gguf(tmp_path / "new" / "tiny.gguf", plan_gguf(config, weights, "F16", "F16", seed=0), weights)
        assert not list(tmp_path.iterdir())

    def test_refused(self) -> None:
        config = tiny_config()
        with pytest.raises(UsageError, match=r"has rows of 56 weights, Q8_0 stores blocks of 32"):
            plan_gguf(config, SharedWeights(config, 0), "Q8_0", "F16", seed=0)
        config = tiny_config("mistral")
        with pytest.raises(UsageError, match="windows"):
            plan_gguf(config, SharedWeights(config, 0), "F16", "F16", seed=0)
        rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
        config = tiny_config(rope_parameters=rope)
        with pytest.raises(UsageError, match="RoPE of type 'linear'"):
            plan_gguf(config, SharedWeights(config, 0), "F16", "F16", seed=0)


@pytest.mark.skipif(not script._installed("llama_cpp"), reason="the llama-cpp extra is not installed")
class TestBothSides:
    """Through the children, on tiny weights: llama.cpp computes the model that the engine computes."""

    @pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
    @pytest.mark.parametrize("tied", [False, True])
    def test_logits_agree(self, family: str, tied: bool, tmp_path: Path) -> None:
        weights, config = weights_and_config(family, tie_word_embeddings=tied)
        path, prompt, tokens = tmp_path / "tiny.gguf", [5, 200, 17, 3], [9, 250, 31]
        ensure_gguf(path, plan_gguf(config, weights, "F16", "F16", seed=0), weights)

        def take(name: str, shape: tuple[int, ...]) -> torch.Tensor:
            return weights[name if name.startswith("lm_head.") else f"model.{name}"].float()

        engine = DecoderModel(EngineConfig.of(config), take, context=32)
        expected = engine.prefill(torch.tensor([[*prompt, *tokens]]), engine.new_cache(), all_positions=True)[0, -3:]
        task = {"side": "llama.cpp", "gguf": str(path), "prompt": prompt, "context": 32, "threads": 1}
        with Worker(task) as worker:
            for _ in range(2):  # the second time from the same position again
                worker.ask("logits", tokens=tokens, path=str(tmp_path / "logits.npy"))
                agreement = Agreement.of(np.load(tmp_path / "logits.npy"), expected.numpy())
                assert agreement.correlation > 0.9999
                assert agreement.top1 == 1
            assert worker.ask("decode", tokens=tokens, level=0.0, sparse_head=False)["seconds"] > 0

    def test_a_file_that_is_none(self, tmp_path: Path) -> None:
        (tmp_path / "x.gguf").write_bytes(b"nothing")
        with pytest.raises(TealError, match=r"llama.cpp: RuntimeError: llama.cpp cannot load .*x.gguf"):
            Worker({"side": "llama.cpp", "gguf": str(tmp_path / "x.gguf"), "prompt": [1], "context": 32, "threads": 1})


class TestFigures:
    def test_ratios_are_paired(self) -> None:
        """A machine that slows down in the second round changes no ratio."""
        assert speedup([1.0, 3.0, 1.0], [2.0, 6.0, 2.5]) == Spread(2.0, 2.0, 2.5)
        assert tokens_per_second([1.0, 2.0, 4.0], 8) == Spread(4.0, 2.0, 8.0)
        assert Spread(1.5, 1.25, 2.0).text() == "1.50 (1.25-2.00)"
        with pytest.raises(ValueError, match="argument 2 is longer"):
            speedup([1.0], [1.0, 2.0])

    def test_everyone_goes_first(self) -> None:
        assert [rotated("abc", index) for index in range(4)] == [list("abc"), list("bca"), list("cab"), list("abc")]

    def test_agreement(self) -> None:
        logits = np.random.default_rng(0).normal(size=(4, 50)).astype(np.float32)
        same = Agreement.of(logits, 2 * logits + 1)
        assert same.correlation == pytest.approx(1)
        assert same.top1 == 1
        other = logits.copy()
        other[2] = np.roll(other[2], 1)
        assert Agreement.of(logits, other).correlation < 0.5
        assert Agreement.of(logits, other).top1 == 0.75
        other[0, 0] = np.nan
        with pytest.raises(TealError, match="not finite"):
            Agreement.of(logits, other)
        with pytest.raises(TealError, match="do not compare"):
            Agreement.of(logits, logits[:2])


class TestRounds:
    A, B = script.Variant("llama.cpp"), script.Variant("teal")

    def measure(self, monkeypatch: pytest.MonkeyPatch, others: list[float | None]) -> tuple[list[Any], int]:
        given = iter([script.Round({}, 1.0, share) for share in others])
        monkeypatch.setattr(script, "measure_round", lambda *_: next(given))
        return script.measure({}, [self.A, self.B], [1], rounds=2)

    def test_disturbed_rounds_are_measured_again(self, monkeypatch: pytest.MonkeyPatch) -> None:
        chosen, discarded = self.measure(monkeypatch, [0.5, 0.01, 0.06, 0.05])
        assert ([round_.others for round_ in chosen], discarded) == ([0.01, 0.05], 2)

    def test_the_quietest_serve_if_it_never_gets_quiet(self, monkeypatch: pytest.MonkeyPatch) -> None:
        chosen, discarded = self.measure(monkeypatch, [0.5, 0.3, 0.2, 0.6, 0.7, 0.01])
        assert ([round_.others for round_ in chosen], discarded) == ([0.01, 0.2], 4)

    def test_unknown_is_not_disturbed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert self.measure(monkeypatch, [None, None])[1] == 0

    def test_a_round_asks_each_side(self) -> None:
        asked = []

        class Side:
            def __init__(self, name: str) -> None:
                self.name = name

            def ask(self, do: str, **request: Any) -> dict[str, float]:
                asked.append((self.name, do, request.get("level")))
                return {"seconds": 2.0, "processor_seconds": 0.0, "bandwidth": 7.0}

        workers: Any = {"llama.cpp": Side("llama.cpp"), "teal": Side("teal")}
        variant = script.Variant("teal", 0.5)
        round_ = script.measure_round(workers, [variant, self.A], [1, 2])
        assert asked == [("teal", "bandwidth", None), ("teal", "decode", 0.5), ("llama.cpp", "decode", 0.0)]
        assert round_.seconds == {variant: 2.0, self.A: 2.0}
        assert round_.bandwidth == 7.0

    def test_processor_time_of_all(self, tmp_path: Path) -> None:
        """By hand: user, nice, system, idle, iowait, irq, softirq, steal, guest (a part of user), in ticks."""
        (tmp_path / "stat").write_text("cpu 100 20 3 9999 888 4 5 6 70 8\ncpu0 1 1 1 1 1 1 1 1 1 1\n")
        assert rounds.busy_seconds(tmp_path / "stat") == 138 / rounds.os.sysconf("SC_CLK_TCK")
        assert rounds.busy_seconds(tmp_path / "none") is None

    def test_labels(self) -> None:
        variants = [self.A, self.B, script.Variant("teal", 0.4), script.Variant("teal", 0.5, sparse_head=True)]
        assert [v.label for v in variants] == ["llama.cpp", "teal dense", "teal 40%", "teal 50%, sparse head"]


class TestWorker:
    """Children that a few lines of Python stand in for."""

    @pytest.fixture
    def child(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
        def start(code: str) -> Worker:
            (tmp_path / "worker.py").write_text(f"import json, os, signal, sys\n{code}")
            monkeypatch.setattr(rounds, "WORKER", tmp_path / "worker.py")
            return Worker({"side": "llama.cpp"}, "Rebuild it.")

        return start

    def test_asks_and_answers(self, child: Any) -> None:
        with child('print("{}", flush=True)\nfor line in sys.stdin: print(line, end="", flush=True)') as worker:
            assert worker.details == {}
            assert worker.ask("decode", tokens=[1, 2]) == {"do": "decode", "tokens": [1, 2]}

    @pytest.mark.parametrize(
        ("code", "message"),
        [
            ("os.kill(os.getpid(), signal.SIGILL)", "llama.cpp died of an illegal instruction. Rebuild it."),
            ("os.kill(os.getpid(), signal.SIGKILL)", "llama.cpp was killed, probably for want of memory; .*"),
            ("sys.exit(3)", "llama.cpp died with exit code 3"),
            ('print(json.dumps({"error": "no such file"}))', "llama.cpp: no such file"),
        ],
    )
    def test_failures_are_one_line(self, child: Any, code: str, message: str) -> None:
        with pytest.raises(TealError, match=f"^{message}$"):
            child(code)

    def test_death_between_requests(self, child: Any) -> None:
        with child('print("{}", flush=True)') as worker:
            worker._process.wait()
            with pytest.raises(TealError, match="died with exit code 0"):
                worker.ask("decode")


class TestCommand:
    def run(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        path = {"PYTHONPATH": str(SCRIPT.parent.parent / "src"), "PATH": "", **environment}
        command = [sys.executable, "-W", "error", str(SCRIPT), *arguments]
        return subprocess.run(command, env=path, capture_output=True, text=True, check=False)

    def test_help_says_how_to_build(self) -> None:
        done = self.run("--help")
        assert done.returncode == 0
        assert "report AMX and trap on it" in done.stdout
        assert script.CMAKE_ARGS in done.stdout
        assert all(option in script.CMAKE_ARGS for option in ("GGML_NATIVE=OFF", "GGML_AVX512_VNNI=ON"))

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--shape", "gpt-5"], "unknown shape 'gpt-5'; choose from llama-3.2-1b, "),
            (["--levels", "1.5"], "levels lie between 0 and 1, got 1.5"),
            (["--rounds", "0"], "--rounds must be at least 1, got 0"),
        ],
    )
    def test_wrong_usage_is_one_line(
        self, arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(sys, "argv", ["llama_cpp.py", *arguments])
        monkeypatch.setattr(script, "_installed", lambda _: True)
        assert script.main() == 2
        captured = capsys.readouterr()
        assert captured.err.startswith(f"llama_cpp.py: {message}")
        assert captured.err.count("\n") == 1

    def test_not_installed(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        monkeypatch.setattr(sys, "argv", ["llama_cpp.py"])
        monkeypatch.setattr(script, "_installed", lambda name: name != "llama_cpp")
        assert script.main() == 1
        assert capsys.readouterr().err == (
            "llama_cpp.py: llama_cpp not installed; see `python llama_cpp.py --help` for the command\n"
        )


@pytest.mark.parametrize(
    ("hidden", "intermediate", "blocks", "scale"),
    [(2048, 8192, 16, 1 / 8), (4096, 14336, 32, 1 / 32), (32, 56, 2, 1 / 8)],
)
def test_blocks_add_less_the_more_there_are(hidden: int, intermediate: int, blocks: int, scale: float) -> None:
    assert output_scale(hidden, intermediate, blocks) == scale
