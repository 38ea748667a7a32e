"""Hugging Face checkpoints on disk: config, tokenizer and safetensors, sharded or not."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from teal.errors import TealError, UsageError, reason_of
from teal.structure import FINGERPRINT_ROWS, ModelStructure, fingerprint

EMBEDDED = Path(__file__).parent / "embedded"
EMBEDDED_MODEL = EMBEDDED / "model"
DOWNLOADED = ("*.safetensors", "*.json", "*.model", "*.txt", "*.jinja")
NOT_DOWNLOADED = ("consolidated*", "original/*")  # the same weights again, in their publisher's own format
COMPUTED = ".rotary_emb.inv_freq"  # stored by old checkpoints, computed from the config since


def resolve_model(model: str | Path | None) -> Path:
    """The local directory of a model: a directory, a hub name (downloaded), or None for the embedded one.

    Raises UsageError if there is no such directory and the name cannot be downloaded.
    """
    if model is None:
        return EMBEDDED_MODEL
    path = Path(model)
    if path.is_dir():
        return path
    if path.exists() or str(model).startswith((".", "/", "~")) or str(model).count("/") > 1:
        raise UsageError(f"{model} is not a directory; name a directory with config.json and safetensors")
    from huggingface_hub import snapshot_download

    try:
        patterns = {"allow_patterns": list(DOWNLOADED), "ignore_patterns": list(NOT_DOWNLOADED)}
        return Path(snapshot_download(str(model), **patterns))
    except Exception as error:  # the hub raises many kinds; the user needs the one line
        reason = reason_of(error)
        raise UsageError(f"{model} is no local directory and could not be downloaded: {reason}") from error


class Checkpoint:
    """The weights of a model directory. Tensors are memory-mapped: what is not touched is not read.

    Raises TealError if the directory has no config, no safetensors (pickled weights are never opened),
    an index that names a missing file, or a file that is truncated or corrupt.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        if not (self.directory / "config.json").is_file():
            raise TealError(f"{self.directory} has no config.json; it is not a Hugging Face model directory")
        self._file_of: dict[str, Path] = {}
        for file in self._files():
            for name in self._open(file).keys():  # noqa: SIM118
                if not name.endswith(COMPUTED):
                    self._file_of[name] = file

    def _files(self) -> list[Path]:
        index = self.directory / "model.safetensors.index.json"
        if index.is_file():
            try:
                names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
                missing = [name for name in names if not (self.directory / name).is_file()]
            except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
                raise TealError(f"{index} is not a valid index ({error}); download it again") from error
            if missing:
                raise TealError(f"{index} names {', '.join(missing)}, which is missing; download the checkpoint again")
            return [self.directory / name for name in names]
        whole = self.directory / "model.safetensors"
        files = [whole] if whole.is_file() else sorted(self.directory.glob("*.safetensors"))
        if files:
            return files
        pickled = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in self.directory.glob(pattern))
        if pickled:
            raise TealError(
                f"{self.directory} holds only pickled weights ({pickled[0]}), which can run code when opened; "
                "convert them to safetensors"
            )
        raise TealError(f"{self.directory} holds no weights (*.safetensors)")

    @staticmethod
    def _open(file: Path) -> Any:
        try:
            return safe_open(file, framework="pt")
        except (OSError, SafetensorError) as error:
            raise TealError(f"{file} is truncated, corrupt or unreadable ({error}); download it again") from error

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def names(self) -> list[str]:
        return list(self._file_of)

    def names_by_file(self) -> dict[Path, list[str]]:
        """The tensors of each safetensors file."""
        found: dict[Path, list[str]] = {}
        for name, file in self._file_of.items():
            found.setdefault(file, []).append(name)
        return found

    def tensor(self, name: str) -> Tensor:
        """One tensor, memory-mapped. Raises TealError if the checkpoint has none of that name."""
        return self._open(self._path(name)).get_tensor(name)

    def rows(self, name: str, count: int) -> Tensor:
        """The first `count` rows of a tensor."""
        return self._open(self._path(name)).get_slice(name)[:count]

    def tensors(self, prefix: str) -> Iterator[tuple[str, Tensor]]:
        """All tensors whose name starts with `prefix`, by the rest of their name."""
        names = [name for name in self._file_of if name.startswith(prefix)]
        for file in sorted({self._file_of[name] for name in names}):
            opened = self._open(file)
            for name in names:
                if self._file_of[name] == file:
                    yield name[len(prefix) :], opened.get_tensor(name)

    def block_path(self, structure: ModelStructure) -> str | None:
        """Where the blocks are stored: under the model's own path or, in multimodal checkpoints, under another.

        Found by the projections of the first block; None if only transformers can map the names.
        """
        first = [f".0.{projection.name}.weight" for projection in structure.blocks[0]]
        candidates = {name.removesuffix(first[0]) for name in self._file_of if name.endswith(first[0])}
        found = [path for path in candidates if all(f"{path}{rest}" in self for rest in first)]
        if structure.path in found:
            return structure.path
        return found[0] if len(found) == 1 else None

    def fingerprint(self, structure: ModelStructure) -> str:
        """The fingerprint of the weights as they are stored; empty if only transformers can map their names."""
        path = self.block_path(structure)
        if path is None:
            return ""
        return fingerprint(replace(structure, path=path), lambda name: self.rows(name, FINGERPRINT_ROWS))

    def note_identity(self, model: nn.Module) -> None:
        """Let `structure.identify` know the stored weights of `model`, which may be loaded in a narrower dtype."""
        try:
            structure = ModelStructure.of(model)
        except TealError:  # it may be used dense; whoever makes it sparse is told
            return
        object.__setattr__(model, "stored_fingerprint", self.fingerprint(structure))

    def bytes(self) -> int:
        """Size of the safetensors files."""
        return sum(file.stat().st_size for file in set(self._file_of.values()))

    def _path(self, name: str) -> Path:
        if name not in self._file_of:
            raise TealError(f"{self.directory} has no tensor {name}; its weights do not match its config.json")
        return self._file_of[name]


