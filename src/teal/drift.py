"""drift: how sparse a generation really was, token by token, and whether its text is unlike the calibration text."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from teal.engine.cache import whole_extents
from teal.engine.model import DecoderModel
from teal.errors import UsageError
from teal.linear import observing, sparse_from, sparse_layers
from teal.ops.reference import keep_mask
from teal.sparse_model import plan_of
from teal.structure import ModelStructure

TOLERANCE = 0.015  # mean over the block weights of how far a projection's sparsity is from the expected one
LEAST_TOKENS = 32  # fewer say nothing
BATCHES = 8  # into which the tokens are cut, one after another, for the standard error: neighbours resemble each other


@dataclass(frozen=True)
class SparsityLog:
    """What a generation realised.

    `tokens`: share of block-weight bytes that each decoded token did not need; `sparsity` their mean, `expected`
    what the plan says for text like the calibration text. `drift`: how far a projection's sparsity is from what the
    plan says for it, less what chance explains, as a mean over the block weights: opposite drifts of two projections,
    which cancel in `sparsity`, add up. NaN for fewer than LEAST_TOKENS tokens.
    """

    tokens: tuple[float, ...]
    sparsity: float
    expected: float
    drift: float

    def warning(self, tolerance: float = TOLERANCE) -> str | None:
        """One line for the user if `drift` exceeds `tolerance`."""
        if not self.drift > tolerance:
            return None
        return (
            f"this text is unlike the calibration text: over {len(self.tokens)} tokens the projections' sparsity is "
            f"off by {100 * self.drift:.1f} points on average (tolerance {100 * tolerance:g}), {self.sparsity:.3f} "
            f"realised where {self.expected:.3f} was expected; quality and speed may differ from what was measured: "
            "calibrate on text like this"
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "realised": self.sparsity, "expected": self.expected, "tolerance": TOLERANCE,
            "drift": None if math.isnan(self.drift) else self.drift, "warning": self.warning(),
            "tokens": [round(value, 5) for value in self.tokens],
        }  # fmt: skip


@torch.no_grad()
def log_sparsity(model: nn.Module, prompt_ids: Sequence[int], token_ids: Sequence[int]) -> SparsityLog:
    """The realised sparsity of the tokens that were decoded: of all `token_ids` that were generated but the last.

    `model` is the sparse engine or transformers model that generated them, still at its level. Decoding itself is
    not observed, so that no fast path is lost; the text is run once more in one piece, prompt dense and tokens
    sparse, which costs as much as the prefill of a prompt of that length.
    Raises UsageError if nothing was decoded or the model is dense.
    """
    level: Any = getattr(model, "sparsity_level", 0.0)
    decoded = len(token_ids) - 1
    if decoded < 1 or not level:
        raise UsageError("there is no sparse token to log: the model is dense or decoded nothing")
    ids = torch.tensor([[*prompt_ids, *token_ids[:-1]]], device=next(model.parameters()).device)
    with _recording(model) as dropped, sparse_from(model, len(prompt_ids)):
        if isinstance(model, DecoderModel):
            model.prefill(ids, model.new_cache(1, min(model.context, whole_extents(ids.shape[1]))))
        else:
            model(input_ids=ids, use_cache=False)
    plan, structure = plan_of(model), ModelStructure.of(model)
    settings = plan.settings(level)
    projections = list(structure.projections())
    shares = torch.stack([dropped[structure.module_name(index, p)] for index, p in projections]).cpu()  # [P, T]
    expected = torch.tensor([settings[index][p.name].sparsity for index, p in projections])
    weights = torch.tensor([float(p.size) for _, p in projections])
    weights /= weights.sum()
    tokens = weights @ shares
    return SparsityLog(
        tuple(tokens.tolist()),
        float(tokens.mean()),
        plan.expected_sparsity(level),
        _drift(shares, expected, weights) if decoded >= LEAST_TOKENS else math.nan,
    )


def _drift(shares: Tensor, expected: Tensor, weights: Tensor) -> float:
    """Mean of |realised - expected| over projections, less its mean if nothing but chance were at work.

    `shares` [P, T]; the standard error of each mean comes from batches of successive tokens.
    """
    length = shares.shape[1] // BATCHES
    batches = shares[:, : BATCHES * length].unflatten(1, (BATCHES, length)).mean(-1)
    error = batches.std(1) / math.sqrt(BATCHES)
    by_chance = error * math.sqrt(2 / math.pi)  # the mean of |z| for a normal z
    return float(weights @ ((shares.mean(1) - expected).abs() - by_chance))


@contextmanager
def _recording(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Within the context: the share of inputs dropped at each sparse token [T] of one sequence, by projection."""
    layers = sparse_layers(model)
    dropped: dict[str, Tensor] = {}

    def record(name: str, x: Tensor) -> None:
        dropped[name] = (~keep_mask(x, layers[name].threshold)).float().mean(-1).flatten()

    with observing(layers, record):
        yield dropped
