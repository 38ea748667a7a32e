"""The paper's allocation (TEAL, Algorithm 1): in each block, what adds the least L2 error goes first."""

import functools
import itertools
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from teal.blockwalk import BlockSource, Spool, replace_forward, run_block
from teal.calibration import check_finite
from teal.errors import TealError, UsageError
from teal.ops.reference import drop_small
from teal.plan import check_level
from teal.progress import track
from teal.scores import Thresholds
from teal.structure import INPUTS, Projection


@dataclass(frozen=True)
class GreedyConfig:
    """The paper's Algorithm 1. Each step drops `step` of a block's weights; no projection passes `maximum`."""

    step: float = 0.005
    maximum: float = 0.95

    def __post_init__(self) -> None:
        if not 0 < self.step <= 0.1:
            raise UsageError(f"the greedy step must be above 0 and at most 0.1 of a block's weights, got {self.step}")
        check_level(self.maximum)


def allocate_blockwise(
    source: BlockSource,
    ids: Tensor,
    dense_tokens: int,
    thresholds: Thresholds,
    levels: Sequence[float],
    greedy: GreedyConfig,
    job: dict[str, Any],
    spool: Path | None = None,
    show_progress: bool = False,
) -> tuple[list[list[dict[str, float]]], list[dict[str, list[float]]]]:
    """Sparsities [block][level][projection], and the block errors of greedy and uniform at each level."""
    if max(levels) > greedy.maximum:
        raise UsageError(f"no projection can pass {greedy.maximum}; level {max(levels)} cannot be reached")
    hidden, arguments = source.first_inputs(ids)
    progress = Spool(spool, {**job, **vars(greedy)})
    hidden = hidden if progress.hidden is None else progress.hidden.to(hidden.device)
    found = [progress.results(index) for index in range(progress.finished)]
    remaining = range(progress.finished, len(source.structure.blocks))
    for index in track(remaining, "allocating blocks", len(source.structure.blocks), show_progress, progress.finished):
        projections = source.structure.blocks[index]
        with source.block(index) as block, torch.no_grad():
            own = functools.partial(thresholds, index)
            with BlockError(block, projections, own, dense_tokens, hidden, arguments[index]) as error:
                check_finite(error.outputs, f"block {index} {projections[-1].name}")
                trajectory = greedy_trajectory(projections, error, levels, greedy)
                uniform = [{p.name: level for p in projections} for level in levels]
                results = {
                    "sparsity": torch.tensor([list(point.values()) for point in trajectory], dtype=torch.float64),
                    "greedy": torch.tensor([error(point) for point in trajectory], dtype=torch.float64),
                    "uniform": torch.tensor([error(point) for point in uniform], dtype=torch.float64),
                }
                hidden = error.outputs
        progress.save(index, results, hidden)
        found.append(results)
    sparsities = [
        [dict(zip((p.name for p in block), row.tolist(), strict=True)) for row in results["sparsity"]]
        for block, results in zip(source.structure.blocks, found, strict=True)
    ]
    errors = [{name: results[name].sqrt().tolist() for name in ("greedy", "uniform")} for results in found]
    return sparsities, errors


