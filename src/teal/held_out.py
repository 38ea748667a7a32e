"""What a loss is measured on: a text or tasks, one half to search on, the other to confirm on."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

from torch import Tensor, nn

from teal.data import TokenBlocks, describe, token_ids
from teal.errors import UsageError
from teal.evaluation import Evaluation, evaluate
from teal.paired_loss import LEAST
from teal.plan import SparsityPlan
from teal.scoring import encode
from teal.task_evaluation import TaskEvaluation, evaluate_tasks
from teal.tasks import ANSWER, Item, Task


class HeldOut(Protocol):
    """Units, sequences or items, in two halves. `options` are those of the evaluation; `details` go into the result;
    `tokens_read` counts, over all runs so far.
    """

    search: Any
    confirmation: Any
    options: dict[str, Any]
    details: dict[str, Any]
    tokens_read: int

    def measure(
        self, units: Any, plans: Mapping[str, SparsityPlan], levels: Sequence[float], show_progress: bool
    ) -> Evaluation | TaskEvaluation:
        """Evaluate some units of either half, dense and with each plan at each level."""
        ...

    def amount(self, half: int) -> str:
        """For people, what has `half` units in either half."""
        ...


class HeldOutText:
    """Sequences of tokens [B, L]: the first half to search on, the other to confirm on."""

    def __init__(self, model: nn.Module, tokens: Tensor | TokenBlocks, options: dict[str, Any]) -> None:
        self.model, self.options, self.tokens_read = model, options, 0
        self.ids = token_ids(tokens)
        if self.ids.ndim != 2 or len(self.ids) < 2 * LEAST:
            raise UsageError(
                f"{len(self.ids)} sequences are too few to search on one half and confirm on the other; "
                f"give text for at least {2 * LEAST}, or shorter sequences"
            )
        half, self.length = len(self.ids) // 2, self.ids.shape[1]
        self.search, self.confirmation = self.ids[:half], self.ids[half:]
        self.details = describe(tokens) | {
            "search_sequences": half, "confirmation_sequences": len(self.ids) - half, "sequence_length": self.length
        }  # fmt: skip

    def measure(
        self, units: Tensor, plans: Mapping[str, SparsityPlan], levels: Sequence[float], show_progress: bool
    ) -> Evaluation:
        self.tokens_read += units.numel() * (1 + len(plans) * len(levels))
        return evaluate(self.model, units, plans, levels, **self.options, show_progress=show_progress)

    def amount(self, half: int) -> str:
        return f"{2 * half * self.length:,} tokens"


class HeldOutTasks:
    """Items of several tasks, pooled: the 1st, 3rd, ... of each task to search on, the others to confirm on.

    A unit is the number of a task and an item. Units are in the order of how far into its task each item stands, so
    that a part of them holds every task in proportion. The same units are run dense once, however often they are asked.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, tasks: Sequence[Task], options: dict[str, Any]) -> None:
        self.model, self.tokenizer, self.tasks, self.options = model, tokenizer, tasks, options
        self.tokens_read = 0
        self._measured: dict[tuple[tuple[int, Item], ...], TaskEvaluation] = {}  # whose dense runs serve again
        units = [(number, item) for number, task in enumerate(tasks) for item in task.items]
        places = [place / len(task.items) for task in tasks for place in range(len(task.items))]
        odd = [place % 2 for task in tasks for place in range(len(task.items))]
        order = sorted(range(len(units)), key=places.__getitem__)
        self.search, self.confirmation = ([units[i] for i in order if odd[i] == part] for part in (0, 1))
        if len(self.confirmation) < LEAST:
            raise UsageError(
                f"{len(units)} items are too few to search on one half and confirm on the other; "
                f"give at least {2 * LEAST}"
            )
        self.details: dict[str, Any] = {
            "tasks": [
                {"name": task.name, "kind": task.kind, "items": len(task.items), "shots": task.shots} for task in tasks
            ],
            "split": "items 1, 3, 5, ... of each task to search, items 2, 4, 6, ... to confirm",
            "search_items": len(self.search), "confirmation_items": len(self.confirmation),
        }  # fmt: skip

    def measure(
        self,
        units: Sequence[tuple[int, Item]],
        plans: Mapping[str, SparsityPlan],
        levels: Sequence[float],
        show_progress: bool,
    ) -> TaskEvaluation:
        parts = [
            replace(task, items=tuple(item for number, item in units if number == wanted))
            for wanted, task in enumerate(self.tasks)
        ]
        asked, same = [part for part in parts if part.items], tuple(units)
        dense = self._measured.get(same)
        self.tokens_read += self._tokens(units) * ((dense is None) + len(plans) * len(levels))
        result = evaluate_tasks(
            self.model, self.tokenizer, asked, plans, levels, **self.options, show_progress=show_progress, dense=dense
        )
        self._measured[same] = result
        return result

    def _tokens(self, units: Sequence[tuple[int, Item]]) -> int:
        """Of the texts that one run of `units` reads."""
        return sum(  # of an exact answer, the prompt alone
            len(encode(self.tokenizer, context if self.tasks[number].kind == ANSWER else context + continuation))
            for number, item in units
            for context, continuation in item.pairs
        )

    def amount(self, half: int) -> str:
        return f"{2 * half:,} items"
