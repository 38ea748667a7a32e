"""Load a Hugging Face checkpoint into the engine, tensor by tensor."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from teal.checkpoint import Checkpoint, check_memory, load_config
from teal.engine.config import EngineConfig
from teal.engine.model import DecoderModel
from teal.errors import TealError, UsageError, reason_of
from teal.plan import SparsityPlan
from teal.sparse_model import sparsify

DEFAULT_CONTEXT = 4096
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def load_engine(
    directory: str | Path,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    plan: SparsityPlan | None = None,
    level: float | None = None,
    context: int | None = None,
    *,
    quantization: str | None = None,
    head_quantization: str | None = None,
    strict: bool = False,
) -> DecoderModel:
    """The model of a directory, made sparse if there is a plan.

    `dtype` None keeps the stored one; `context` None is what the model was made for, at most DEFAULT_CONTEXT;
    `level` and `strict` are those of `teal.sparsify`. `quantization` "int8" or "int4" rounds the projections
    while they are loaded, `head_quantization` the LM head. On the CPU, weights that keep dtype and layout stay
    memory-mapped: do not overwrite the files while the engine lives.
    Raises TealError for a config the engine does not support, for tensors that are missing, unexpected or of
    the wrong shape (naming them), for a plan that does not fit and for a GPU that is too small; UsageError for a
    dtype or a device that there is not.
    """
    directory = Path(directory)
    checkpoint = Checkpoint(directory)
    config = EngineConfig.of(load_config(directory), _generation_eos(directory))
    if config.tied_embeddings and _has_own_head(checkpoint):
        config = replace(config, tied_embeddings=False)
    config = replace(config, quantization=quantization, head_quantization=head_quantization)
    device, dtype = _device(device), _dtype(dtype, config, checkpoint)
    check_memory(config.weights * dtype.itemsize, device)
    take = _CheckpointTensors(checkpoint, dtype, device)
    if context is None:
        context = min(config.max_positions, DEFAULT_CONTEXT)
    model = DecoderModel(config, take, context).eval()
    take.check_all_taken()
    checkpoint.note_identity(model)
    if plan is not None:
        sparsify(model, plan, level, strict=strict)
    return model


class _CheckpointTensors:
    """Gives DecoderModel its tensors and remembers which ones nobody asked for."""

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> None:
        self._checkpoint, self._dtype, self._device = checkpoint, dtype, device
        # Old checkpoints store the RoPE frequencies too; a tied head may be stored a second time.
        ignored = (".rotary_emb.inv_freq", "lm_head.weight")
        self._left = {name for name in checkpoint.names() if not name.endswith(ignored)}

    def __call__(self, name: str, shape: tuple[int, ...]) -> Tensor:
        name = name if name.startswith("lm_head.") else f"model.{name}"
        tensor = self._checkpoint.tensor(name)
        if tuple(tensor.shape) != shape:
            raise self._error(f"{name} has shape {list(tensor.shape)}, its config.json asks for {list(shape)}")
        if tensor.dtype not in (*DTYPES, torch.float64):
            raise self._error(f"{name} is stored as {_name(tensor.dtype)}; quantized weights are not supported")
        self._left.discard(name)
        return tensor.to(self._device, self._dtype)

    def check_all_taken(self) -> None:
        if self._left:
            more = f" and {len(self._left) - 1} more" if len(self._left) > 1 else ""
            raise self._error(f"{min(self._left)}{more} has no place in a model of its config.json")

    def _error(self, problem: str) -> TealError:
        return TealError(f"{self._checkpoint.directory}: tensor {problem}")


def _has_own_head(checkpoint: Checkpoint) -> bool:
    """Whether a config says "tied" and the weights say otherwise; transformers, too, believes the weights."""
    head, embeddings = "lm_head.weight", "model.embed_tokens.weight"
    return head in checkpoint and not torch.equal(checkpoint.tensor(head), checkpoint.tensor(embeddings))


def _generation_eos(directory: Path) -> int | list[int] | None:
    """The end-of-text ids of generation_config.json, which go before those of config.json."""
    file = directory / "generation_config.json"
    if not file.is_file():
        return None
    try:
        settings: Any = json.loads(file.read_text(encoding="utf-8"))
        return settings.get("eos_token_id")
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError) as error:
        raise TealError(f"{file} is not a JSON object ({error}); download it again or remove it") from error


def _dtype(asked: torch.dtype | None, config: EngineConfig, checkpoint: Checkpoint) -> torch.dtype:
    dtype = asked or config.dtype or checkpoint.rows("model.embed_tokens.weight", 1).dtype
    if dtype not in DTYPES:
        raise UsageError(f"the engine computes in {', '.join(map(_name, DTYPES))}, not in {_name(dtype)}")
    return dtype


def _device(device: str | torch.device) -> torch.device:
    try:
        device = torch.device(device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # unknown name, missing driver, torch built without it
        reason = reason_of(error)
        raise UsageError(f"there is no device {device} here: {reason}") from error
    return device


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
