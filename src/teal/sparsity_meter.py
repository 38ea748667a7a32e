"""SparsityMeter: how sparse the sparse tokens really were, per projection and by bytes."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from teal.linear import observing, sparse_layers
from teal.ops.reference import keep_mask
from teal.structure import ModelStructure


class SparsityMeter:
    """Counts dropped inputs of the sparse tokens of `model` while `measuring`; counts add up over contexts.

    For measurements, not for timed runs: every sparse product is counted on top of being computed.
    """

    def __init__(self, model: nn.Module) -> None:
        self._layers = sparse_layers(model)
        structure = ModelStructure.of(model)
        self._labels = {structure.module_name(i, p): f"{i}.{p.name}" for i, p in structure.projections()}
        self._sizes = {structure.module_name(i, p): p.size for i, p in structure.projections()}
        self._dropped = {name: torch.zeros((), dtype=torch.int64) for name in self._labels}
        self._total = dict.fromkeys(self._labels, 0)

    @contextmanager
    def measuring(self, counted: Tensor | None = None) -> Iterator[None]:
        """Count what the model computes within the context.

        Of the tokens [B, T] of a call only those that are True in `counted` count; None counts all.
        """

        def count(name: str, x: Tensor) -> None:
            if counted is not None:
                x = x[counted[:, counted.shape[1] - x.shape[-2] :]]
            dropped = (~keep_mask(x, self._layers[name].threshold)).sum()
            self._dropped[name] = self._dropped[name].to(x.device) + dropped
            self._total[name] += x.numel()

        with observing({name: self._layers[name] for name in self._labels}, count):
            yield

    def projections(self) -> dict[str, float]:
        """Share of inputs dropped by "block.projection"; 0 where no sparse token was seen."""
        return {label: self._share(name) for name, label in self._labels.items()}

    def sparsity(self) -> float:
        """Bytes of block weights not needed / all block weights, on the sparse tokens seen."""
        dropped = sum(self._share(name) * size for name, size in self._sizes.items())
        return dropped / sum(self._sizes.values())

    def _share(self, name: str) -> float:
        return int(self._dropped[name]) / max(1, self._total[name])
