"""Model directories: what is read, and every damaged or unsafe one that must be refused."""

import errno
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import save_tiny, tiny_model
from safetensors.torch import load_file, save_file

from teal import checkpoint
from teal.blockwalk import open_blocks
from teal.checkpoint import (
    Checkpoint,
    load_config,
    load_model,
    load_tokenizer,
    resolve_model,
    structure_from_config,
)
from teal.engine.load import load_engine
from teal.errors import TealError, UsageError
from teal.structure import FINGERPRINT_ROWS, ModelStructure, fingerprint, identify

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    save_tiny(root / "single")
    shutil.copytree(root / "single", root / "sharded")
    (root / "sharded" / "model.safetensors").unlink()
    tiny_model().save_pretrained(root / "sharded", max_shard_size="30KB")
    return root


@pytest.fixture
def single(originals: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(originals / "single", tmp_path / "single"))


@pytest.fixture
def sharded(originals: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(originals / "sharded", tmp_path / "sharded"))


def rewrite(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


class TestCheckpoint:
    @pytest.mark.parametrize("kind", ["single", "sharded"])
    def test_reads_all_tensors(self, originals: Path, kind: str) -> None:
        reader, state = Checkpoint(originals / kind), tiny_model().state_dict()
        assert set(reader.names()) == set(state)
        assert "model.norm.weight" in reader
        assert "model.norm.bias" not in reader
        assert all(torch.equal(reader.tensor(name), state[name]) for name in state)
        assert torch.equal(reader.rows("lm_head.weight", 3), state["lm_head.weight"][:3])
        files = list((originals / kind).glob("*.safetensors"))
        assert (len(files) > 1) is (kind == "sharded")
        assert reader.bytes() == sum(file.stat().st_size for file in files)

    def test_tensors_of_one_block(self, originals: Path) -> None:
        reader, block = Checkpoint(originals / "sharded"), tiny_model().model.layers[1].state_dict()
        read = dict(reader.tensors("model.layers.1."))
        assert set(read) == set(block)
        assert all(torch.equal(read[name], tensor) for name, tensor in block.items())

    def test_fingerprint_is_that_of_the_model_in_memory(self, originals: Path) -> None:
        reader, model = Checkpoint(originals / "sharded"), tiny_model()
        found = fingerprint(ModelStructure.of(model), lambda name: reader.rows(name, FINGERPRINT_ROWS))
        assert found == identify(model).weights

    @pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
    def test_a_narrowing_load_keeps_the_stored_fingerprint(self, originals: Path, dtype: torch.dtype | None) -> None:
        stored = identify(tiny_model())
        assert identify(load_model(originals / "single", dtype)) == stored
        assert identify(load_engine(originals / "single", dtype)) == stored
        assert open_blocks(originals / "single", dtype).identity == stored

    @pytest.mark.parametrize(
        ("family", "prefix", "stored"),
        [
            ("gemma3", "language_model.model.", "language_model.model."),
            ("gemma3", "language_model.model.", "model.language_model."),
            ("llama", "model.", "model.language_model."),
            ("llama", "model.", ""),
        ],
    )
    def test_finds_blocks_under_other_names(self, family: str, prefix: str, stored: str, tmp_path: Path) -> None:
        model = tiny_model(family)
        model.save_pretrained(tmp_path)
        file = tmp_path / "model.safetensors"
        renamed = {f"{stored}{name.removeprefix(prefix)}": tensor for name, tensor in load_file(file).items()}
        save_file(renamed, file, metadata={"format": "pt"})
        assert Checkpoint(tmp_path).block_path(ModelStructure.of(model)) == f"{stored}layers"
        assert open_blocks(tmp_path, torch.bfloat16).identity == identify(model)

    def test_blocks_under_names_of_no_one_place(self, single: Path) -> None:
        file = single / "model.safetensors"
        weights = {f"{first}.{name}": tensor for name, tensor in load_file(file).items() for first in "ab"}
        save_file({name: tensor.clone() for name, tensor in weights.items()}, file, metadata={"format": "pt"})
        assert Checkpoint(single).block_path(ModelStructure.of(tiny_model())) is None
        assert Checkpoint(single).fingerprint(ModelStructure.of(tiny_model())) == ""

    def test_missing_tensor(self, originals: Path) -> None:
        reader = Checkpoint(originals / "single")
        for read in (lambda: reader.tensor("x"), lambda: reader.rows("x", 1)):
            with pytest.raises(TealError, match=r"has no tensor x; its weights do not match its config.json"):
                read()

    def test_no_config(self, single: Path) -> None:
        (single / "config.json").unlink()
        with pytest.raises(TealError, match=r"has no config.json; it is not a Hugging Face model directory"):
            Checkpoint(single)

    def test_no_directory(self, tmp_path: Path) -> None:
        with pytest.raises(TealError, match=r"has no config.json"):
            Checkpoint(tmp_path / "nowhere")

    def test_no_weights(self, single: Path) -> None:
        (single / "model.safetensors").unlink()
        with pytest.raises(TealError, match=r"holds no weights \(\*\.safetensors\)"):
            Checkpoint(single)

    @pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "weights.pt"])
    def test_pickled_weights_are_never_opened(self, single: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        torch.save(load_file(single / "model.safetensors"), single / name)
        (single / "model.safetensors").unlink()
        monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("opened a pickle"))
        for read in (Checkpoint, load_model):
            with pytest.raises(TealError, match=f"holds only pickled weights \\({name}\\).*convert them"):
                read(single)

    @pytest.mark.parametrize("kept", [0, 7, 500, -1])
    def test_truncated(self, single: Path, kept: int) -> None:
        path = single / "model.safetensors"
        path.write_bytes(path.read_bytes()[:kept])
        for read in (Checkpoint, load_model):
            with pytest.raises(TealError, match=r"model.safetensors is truncated, corrupt or unreadable"):
                read(single)

    def test_pickle_named_safetensors(self, single: Path) -> None:
        torch.save({"x": torch.ones(2)}, single / "model.safetensors")
        with pytest.raises(TealError, match="is truncated, corrupt or unreadable"):
            Checkpoint(single)

    def test_unreadable(self, single: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*_: object, **__: object) -> None:
            raise PermissionError(errno.EACCES, "Permission denied")

        monkeypatch.setattr(checkpoint, "safe_open", fail)
        with pytest.raises(TealError, match=r"model.safetensors is .*unreadable .*Permission denied"):
            Checkpoint(single)

    def test_index_that_names_a_missing_shard(self, sharded: Path) -> None:
        next(iter(sharded.glob("model-00002-*"))).unlink()
        with pytest.raises(TealError, match=r"names model-00002-of-.*\.safetensors, which is missing"):
            Checkpoint(sharded)

    @pytest.mark.parametrize(
        "text",
        [
            "{",
            "[]",
            "{}",
            '{"weight_map": []}',
            '{"weight_map": {"a": 1}}',
            '{"weight_map": {"a": 1, "b": "c"}}',
        ],
    )
    def test_damaged_index(self, sharded: Path, text: str) -> None:
        (sharded / INDEX).write_text(text)
        with pytest.raises(TealError, match=f"{INDEX} is not a valid index"):
            Checkpoint(sharded)


