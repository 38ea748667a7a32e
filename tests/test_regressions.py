"""Things that were once wrong and must not come back."""

import json
from pathlib import Path

import pytest
import torch
from helpers import byte_tokenizer, random_plan, random_tokens, save_tiny, tiny_model, tiny_plan
from safetensors.torch import load_file, save_file

from teal.allocation import allocate
from teal.benchmark import benchmark
from teal.blockwalk import StreamedBlocks, open_blocks
from teal.calibration import calibrate
from teal.cli import main
from teal.engine.load import load_engine
from teal.errors import TealError, UsageError
from teal.evaluation import evaluate
from teal.linear import SparseLinear
from teal.ops.packed import RowMajorWeight
from teal.sparse_model import set_sparsity, sparsify
from teal.structure import identify

IDS = random_tokens(rows=2, length=24)


def test_the_dense_row_of_a_benchmark_is_not_the_sparse_kernel(tmp_path: Path, monkeypatch) -> None:
    calls = {"sparse": 0}
    right = RowMajorWeight.sparse_gemv

    def counted(self, *inputs):
        calls["sparse"] += 1
        return right(self, *inputs)

    engine = load_engine(save_tiny(tmp_path))
    monkeypatch.setattr(RowMajorWeight, "sparse_gemv", counted)
    benchmark(engine, tiny_plan(tiny_model()), [], IDS[0, :4].tolist(), new_tokens=3, repeats=1)
    before = calls["sparse"]
    benchmark(engine, tiny_plan(tiny_model()), [], IDS[0, :4].tolist(), new_tokens=3, repeats=5)
    assert calls["sparse"] == 2 * before  # the check and the untimed run, however often the dense row is timed


def test_checkpoints_that_store_rotary_frequencies(tmp_path: Path) -> None:
    directory = save_tiny(tmp_path)
    weights = load_file(directory / "model.safetensors")
    for index in range(2):
        weights[f"model.layers.{index}.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(weights, directory / "model.safetensors", {"format": "pt"})
    source = open_blocks(directory)
    assert isinstance(source, StreamedBlocks)
    assert len(calibrate(source, IDS).blocks) == 2


def test_greedy_needs_sparse_tokens() -> None:
    model = tiny_model()
    statistics = calibrate(model, IDS, dense_tokens=8)
    with pytest.raises(UsageError, match="hold no sparse token after 8 dense ones"):
        allocate(statistics, "blockwise", model=model, tokens=IDS[:, :8])


def test_level_0_is_dense_whatever_the_plan_says_there() -> None:
    model, dense = tiny_model(), tiny_model()
    plan = random_plan(identify(model), vectors=True)
    result = evaluate(model, IDS, plan, [0.5])
    reference = evaluate(dense, IDS, tiny_plan(dense), [0.0])
    assert result.dense_perplexity == pytest.approx(reference.dense_perplexity, rel=1e-6)
    sparsify(model, plan, 0.5)
    set_sparsity(model, 0.0)
    layers = [layer for layer in model.modules() if isinstance(layer, SparseLinear)]
    assert all(
        (layer.threshold < 0).all() and (layer.sparse_bias is None or not layer.sparse_bias.any()) for layer in layers
    )


def test_mixed_dtypes_stream_as_one(tmp_path: Path) -> None:
    directory = save_tiny(tmp_path, dtype=torch.bfloat16)
    weights = load_file(directory / "model.safetensors")
    mixed = {name: w.float() if "norm" in name else w for name, w in weights.items()}
    save_file(mixed, directory / "model.safetensors", {"format": "pt"})
    assert calibrate(directory, IDS).details["dtype"] == "bfloat16"


def test_more_blocks_than_the_config_says(tmp_path: Path) -> None:
    directory = save_tiny(tmp_path)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))
    with pytest.raises(TealError, match="more blocks than the 1"):
        open_blocks(directory)


def test_a_forward_set_on_a_block_stays() -> None:
    model = tiny_model()
    block = model.model.layers[0]
    original, calls = block.forward, []

    def forward(*inputs, **arguments):
        calls.append(1)
        return original(*inputs, **arguments)

    block.forward = forward
    statistics = calibrate(model, IDS)
    allocate(statistics, "blockwise", model=model, tokens=IDS, levels=[0.0, 0.1])
    assert block.forward is forward
    before = len(calls)
    model(input_ids=IDS)
    assert len(calls) == before + 1


def test_a_model_in_training_mode_is_refused() -> None:
    model = tiny_model().train()
    with pytest.raises(UsageError, match=r"call model\.eval\(\) first"):
        calibrate(model, IDS)
    with pytest.raises(UsageError, match=r"call model\.eval\(\) first"):
        evaluate(model, IDS, tiny_plan(tiny_model()), [0.5])


def test_other_safetensors_beside_the_model(tmp_path: Path) -> None:
    directory = save_tiny(tmp_path)
    save_file({"layers.0.attention.wq.weight": torch.ones(2, 2)}, directory / "consolidated.safetensors")
    assert load_engine(directory).prefill(IDS, load_engine(directory).new_cache(2)).shape == (2, 258)


@pytest.mark.filterwarnings("default:decoding through transformers")
@pytest.mark.parametrize("options", [[], ["--stop", "zz"]])
def test_the_transformers_path_joins_prompt_and_text_as_the_engine_does(tmp_path: Path, capsys, options) -> None:
    directory = save_tiny(tmp_path / "phi3", "phi3")
    byte_tokenizer().save_pretrained(directory)
    arguments = ["generate", str(directory), "--dense", "--prompt", "hello", "--max-new-tokens", "6", "--json", "-"]
    assert main([*arguments, *options]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["engine"] == "transformers"
    assert result["new_tokens"] <= 6
    assert result["finish_reason"] in ("stop", "length")


def test_a_seed_out_of_range(capsys) -> None:
    assert main(["calibrate", "--seed", "99999999999999999999"]) == 2
    assert "a seed must be below 2**63" in capsys.readouterr().err
