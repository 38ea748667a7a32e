"""Calibration: streamed, in memory and by plain hooks alike; resumable with the same bytes; bounded memory."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    BEGIN,
    FAMILIES,
    Interrupted,
    interrupted_after,
    random_checkpoint,
    random_tokens,
    save_tiny,
    tiny_model,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from teal.blockwalk import StreamedBlocks, discard_spool, open_blocks
from teal.calibration import calibrate
from teal.checkpoint import load_model
from teal.cli import main
from teal.data import TokenBlocks
from teal.errors import TealError, UsageError
from teal.statistics import ActivationStatistics, InputStatistics
from teal.structure import INPUTS, ModelStructure

DENSE_TOKENS = 3
TOKENS = random_tokens(3, 24)


def saved_bytes(statistics: ActivationStatistics, directory: Path) -> bytes:
    statistics.save(directory / "statistics.safetensors")
    return (directory / "statistics.safetensors").read_bytes()


def save_sharded(directory: Path, family: str = "llama", **options: Any) -> Path:
    tiny_model(family, **options).save_pretrained(directory, max_shard_size="40KB")
    assert len(list(directory.glob("*.safetensors"))) > 1
    return directory


def by_hooks(model: nn.Module, ids: Tensor, dense_tokens: int) -> list[dict[str, InputStatistics]]:
    """The statistics that plain forward hooks on the whole model collect, one sequence at a time."""
    structure = ModelStructure.of(model)
    blocks = [
        {name: InputStatistics.empty(k) for name, k in structure.input_features(index).items()}
        for index in range(len(structure.blocks))
    ]
    with ExitStack() as stack, torch.no_grad():
        for index, projection in structure.projections():
            if projection.name.rpartition(".")[2] in ("k_proj", "v_proj", "up_proj"):
                continue  # read the same input as q_proj and gate_proj
            entry = blocks[index][projection.input]

            def count(_: nn.Module, inputs: tuple[Tensor, ...], entry: InputStatistics = entry) -> None:
                entry.add(inputs[0][:, dense_tokens:])

            module = model.get_submodule(structure.module_name(index, projection))
            stack.callback(module.register_forward_pre_hook(count).remove)
        for row in ids:
            model(input_ids=row[None], use_cache=False)
    return blocks


class TestSameStatistics:
    @pytest.mark.parametrize("family", FAMILIES)
    def test_streamed_in_memory_and_by_hooks(self, family: str, tmp_path: Path) -> None:
        model = tiny_model(family)
        source = open_blocks(save_sharded(tmp_path, family))
        assert isinstance(source, StreamedBlocks)
        streamed = calibrate(source, TOKENS, dense_tokens=DENSE_TOKENS)
        in_memory = calibrate(model, TOKENS, dense_tokens=DENSE_TOKENS)
        assert saved_bytes(streamed, tmp_path) == saved_bytes(in_memory, tmp_path)
        for found, expected in zip(in_memory.blocks, by_hooks(model, TOKENS, DENSE_TOKENS), strict=True):
            for name in INPUTS:
                assert torch.equal(found[name].counts, expected[name].counts)
                assert torch.equal(found[name].sum, expected[name].sum)
                assert torch.equal(found[name].sum_of_squares, expected[name].sum_of_squares)
                assert found[name].tokens == expected[name].tokens == TOKENS.shape[0] * (24 - DENSE_TOKENS)

    def test_unequal_blocks(self, tmp_path: Path) -> None:
        """Each block's own arguments: here one block has a sliding window and the others have none."""
        changes = {"layer_types": ["full_attention", "sliding_attention", "full_attention"], "num_hidden_layers": 3}
        changes |= {"sliding_window": 4, "use_sliding_window": True}
        model = tiny_model("qwen2", **changes)
        assert model.config.layer_types == changes["layer_types"]
        streamed = calibrate(save_sharded(tmp_path, "qwen2", **changes), TOKENS, dense_tokens=0)
        for found, expected in zip(streamed.blocks, by_hooks(model, TOKENS, 0), strict=True):
            assert all(torch.equal(found[name].counts, expected[name].counts) for name in INPUTS)

    @pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("asked", [None, torch.float32, torch.bfloat16])
    def test_dtypes(self, stored: torch.dtype, asked: torch.dtype | None, tmp_path: Path) -> None:
        tiny_model(dtype=stored).save_pretrained(tmp_path)
        streamed = calibrate(open_blocks(tmp_path, asked), TOKENS)
        in_memory = calibrate(load_model(tmp_path, asked), TOKENS)
        assert streamed.details["dtype"] == str(asked or stored).removeprefix("torch.")
        assert all(
            torch.equal(streamed.blocks[index][name].counts, in_memory.blocks[index][name].counts)
            for index in range(2)
            for name in INPUTS
        )

    def test_tied_embeddings(self, tmp_path: Path) -> None:
        streamed = calibrate(save_sharded(tmp_path, tie_word_embeddings=True), TOKENS)
        in_memory = calibrate(tiny_model(tie_word_embeddings=True), TOKENS)
        assert saved_bytes(streamed, tmp_path) == saved_bytes(in_memory, tmp_path)

    def test_a_multimodal_checkpoint_keeps_its_vision_tower_on_disk(self, tmp_path: Path) -> None:
        source = open_blocks(save_sharded(tmp_path, "gemma3"))
        resident = {name for name, parameter in source.model.named_parameters() if not parameter.is_meta}
        assert resident == {"model.language_model.embed_tokens.weight", "model.language_model.norm.weight"}

    def test_a_model_without_weights(self) -> None:
        with torch.device("meta"):
            model = tiny_model()
        with pytest.raises(TealError, match="weights of the model are on the meta device"):
            calibrate(model, TOKENS)

    def test_another_default_device(self) -> None:
        model = tiny_model()
        want = calibrate(model, TOKENS)
        with torch.device("meta"):
            got = calibrate(model, TOKENS)
        for ours, theirs in zip(got.blocks, want.blocks, strict=True):
            assert all(torch.equal(ours[name].counts, theirs[name].counts) for name in theirs)

    def test_only_one_block_is_resident(self, tmp_path: Path) -> None:
        source = open_blocks(save_sharded(tmp_path))
        modules = source.structure.block_modules(source.model)

        def resident() -> list[bool]:
            return [not any(parameter.is_meta for parameter in module.parameters()) for module in modules]

        assert resident() == [False, False]
        with source.block(1):
            assert resident() == [False, True]
        assert resident() == [False, False]

    def test_the_model_in_memory_is_left_as_it_was(self) -> None:
        model = tiny_model()
        before = model(input_ids=TOKENS).logits
        calibrate(model, TOKENS)
        assert torch.equal(model(input_ids=TOKENS).logits, before)
        assert all("forward" not in vars(module) and not module._forward_pre_hooks for module in model.modules())


