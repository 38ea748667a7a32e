"""A bias that stands for what is dropped, on sparse tokens only: b' = b + W E[dropped x]."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from teal.blockwalk import BlockSource, watch_inputs
from teal.ops.reference import keep_mask
from teal.plan import ProjectionPlan
from teal.structure import Projection


def mean_shifts(
    source: BlockSource,
    tokens: Tensor,
    plans: Sequence[dict[str, ProjectionPlan]],
    dense_tokens: int,
    show_progress: bool = False,
) -> list[dict[str, Tensor]]:
    """[block][projection]: the mean [levels, K] of what `plans` drop from the sparse tokens of [B, L]."""
    counted = tokens.shape[0] * (tokens.shape[1] - dense_tokens)
    dropped: list[dict[str, Tensor]] = [{} for _ in plans]

    def watching(block: int, projection: Projection, module: Any) -> Callable[[Tensor], None]:
        thresholds = plans[block][projection.name].threshold
        shape = (len(thresholds), projection.in_features)
        sums = torch.zeros(shape, dtype=torch.float64, device=module.weight.device)
        dropped[block][projection.name] = sums

        def add(x: Tensor) -> None:
            x = x[:, dense_tokens:].flatten(0, 1)
            for level, threshold in enumerate(thresholds):
                kept = keep_mask(x, torch.as_tensor(threshold, device=x.device))
                sums[level] += torch.where(kept, 0, x).sum(0, dtype=torch.float64)

        return add

    watch_inputs(source, tokens, watching, "measuring what is dropped", show_progress)
    return [{name: (sums / counted).float() for name, sums in block.items()} for block in dropped]


def compensations(source: BlockSource, shifts: Sequence[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """[block][projection]: W @ shift for each level, [levels, N] in float32."""
    found = []
    for index, per_projection in enumerate(shifts):
        with source.block(index) as block:
            modules: dict[str, Any] = {name: block.get_submodule(name) for name in per_projection}
            weights = {name: module.weight.detach() for name, module in modules.items()}
            found.append({
                name: (shift.to(weights[name].device) @ weights[name].float().T).cpu()
                for name, shift in per_projection.items()
            })  # fmt: skip
    return found
