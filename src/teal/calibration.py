"""calibrate: one pass over a little text gives the distribution of every distinct projection input."""

from contextlib import ExitStack
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from teal.blockwalk import BlockSource, Spool, open_blocks, run_block
from teal.data import TokenBlocks, describe, hash_tokens, token_ids
from teal.errors import TealError, UsageError
from teal.progress import track
from teal.statistics import ActivationStatistics, InputStatistics, block_tensors, from_tensors

DENSE_TOKENS = 8
COUNTED_ROWS = 256  # counted at once; counting needs about 16 times the memory of what is counted
REMEDY = "load the model in float32 or bfloat16, or check the weights before that"


def calibrate(
    model: nn.Module | str | Path | BlockSource,
    tokens: Tensor | TokenBlocks,
    *,
    dense_tokens: int = DENSE_TOKENS,
    spool: Path | None = None,
    show_progress: bool = False,
) -> ActivationStatistics:
    """Count the activations that enter the projections of `model` on tokens [B, L] (TEAL, section 4).

    `model` is a transformers model, a checkpoint directory, whose blocks are then read one at a time, or an
    opened BlockSource. The first `dense_tokens` positions of each row are not counted. With a `spool`
    directory an interrupted run continues at the first unfinished block and ends with the same bytes.
    Raises TealError for NaN or infinite activations, naming the block and the input.
    """
    ids = token_ids(tokens)
    source = model if isinstance(model, BlockSource) else open_blocks(model)
    hidden, arguments = source.first_inputs(ids)
    if not 0 <= dense_tokens < ids.shape[1]:
        raise UsageError(f"dense_tokens must be between 0 and {ids.shape[1] - 1} for blocks of {ids.shape[1]} tokens")
    job = {
        "stage": "calibrate", "model": source.identity.weights, "tokens": hash_tokens(ids),
        "dense_tokens": dense_tokens, "dtype": str(hidden.dtype).removeprefix("torch."),
    }  # fmt: skip
    details = describe(tokens)
    progress = Spool(spool, job)
    hidden = hidden if progress.hidden is None else progress.hidden.to(hidden.device)
    blocks = []
    for index in range(progress.finished):
        saved = progress.results(index)
        blocks.append({name: from_tensors(saved, index, name) for name in source.structure.input_features(index)})

    remaining = range(progress.finished, len(source.structure.blocks))
    for index in track(remaining, "calibrating blocks", len(source.structure.blocks), show_progress, progress.finished):
        statistics = {name: InputStatistics.empty(k) for name, k in source.structure.input_features(index).items()}
        with source.block(index) as block, _counting(source, index, block, statistics, dense_tokens):
            for row in hidden.split(1):
                row.copy_(run_block(block, row, arguments[index]))
        check_finite(hidden, f"block {index} {source.structure.blocks[index][-1].name}")
        progress.save(index, block_tensors(index, statistics), hidden)
        blocks.append(statistics)
    return ActivationStatistics(source.identity, dense_tokens, blocks, {**details, "dtype": job["dtype"]})


def check_finite(hidden: Tensor, after: str) -> None:
    """Raise TealError, naming what it comes `after`, if a hidden state is NaN or infinite."""
    if not hidden.isfinite().all():
        raise TealError(f"NaN or infinite values after {after}; {REMEDY}")


def _counting(
    source: BlockSource,
    index: int,
    block: nn.Module,
    statistics: dict[str, InputStatistics],
    dense_tokens: int,
) -> ExitStack:
    """Hooks that count every distinct input of the block for as long as the context lasts."""
    first = {p.input: p.name for p in reversed(source.structure.blocks[index])}

    def counter(name: str) -> Any:
        def count(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            try:
                for rows in inputs[0][..., dense_tokens:, :].split(COUNTED_ROWS, dim=-2):
                    statistics[name].add(rows)
            except TealError as error:
                raise TealError(f"at the input of block {index} {first[name]}, {error}; {REMEDY}") from None

        return count

    hooks = ExitStack()
    for name, projection in first.items():
        handle = block.get_submodule(projection).register_forward_pre_hook(counter(name))
        hooks.callback(handle.remove)
    return hooks