class TestWhatIsCounted:
    def test_the_first_tokens_are_not(self) -> None:
        model, ids = tiny_model(), TOKENS.clone()
        every, later = (calibrate(model, ids, dense_tokens=dense_tokens) for dense_tokens in (0, 8))
        first = by_hooks(model, ids[:, :8], 0)
        for index in range(2):
            for name in INPUTS:
                assert later.blocks[index][name].tokens == 3 * 16
                difference = every.blocks[index][name].counts - later.blocks[index][name].counts
                assert torch.equal(difference, first[index][name].counts)

    def test_merged_runs_equal_one_run_over_both_texts(self) -> None:
        model = tiny_model()
        one, other = calibrate(model, TOKENS[:2]), calibrate(model, TOKENS[2:])
        merged, both = one.merge(other), calibrate(model, TOKENS)
        for index in range(2):
            for name in INPUTS:
                found, expected = merged.blocks[index][name], both.blocks[index][name]
                assert torch.equal(found.counts, expected.counts)
                assert found.tokens == expected.tokens
                torch.testing.assert_close(found.sum, expected.sum)
                torch.testing.assert_close(found.sum_of_squares, expected.sum_of_squares)
                assert found.threshold(0.5) == expected.threshold(0.5)

    def test_what_is_recorded(self) -> None:
        blocks = TokenBlocks(TOKENS, ("some.txt",), 7)
        assert calibrate(tiny_model(), blocks).details == {**blocks.describe(), "dtype": "float32"}

    @pytest.mark.parametrize("dense_tokens", [-1, 24])
    def test_no_tokens_left(self, dense_tokens: int) -> None:
        with pytest.raises(UsageError, match="dense_tokens must be between 0 and 23 for blocks of 24 tokens"):
            calibrate(tiny_model(), TOKENS, dense_tokens=dense_tokens)

    def test_tokens_the_model_does_not_know(self) -> None:
        with pytest.raises(TealError, match="token id 258 is outside the model's vocabulary of 258"):
            calibrate(tiny_model(), torch.tensor([[BEGIN, 258]]), dense_tokens=0)


