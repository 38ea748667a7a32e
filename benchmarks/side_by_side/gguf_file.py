"""Random weights of a shape as a GGUF file, made tensor by tensor, so that neither model nor file is held in memory."""

import importlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from teal.artifacts import write_atomically
from teal.engine.config import EngineConfig
from teal.errors import TealError, UsageError
from teal.progress import track

if TYPE_CHECKING:
    from side_by_side.weights import SharedWeights

ARCHITECTURES = {"llama": "LLAMA", "mistral": "LLAMA", "qwen2": "QWEN2", "qwen3": "QWEN3"}
FINGERPRINT = "teal.weights"
VERSION = 3  # of what a plan and its random weights make
INSTALL = 'pip install -c constraints.txt ".[llama-cpp]"'


@dataclass(frozen=True)
class GgufTensor:
    """One tensor: its name here and there, shape [N, K] or [N], and how and in how many bytes it is stored."""

    source: str
    name: str
    shape: tuple[int, ...]
    format: str
    bytes: int


@dataclass(frozen=True)
class GgufPlan:
    """What a file holds. `matrix_format` is that of the blocks' projections, `head_format` of embedding and LM head."""

    config: EngineConfig
    matrix_format: str
    head_format: str
    rope_base: float
    seed: int
    tensors: tuple[GgufTensor, ...]

    @property
    def bytes(self) -> int:
        return sum(tensor.bytes for tensor in self.tensors)

    @property
    def bytes_per_token(self) -> int:
        """Weights that one decoded token reads: all, but of an embedding that is not also the head only a row."""
        embedding = next(tensor for tensor in self.tensors if tensor.source == "model.embed_tokens.weight")
        if self.config.tied_embeddings:
            return self.bytes
        return self.bytes - embedding.bytes + embedding.bytes // embedding.shape[0]

    @property
    def fingerprint(self) -> str:
        """All that decides the file's content, in one line."""
        tensors = [(tensor.name, tensor.shape, tensor.format) for tensor in self.tensors]
        heads = [self.config.heads, self.config.kv_heads, self.config.head_dim]
        numbers = [self.rope_base, self.config.rms_norm_eps, self.config.max_positions]
        made = {"version": VERSION, "seed": self.seed, "type": self.config.model_type, "heads": heads}
        return json.dumps({**made, "numbers": numbers, "tensors": tensors}, sort_keys=True)


def plan_gguf(config: Any, weights: "SharedWeights", matrix_format: str, head_format: str, seed: int) -> GgufPlan:
    """Decide names, order, formats and sizes. Formats are llama.cpp's names: F16, BF16, Q8_0, Q4_0, ...

    Raises UsageError for an architecture without a name there or a matrix that no whole blocks fill.
    """
    engine_config = EngineConfig.of(config)
    if engine_config.model_type not in ARCHITECTURES or any(engine_config.windows):
        raise UsageError(f"model type {engine_config.model_type!r} with its windows is not written as GGUF here")
    rope = config.rope_parameters
    if rope["rope_type"] != "default":
        raise UsageError(f"RoPE of type {rope['rope_type']!r} is not written as GGUF here")
    gguf = import_gguf()
    names = gguf.get_tensor_name_map(_architecture(gguf, engine_config), engine_config.blocks)
    tensors = []
    for source, shape in weights.shapes.items():
        name = names.get_name(source, try_suffixes=(".weight", ".bias"))
        format_ = "F32"  # llama.cpp computes with norms and biases in float32 only
        if len(shape) > 1:
            format_ = matrix_format if ".layers." in source else head_format
        tensors.append(GgufTensor(source, name, shape, format_, _bytes(gguf, source, shape, format_)))
    return GgufPlan(engine_config, matrix_format, head_format, rope["rope_theta"], seed, tuple(tensors))


def _bytes(gguf: Any, source: str, shape: tuple[int, ...], format_: str) -> int:
    block, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[format_]]
    if shape[-1] % block:
        raise UsageError(f"{source} has rows of {shape[-1]} weights, {format_} stores blocks of {block}; name another")
    return torch.Size(shape).numel() // block * block_bytes


def ensure_gguf(path: Path, plan: GgufPlan, weights: "SharedWeights", show_progress: bool = False) -> bool:
    """Write the file, unless it is there and holds just this; returns whether it was written.

    Raises TealError if the disk has too little room or cannot be written.
    """
    if _stored_fingerprint(path) == plan.fingerprint:
        return False
    _check_disk(path, plan.bytes)
    write_atomically(path, lambda temporary: _write(temporary, plan, weights, show_progress))
    return True


def import_gguf() -> Any:
    try:
        return importlib.import_module("gguf")
    except ImportError as error:
        raise TealError(f"the gguf package is missing; install it: {INSTALL}") from error


def _architecture(gguf: Any, config: EngineConfig) -> Any:
    return gguf.MODEL_ARCH[ARCHITECTURES[config.model_type]]


def _stored_fingerprint(path: Path) -> str | None:
    """What the file says it holds; None if there is none or it is not whole."""
    if not path.is_file():
        return None
    try:
        return str(import_gguf().GGUFReader(path).fields[FINGERPRINT].contents())
    except (ValueError, KeyError, IndexError, OSError):
        return None


def _check_disk(path: Path, needed: int) -> None:
    directory = path.parent.resolve()
    while not directory.exists():
        directory = directory.parent
    free = shutil.disk_usage(directory).free
    if free < needed * 1.02:  # the file system's own share
        raise TealError(
            f"{path.name} takes {needed / 1e9:.1f} GB and {directory} has {free / 1e9:.1f} GB free; "
            "make room or name another --directory"
        )


def _write(path: Path, plan: GgufPlan, weights: "SharedWeights", show_progress: bool) -> None:
    gguf = import_gguf()
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[_architecture(gguf, plan.config)])
    _describe(writer, plan)
    for tensor in plan.tensors:
        stored = gguf.GGMLQuantizationType[tensor.format]
        # A float dtype says that the shape counts weights; uint8 would say bytes.
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.bytes, raw_dtype=stored)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        label = f"writing {plan.matrix_format}"
        for tensor in track(plan.tensors, label, len(plan.tensors), show_progress):
            rows = interleave_rotary_rows(weights[tensor.source], tensor.source, plan.config).float()
            writer.write_tensor_data(gguf.quantize(rows.numpy(), gguf.GGMLQuantizationType[tensor.format]))
    finally:
        writer.close()


def _describe(writer: Any, plan: GgufPlan) -> None:
    """Hyperparameters and the smallest vocabulary that there is: none, only its size."""
    config = plan.config
    writer.add_string(FINGERPRINT, plan.fingerprint)
    writer.add_context_length(config.max_positions)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.blocks)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.heads)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(plan.rope_base)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")


def interleave_rotary_rows(weight: Tensor, source: str, config: EngineConfig) -> Tensor:
    """Rows of q_proj and k_proj as llama.cpp wants them for the llama architecture; other tensors as they are.

    Hugging Face rotates row i of a head with row i + head_dim / 2, llama.cpp row 2 i with row 2 i + 1.
    """
    if ARCHITECTURES[config.model_type] != "LLAMA" or not any(part in source for part in (".q_proj.", ".k_proj.")):
        return weight
    heads = weight.view(-1, 2, config.head_dim // 2, *weight.shape[1:])  # [heads, half, pair, K]
    return heads.transpose(1, 2).reshape(weight.shape)
