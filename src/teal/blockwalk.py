"""Walk a model block by block: hidden states are carried along, only one block's weights need be in memory."""

import ctypes
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from teal.artifacts import check_header, read_tensors, write_tensors
from teal.checkpoint import Checkpoint, load_config, load_model, structure_from_config
from teal.data import check_tokens
from teal.errors import TealError, UsageError
from teal.progress import track
from teal.structure import ModelStructure, Projection, identify


class BlockSource:
    """The blocks of a model that is in memory. `model`, its `structure` and its `identity`."""

    def __init__(self, model: nn.Module) -> None:
        check_evaluation_mode(model)
        self.model = model
        self.structure = ModelStructure.of(model)
        self.identity = identify(model, self.structure)
        self._check_weights()

    def _check_weights(self) -> None:
        if any(p.is_meta for block in self.structure.block_modules(self.model) for p in block.parameters()):
            raise TealError(
                "weights of the model are on the meta device (never loaded, or offloaded); load the whole model, or "
                "give its directory to read it block by block"
            )

    @contextmanager
    def block(self, index: int) -> Iterator[nn.Module]:
        """One block with its weights, for as long as the context lasts."""
        yield self.structure.block_modules(self.model)[index]

    @torch.no_grad()
    def first_inputs(self, tokens: Tensor) -> tuple[Tensor, list[dict[str, Any]]]:
        """What the first block receives for tokens [B, L], hidden states [B, L, d], and the keyword arguments
        (masks, rotary embeddings) that the model passes to every block for one sequence of L tokens.
        Raises TealError for tokens that the model does not know.
        """
        check_tokens(tokens, self.model)
        blocks = self.structure.block_modules(self.model)
        base = self.model.get_submodule(self.structure.path.rpartition(".")[0])
        device = next(parameter for parameter in base.parameters() if not parameter.is_meta).device
        hidden, arguments = [], [{} for _ in blocks]
        with _recording(blocks, hidden, arguments):
            for row in tokens:
                base(input_ids=row[None].to(device), use_cache=False)
        return torch.cat(hidden), arguments


class StreamedBlocks(BlockSource):
    """The blocks of a checkpoint: everything else is memory-mapped, a block's weights are read when it is used."""

    def __init__(self, checkpoint: Checkpoint, path: str, dtype: torch.dtype | None = None) -> None:
        """`path` is where the checkpoint stores the blocks, see `Checkpoint.block_path`."""
        self.checkpoint = checkpoint
        self.path = path
        self.dtype = dtype or load_config(checkpoint.directory).get_text_config().dtype
        super().__init__(_skeleton(checkpoint, path, self.dtype))
        if any(name.startswith(f"{path}.{len(self.structure.blocks)}.") for name in checkpoint.names()):
            known = len(self.structure.blocks)
            raise TealError(f"{checkpoint.directory} holds more blocks than the {known} of its config.json")

    def _check_weights(self) -> None:
        """A block's weights come with `block`."""

    @contextmanager
    def block(self, index: int) -> Iterator[nn.Module]:
        module = self.structure.block_modules(self.model)[index]
        weights = self.checkpoint.tensors(f"{self.path}.{index}.")
        converted = {name: tensor.to(self.dtype or tensor.dtype) for name, tensor in weights}
        _assign(module, converted, f"block {index} of {self.checkpoint.directory}")
        try:
            yield module
        finally:
            module.to("meta")
            _return_freed_memory()


def open_blocks(model: nn.Module | str | Path, dtype: torch.dtype | None = None, device: str = "cpu") -> BlockSource:
    """The blocks of a model in memory, or of a checkpoint directory, streamed where its names allow it or, onto a
    `device` other than "cpu", loaded all at once.

    `dtype` None keeps the stored one. Raises TealError for an unknown architecture or damaged weights.
    """
    if isinstance(model, nn.Module):
        return BlockSource(model)
    directory = Path(model)
    if device != "cpu":
        return BlockSource(load_model(directory, dtype, device))
    structure = structure_from_config(directory)
    checkpoint = Checkpoint(directory)
    path = checkpoint.block_path(structure)
    if path is not None:
        return StreamedBlocks(checkpoint, path, dtype)
    return BlockSource(load_model(directory, dtype))  # stored under names that only transformers can map


