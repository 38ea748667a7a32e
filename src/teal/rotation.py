"""Rotate a model's hidden states: the same function, but few channels hold most of what its projections read.

With the gains of its norms moved into the weights behind them, a decoder of the Llama kind computes the same in any
orthonormal basis of its hidden states (SliceGPT, arXiv 2401.15024), and of each head's values (QuaRot, arXiv
2404.00456). In the basis of principal components, that of LaRoSA (arXiv 2507.01299), channels differ widely in
magnitude, so dropping the small ones takes less with them. LaRoSA has a basis for every block and turns hidden states
while decoding; here all blocks share one, and nothing is left to do then: a rotated model is an ordinary checkpoint.
What `down_proj` reads comes out of a product by channel and cannot be rotated.
"""

import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from teal.artifacts import check_writable, read_json, write_atomically, write_json
from teal.blockwalk import BlockSource, Spool, discard_spool, open_blocks, run_block
from teal.calibration import DENSE_TOKENS, check_finite
from teal.checkpoint import Checkpoint, structure_from_config
from teal.data import TokenBlocks, hash_tokens, token_ids
from teal.errors import TealError
from teal.progress import track
from teal.structure import INPUT_OF_PROJECTION

# Model types that add nothing but projections to hidden states, each behind an RMSNorm with a gain and no more.
ROTATABLE = ("llama", "mistral", "qwen2", "qwen3", "phi3")
NORM_BEFORE = {"attention_input": "input_layernorm", "mlp_input": "post_attention_layernorm"}
GAINS = tuple(f".{norm}.weight" for norm in NORM_BEFORE.values())
FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
BESIDE_WEIGHTS = ("*.json", "*.model", "*.txt", "*.jinja", "LICENSE*", "USE_POLICY*")
HEAD = "lm_head.weight"
ROWS = 16384  # of a weight that are multiplied at once


@dataclass(frozen=True)
class Rotation:
    """New axes as columns, the most energetic first, in float64: of the hidden states [d, d], and for each block of
    the values of its key/value heads [kv_heads, head_dim, head_dim]; `spectrum` [d] is the energy along the former.
    """

    hidden: Tensor
    heads: tuple[Tensor, ...]
    spectrum: Tensor

    def channels_holding(self, share: float) -> int:
        """How many of the first channels hold this share of the hidden states' energy."""
        held = self.spectrum.cumsum(0) / self.spectrum.sum()
        return int((held < share).sum()) + 1


def rotate(
    directory: str | Path,
    tokens: Tensor | TokenBlocks,
    output: str | Path,
    *,
    dense_tokens: int = DENSE_TOKENS,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    show_progress: bool = False,
) -> Rotation:
    """Write the model of `directory` to the directory `output`, in axes found on tokens [B, L], see `find_rotation`.

    Weights are multiplied in float32 and stored in `dtype` (None: as they were); a tied LM head is stored apart, as the
    final norm's gain goes into it. A `device` other than "cpu" must hold the whole model. What is finished lies beside
    `output` until all is: an interrupted run, repeated, continues.
    Raises TealError for an `output` that exists, for quantized weights and for model types other than ROTATABLE.
    """
    directory, output = Path(directory), Path(output)
    if output.exists():
        raise TealError(f"{output} exists; name another directory or remove it")
    check_writable(output)
    structure = structure_from_config(directory)
    if structure.model_type not in ROTATABLE:
        raise TealError(
            f"model type {structure.model_type!r} cannot be rotated: not known to have nothing but RMSNorms and "
            f"projections on its hidden states; {', '.join(ROTATABLE)} are"
        )
    if read_json(directory / "config.json").get("quantization_config"):
        raise TealError(
            f"{directory} is quantized, or was saved sparse (quantization_config in its config.json); rotate the model "
            "that it was made of"
        )
    checkpoint = Checkpoint(directory)
    path = checkpoint.block_path(structure)
    if path is None:
        raise TealError(f"{directory} stores its blocks under names that are not its model type's")
    source = open_blocks(directory, device=device)
    job = {
        "stage": "rotate", "model": source.identity.weights, "tokens": hash_tokens(token_ids(tokens)),
        "dense_tokens": dense_tokens, "dtype": str(dtype),
    }  # fmt: skip
    unfinished = output.with_name(f"{output.name}.partial")
    rotation = find_rotation(source, tokens, dense_tokens, Spool(unfinished, job), show_progress)
    rotated = _RotatedCheckpoint(checkpoint, path, rotation, dtype, device)
    shards = unfinished / "model"
    files = checkpoint.names_by_file()
    for file, names in track(list(files.items()), "rotating files", len(files), show_progress):
        if not (shards / file.name).exists():
            tensors = rotated.tensors(names)
            write_atomically(shards / file.name, partial(save_file, tensors, metadata={"format": "pt"}))
    _write_companions(directory, shards, rotated)
    shards.rename(output)
    discard_spool(unfinished)
    return rotation