def load_config(path: Path) -> Any:
    """The transformers config of a model directory or of a file.

    Raises TealError if there is none, it is damaged or transformers does not know the model.
    """
    from transformers import AutoConfig

    file = path if path.is_file() else path / "config.json"
    if not file.is_file():
        raise TealError(f"{path} has no config.json; it is not a Hugging Face model directory")
    try:
        return AutoConfig.from_pretrained(file)
    except Exception as error:  # each config class has its own checks and errors
        reason = reason_of(error)
        raise TealError(f"{file} is not understood: {reason}") from error


def structure_from_config(path: str | Path) -> ModelStructure:
    """The structure of the model that a config describes, without its weights.

    `path` is a model directory or a config file. Raises TealError if it is neither or the architecture is
    unknown.
    """
    from transformers import AutoModelForCausalLM

    config = load_config(Path(path))
    try:
        with torch.device("meta"):
            return ModelStructure.of(AutoModelForCausalLM.from_config(config))
    except ValueError as error:
        reason = reason_of(error)
        raise TealError(f"{path} describes no causal language model: {reason}") from error


def context_length(config: Any) -> int:
    """Tokens that the positions of a model with this config reach."""
    return int(getattr(config.get_text_config(), "max_position_embeddings", 2048))


def load_tokenizer(directory: Path) -> Any:
    """The tokenizer of a model directory. Raises TealError if it has none."""
    from transformers import AutoTokenizer

    load_config(directory)  # its errors first: the tokenizer needs it
    files = [path.name for pattern in ("tokenizer*", "vocab*", "*.model") for path in directory.glob(pattern)]
    if not set(files) - {"tokenizer_config.json"}:
        raise TealError(f"{directory} has no usable tokenizer: there is no tokenizer file")
    try:
        return AutoTokenizer.from_pretrained(directory)
    except Exception as error:  # the tokenizers library raises bare ones
        reason = reason_of(error)
        raise TealError(f"{directory} has no usable tokenizer: {reason}") from error


def load_model(directory: Path, dtype: torch.dtype | None = None, device: str = "cpu") -> Any:
    """The transformers causal language model of a directory, in evaluation mode.

    `dtype` None keeps the stored one. Raises TealError for what `Checkpoint` and `load_config` refuse and for
    weights that do not match the config.
    """
    from transformers import AutoModelForCausalLM

    checkpoint = Checkpoint(directory)  # clear errors for missing, pickled or damaged weights
    load_config(directory)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            directory, dtype=dtype or "auto", output_loading_info=True, ignore_mismatched_sizes=True
        )
    except (ValueError, KeyError, OSError, RuntimeError, SafetensorError) as error:
        reason = reason_of(error)
        raise TealError(f"{directory} could not be loaded: {reason}") from error
    model, report = loaded
    if mismatched := sorted(report["mismatched_keys"]):
        name, stored, wanted = mismatched[0]
        raise TealError(f"{directory}: tensor {name} has shape {list(stored)}, its config.json asks for {list(wanted)}")
    if missing := sorted(report["missing_keys"]):
        raise TealError(f"{directory} lacks {len(missing)} weights of its config.json, e.g. {missing[0]}")
    checkpoint.note_identity(model)
    check_memory(sum(parameter.nbytes for parameter in model.parameters()), device)
    return model.to(device).eval()


def check_memory(needed: int, device: str | torch.device) -> None:
    """Raise TealError if weights of `needed` bytes exceed the free memory of a CUDA device; others are not asked."""
    device = torch.device(device)
    if device.type != "cuda":
        return
    free, total = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if needed > free:
        needed_gb, free_gb, total_gb = (size / 2**30 for size in (needed, free, total))
        raise TealError(
            f"the model's weights take {needed_gb:.1f} GiB, {device} has {free_gb:.1f} of {total_gb:.1f} GiB free; "
            "use a dtype of 16 bits, a smaller model or --device cpu"
        )
