"""What is dropped first: scores of a projection's inputs, and the thresholds that drop a given share of them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from teal.blockwalk import BlockSource, watch_inputs
from teal.ops.reference import KEEP_ALL
from teal.plan import DROP_ALL
from teal.sensitivity import Sensitivities, Sensitivity, at_bins, cheapest_bins, find_price
from teal.statistics import ActivationStatistics, InputStatistics
from teal.structure import INPUT_OF_PROJECTION, Projection

SCORES = ("magnitude", "l2", "l1", "sensitivity")

Thresholds = Callable[[int, str, float], float | Tensor]
"""(block, projection, sparsity) -> the threshold that drops this share of the projection's inputs, [] or [K]."""


def magnitude_thresholds(statistics: ActivationStatistics) -> Thresholds:
    """|x_i|, as TEAL does: one threshold for all channels."""

    def threshold(block: int, projection: str, sparsity: float) -> float:
        return statistics.blocks[block][INPUT_OF_PROJECTION[projection.rpartition(".")[2]]].threshold(sparsity)

    return threshold


def norm_thresholds(
    source: BlockSource, tokens: Tensor, dense_tokens: int, order: int, show_progress: bool = False
) -> Thresholds:
    """|x_i| times the norm of the weights W[:, i] that it meets: L2 as in WINA (arXiv 2505.19427), or L1.

    A pass over tokens [B, L] counts the scores of each projection.
    """
    counted: list[dict[str, InputStatistics]] = [{} for _ in source.structure.blocks]
    norms: list[dict[str, Tensor]] = [{} for _ in source.structure.blocks]

    def watching(block: int, projection: Projection, module: Any) -> Callable[[Tensor], None]:
        norm = torch.linalg.vector_norm(module.weight.detach().float(), order, dim=0)
        entry = InputStatistics.empty(projection.in_features)
        norms[block][projection.name], counted[block][projection.name] = norm, entry
        return lambda x: entry.add(x[:, dense_tokens:].float() * norm)

    watch_inputs(source, tokens, watching, "counting scores", show_progress)

    def threshold(block: int, projection: str, sparsity: float) -> Tensor:
        norm, score = norms[block][projection], counted[block][projection].threshold(sparsity)
        if score < 0:
            return torch.full_like(norm, KEEP_ALL)
        return torch.where(norm > 0, score / norm, DROP_ALL).clamp_max(DROP_ALL)

    return threshold


def sensitivity_thresholds(sensitivities: Sensitivities, compensate: bool) -> Thresholds:
    """What costs the least divergence, with a threshold for each channel (see teal.sensitivity)."""

    def threshold(block: int, projection: str, sparsity: float) -> Tensor:
        entry: Sensitivity = sensitivities[block][projection]
        cost, dropped = entry.cost(compensate), entry.dropped()

        def saved(price: float) -> float:
            return float(at_bins(dropped, cheapest_bins(cost, dropped, price), 0.0).mean())

        if sparsity <= 0:
            return torch.full_like(entry.scale, KEEP_ALL)
        return at_bins(entry.thresholds(), cheapest_bins(cost, dropped, find_price(saved, sparsity)), KEEP_ALL)

    return threshold