class TestDamagedWeights:
    @pytest.mark.parametrize(
        ("projection", "place"),
        [
            ("0.self_attn.q_proj", "at the input of block 0 self_attn.o_proj"),
            ("0.self_attn.o_proj", "at the input of block 0 mlp.gate_proj"),
            ("1.mlp.up_proj", "at the input of block 1 mlp.down_proj"),
            ("0.mlp.down_proj", "after block 0 mlp.down_proj"),
            ("1.mlp.down_proj", "after block 1 mlp.down_proj"),
        ],
    )
    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_the_place_is_named(self, projection: str, place: str, value: float) -> None:
        model = tiny_model()
        model.get_submodule(f"model.layers.{projection}").weight.data[0, 0] = value
        with pytest.raises(TealError, match=f"{place}.*load the model in float32 or bfloat16, or check the weights"):
            calibrate(model, TOKENS)

    def test_no_shape_of_the_config(self, tmp_path: Path) -> None:
        save_tiny(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        for change in ({"vocab_size": 300}, {"intermediate_size": 48}):
            (tmp_path / "config.json").write_text(json.dumps(config | change))
            with pytest.raises(TealError, match=r"does not match its config\.json: size mismatch for"):
                calibrate(tmp_path, TOKENS)

    @pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight"])
    def test_a_missing_tensor(self, name: str, tmp_path: Path) -> None:
        file = save_tiny(tmp_path) / "model.safetensors"
        save_file({key: tensor for key, tensor in load_file(file).items() if key != name}, file)
        with pytest.raises(TealError, match=f"has no tensor {name}"):
            calibrate(tmp_path, TOKENS)

    def test_an_architecture_without_gated_mlp(self, tmp_path: Path) -> None:
        from transformers import GPT2Config

        model: Any = AutoModelForCausalLM.from_config(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=32))
        model.save_pretrained(tmp_path)
        with pytest.raises(TealError, match="unknown architecture 'gpt2'"):
            calibrate(tmp_path, TOKENS)