class TestLoading:
    @pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["stored", "bfloat16"])
    def test_model(self, originals: Path, dtype: torch.dtype | None) -> None:
        model = load_model(originals / "sharded", dtype)
        expected = tiny_model().to(dtype).state_dict()
        assert not model.training
        assert model.dtype == (dtype or torch.float32)
        assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())

    def test_weights_that_lack_a_tensor(self, single: Path) -> None:
        rewrite(single / "config.json", num_hidden_layers=3)
        with pytest.raises(TealError, match=r"lacks 9 weights of its config.json, e.g. model.layers.2"):
            load_model(single)

    def test_weights_of_other_shapes(self, single: Path) -> None:
        rewrite(single / "config.json", intermediate_size=40)
        with pytest.raises(TealError, match=r"shape \[32, 56\], its config.json asks for \[32, 40\]"):
            load_model(single)

    def test_tokenizer(self, originals: Path) -> None:
        tokenizer = load_tokenizer(originals / "single")
        assert tokenizer.decode(tokenizer("grüße").input_ids, skip_special_tokens=True) == "grüße"

    def test_no_tokenizer(self, single: Path) -> None:
        for path in single.glob("tokenizer*"):
            path.unlink()
        with pytest.raises(TealError, match="has no usable tokenizer"):
            load_tokenizer(single)

    @pytest.mark.parametrize(
        "text",
        [
            pytest.param("{", id="damaged"),
            pytest.param("{}", id="no-model-type"),
            pytest.param('{"model_type": "perceptron"}', id="unknown-model-type"),
            pytest.param('{"model_type": "llama", "num_attention_heads": "x"}', id="bad-value"),
        ],
    )
    def test_bad_config(self, single: Path, text: str) -> None:
        (single / "config.json").write_text(text)
        for read in (load_config, structure_from_config):
            with pytest.raises(TealError, match=r"config.json is not understood"):
                read(single)


