"""A bias that stands for what is dropped, on sparse tokens only: b' = b + W E[dropped x]."""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from teal.blockwalk import BlockSource, run_block
from teal.ops.reference import keep_mask
from teal.plan import ProjectionPlan
from teal.progress import track


def mean_shifts(
    source: BlockSource,
    tokens: Tensor,
    plans: Sequence[dict[str, ProjectionPlan]],
    dense_tokens: int,
    show_progress: bool = False,
) -> list[dict[str, Tensor]]:
    """[block][projection]: the mean [levels, K] of what `plans` drop from the sparse tokens of [B, L]."""
    hidden, arguments = source.first_inputs(tokens)
    counted = tokens.shape[0] * (tokens.shape[1] - dense_tokens)
    shifts: list[dict[str, Tensor]] = []
    for index in track(range(len(plans)), "measuring what is dropped", len(plans), show_progress):
        with source.block(index) as block, ExitStack() as hooks:
            shifts.append({})
            for projection in source.structure.blocks[index]:
                thresholds = plans[index][projection.name].threshold
                sums = torch.zeros(len(thresholds), projection.in_features, dtype=torch.float64, device=hidden.device)
                shifts[-1][projection.name] = sums

                def add(
                    _: object, inputs: tuple[Tensor, ...], thresholds: Sequence[float] | Tensor = thresholds,
                    sums: Tensor = sums,
                ) -> None:  # fmt: skip
                    x = inputs[0][:, dense_tokens:].flatten(0, 1)
                    for level, threshold in enumerate(thresholds):
                        kept = keep_mask(x, torch.as_tensor(threshold, device=x.device))
                        sums[level] += torch.where(kept, 0, x).sum(0, dtype=torch.float64)

                hooks.callback(block.get_submodule(projection.name).register_forward_pre_hook(add).remove)
            hidden = torch.cat([run_block(block, row, arguments[index]) for row in hidden.split(1)])
    return [{name: (sums / counted).float() for name, sums in block.items()} for block in shifts]


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
