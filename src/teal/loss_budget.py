"""LossBudget: how much a model may lose, by which metric; what a measurement lost of it."""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from teal.errors import UsageError
from teal.evaluation import Evaluation, mean_and_error
from teal.paired_loss import CONFIDENCE, LEAST, ItemLoss, PairedLoss
from teal.task_evaluation import TaskEvaluation

Measured = tuple[str, float, float, PairedLoss]  # plan, level, realised sparsity, loss


def _perplexity_losses(result: Evaluation) -> list[Measured]:
    """Nats per token that the right tokens cost more."""
    return [(m.plan, m.level, m.sparsity, _paired(PairedLoss, m.nll, result.dense_nll)) for m in result.measurements]


def _kl_losses(result: Evaluation) -> list[Measured]:
    """Nats per token of divergence."""
    return [(m.plan, m.level, m.sparsity, PairedLoss(m.kl, m.kl_error, len(m.nll))) for m in result.measurements]


def _accuracy_losses(result: TaskEvaluation) -> list[Measured]:
    """Share of the items of all tasks together; sparsity is their mean, weighted by items."""
    found: list[Measured] = []
    dense = [right for task in result.tasks for right in task.dense.correct]
    for runs in zip(*(task.runs for task in result.tasks), strict=True):
        sparse = [right for run in runs for right in run.correct]
        sparsity = sum(run.sparsity * len(run.correct) for run in runs) / len(sparse)
        found.append((runs[0].plan, runs[0].level, sparsity, _paired(ItemLoss, dense, sparse)))
    return found


def _paired(kind: type[PairedLoss], more: Sequence[float], less: Sequence[float]) -> PairedLoss:
    return kind(*mean_and_error([a - b for a, b in zip(more, less, strict=True)]), len(more))


ACCURACY = "accuracy"  # of tasks; the others are of text
METRICS: dict[str, Callable[[Any], list[Measured]]] = {
    "perplexity": _perplexity_losses,
    "kl": _kl_losses,
    ACCURACY: _accuracy_losses,
}


@dataclass(frozen=True)
class LossBudget:
    """How much a model may lose: at most `limit` of `metric`, spoken of as `text` says it.

    "perplexity": the increase of the mean loss in nats per token, log(1 + p / 100) where the text is "p%".
    "kl": the divergence of the sparse from the dense model's distribution, in nats per token.
    "accuracy": the share of a task's items that sparsity loses beyond those it gains, p / 100 of "p points".
    """

    metric: str
    text: str
    limit: float

    @classmethod
    def parse(cls, text: str, metric: str = "perplexity") -> "LossBudget":
        """ "2%" of perplexity, "0.02nats" of perplexity or kl, "1%" or "1points" of accuracy.

        Raises UsageError for anything else.
        """
        if metric not in METRICS:
            raise UsageError(f"unknown metric {metric!r}; choose from {', '.join(METRICS)}")
        found = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*(%|nats|points?)\s*", text)
        if found is None:
            raise UsageError(f"a loss is a number with its unit, such as 2% or 0.02nats, got {text!r}")
        value, unit = float(found[1]), found[2]
        if value <= 0:
            raise UsageError(f"the loss allowed must be above 0, got {text}; without any loss, dense is the answer")
        if metric == ACCURACY:
            return cls._of_accuracy(value, unit)
        if unit.startswith("point"):
            raise UsageError(
                f"points are of accuracy; {metric} is bounded in {'nats' if metric == 'kl' else '% or nats'}"
            )
        if unit == "%" and metric != "perplexity":
            raise UsageError(f"KL divergence is in nats, not in per cent; say {value / 100:g}nats")
        limit = math.log1p(value / 100) if unit == "%" else value
        return cls(metric, f"{value:g}%" if unit == "%" else f"{value:g}nats", limit)

    @classmethod
    def _of_accuracy(cls, value: float, unit: str) -> "LossBudget":
        if unit == "nats":
            raise UsageError("accuracy is in percentage points, not in nats; say 1%, for one point")
        if value >= 100:
            raise UsageError(f"accuracy cannot fall by more than 100 points; allow fewer than 100, got {value:g}")
        return cls(ACCURACY, f"{value:g} point{'' if value == 1 else 's'}", value / 100)

    def trials(self, result: Evaluation | TaskEvaluation) -> list["Trial"]:
        """What each plan lost at each level of a result that this metric is read from."""
        return [
            Trial(plan, level, sparsity, loss.mean, loss.error, loss.count, loss.bound(CONFIDENCE) <= self.limit)
            for plan, level, sparsity, loss in METRICS[self.metric](result)
        ]

    def loss(self, trial: "Trial") -> PairedLoss:
        """What was lost in a trial, with its bounds."""
        kind = ItemLoss if self.metric == ACCURACY else PairedLoss
        return kind(trial.loss, trial.loss_error, trial.sequences)

    @property
    def noun(self) -> str:
        """What losses are taken of."""
        return "item" if self.metric == ACCURACY else "sequence"

    @property
    def least(self) -> int:
        """Sequences or items that must be in either half to tell such a loss, even if none lost anything."""
        if self.metric != ACCURACY:
            return LEAST
        return max(LEAST, math.ceil(math.log(1 - CONFIDENCE) / math.log1p(-self.limit)))

    @property
    def unit(self) -> str:
        if self.metric == ACCURACY:
            return "points"
        return "%" if self.text.endswith("%") else "nats"

    def value(self, loss: float) -> float:
        """A loss in the budget's unit."""
        if self.unit == "points":
            return 100 * loss
        return 100 * math.expm1(min(loss, 600.0)) if self.unit == "%" else loss

    def show(self, loss: float) -> str:
        """A loss in the budget's unit, for people."""
        return f"{loss:.4f} nats" if self.unit == "nats" else f"{self.value(loss):+.2f} {self.unit}"

    @property
    def name(self) -> str:
        """What is bounded, for people."""
        if self.metric == "perplexity":
            return "perplexity over dense" if self.unit == "%" else "loss over dense"
        return "KL divergence from dense" if self.metric == "kl" else "accuracy lost"


@dataclass(frozen=True)
class Trial:
    """One plan at one level, measured on a part, or on as much of the search part as was needed to decide.

    `loss` and `loss_error` in nats per token, or as a share of items, `sparsity` realised; `sequences` counts them, or
    items; `fits`: whether it is within the budget.
    """

    plan: str
    level: float
    sparsity: float
    loss: float
    loss_error: float
    sequences: int
    fits: bool