@torch.no_grad()
def find_rotation(
    source: BlockSource,
    tokens: Tensor | TokenBlocks,
    dense_tokens: int = DENSE_TOKENS,
    progress: Spool | None = None,
    show_progress: bool = False,
) -> Rotation:
    """The principal components of what the blocks of a model compute on tokens [B, L], positions from `dense_tokens`.

    For the hidden states, of what their norms, without their gains, give before all attentions and all MLPs together;
    for the values, of what leaves attention, over the heads that share them. About zero, not the mean.
    """
    progress = progress or Spool(None, {})
    hidden, arguments = source.first_inputs(token_ids(tokens))
    heads, head_dim = _value_heads(source.model.config)
    energy = torch.zeros(hidden.shape[-1], hidden.shape[-1], dtype=torch.float64)
    if progress.hidden is not None:
        hidden, energy = progress.hidden.to(hidden.device), progress.carried["energy"]
    values = [progress.results(index)["values"] for index in range(progress.finished)]
    blocks = range(progress.finished, len(source.structure.blocks))
    for index in track(blocks, "finding axes", len(source.structure.blocks), show_progress, progress.finished):
        with source.block(index) as block, _Moments(block, heads, head_dim, dense_tokens) as moments:
            hidden = torch.cat([run_block(block, row, arguments[index]) for row in hidden.split(1)])
        check_finite(hidden, f"block {index}")
        energy += moments.hidden
        values.append(moments.values)
        progress.save(index, {"values": moments.values}, hidden, energy=energy)
    spectrum, axes = _principal_components(energy)
    return Rotation(axes, tuple(_principal_components(value)[1] for value in values), spectrum)