@torch.no_grad()
def run_block(block: nn.Module, hidden: Tensor, arguments: dict[str, Any]) -> Tensor:
    """Sequences [B, L, d] of equal length through a block -> [B, L, d]."""
    return block_output(block, hidden, arguments)


def block_output(block: nn.Module, hidden: Tensor, arguments: dict[str, Any]) -> Tensor:
    """As `run_block`, with gradients where they are enabled."""
    out = block(hidden, **arguments)
    return out[0] if isinstance(out, tuple) else out


@torch.no_grad()
def watch_inputs(
    source: BlockSource,
    tokens: Tensor,
    watching: Callable[[int, Projection, nn.Module], Callable[[Tensor], None]],
    title: str,
    show_progress: bool,
) -> None:
    """Walk tokens [B, L] through the blocks; `watching(block, projection, module)` gives what its inputs
    [1, L, K], one sequence at a time, are handed to.
    """
    hidden, arguments = source.first_inputs(tokens)
    count = len(source.structure.blocks)
    for index in track(range(count), title, count, show_progress):
        with source.block(index) as block, ExitStack() as hooks:
            for projection in source.structure.blocks[index]:
                module = block.get_submodule(projection.name)
                watch = watching(index, projection, module)

                def hand_on(_: object, inputs: tuple[Tensor, ...], watch: Callable[[Tensor], None] = watch) -> None:
                    watch(inputs[0])

                hooks.callback(module.register_forward_pre_hook(hand_on).remove)
            hidden = torch.cat([run_block(block, row, arguments[index]) for row in hidden.split(1)])


