"""Allocation under one budget for the whole model: the channels that cost the least for what they save go first."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from teal.blockwalk import BlockSource
from teal.errors import UsageError
from teal.sensitivity import Dropping, Sensitivities, Sensitivity, measure_sensitivity
from teal.statistics import ActivationStatistics

SEARCH_STEPS = 40  # halvings of the price's logarithm


@dataclass(frozen=True)
class GlobalConfig:
    """Sensitivities are measured dense and then each time the level has risen by `stride`, where the plan is then."""

    stride: float = 0.15
    compensate: bool = True
    batch: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0.01 <= self.stride <= 1:
            raise UsageError(f"the stride must be at least 0.01 and at most 1, got {self.stride}")


@dataclass(frozen=True)
class Choice:
    """One projection at one level: `threshold` [K], its expected `sparsity` and the `shift` [K] that compensates."""

    threshold: Tensor
    sparsity: float
    shift: Tensor


Choices = list[dict[str, Choice]]


def allocate_global(
    statistics: ActivationStatistics,
    levels: Sequence[float],
    source: BlockSource,
    tokens: Tensor,
    config: GlobalConfig,
    show_progress: bool = False,
) -> list[Choices]:
    """[level][block][projection]: thresholds of every channel that save the level's bytes for the least divergence.

    For each level a price per byte is found at which the cheapest choice of every channel, divergence minus price
    times bytes saved, saves as much as the level asks (Lagrange). A sparse model is more sensitive than the dense one,
    and in other places: so sensitivities are measured again on the way up.
    """

    def measure(choices: Choices | None) -> Sensitivities:
        droppings = choices and [
            {name: Dropping(c.threshold, c.shift) for name, c in block.items()} for block in choices
        ]
        return measure_sensitivity(
            source, tokens, statistics, droppings, batch=config.batch, seed=config.seed, show_progress=show_progress
        )

    sizes = [{p.name: p.out_features for p in block} for block in source.structure.blocks]
    measured = [(0.0, measure(None))]
    while (at := measured[-1][0]) < max(levels) - 1e-9:
        following = min(at + config.stride, max(levels))
        measured.append((following, measure(choose(measured[-1][1], sizes, following, config.compensate))))
    return [choose(_between(measured, level), sizes, level, config.compensate) for level in levels]


def _between(measured: Sequence[tuple[float, Sensitivities]], level: float) -> Sensitivities:
    """Sensitivities at a level between those measured."""
    above = next(index for index, (at, _) in enumerate(measured) if at >= level - 1e-9)
    (low, before), (high, after) = measured[max(0, above - 1)], measured[above]
    share = (level - low) / (high - low) if high > low else 1.0
    return [
        {name: mine[name].mix(theirs[name], share) for name in mine}
        for mine, theirs in zip(before, after, strict=True)
    ]


def choose(
    sensitivities: Sensitivities, sizes: Sequence[dict[str, int]], level: float, compensate: bool
) -> Choices:
    """The choice of every channel that drops `level` of all weights. `sizes` are the weights of a channel."""
    curves = [
        {name: _Curves.of(entry, sizes[index][name], compensate) for name, entry in block.items()}
        for index, block in enumerate(sensitivities)
    ]
    every = [curve for block in curves for curve in block.values()]
    total = sum(curve.size * len(curve.cost) for curve in every)
    price = _price(lambda price: sum(curve.saved(curve.cheapest(price)) for curve in every) / total, level)
    return [
        {name: curve.choice(block[name], curve.cheapest(price)) for name, curve in curves[index].items()}
        for index, block in enumerate(sensitivities)
    ]


def _price(saved_at: Callable[[float], float], level: float) -> float:
    """The lowest price, in nats per weight, at which at least `level` is saved."""
    low, high = -80.0, 20.0
    for _ in range(SEARCH_STEPS):
        middle = (low + high) / 2
        low, high = (low, middle) if saved_at(math.exp(middle)) >= level else (middle, high)
    return math.exp(high)


@dataclass(frozen=True)
class _Curves:
    """Of the channels of one projection, by bin up to which is dropped: `cost` and `dropped` [K, BINS]."""

    cost: Tensor
    dropped: Tensor
    size: int
    compensate: bool

    @classmethod
    def of(cls, entry: Sensitivity, size: int, compensate: bool) -> "_Curves":
        return cls(entry.cost(compensate), entry.dropped(), size, compensate)

    def cheapest(self, price: float) -> Tensor:
        """[K]: the bin up to which to drop, -1 for none."""
        value, index = torch.add(self.cost, self.dropped, alpha=-price * self.size).min(1)
        return torch.where(value < 0, index, -1)

    def saved(self, bins: Tensor) -> float:
        """Weights not read per token."""
        return self.size * float(_at(self.dropped, bins, 0.0).sum())

    def choice(self, entry: Sensitivity, bins: Tensor) -> Choice:
        shift = _at(entry.shift(), bins, 0.0) if self.compensate else torch.zeros_like(entry.scale)
        return Choice(_at(entry.thresholds(), bins, -1.0), float(_at(self.dropped, bins, 0.0).mean()), shift)


def _at(values: Tensor, bins: Tensor, otherwise: float) -> Tensor:
    """values [K, BINS] at bins [K], `otherwise` where the bin is -1."""
    return torch.where(bins < 0, otherwise, values.gather(1, bins.clamp_min(0)[:, None])[:, 0])
