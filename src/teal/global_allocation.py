"""Allocation under one budget for the whole model: what changes its output the least for its bytes goes first."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from teal.blockwalk import Spool
from teal.errors import UsageError
from teal.ops.reference import KEEP_ALL
from teal.scores import Thresholds
from teal.sensitivity import (
    Dropping,
    Sensitivities,
    Sensitivity,
    SensitivityMeter,
    at_bins,
    cheapest_bins,
    find_price,
)

STRIDE = 0.15
SPARSITIES = tuple(index / 50 for index in range(49))  # choices of a projection whose score fixes what goes first


@dataclass(frozen=True)
class Choice:
    """Of one projection at one level: `threshold` [K], expected `sparsity`, and the `shift` [K] that compensates."""

    threshold: Tensor
    sparsity: float
    shift: Tensor


Choices = list[dict[str, Choice]]  # [block][projection]


def allocate_global(
    meter: SensitivityMeter,
    levels: Sequence[float],
    thresholds: Thresholds | None,
    compensate: bool,
    stride: float,
    job: dict[str, Any],
    spool: Path | None = None,
    show_progress: bool = False,
) -> list[Choices]:
    """For each level the choices that save its bytes for the least divergence from the dense model.

    At one price per byte (a Lagrange multiplier) everything takes the choice of least divergence minus price times
    bytes saved; the price is where the sum meets the level. Without `thresholds` every channel chooses for itself;
    with them, each projection chooses a sparsity and they say what goes first.
    A sparse model is more sensitive than the dense one, and elsewhere: so sensitivities are measured again on the way
    up at every `stride`, each time where the plan has come to.
    Raises UsageError for a stride below 0.01 or above 1.
    """
    if not 0.01 <= stride <= 1:
        raise UsageError(f"the stride must be at least 0.01 and at most 1, got {stride}")
    progress = Spool(spool, {**job, "stride": stride})
    sizes = [{p.name: p.out_features for p in block} for block in meter.source.structure.blocks]
    measured: list[tuple[float, Sensitivities]] = []
    at = 0.0
    while True:
        if len(measured) < progress.finished:
            assert progress.hidden is not None
            meter.dense_output = progress.hidden
            sensitivities = _from_tensors(progress.results(len(measured)), sizes)
        else:
            droppings = None
            if measured:
                choices = _choose(measured[-1][1], sizes, at, thresholds, compensate)
                droppings = [{name: Dropping(c.threshold, c.shift) for name, c in block.items()} for block in choices]
            sensitivities = meter.measure(droppings, f"measuring sensitivities at {at:.0%}", show_progress)
            assert meter.dense_output is not None
            progress.save(len(measured), _to_tensors(sensitivities), meter.dense_output)
        measured.append((at, sensitivities))
        if at >= max(levels) - 1e-9:
            break
        at = min(at + stride, max(levels))
    return [_choose(_between(measured, level), sizes, level, thresholds, compensate) for level in levels]


def _to_tensors(sensitivities: Sensitivities) -> dict[str, Tensor]:
    return {
        f"{index}.{name}.{key}": torch.as_tensor(value).cpu()
        for index, block in enumerate(sensitivities)
        for name, entry in block.items()
        for key, value in vars(entry).items()
    }


def _from_tensors(tensors: dict[str, Tensor], names: Sequence[dict[str, Any]]) -> Sensitivities:
    def entry(prefix: str) -> Sensitivity:
        fields = {key: tensors[f"{prefix}.{key}"] for key in ("scale", "count", "pull", "energy", "curvature")}
        return Sensitivity(
            **fields, tokens=int(tensors[f"{prefix}.tokens"]), coherence=float(tensors[f"{prefix}.coherence"])
        )

    return [{name: entry(f"{index}.{name}") for name in block} for index, block in enumerate(names)]


def _between(measured: Sequence[tuple[float, Sensitivities]], level: float) -> Sensitivities:
    """Sensitivities at a level between those measured."""
    above = next(index for index, (at, _) in enumerate(measured) if at >= level - 1e-9)
    (low, before), (high, after) = measured[max(0, above - 1)], measured[above]
    share = (level - low) / (high - low) if high > low else 1.0
    return [
        {name: mine[name].mix(theirs[name], share) for name in mine} for mine, theirs in zip(before, after, strict=True)
    ]


def _choose(
    sensitivities: Sensitivities,
    sizes: Sequence[dict[str, int]],
    level: float,
    thresholds: Thresholds | None,
    compensate: bool,
) -> Choices:
    """The choices that drop `level` of all weights; `sizes` [block][projection] are the weights of a channel."""
    options = []
    for index, block in enumerate(sensitivities):
        for name, entry in block.items():
            if thresholds is None:
                options.append(_ChannelOptions(entry, sizes[index][name], compensate))
            else:
                ruled = [thresholds(index, name, sparsity) for sparsity in SPARSITIES]
                options.append(_ProjectionOptions(entry, sizes[index][name], compensate, ruled))
    total = sum(option.size * len(option.entry.scale) for option in options)
    price = find_price(lambda price: sum(option.saved(price) for option in options) / total, level) if level else 0.0
    chosen = iter(options)
    return [{name: next(chosen).choice(price) for name in block} for block in sensitivities]


class _ChannelOptions:
    """Every channel of a projection may drop up to any bin."""

    def __init__(self, entry: Sensitivity, size: int, compensate: bool) -> None:
        self.entry, self.size, self.compensate = entry, size, compensate
        self.cost, self.dropped = entry.cost(compensate), entry.dropped()

    def saved(self, price: float) -> float:
        """Weights not read per token."""
        return self.size * float(at_bins(self.dropped, self._bins(price), 0.0).sum())

    def choice(self, price: float) -> Choice:
        bins = self._bins(price)
        return Choice(
            at_bins(self.entry.thresholds(), bins, KEEP_ALL),
            min(1.0, float(at_bins(self.dropped, bins, 0.0).mean())),
            at_bins(self.entry.shift(), bins, 0.0) if self.compensate else torch.zeros_like(self.entry.scale),
        )

    def _bins(self, price: float) -> Tensor:
        return cheapest_bins(self.cost, self.dropped, price * self.size)


class _ProjectionOptions:
    """A projection may take any of SPARSITIES; `thresholds` [] or [K] are what reaches them."""

    def __init__(self, entry: Sensitivity, size: int, compensate: bool, thresholds: Sequence[float | Tensor]) -> None:
        self.entry, self.size, self.compensate, self.thresholds = entry, size, compensate, thresholds
        self._bins = [entry.bins_below(threshold) for threshold in thresholds]
        cost = entry.cost(compensate)
        self.cost = torch.stack([at_bins(cost, bins, 0.0).sum() for bins in self._bins])[None]
        self.dropped = torch.tensor([SPARSITIES], device=cost.device)

    def saved(self, price: float) -> float:
        """Weights not read per token."""
        return self.size * len(self.entry.scale) * SPARSITIES[self._option(price)]

    def choice(self, price: float) -> Choice:
        option = self._option(price)
        threshold = torch.as_tensor(self.thresholds[option], device=self.entry.scale.device)
        shift = at_bins(self.entry.shift(), self._bins[option], 0.0)
        return Choice(
            threshold.float().expand(len(shift)).contiguous(),
            SPARSITIES[option],
            shift if self.compensate else torch.zeros_like(shift),
        )

    def _option(self, price: float) -> int:
        return max(0, int(cheapest_bins(self.cost, self.dropped, price * self.size * len(self.entry.scale))))