class Spool:
    """Finished blocks of a long walk, on disk, so that an interrupted run continues where it stopped.

    Holds one file of results per finished block, the hidden states that enter the next one and what else is `carried`
    along. `job` says what is being computed: a spool of another job is refused, never mixed in. Without a directory
    nothing is kept. `discard_spool` deletes it once the result is safe.
    """

    FORMAT = "teal.spool"
    VERSION = 1

    def __init__(self, directory: Path | None, job: dict[str, Any]) -> None:
        self.directory = directory
        self.job = job
        self.finished = 0
        self.hidden: Tensor | None = None
        self.carried: dict[str, Tensor] = {}
        if directory is not None and (directory / "hidden.safetensors").exists():
            tensors, header = self._read("hidden")
            self.finished, self.hidden, self.carried = int(header["finished"]), tensors.pop("hidden"), tensors

    def save(self, index: int, results: dict[str, Tensor], hidden: Tensor, **carried: Tensor) -> None:
        """Keep the results of block `index`, the hidden states it gave and what is carried along with them."""
        if self.directory is not None:
            self._write(f"block-{index:05d}", results, index + 1)
            self._write("hidden", {"hidden": hidden, **carried}, index + 1)

    def results(self, index: int) -> dict[str, Tensor]:
        """What was saved for a finished block."""
        return self._read(f"block-{index:05d}")[0]

    def _write(self, name: str, tensors: dict[str, Tensor], finished: int) -> None:
        header = {"format": self.FORMAT, "version": self.VERSION, "job": self.job, "finished": finished}
        assert self.directory is not None
        write_tensors(self.directory / f"{name}.safetensors", tensors, header)

    def _read(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        assert self.directory is not None
        path = self.directory / f"{name}.safetensors"
        tensors, header = read_tensors(path)
        check_header(header, self.FORMAT, self.VERSION, path)
        if header["job"] != self.job:
            differing = [key for key in self.job if self.job[key] != header["job"].get(key)]
            raise TealError(
                f"{self.directory} holds an unfinished run with other settings (different: {', '.join(differing)}); "
                "repeat that run as it was, or delete the directory"
            )
        return tensors, header


def discard_spool(directory: Path) -> None:
    """Delete a spool directory, if it exists."""
    if directory.is_dir():
        for file in directory.glob("*.safetensors"):
            file.unlink()
        for temporary in directory.glob(".*.tmp"):  # what a killed process was writing
            shutil.rmtree(temporary, ignore_errors=True)
        with suppress(OSError):  # it holds something that is not ours
            directory.rmdir()


def _skeleton(checkpoint: Checkpoint, path: str, dtype: torch.dtype | None) -> nn.Module:
    """The model with what surrounds its blocks, stored under `path`, memory-mapped; the blocks are on the meta device.

    Other parts (vision towers) stay on the meta device too: no block's input depends on them.
    """
    from transformers import AutoModelForCausalLM

    config = load_config(checkpoint.directory)
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype or config.dtype or torch.float32)
    compute_buffers(model)
    parent, _, blocks = ModelStructure.of(model).path.rpartition(".")
    stored, wanted = "".join(path.rpartition(".")[:2]), model.state_dict().keys()
    weights = {}
    for name in checkpoint.names():
        place = f"{parent}.{name.removeprefix(stored)}" if name.startswith(stored) else name
        if place in wanted and not name.startswith(f"{path}."):
            tensor = checkpoint.tensor(name)
            weights[place] = tensor.to(dtype or tensor.dtype)
    _assign(model, weights, checkpoint.directory, strict=False)
    model.tie_weights()
    for name, value in model.get_submodule(parent).named_parameters():
        if value.is_meta and not name.startswith(f"{blocks}."):
            raise TealError(
                f"{checkpoint.directory} has no tensor {stored}{name}; its weights do not match its config.json"
            )
    checkpoint.note_identity(model)
    return model.eval()


@torch.no_grad()
def compute_buffers(model: Any) -> None:
    """Compute the buffers that no checkpoint holds, rotary frequencies for one, of a model made on meta."""
    for module in model.modules():
        computed = [name for name, buffer in module.named_buffers(recurse=False) if buffer.is_meta]
        for name in computed:
            module._buffers[name] = torch.empty_like(module._buffers[name], device="cpu")
        if computed:
            model._init_weights(module)


def _return_freed_memory() -> None:
    """Give freed memory back to the system, where the C library can: its heap fragments from block to block."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _assign(module: nn.Module, weights: dict[str, Tensor], what: object, strict: bool = True) -> None:
    try:
        module.load_state_dict(weights, strict=strict, assign=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split("\n\t")[1:]) or str(error)
        raise TealError(f"{what} does not match its config.json: {reason}") from error


@contextmanager
def replace_forward(module: nn.Module, forward: Any) -> Iterator[None]:
    """Within the context `module` computes `forward`; what was set on the instance before comes back."""
    before = module.__dict__.get("forward")
    try:
        module.forward = forward
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


def check_evaluation_mode(model: nn.Module) -> None:
    """Raise UsageError for a model in training mode: dropout would be measured too."""
    if model.training:
        raise UsageError("the model is in training mode; call model.eval() first")


@contextmanager
def _recording(blocks: Sequence[nn.Module], hidden: list[Tensor], arguments: list[dict[str, Any]]) -> Iterator[None]:
    """Within the context the blocks compute nothing: they note what they are called with and pass it on."""

    def recorder(index: int) -> Any:
        def forward(states: Tensor, **keywords: Any) -> Tensor:
            if index == 0:
                hidden.append(states)
            arguments[index] = keywords
            return states

        return forward

    with ExitStack() as replaced:
        for index, block in enumerate(blocks):
            replaced.enter_context(replace_forward(block, recorder(index)))
        yield