class TestStructureFromConfig:
    @pytest.mark.parametrize("name", ["", "config.json"], ids=["directory", "file"])
    def test_needs_no_weights(self, single: Path, name: str) -> None:
        (single / "model.safetensors").unlink()
        assert structure_from_config(single / name) == ModelStructure.of(tiny_model())

    def test_a_config_under_any_name(self, single: Path) -> None:
        path = (single / "config.json").rename(single / "tiny.json")
        assert structure_from_config(str(path)) == ModelStructure.of(tiny_model())

    def test_missing(self, tmp_path: Path) -> None:
        with pytest.raises(TealError, match=r"has no config.json"):
            structure_from_config(tmp_path)
        with pytest.raises(TealError, match=r"tiny.json"):
            structure_from_config(tmp_path / "tiny.json")

    def test_no_language_model(self, single: Path) -> None:
        rewrite(single / "config.json", model_type="vit")
        with pytest.raises(TealError, match="describes no causal language model"):
            structure_from_config(single)


class TestResolveModel:
    def test_directory(self, single: Path) -> None:
        assert resolve_model(str(single)) == single

    def test_default_is_the_embedded_model(self) -> None:
        assert resolve_model(None) == checkpoint.EMBEDDED_MODEL

    @pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "a/b/c"])
    def test_no_such_directory(self, name: str) -> None:
        with pytest.raises(UsageError, match="is not a directory"):
            resolve_model(name)

    def test_a_file(self, single: Path) -> None:
        with pytest.raises(UsageError, match="is not a directory"):
            resolve_model(single / "config.json")

    def test_name_that_cannot_be_downloaded(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import huggingface_hub

        def fail(*_: object, **__: object) -> None:
            raise RuntimeError("no network\nat all")

        monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
        with pytest.raises(
            UsageError, match=r"^some/model is no local directory and could not be downloaded: no network$"
        ):
            resolve_model("some/model")

    def test_what_is_downloaded(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Not the copies of the weights that publishers add in formats of their own."""
        import huggingface_hub
        from huggingface_hub.utils import filter_repo_objects

        offered = {
            "config.json": True,
            "model-00001-of-00002.safetensors": True,
            "model.safetensors.index.json": True,
            "tokenizer.json": True,
            "tokenizer.model": True,
            "chat_template.jinja": True,
            "merges.txt": True,
            "consolidated.safetensors": False,
            "consolidated.00.pth": False,
            "consolidated.safetensors.index.json": False,
            "original/params.json": False,
            "original/tokenizer.model": False,
            "original/model.safetensors": False,
            "pytorch_model.bin": False,
            "model.gguf": False,
        }
        found: list[str] = []

        def download(name: str, **patterns: Any) -> str:
            found.extend(filter_repo_objects(offered, **patterns))
            return name

        monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
        assert resolve_model("some/model") == Path("some/model")
        assert found == [name for name, wanted in offered.items() if wanted]
