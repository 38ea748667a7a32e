"""tune: the plan and level that read the fewest bytes within a loss that the user sets, by measurement."""

import math
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from teal.artifacts import check_header, check_keys
from teal.benchmark import Benchmark
from teal.calibration import DENSE_TOKENS
from teal.data import TokenBlocks, hash_tokens
from teal.errors import TealError, UsageError
from teal.evaluation import Evaluation, make_sparse
from teal.held_out import HeldOut, HeldOutTasks, HeldOutText
from teal.linear import sparse_layers
from teal.loss_budget import ACCURACY, LossBudget, Trial
from teal.paired_loss import CONFIDENCE, LEAST, PairedLoss, share_bound
from teal.plan import SparsityPlan
from teal.progress import track
from teal.task_evaluation import TaskEvaluation
from teal.tasks import Task

FORMAT = "teal.tuning"
VERSION = 1
RESOLUTION = 0.01  # levels that are tried are multiples of it
DECIDED = 0.999  # a probe ends early when the loss is on one side of the budget with this confidence
STEPS = (0.5, 0.85, 0.93, 0.97, 1.0)  # of the level that the search found: the candidates that are confirmed


@dataclass(frozen=True)
class Tuning:
    """What `tune` found. Level 0: dense is the answer; `notes` say why, and what else a user should know.

    `sparsity` is realised on the confirmation part, `loss` measured there in nats per token, or as a share of items,
    with its standard error; `bound` is what is claimed: with `confidence`, the loss on text, or on items, like these is
    at most that. `dense_bytes` and `sparse_bytes` are the weights that one token reads, LM head included.
    `trials` are those of the search, `confirmation` holds the candidates on the other part, None if there was none.
    `tokens_evaluated` counts what was read, not what was written as an exact answer.
    """

    budget: LossBudget
    plan: str
    level: float
    sparsity: float
    loss: float
    loss_error: float
    bound: float
    dense_bytes: int
    sparse_bytes: int
    notes: list[str]
    trials: list[Trial]
    confirmation: Evaluation | TaskEvaluation | None
    tokens_evaluated: int
    seconds: float
    details: dict[str, Any] = field(default_factory=dict)
    speed: Benchmark | None = None
    confidence: float = CONFIDENCE

    def to_json(self) -> dict[str, Any]:
        return {
            "format": FORMAT, "version": VERSION, **vars(self), "budget": vars(self.budget),
            "trials": [vars(trial) for trial in self.trials],
            "confirmation": self.confirmation and self.confirmation.to_json(),
            "speed": self.speed and self.speed.to_json(),
        }  # fmt: skip

    @classmethod
    def from_json(cls, payload: dict[str, Any], where: object) -> "Tuning":
        """Read what `to_json` gave. Raises TealError naming `where` for anything that does not belong."""
        check_header(payload, FORMAT, VERSION, where)
        keys = ("format", "version", *cls.__dataclass_fields__)
        check_keys(payload, keys, where, keys)
        values = {key: value for key, value in payload.items() if key not in ("format", "version")}
        confirmation, speed = values["confirmation"], values["speed"]
        try:
            budget = LossBudget(**values["budget"])
            read = TaskEvaluation.from_json if budget.metric == ACCURACY else Evaluation.from_json
            return cls(
                **values
                | {
                    "budget": budget,
                    "trials": [Trial(**trial) for trial in values["trials"]],
                    "confirmation": confirmation and read(confirmation, f"{where}, its confirmation"),
                    "speed": speed and Benchmark.from_json(speed, f"{where}, its speed"),
                }
            )
        except (TypeError, AttributeError) as error:
            raise TealError(f"{where} is damaged ({error}); tune again") from error


