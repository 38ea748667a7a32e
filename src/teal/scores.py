"""What is dropped first: scores of a projection's inputs, and the thresholds that drop a given share of them."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from teal.blockwalk import BlockSource, run_block
from teal.progress import track
from teal.sensitivity import DROP_ALL, Sensitivities, Sensitivity, at_bins, cheapest_bins, find_price
from teal.statistics import ActivationStatistics, InputStatistics
from teal.structure import INPUT_OF_PROJECTION

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
    hidden, arguments = source.first_inputs(tokens)
    counted: list[dict[str, InputStatistics]] = []
    norms: list[dict[str, Tensor]] = []
    count = len(source.structure.blocks)
    for index in track(range(count), "counting scores", count, show_progress):
        with source.block(index) as block, ExitStack() as hooks:
            norms.append({})
            counted.append({})
            for projection in source.structure.blocks[index]:
                module: Any = block.get_submodule(projection.name)
                norm = torch.linalg.vector_norm(module.weight.detach().float(), order, dim=0)
                entry = InputStatistics.empty(projection.in_features)
                norms[-1][projection.name], counted[-1][projection.name] = norm, entry

                def add(
                    _: object, inputs: tuple[Tensor, ...], norm: Tensor = norm, entry: InputStatistics = entry
                ) -> None:
                    for row in inputs[0]:
                        entry.add(row[dense_tokens:].float() * norm)

                hooks.callback(module.register_forward_pre_hook(add).remove)
            hidden = torch.cat([run_block(block, row, arguments[index]) for row in hidden.split(1)])

    def threshold(block: int, projection: str, sparsity: float) -> Tensor:
        norm, score = norms[block][projection], counted[block][projection].threshold(sparsity)
        if score < 0:
            return torch.full_like(norm, -1.0)
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
            return torch.full_like(entry.scale, -1.0)
        return at_bins(entry.thresholds(), cheapest_bins(cost, dropped, find_price(saved, sparsity)), -1.0)

    return threshold
