"""allocate: how sparse each projection is at each level, what goes first there, and what makes up for it."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from teal.blockwalk import BlockSource, open_blocks
from teal.blockwise_allocation import GreedyConfig, allocate_blockwise
from teal.compensation import compensations, mean_shifts
from teal.data import TokenBlocks, describe, hash_tokens, token_ids
from teal.errors import UsageError
from teal.global_allocation import STRIDE, Choices, allocate_global
from teal.plan import ProjectionPlan, SparsityPlan, check_level, level_grid
from teal.scores import SCORES, Thresholds, magnitude_thresholds, norm_thresholds, sensitivity_thresholds
from teal.sensitivity import SensitivityMeter
from teal.statistics import ActivationStatistics

METHODS = ("uniform", "blockwise", "global")


def allocate(
    statistics: ActivationStatistics,
    method: str = "uniform",
    *,
    score: str | None = None,
    compensate: bool | None = None,
    levels: Sequence[float] = level_grid(),
    model: nn.Module | str | Path | BlockSource | None = None,
    tokens: Tensor | TokenBlocks | None = None,
    greedy: GreedyConfig = GreedyConfig(),
    stride: float = STRIDE,
    batch: int = 1,
    spool: Path | None = None,
    show_progress: bool = False,
) -> SparsityPlan:
    """Make a plan out of statistics.

    `method` says how sparse each projection is. "uniform": all alike. "blockwise": the paper's Algorithm 1, per block
    and from zero, raise the projection whose increase costs the least L2 error of the block's output. "global": one
    budget for the whole model, spent where it changes the model's output the least; its sensitivities are measured
    anew whenever the level has risen by `stride`, on `batch` sequences at a time.
    `score` says what goes first in a projection: "magnitude" of x, that times the "l2" or "l1" norm of the weights it
    meets, or "sensitivity", what costs the model's output the least, with a threshold for every channel.
    `compensate` adds a bias on sparse tokens that stands for what is dropped.
    The defaults are "magnitude" without compensation, for "global" "sensitivity" with it.
    All but uniform magnitudes run `model` on `tokens` [B, L]; with a `spool` directory blockwise and global continue
    after an interruption.
    Raises UsageError for unknown choices or missing inputs, TealError if model and statistics do not fit.
    """
    levels = tuple(check_level(level) for level in levels)
    if list(levels) != sorted(set(levels)) or not levels:
        raise UsageError(f"levels must rise strictly, got {', '.join(map(str, levels))}")
    score = score or ("sensitivity" if method == "global" else "magnitude")
    compensate = method == "global" if compensate is None else compensate
    for kind, value, known in (("method", method, METHODS), ("score", score, SCORES)):
        if value not in known:
            raise UsageError(f"unknown {kind} {value!r}; choose from {', '.join(known)}")
    details: dict[str, Any] = {
        "score": score, "compensated": compensate, "statistics": statistics.details,
        "dense_tokens": statistics.dense_tokens,
    }  # fmt: skip
    if method == "uniform" and score == "magnitude" and not compensate:
        thresholds = magnitude_thresholds(statistics)
        return _plan(statistics, method, levels, _uniform(statistics, levels), thresholds, details)
    if model is None or tokens is None:
        raise UsageError("all allocation but uniform, by magnitude, runs the model: give it a model and tokens")
    ids = token_ids(tokens)
    details["text"] = describe(tokens)
    source = model if isinstance(model, BlockSource) else open_blocks(model)
    statistics.identity.check_fits(source.identity, "the statistics")
    if ids.shape[1] <= statistics.dense_tokens:
        raise UsageError(
            f"blocks of {ids.shape[1]} tokens hold no sparse token after {statistics.dense_tokens} dense ones; "
            "give longer blocks"
        )
    job = {
        "stage": method, "score": score, "compensated": compensate, "model": source.identity.weights,
        "tokens": hash_tokens(ids), "levels": list(levels), "statistics": statistics.details,
        "dense_tokens": statistics.dense_tokens,
        "dtype": str(next(source.model.parameters()).dtype).removeprefix("torch."),
    }  # fmt: skip
    meter = SensitivityMeter(source, ids, statistics, batch)
    if method == "global":
        thresholds = None if score == "sensitivity" else _thresholds(score, compensate, meter, show_progress)
        choices = allocate_global(meter, levels, thresholds, compensate, stride, job, spool, show_progress)
        details["stride"] = stride
        return _plan_of_choices(statistics, source, levels, choices, compensate, details)
    thresholds = _thresholds(score, compensate, meter, show_progress)
    if method == "uniform":
        sparsities = _uniform(statistics, levels)
    else:
        dense = statistics.dense_tokens
        sparsities, errors = allocate_blockwise(
            source, ids, dense, thresholds, levels, greedy, job, spool, show_progress
        )
        details |= {"greedy": vars(greedy), "block_error": errors}
    plan = _plan(statistics, method, levels, sparsities, thresholds, details)
    if not compensate:
        return plan
    shifts = mean_shifts(source, ids, plan.blocks, statistics.dense_tokens, show_progress)
    return _compensated(plan, compensations(source, shifts))


def _thresholds(score: str, compensate: bool, meter: SensitivityMeter, show_progress: bool) -> Thresholds:
    if score == "magnitude":
        return magnitude_thresholds(meter.statistics)
    if score == "sensitivity":
        return sensitivity_thresholds(meter.measure(title="measuring sensitivities", show=show_progress), compensate)
    order = 2 if score == "l2" else 1
    return norm_thresholds(meter.source, meter.tokens, meter.dense_tokens, order, show_progress)


def _uniform(statistics: ActivationStatistics, levels: Sequence[float]) -> list[list[dict[str, float]]]:
    return [[dict.fromkeys(block, level) for level in levels] for block in statistics.identity.shapes]


def _plan(
    statistics: ActivationStatistics,
    method: str,
    levels: Sequence[float],
    sparsities: Sequence[Sequence[dict[str, float]]],
    thresholds: Thresholds,
    details: dict[str, Any],
) -> SparsityPlan:
    """A plan with `sparsities[block][level][projection]` and the `thresholds` that reach them."""
    blocks = []
    for index, per_level in enumerate(sparsities):
        blocks.append({})
        for name in per_level[0]:
            reached = [thresholds(index, name, at_level[name]) for at_level in per_level]
            blocks[-1][name] = ProjectionPlan(
                tuple(at_level[name] for at_level in per_level),
                torch.stack([torch.as_tensor(threshold).cpu() for threshold in reached])
                if isinstance(reached[0], Tensor)
                else tuple(map(float, reached)),
            )
    return SparsityPlan(statistics.identity, method, tuple(levels), tuple(blocks), details)


def _plan_of_choices(
    statistics: ActivationStatistics,
    source: BlockSource,
    levels: Sequence[float],
    choices: Sequence[Choices],
    compensate: bool,
    details: dict[str, Any],
) -> SparsityPlan:
    """A plan out of the global allocation's `choices[level][block][projection]`."""
    blocks, shifts = [], []
    for block in range(len(source.structure.blocks)):
        at = {name: [per_level[block][name] for per_level in choices] for name in choices[0][block]}
        blocks.append({
            name: ProjectionPlan(
                tuple(choice.sparsity for choice in per_level),
                torch.stack([choice.threshold for choice in per_level]).cpu(),
            )
            for name, per_level in at.items()
        })  # fmt: skip
        shifts.append({name: torch.stack([choice.shift for choice in per_level]) for name, per_level in at.items()})
    plan = SparsityPlan(statistics.identity, "global", tuple(levels), tuple(blocks), details)
    return _compensated(plan, compensations(source, shifts)) if compensate else plan


def _compensated(plan: SparsityPlan, compensation: Sequence[dict[str, Tensor]]) -> SparsityPlan:
    blocks = tuple(
        {name: replace(entry, compensation=biases[name]) for name, entry in block.items()}
        for block, biases in zip(plan.blocks, compensation, strict=True)
    )
    return replace(plan, blocks=blocks)