def tune(
    model: nn.Module,
    held_out: Tensor | TokenBlocks | Sequence[Task],
    plans: SparsityPlan | Mapping[str, SparsityPlan],
    max_loss: str | LossBudget,
    *,
    metric: str = "perplexity",
    tokenizer: Any = None,
    dense_tokens: int = DENSE_TOKENS,
    max_new_tokens: int = 256,
    batch: int | None = None,
    quantization: str | None = None,
    strict: bool = False,
    show_progress: bool = False,
) -> Tuning:
    """Find the plan and level that read the fewest bytes and lose at most `max_loss` ("2%", "0.02nats").

    `held_out` are tokens [B, L] of a text, or, for the metric "accuracy", tasks, with the model's `tokenizer`; "1%" is
    one percentage point then, over all items together. On one half (of each task every other item) each plan's level is
    searched by bisection, in pairs with the dense model. On the other half a few levels up to the best one are
    measured; rising through them, the last whose upper confidence bound is within the budget is the answer. (Tests in
    an order fixed before need no correction for their number.) What served here is spent: a test of the result needs
    another text, or other items. The rule of sparse tokens, `model` and the other options are those of `evaluate`, or
    of `evaluate_tasks`; `batch` is 1 sequence, or 16 texts, unless given.
    Raises UsageError for a budget that is none or too little text, TealError for text that a plan was made on.
    """
    started = time.monotonic()
    budget = max_loss if isinstance(max_loss, LossBudget) else LossBudget.parse(max_loss, metric)
    plans = {plans.method: plans} if isinstance(plans, SparsityPlan) else dict(plans)
    if not plans:
        raise UsageError("there is no plan to tune")
    options = {"dense_tokens": dense_tokens, "quantization": quantization, "strict": strict}
    if isinstance(held_out, (Tensor, TokenBlocks)):
        on = _text(model, held_out, budget, plans, options | {"batch": 1 if batch is None else batch})
    else:
        options |= {"batch": 16 if batch is None else batch, "max_new_tokens": max_new_tokens}
        on = _tasks(model, tokenizer, held_out, budget, options)
    make_sparse(model, list(plans.values()), quantization, strict)  # checks every plan, and warns of it, once
    search = _Search(on, budget, show_progress)
    if len(on.confirmation) >= budget.least:
        for name, plan in plans.items():
            search.bisect(name, plan)
    name, confirmed, candidates = next(iter(plans)), None, []
    if search.best is not None:
        name = search.best.plan
        levels = _candidates(plans[name], search.best.level)
        confirmed = _measure(on, on.confirmation, name, plans[name], levels, show_progress)
        candidates = budget.trials(confirmed)
    chosen = _highest_confirmed(candidates)
    level, sparsity, loss = 0.0, 0.0, PairedLoss(0.0, 0.0, LEAST)
    if chosen is not None:
        level, sparsity, loss = chosen.level, chosen.sparsity, budget.loss(chosen)
    details = on.details | ({} if quantization is None else {"weights": quantization})
    return Tuning(
        budget, name, level, sparsity, loss.mean, loss.error, loss.bound(CONFIDENCE), *_weight_bytes(model, sparsity),
        _notes(search, candidates, level), search.trials, confirmed, on.tokens_read, time.monotonic() - started,
        details,
    )  # fmt: skip


def _text(
    model: nn.Module,
    tokens: Tensor | TokenBlocks,
    budget: LossBudget,
    plans: Mapping[str, SparsityPlan],
    options: dict[str, Any],
) -> HeldOut:
    if budget.metric == ACCURACY:
        raise UsageError("accuracy is measured on tasks; give a sequence of Task and the model's tokenizer")
    on = HeldOutText(model, tokens, options)
    for plan in plans.values():
        check_held_out(plan, on.ids)
    return on


def _tasks(
    model: nn.Module, tokenizer: Any, tasks: Sequence[Task], budget: LossBudget, options: dict[str, Any]
) -> HeldOut:
    if budget.metric != ACCURACY:
        raise UsageError(f"{budget.metric} is measured on text; give tokens, or pass metric='accuracy' for tasks")
    if tokenizer is None:
        raise UsageError("tasks need the model's tokenizer; pass tokenizer=")
    return HeldOutTasks(model, tokenizer, tasks, options)


def calibration_texts(plan: SparsityPlan) -> list[dict[str, Any]]:
    """What a plan says of the texts it was made on: `TokenBlocks.describe` of each, as far as it is known."""
    return [found for found in _dictionaries(plan.details) if "tokens_sha256" in found]


def check_held_out(plan: SparsityPlan, ids: Tensor) -> None:
    """Raise TealError if `ids` are the very tokens that `plan` was made on."""
    if hash_tokens(ids) in {text["tokens_sha256"] for text in calibration_texts(plan)}:
        raise TealError("the plan was made on this very text; tune on text that was held out")


