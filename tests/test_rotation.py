"""Rotated checkpoints: the same function of every family, axes that are principal components, resumed alike."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Interrupted, byte_tokenizer, random_tokens, tiny_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

import teal.rotation
from teal.blockwalk import BlockSource
from teal.checkpoint import load_model
from teal.cli import main
from teal.engine.load import load_engine
from teal.errors import TealError
from teal.rotation import ROTATABLE, find_rotation, rotate
from teal.structure import ModelStructure

TOKENS = random_tokens(4, 24)
DENSE_TOKENS = 3


def varied_model(family: str, **changes: Any) -> Any:
    """A tiny model whose gains and biases are not the ones and zeros of a fresh one."""
    model = tiny_model(family, **changes)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                start = 1.0 if "norm" in name else 0.0
                parameter.copy_(start + 0.5 * torch.randn(parameter.shape, generator=generator))
    return model


def save(directory: Path, model: Any, **options: Any) -> Path:
    model.save_pretrained(directory, **options)
    byte_tokenizer().save_pretrained(directory)
    return directory


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS, use_cache=False).logits


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        *((family, {}) for family in ROTATABLE),
        ("llama", {"tie_word_embeddings": True}),
        ("llama", {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 4}),
        ("qwen3", {"attention_bias": True, "num_key_value_heads": 1}),
    ],
)
def test_the_same_function(family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    model = varied_model(family, **changes)
    rotate(save(tmp_path / "model", model), TOKENS, tmp_path / "rotated", dense_tokens=DENSE_TOKENS)
    rotated = load_model(tmp_path / "rotated")
    torch.testing.assert_close(logits(rotated), logits(model), rtol=1e-3, atol=1e-3)
    before, after = model.state_dict(), rotated.state_dict()
    changed = [name for name in after if "proj" in name and not torch.allclose(after[name], before[name], atol=1e-3)]
    assert {name.rpartition("_proj")[0].rpartition(".")[2] for name in changed if name.endswith("weight")} == {
        name.rpartition("_proj")[0].rpartition(".")[2] for name in after if "proj.weight" in name
    }
    assert not any(path.name.endswith(".partial") for path in tmp_path.iterdir())


@pytest.mark.parametrize("tied", [False, True])
def test_the_engine_reads_it(tied: bool, tmp_path: Path) -> None:
    model = varied_model("llama", tie_word_embeddings=tied)
    rotate(save(tmp_path / "model", model), TOKENS, tmp_path / "rotated")
    expected = logits(model)[0, -1]
    engine = load_engine(tmp_path / "rotated")
    got = engine.prefill(TOKENS[:1], engine.new_cache())
    torch.testing.assert_close(got.flatten(), expected, rtol=1e-3, atol=1e-3)


def test_axes_are_principal_components() -> None:
    model = varied_model("llama")
    rotation = find_rotation(BlockSource(model), TOKENS, DENSE_TOKENS)
    width = model.config.hidden_size
    torch.testing.assert_close(rotation.hidden.T @ rotation.hidden, torch.eye(width, dtype=torch.float64))
    assert rotation.spectrum.diff().max() <= 0
    counted = TOKENS.shape[0] * (TOKENS.shape[1] - DENSE_TOKENS) * 2 * model.config.num_hidden_layers
    torch.testing.assert_close(float(rotation.spectrum.sum()), float(counted * width), rtol=1e-4, atol=0)
    assert rotation.channels_holding(1e-9) == 1
    assert rotation.channels_holding(0.5) <= rotation.channels_holding(0.9) <= width

    inputs: dict[str, list[torch.Tensor]] = {"hidden": [], "values": []}

    def normed(_: object, arguments: tuple[torch.Tensor, ...]) -> None:
        x = arguments[0][:, DENSE_TOKENS:].flatten(0, 1)
        inputs["hidden"].append(x / x.square().mean(-1, keepdim=True).sqrt())

    block = ModelStructure.of(model).block_modules(model)
    for module in block:
        module.get_submodule("input_layernorm").register_forward_pre_hook(normed)
        module.get_submodule("post_attention_layernorm").register_forward_pre_hook(normed)
    block[1].get_submodule("self_attn.o_proj").register_forward_pre_hook(
        lambda _, arguments: inputs["values"].append(arguments[0][:, DENSE_TOKENS:].flatten(0, 1))
    )
    logits(model)
    x = torch.cat(inputs["hidden"]).double() @ rotation.hidden
    torch.testing.assert_close(x.T @ x, rotation.spectrum.diag(), rtol=1e-3, atol=1e-2)
    values = inputs["values"][0].double().unflatten(1, (2, 2, 8))  # key/value heads, those that share them, width
    turned = torch.einsum("thgi,hij->thgj", values, rotation.heads[1])
    moments = torch.einsum("thgi,thgj->hij", turned, turned)
    torch.testing.assert_close(moments, moments.diagonal(0, 1, 2).diag_embed(), rtol=1e-3, atol=1e-3)


def test_shards_and_dtype_are_kept_and_chosen(tmp_path: Path) -> None:
    model = varied_model("llama", tie_word_embeddings=True, dtype=torch.bfloat16)
    save(tmp_path / "model", model, max_shard_size="20KB")
    files = sorted(path.name for path in (tmp_path / "model").glob("*.safetensors"))
    assert len(files) > 1
    rotate(tmp_path / "model", TOKENS, tmp_path / "rotated")
    assert sorted(path.name for path in (tmp_path / "rotated").glob("*.safetensors")) == files
    index = json.loads((tmp_path / "rotated/model.safetensors.index.json").read_text())["weight_map"]
    for name, file in index.items():
        with safe_open(tmp_path / "rotated" / file, framework="pt") as opened:
            assert opened.get_tensor(name).dtype == torch.bfloat16
    assert "lm_head.weight" in index
    assert load_model(tmp_path / "rotated").config.tie_word_embeddings is False

    rotate(tmp_path / "model", TOKENS, tmp_path / "wide", dtype=torch.float32)
    wide = AutoModelForCausalLM.from_pretrained(tmp_path / "wide")
    assert wide.dtype == torch.float32
    torch.testing.assert_close(logits(wide), logits(model.float()), rtol=1e-3, atol=1e-3)


def fail_after(name: str, calls: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What teal.rotation calls `name` works `calls` times and then raises Interrupted."""
    call, left = getattr(teal.rotation, name), calls

    def failing(*arguments: Any, **keywords: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise Interrupted
        return call(*arguments, **keywords)

    monkeypatch.setattr(teal.rotation, name, failing)


@pytest.mark.parametrize("calls", [1, 2])
def test_an_interrupted_run_continues(calls: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = save(tmp_path / "model", varied_model("llama", num_hidden_layers=3), max_shard_size="20KB")
    rotate(directory, TOKENS, tmp_path / "whole")
    for name, times in (("run_block", calls * len(TOKENS)), ("save_file", calls)):
        with monkeypatch.context() as patched:
            fail_after(name, times, patched)
            with pytest.raises(Interrupted):
                rotate(directory, TOKENS, tmp_path / "resumed")
        assert not (tmp_path / "resumed").exists()
    with pytest.raises(TealError, match=r"unfinished run with other settings \(different: dtype\)"):
        rotate(directory, TOKENS, tmp_path / "resumed", dtype=torch.bfloat16)
    rotate(directory, TOKENS, tmp_path / "resumed")
    for file in (tmp_path / "whole").iterdir():
        assert (tmp_path / "resumed" / file.name).read_bytes() == file.read_bytes(), file.name


def test_bad_input(tmp_path: Path) -> None:
    gemma = save(tmp_path / "gemma", tiny_model("gemma2"))
    with pytest.raises(TealError, match="'gemma2' cannot be rotated"):
        rotate(gemma, TOKENS, tmp_path / "rotated")
    model = save(tmp_path / "model", tiny_model())
    with pytest.raises(TealError, match="exists; name another"):
        rotate(model, TOKENS, tmp_path / "gemma")
    weights = load_file(model / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    save_file({**weights, name: weights[name].to(torch.float8_e4m3fn)}, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(TealError, match=f"{name} is stored as float8_e4m3fn; quantized weights cannot be rotated"):
        rotate(model, TOKENS, tmp_path / "rotated")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(TealError, match="is quantized, or was saved sparse"):
        rotate(model, TOKENS, tmp_path / "rotated")
    assert not (tmp_path / "rotated").exists()


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "tiny", varied_model("llama"))
    (tmp_path / "text.txt").write_text("Some text to look at. " * 40)
    options = ["--text", "text.txt", "--tokens", "256", "--length", "32", "--json", "found.json"]
    assert main(["rotate", "tiny", *options]) == 0
    assert "hidden states of 32 channels: 50% of their energy in" in capsys.readouterr().out
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["output"] == "tiny-rotated"
    assert 1 <= found["channels_holding"]["50%"] <= found["channels_holding"]["90%"] <= 32
    assert main(["rotate", "tiny", *options]) == 1
    assert "tiny-rotated exists" in capsys.readouterr().err
    assert main(["calibrate", "tiny-rotated", "--text", "text.txt", "--tokens", "256", "--length", "32"]) == 0