class TestSpool:
    @pytest.mark.parametrize("finished", [0, 1, 3])
    def test_an_interrupted_run_ends_with_the_same_bytes(
        self, finished: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        directory = save_sharded(tmp_path / "model", num_hidden_layers=4)
        whole = saved_bytes(calibrate(directory, TOKENS), tmp_path)
        spool = tmp_path / "spool"
        with pytest.raises(Interrupted):
            calibrate(interrupted_after(open_blocks(directory), finished, monkeypatch), TOKENS, spool=spool)
        assert len(list(spool.glob("block-*"))) == finished
        again = open_blocks(directory)
        used = []
        block = again.block
        monkeypatch.setattr(again, "block", lambda index: used.append(index) or block(index))
        assert saved_bytes(calibrate(again, TOKENS, spool=spool), tmp_path) == whole
        assert used == list(range(finished, 4))  # finished work is not repeated

    @pytest.mark.parametrize(
        ("change", "differing"),
        [
            ({"tokens": random_tokens(3, 24, seed=1)}, "tokens"),
            ({"dense_tokens": 5}, "dense_tokens"),
            ({"model": tiny_model(seed=1)}, "model"),
            ({"model": tiny_model(dtype=torch.bfloat16)}, "dtype"),
        ],
        ids=["tokens", "dense-tokens", "weights", "dtype"],
    )
    def test_of_another_job_is_refused(self, change: dict[str, Any], differing: str, tmp_path: Path) -> None:
        calibrate(tiny_model(), TOKENS, spool=tmp_path)
        before = {path: path.read_bytes() for path in tmp_path.iterdir()}
        arguments = {"model": tiny_model(), "tokens": TOKENS, "spool": tmp_path, **change}
        with pytest.raises(TealError, match=rf"unfinished run with other settings \(different: .*{differing}"):
            calibrate(**arguments)
        assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before

    def test_discard(self, tmp_path: Path) -> None:
        spool = tmp_path / "spool"
        calibrate(tiny_model(), TOKENS, spool=spool)
        abandoned = spool / ".hidden.safetensors.host-123-x.tmp"  # by a killed process
        abandoned.mkdir()
        (abandoned / ".tmpE4xq7P").write_bytes(b"x")
        discard_spool(spool)
        assert not spool.exists()
        discard_spool(spool)

    def test_discard_leaves_what_is_not_ours(self, tmp_path: Path) -> None:
        calibrate(tiny_model(), TOKENS, spool=tmp_path)
        (tmp_path / "notes.txt").write_text("mine")
        discard_spool(tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


BLOCKS = 24


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a model of many blocks, a text and statistics of an uninterrupted run are."""
    place = tmp_path_factory.mktemp("killed")
    save_tiny(place / "model", num_hidden_layers=BLOCKS, hidden_size=64, intermediate_size=192)
    (place / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 400)
    assert main(command(place, "calibrate", "uninterrupted.safetensors")) == 0
    return place


def command(place: Path, verb: str, output: str) -> list[str]:
    statistics = f"--statistics {place}/uninterrupted.safetensors --length 64"
    options = {
        "calibrate": "--tokens 16384",
        "allocate": f"{statistics} --method blockwise --tokens 1024",
        "allocate-globally": f"{statistics} --levels 0.5 --stride 0.1 --tokens 256",
    }
    verb, chosen = verb.partition("-")[0], options[verb]
    return f"{verb} {place}/model --text {place}/text.txt --output {place}/{output} {chosen}".split()


def stopped(arguments: list[str], spool: Path, how: signal.Signals) -> tuple[int, str]:
    """Run teal in a process of its own and send it a signal when it has finished one more block.

    Returns the exit code and what it wrote to standard error.
    """
    before = len(list(spool.glob("block-*")))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # as many as the tests have, so that sums have the same bits
    process = subprocess.Popen(
        [sys.executable, "-m", "teal", *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    with process:
        deadline = time.monotonic() + 120
        while len(list(spool.glob("block-*"))) <= before or not (spool / "hidden.safetensors").exists():
            if process.poll() is not None or time.monotonic() > deadline:
                process.kill()
                pytest.fail(f"no block was finished: {process.communicate()[1]}")
            time.sleep(0.005)
        process.send_signal(how)
        _, errors = process.communicate(timeout=60)
    assert before < len(list(spool.glob("block-*"))) < BLOCKS, f"the signal came too late: {errors}"
    return process.returncode, errors


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("verb", "suffix"), [("calibrate", "safetensors"), ("allocate", "json"), ("allocate-globally", "json")]
)
def test_a_killed_process_continues_and_ends_with_the_same_bytes(verb: str, suffix: str, place: Path) -> None:
    output, spool = place / f"stopped.{suffix}", place / f"stopped.{suffix}.partial"
    output.unlink(missing_ok=True)
    arguments = command(place, verb, output.name)
    code, errors = stopped(arguments, spool, signal.SIGINT)
    assert code == 1
    assert "Traceback" not in errors
    kept = "blocks" if verb == "calibrate" else "parts"
    assert errors.splitlines()[-1] == f"teal: interrupted; finished {kept} are kept, repeat the command to continue"
    code, _ = stopped(arguments, spool, signal.SIGKILL)
    assert code == -signal.SIGKILL
    assert not output.exists()
    assert main(arguments) == 0
    assert not spool.exists()
    if verb != "calibrate":
        assert main([*command(place, verb, f"uninterrupted.{suffix}"), "--overwrite"]) == 0
    for file in {output, *place.glob("stopped.vectors.safetensors")} if verb == "allocate-globally" else {output}:
        same = place / file.name.replace("stopped", "uninterrupted")
        assert file.read_bytes().replace(b"stopped.", b"uninterrupted.") == same.read_bytes()


# Not getrusage: what it reports includes the process that started this one.
MEASURE = """
import re, sys
from teal.cli import main
code = main(sys.argv[1:])
print(1024 * int(re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read()).group(1)))
sys.exit(code)
"""


@pytest.mark.slow
def test_a_model_larger_than_memory(tmp_path: Path) -> None:
    """Resident memory stays below half of a 2.5 GB checkpoint plus the statistics."""
    size = random_checkpoint(tmp_path / "model", "llama-3.2-1b")
    assert size > 2.4e9
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 200)
    output = tmp_path / "statistics.safetensors"
    arguments = ["calibrate", tmp_path / "model", "--text", tmp_path / "text.txt", "--output", output]
    process = subprocess.run(
        [sys.executable, "-c", MEASURE, *map(str, arguments), "--tokens", "4096"], capture_output=True, text=True
    )
    shutil.rmtree(tmp_path / "model")
    assert process.returncode == 0, process.stderr
    peak = int(process.stdout.split()[-1])
    print(f"checkpoint {size / 1e6:.0f} MB, statistics {output.stat().st_size / 1e6:.0f} MB, peak {peak / 1e6:.0f} MB")
    assert peak < size / 2 + output.stat().st_size