def _value_heads(config: Any) -> tuple[int, int]:
    """Key/value heads and the width of each."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return config.num_key_value_heads, head_dim


def _principal_components(moments: Tensor) -> tuple[Tensor, Tensor]:
    """Second moments [..., n, n] -> energies [..., n], falling, and axes [..., n, n] as columns of a fixed sign."""
    energies, axes = torch.linalg.eigh(moments)
    energies, axes = energies.flip(-1), axes.flip(-1)
    largest = axes.gather(-2, axes.abs().argmax(-2, keepdim=True))
    return energies, axes * largest.sign()


class _Moments:
    """Sums of second moments in one block while it runs: of normed hidden states [d, d], and of values [H, D, D]."""

    def __init__(self, block: nn.Module, heads: int, head_dim: int, dense_tokens: int) -> None:
        self.block, self.dense_tokens = block, dense_tokens
        self.hidden: Tensor = torch.zeros(())
        self.values = torch.zeros(heads, head_dim, head_dim, dtype=torch.float64)
        self._hooks = ExitStack()

    def __enter__(self) -> "_Moments":
        for norm in NORM_BEFORE.values():
            handle = self.block.get_submodule(norm).register_forward_pre_hook(self._add_hidden)
            self._hooks.callback(handle.remove)
        output = next(module for name, module in self.block.named_modules() if name.endswith("o_proj"))
        self._hooks.callback(output.register_forward_pre_hook(self._add_values).remove)
        return self

    def __exit__(self, *_: object) -> None:
        self._hooks.close()

    def _add_hidden(self, _: object, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0][:, self.dense_tokens :].flatten(0, 1).float()
        x = x * x.square().mean(-1, keepdim=True).clamp_min(1e-30).rsqrt()
        self.hidden = self.hidden + (x.T @ x).double().cpu()

    def _add_values(self, _: object, inputs: tuple[Tensor, ...]) -> None:
        heads, head_dim = self.values.shape[:2]
        x = inputs[0][:, self.dense_tokens :].float().unflatten(-1, (heads, -1, head_dim))  # [B, T, H, group, D]
        self.values += torch.einsum("bthgi,bthgj->hij", x, x).double().cpu()


class _RotatedCheckpoint:
    """The tensors of a checkpoint in new axes."""

    def __init__(
        self, checkpoint: Checkpoint, path: str, rotation: Rotation, dtype: torch.dtype | None, device: str
    ) -> None:
        self.checkpoint, self.path, self.dtype, self.device = checkpoint, path, dtype, device
        parent = path.rpartition(".")[0]
        self.embedding, self.final_norm = f"{parent}.embed_tokens.weight", f"{parent}.norm.weight"
        self.axes = rotation.hidden.to(device, torch.float32)
        self.heads = [axes.to(device, torch.float32) for axes in rotation.heads]

    def tensors(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Those called `names`, rotated, and a tied LM head with the embedding."""
        found = {name: self._stored(self._rotated(name), name) for name in names}
        if self.embedding in found and HEAD not in self.checkpoint:
            found[HEAD] = self._stored(self._head(self._load(self.embedding)), self.embedding)
        return found

    def _rotated(self, name: str) -> Tensor:
        weight = self._load(name)
        if name == self.embedding:
            return self._turned(weight)
        if name == HEAD:
            return self._head(weight)
        if name == self.final_norm or name.endswith(GAINS):
            return torch.ones_like(weight)
        block, _, rest = name.removeprefix(f"{self.path}.").partition(".")
        module, _, kind = rest.rpartition(".")
        input_ = INPUT_OF_PROJECTION.get(module.rpartition(".")[2])
        if input_ in NORM_BEFORE:
            if kind == "weight":
                weight = self._turned(weight * self._load(f"{self.path}.{block}.{NORM_BEFORE[input_]}.weight"))
            if module.endswith(("v_proj", "qkv_proj")):
                weight = self._values_turned(weight, self.heads[int(block)])
        elif input_ is not None:
            if kind == "weight" and input_ == "attention_output":
                weight = self._outputs_turned(weight, self.heads[int(block)])
            weight = self._turned(weight.T).T if kind == "weight" else self._turned(weight)
        return weight

    def _head(self, weight: Tensor) -> Tensor:
        return self._turned(weight * self._load(self.final_norm))

    def _load(self, name: str) -> Tensor:
        tensor = self.checkpoint.tensor(name)
        if tensor.dtype not in FLOATING:
            raise TealError(
                f"{self.checkpoint.directory}: tensor {name} is stored as {str(tensor.dtype).removeprefix('torch.')}; "
                "quantized weights cannot be rotated"
            )
        return tensor.to(self.device, torch.float32)

    def _stored(self, tensor: Tensor, name: str) -> Tensor:
        return tensor.to("cpu", self.dtype or self.checkpoint.tensor(name).dtype).contiguous()

    def _turned(self, weight: Tensor) -> Tensor:
        """Rows [N, d] or one row [d] in new axes."""
        return torch.cat([rows @ self.axes for rows in weight.split(ROWS)]) if weight.ndim > 1 else weight @ self.axes

    @staticmethod
    def _values_turned(weight: Tensor, axes: Tensor) -> Tensor:
        """The last rows, those of the values, of [N, d] or a bias [N]."""
        heads, head_dim, _ = axes.shape
        rest, values = weight.split([len(weight) - heads * head_dim, heads * head_dim])
        turned = torch.einsum("hi...,hij->hj...", values.unflatten(0, (heads, head_dim)), axes)
        return torch.cat([rest, turned.flatten(0, 1)])

    @staticmethod
    def _outputs_turned(weight: Tensor, axes: Tensor) -> Tensor:
        """[N, heads x head_dim], where a group of heads shares the values of one."""
        heads, head_dim, _ = axes.shape
        grouped = weight.unflatten(1, (heads, -1, head_dim))
        return torch.einsum("nhgi,hij->nhgj", grouped, axes).flatten(1)


def _write_companions(directory: Path, output: Path, rotated: _RotatedCheckpoint) -> None:
    """Config, tokenizer and all else that lies beside weights; the index, if there is one, with the LM head in it."""
    for file in sorted({file for pattern in BESIDE_WEIGHTS for file in directory.glob(pattern)}):
        shutil.copy(file, output / file.name)
    config = read_json(directory / "config.json")
    config["tie_word_embeddings"] = False
    if rotated.dtype is not None:
        config["dtype"] = str(rotated.dtype).removeprefix("torch.")
        config.pop("torch_dtype", None)
    write_json(output / "config.json", config)
    index = output / "model.safetensors.index.json"
    if index.exists():
        found = read_json(index)
        shards = {name: file for name, file in found["weight_map"].items() if name in rotated.checkpoint}
        shards.setdefault(HEAD, shards[rotated.embedding])
        size = sum(file.stat().st_size for file in output.glob("*.safetensors"))
        write_json(index, {"metadata": {"total_size": size}, "weight_map": shards})