class BlockError:
    """Squared L2 error of a block's output on its sparse tokens, for given sparsities of its projections.

    `thresholds(projection, sparsity)` is what reaches a sparsity, [] or [K].

    hidden [B, L, d] enters the block; `outputs` [B, L, d] is what the dense block makes of it. The input never
    changes, so what does not depend on a changed projection is remembered and not computed again: raising
    down_proj repeats neither attention nor gate and up. Use as a context; the block is restored at its end.
    """

    def __init__(
        self,
        block: nn.Module,
        projections: Sequence[Projection],
        thresholds: Callable[[str, float], float | Tensor],
        dense_tokens: int,
        hidden: Tensor,
        arguments: dict[str, Any],
    ) -> None:
        self.block = block
        self.projections = projections
        self.thresholds = thresholds
        self.dense_tokens = dense_tokens
        self.hidden = hidden
        self.arguments = arguments
        self.outputs = run_block(block, hidden, arguments)
        self.sparsity: dict[str, float] = {}
        self._replaced = ExitStack()

    def __call__(self, sparsity: dict[str, float]) -> float:
        self.sparsity = sparsity
        difference = run_block(self.block, self.hidden, self.arguments) - self.outputs
        return difference[:, self.dense_tokens :].double().square().sum().item()

    def __enter__(self) -> "BlockError":
        for projection in self.projections:
            module = self.block.get_submodule(projection.name)
            forward = self._remember(self._dropping(module, projection), self._upstream(projection, False))
            self._replaced.enter_context(replace_forward(module, forward))
        output = next(p for p in self.projections if p.input == "attention_output")
        attention = self.block.get_submodule(output.name.rpartition(".")[0])
        forward = self._remember(attention.forward, self._upstream(output, True))
        self._replaced.enter_context(replace_forward(attention, forward))
        return self

    def __exit__(self, *exception: object) -> None:
        self._replaced.close()

    def _upstream(self, projection: Projection, siblings: bool) -> list[str]:
        """The projections that the output of `projection` depends on, with itself (and those beside it)."""
        stage = INPUTS.index(projection.input)
        reached = [p.name for p in self.projections if INPUTS.index(p.input) < stage + siblings]
        return [*reached, projection.name]

    def _dropping(self, module: nn.Module, projection: Projection) -> Callable[[Tensor], Tensor]:
        product = module.forward

        def forward(x: Tensor) -> Tensor:
            threshold = self.thresholds(projection.name, self.sparsity[projection.name])
            threshold = torch.as_tensor(threshold, device=x.device)
            dense, sparse = x[..., : self.dense_tokens, :], x[..., self.dense_tokens :, :]
            return product(torch.cat([dense, drop_small(sparse, threshold)], dim=-2))

        return forward

    def _remember(self, compute: Callable[..., Any], names: list[str], kept: int = 3) -> Callable[..., Any]:
        memory: OrderedDict[tuple[float, ...], Any] = OrderedDict()

        def forward(*inputs: Any, **arguments: Any) -> Any:
            key = tuple(self.sparsity[name] for name in names)
            if key not in memory:
                memory[key] = compute(*inputs, **arguments)
                while len(memory) > kept:
                    memory.popitem(last=False)
            memory.move_to_end(key)
            return memory[key]

        return forward


def greedy_trajectory(
    projections: Sequence[Projection],
    error: Callable[[dict[str, float]], float],
    levels: Sequence[float],
    config: GreedyConfig,
) -> list[dict[str, float]]:
    """The sparsities of one block at each level along the greedy path (TEAL, Algorithm 1).

    Each step raises one projection by `step` of the block's weights, the one whose increase adds the least
    error. Increases are re-evaluated lazily (Minoux 1978): one computed earlier is trusted as a lower bound,
    so that most steps cost one or two evaluations instead of one per projection. Where increases grow along
    the path, as they mostly do, the path is that of the exhaustive search. Between two steps the level is met
    exactly by interpolation.
    """
    total = sum(p.size for p in projections)
    rise = {p.name: config.step * total / p.size for p in projections}
    share = {p.name: p.size / total for p in projections}
    current, now = dict.fromkeys(rise, 0.0), 0.0
    added, fresh = dict.fromkeys(rise, 0.0), dict.fromkeys(rise, -1)
    dropped, path = 0.0, [(0.0, dict(current))]
    for step in itertools.count():
        if dropped >= max(levels) - 1e-9:
            break
        candidates = [name for name in rise if current[name] < config.maximum - 1e-9]
        if not candidates:
            raise TealError(f"no projection can pass {config.maximum}; level {max(levels)} cannot be reached")
        while True:
            best = min(candidates, key=added.__getitem__)
            raised = {**current, best: min(current[best] + rise[best], config.maximum)}
            if fresh[best] == step:
                break
            added[best], fresh[best] = error(raised) - now, step
        now += added[best]
        current, dropped = raised, sum(share[name] * value for name, value in raised.items())
        path.append((dropped, dict(current)))
    return [_along(path, level) for level in levels]


def _along(path: Sequence[tuple[float, dict[str, float]]], level: float) -> dict[str, float]:
    """The point of a path of (dropped share, sparsities) where exactly `level` is dropped."""
    for (before, low), (after, high) in itertools.pairwise(path):
        if level <= after + 1e-9:
            weight = min(1.0, max(0.0, (level - before) / (after - before)))
            return {name: low[name] + weight * (high[name] - low[name]) for name in low}
    return path[-1][1]