def _dictionaries(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        yield value
    if isinstance(value, (dict, list)):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _dictionaries(inner)


class _Search:
    """Looks for each plan's highest level within the budget on the search part; `best` is the one so far."""

    def __init__(self, on: HeldOut, budget: LossBudget, show_progress: bool) -> None:
        self.on, self.budget, self.show_progress = on, budget, show_progress
        self.trials: list[Trial] = []
        self.best: Trial | None = None

    def bisect(self, name: str, plan: SparsityPlan) -> None:
        """Try levels of one plan, halving what is left; a plan that loses too much at the best level is left there."""
        levels = _grid(plan)
        low, high = -1, len(levels)  # the highest index that fits, the lowest that does not
        while high - low > 1:
            middle = (low + high) // 2
            if low < 0 and high == len(levels) and self.best is not None:
                middle = min(len(levels) - 1, max(0, _index(levels, self.best.level)))
            trial = self._try(name, plan, levels[middle])
            if trial.fits:
                low = middle
                if self.best is None or trial.sparsity > self.best.sparsity:
                    self.best = trial
            elif self.best is not None and self.best.plan != name and trial.sparsity <= self.best.sparsity:
                return
            else:
                high = middle

    def _try(self, name: str, plan: SparsityPlan, level: float) -> Trial:
        limit, units = self.budget.limit, self.on.search
        loss, sparsity, fits = None, 0.0, False
        size = max(LEAST, self.on.options["batch"])
        pieces = [units[start : start + size] for start in range(0, len(units), size)]
        for piece in track(pieces, f"{name} at {level:g}", len(pieces), self.show_progress):
            (found,) = self.budget.trials(_measure(self.on, piece, name, plan, [level]))
            loss = self.budget.loss(found) if loss is None else loss + self.budget.loss(found)
            sparsity += found.sparsity * found.sequences
            fits = loss.bound(CONFIDENCE) <= limit
            if loss.bound(DECIDED) <= limit or loss.bound(1 - DECIDED) > limit:
                break
        assert loss is not None
        trial = Trial(name, level, sparsity / loss.count, loss.mean, loss.error, loss.count, fits)
        self.trials.append(trial)
        return trial


def _measure(
    on: HeldOut, units: Any, name: str, plan: SparsityPlan, levels: Sequence[float], show_progress: bool = False
) -> Evaluation | TaskEvaluation:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the plan may not belong to this model")
        return on.measure(units, {name: plan}, levels, show_progress)


def _grid(plan: SparsityPlan) -> list[float]:
    """The levels of a plan that are tried, rising: multiples of RESOLUTION, and its highest."""
    lowest, highest = plan.levels[0], plan.levels[-1]
    if highest == 0:
        raise UsageError("the plan has no level above 0; allocate with others")
    steps = (round(index * RESOLUTION, 6) for index in range(1, math.floor(highest / RESOLUTION) + 1))
    return sorted({*(level for level in steps if lowest <= level < highest), highest})


def _index(levels: Sequence[float], level: float) -> int:
    """Of the highest of `levels` that is not above `level`; -1 if all are."""
    return sum(value <= level + 1e-9 for value in levels) - 1


def _candidates(plan: SparsityPlan, level: float) -> list[float]:
    levels = _grid(plan)
    return sorted({levels[max(0, _index(levels, step * level))] for step in STEPS})


def _highest_confirmed(candidates: Sequence[Trial]) -> Trial | None:
    """The last of the rising levels that is within the budget, as all below it are."""
    chosen = None
    for trial in candidates:
        if not trial.fits:
            break
        chosen = trial
    return chosen


def _notes(search: _Search, candidates: Sequence[Trial], level: float) -> list[str]:
    """What a user should know beside the answer: why it is lower than it looked, or dense, and what would tell more."""
    budget, on = search.budget, search.on
    notes: list[str] = []
    if not search.trials:
        bound = share_bound(0, len(on.confirmation), CONFIDENCE)
        return [
            f"dense is the answer: too few items to tell; even if none of {len(on.confirmation)} were lost, the loss "
            f"could be {budget.show(bound)}; at least {on.amount(budget.least)} would be needed"
        ]
    refused = min(search.trials, key=lambda trial: trial.level)  # the lowest level that is not within the budget
    if candidates:
        refused = next((trial for trial in candidates if trial.level > level), None)
        if refused is not None:
            down = f"stepped down to {level:g}" if level else "it is the lowest that was tried there"
            notes.append(
                f"level {candidates[-1].level:g}, which the search found, is not confirmed: at {refused.level:g} the "
                f"loss on the other part is {_range(refused, budget)}; {down}"
            )
    if level == 0 and refused is not None:
        notes.append(f"dense is the answer: even level {refused.level:g} costs {_range(refused, budget)}")
    if refused is not None and (needed := budget.loss(refused).count_needed(budget.limit)) is not None:
        little = "too little text" if budget.noun == "sequence" else "too few items"
        notes.append(
            f"the loss measured at {refused.level:g} is within the budget, its bound is not: {little} to tell; "
            f"about {on.amount(max(needed, LEAST))} would be needed"
        )
    return notes


def _range(trial: Trial, budget: LossBudget) -> str:
    return f"{budget.show(trial.loss)}, at most {budget.show(budget.loss(trial).bound(CONFIDENCE))}"


def _weight_bytes(model: nn.Module, sparsity: float) -> tuple[int, int]:
    """Bytes of block weights and LM head that one token reads, dense and at a realised sparsity."""
    weights = [layer.packed for layer in sparse_layers(model).values()]
    output: Any = model.get_output_embeddings()  # pyright: ignore[reportCallIssue]
    head = output.weight.numel() * output.weight.element_size()
    dense, sparse = (sum(weight.bytes_read(kept) for weight in weights) for kept in (1.0, 1 - sparsity))
    return round(dense) + head, round(sparse) + head
