"""evaluate_tasks: what sparsity costs in tasks, dense and sparse on the same items, with paired errors."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from torch import nn

from teal.artifacts import check_header, check_keys
from teal.blockwalk import check_evaluation_mode
from teal.calibration import DENSE_TOKENS
from teal.data import opening_tokens
from teal.errors import TealError, UsageError
from teal.evaluation import check_levels, increase, make_sparse, mean_and_error, restoring
from teal.linear import sparse_from
from teal.plan import SparsityPlan
from teal.progress import track
from teal.scoring import (
    TokenRequest,
    batches,
    context_of,
    continue_greedily,
    encode,
    encode_request,
    score,
    shorten,
)
from teal.sparse_model import apply_plan, plan_of
from teal.sparsity_meter import SparsityMeter
from teal.structure import ModelIdentity
from teal.tasks import ANSWER, STOP, WORD, Item, Task, is_right

FORMAT = "teal.tasks"
VERSION = 1


@dataclass(frozen=True)
class TaskRun:
    """One plan at one level (the dense run: level 0) over the items of a task, in order.

    `correct`: 1 where the answer was right; `correct_normalized`: where it was, with log-likelihoods per character
    of the choice; `loss`: nats of the right continuation, summed over its tokens. Each is empty where the kind of
    the task has none. `sparsity` realised: share of block-weight bytes not read on the tokens that count.
    """

    plan: str
    level: float
    sparsity: float
    correct: list[int]
    correct_normalized: list[int] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Figure:
    """A figure with its standard error over items, and its difference to dense with that of the paired difference."""

    value: float
    error: float
    difference: float
    difference_error: float


@dataclass(frozen=True)
class TaskResult:
    """What was found on one task. `shortened`: items whose contexts were cut to fit the model."""

    name: str
    kind: str
    items: int
    shots: int
    chance: float
    shortened: int
    dense: TaskRun
    runs: list[TaskRun]

    def accuracy(self, run: TaskRun) -> Figure:
        return _share(run.correct, self.dense.correct)

    def normalized_accuracy(self, run: TaskRun) -> Figure | None:
        """By log-likelihood per character of the choice, as `acc_norm` of lm-evaluation-harness."""
        return _share(run.correct_normalized, self.dense.correct_normalized) if run.correct_normalized else None

    def mean_loss(self, run: TaskRun) -> Figure | None:
        """Nats of the right continuation, which tell what sparsity costs long before choices change."""
        if not run.loss:
            return None
        differences = [sparse - dense for sparse, dense in zip(run.loss, self.dense.loss, strict=True)]
        return Figure(*mean_and_error(run.loss), *mean_and_error(differences))

    def perplexity(self, run: TaskRun) -> Figure | None:
        """Of the last words; its difference to dense is an increase in per cent."""
        if self.kind != WORD:
            return None
        mean, error = mean_and_error(run.loss)
        value = math.exp(min(mean, 600.0))
        return Figure(value, value * error, *increase(run.loss, self.dense.loss))


@dataclass(frozen=True)
class TaskEvaluation:
    """Every task, dense and sparse on the same items. `rule` states which tokens were sparse and which counted."""

    tasks: list[TaskResult]
    rule: dict[str, Any]
    identity: ModelIdentity

    def mean_accuracy(self, index: int | None) -> Figure:
        """Over tasks, each with the same weight, of run number `index` (None: dense)."""
        figures = [task.accuracy(task.dense if index is None else task.runs[index]) for task in self.tasks]
        count = len(figures)
        return Figure(
            sum(figure.value for figure in figures) / count,
            math.hypot(*(figure.error for figure in figures)) / count,
            sum(figure.difference for figure in figures) / count,
            math.hypot(*(figure.difference_error for figure in figures)) / count,
        )

    def to_json(self) -> dict[str, Any]:
        """With the figures beside the items they are computed from."""
        tasks = [
            vars(task)
            | {"dense": _run_to_json(task, task.dense), "runs": [_run_to_json(task, run) for run in task.runs]}
            for task in self.tasks
        ]
        return {
            "format": FORMAT, "version": VERSION, "model": self.identity.to_json(), "rule": self.rule, "tasks": tasks
        }  # fmt: skip

    @classmethod
    def from_json(cls, payload: dict[str, Any], where: object) -> "TaskEvaluation":
        """Read what `to_json` gave. Raises TealError naming `where` for anything that does not belong."""
        check_header(payload, FORMAT, VERSION, where)
        keys = ("format", "version", "model", "rule", "tasks")
        check_keys(payload, keys, where, keys)
        try:
            tasks = [
                TaskResult(**(task | {"dense": _run(task["dense"]), "runs": [_run(run) for run in task["runs"]]}))
                for task in payload["tasks"]
            ]
            return cls(tasks, dict(payload["rule"]), ModelIdentity.from_json(payload["model"], where))
        except (KeyError, TypeError, ValueError) as error:
            raise TealError(f"{where} is damaged ({error}); evaluate again") from error


FIGURES = ("accuracy", "normalized_accuracy", "mean_loss", "perplexity")  # methods of TaskResult


def _run_to_json(task: TaskResult, run: TaskRun) -> dict[str, Any]:
    figures = {name: getattr(task, name)(run) for name in FIGURES}
    return vars(run) | {name: None if figure is None else vars(figure) for name, figure in figures.items()}


def _run(payload: dict[str, Any]) -> TaskRun:
    return TaskRun(**{name: value for name, value in payload.items() if name not in FIGURES})


def _share(correct: Sequence[int], dense: Sequence[int]) -> Figure:
    differences = [sparse - base for sparse, base in zip(correct, dense, strict=True)]
    return Figure(*mean_and_error(correct), *mean_and_error(differences))


def evaluate_tasks(
    model: nn.Module,
    tokenizer: Any,
    tasks: Sequence[Task],
    plans: SparsityPlan | Mapping[str, SparsityPlan],
    levels: Sequence[float] = (0.4, 0.5),
    *,
    dense_tokens: int = DENSE_TOKENS,
    max_new_tokens: int = 256,
    batch: int = 16,
    quantization: str | None = None,
    strict: bool = False,
    show_progress: bool = False,
    dense: TaskEvaluation | None = None,
) -> TaskEvaluation:
    """Every task dense and with each plan at each level, `batch` texts at a time.

    The rule of scored tasks is that of `evaluate`: positions from `dense_tokens` on are computed as if decoded,
    context and continuation alike. Exact answers are really decoded, greedily: a dense prompt, then up to
    `max_new_tokens` sparse tokens. `model` is a transformers model, made sparse in place and left at its former
    level, or dense; `quantization` as in `evaluate`. An earlier result on the very same items, given as `dense`,
    lends its dense runs, which are not repeated.
    Raises TealError for plans that do not fit and for texts that the model's context cannot hold, UsageError for
    a request that leaves nothing to do.
    """
    check_evaluation_mode(model)
    plans = {plans.method: plans} if isinstance(plans, SparsityPlan) else dict(plans)
    check_levels(plans, levels)
    if not tasks:
        raise UsageError("there is no task to evaluate")
    if min(batch, max_new_tokens) < 1 or dense_tokens < 0:
        raise UsageError(
            f"batch and max_new_tokens must be at least 1 and dense_tokens at least 0, got {batch}, {max_new_tokens} "
            f"and {dense_tokens}"
        )
    prepared = [_prepare(model, tokenizer, task, max_new_tokens) for task in tasks]
    identity = make_sparse(model, list(plans.values()), quantization, strict)
    runs = [_Run(name, plan, level) for name, plan in plans.items() for level in dict.fromkeys(levels)]
    ask = _Asking(model, tokenizer, dense_tokens, max_new_tokens, batch, show_progress)
    rule = _rule(ask, quantization)
    lent = [None] * len(tasks) if dense is None else _dense_runs(dense, tasks, rule, identity)
    with restoring(model):
        results = [_evaluate_task(ask, task, own, runs) for task, own in zip(prepared, lent, strict=True)]
    return TaskEvaluation(results, rule, identity)


def _rule(ask: "_Asking", quantization: str | None) -> dict[str, Any]:
    """Which tokens were sparse and which counted."""
    return {
        "dense_tokens": ask.dense_tokens,
        "scored": f"positions from {ask.dense_tokens} on sparse, as if decoded, earlier ones dense; those that predict "
        "the scored tokens count",
        "written": f"prompts dense, up to {ask.max_new_tokens} tokens decoded greedily, sparse; those count",
        "dtype": str(next(ask.model.parameters()).dtype).removeprefix("torch."),
        "weights": quantization or "as loaded",
    }


def _dense_runs(
    dense: TaskEvaluation, tasks: Sequence[Task], rule: dict[str, Any], identity: ModelIdentity
) -> list[TaskRun]:
    """Of an earlier result, after a check that it is of such items and found in the same way."""
    found = [(task.name, task.kind, task.items) for task in dense.tasks]
    wanted = [(task.name, task.kind, len(task.items)) for task in tasks]
    if found != wanted or dense.rule != rule or dense.identity != identity:
        raise UsageError("the dense results are of other items, another model or another rule; leave them out")
    return [task.dense for task in dense.tasks]


@dataclass(frozen=True)
class _Run:
    name: str
    plan: SparsityPlan
    level: float


@dataclass(frozen=True)
class _Prepared:
    """A task in tokens: the requests of each item, or its prompt."""

    task: Task
    requests: list[list[TokenRequest]]
    shortened: int


@dataclass(frozen=True)
class _Asking:
    """How items are put to the model."""

    model: nn.Module
    tokenizer: Any
    dense_tokens: int
    max_new_tokens: int
    batch: int
    show_progress: bool


def _prepare(model: Any, tokenizer: Any, task: Task, max_new_tokens: int) -> _Prepared:
    opening, context = opening_tokens(tokenizer), context_of(model)
    requests, shortened = [], 0
    for number, item in enumerate(task.items, 1):
        if task.kind == ANSWER:
            wanted, room = [TokenRequest(tuple(encode(tokenizer, item.pairs[0][0])), 0)], context - max_new_tokens
        else:  # the last token is scored but not read
            wanted, room = [encode_request(tokenizer, *pair) for pair in item.pairs], context + 1
        try:
            fitting = [shorten(request, room, opening) for request in wanted]
        except TealError as error:
            raise TealError(f"task {task.name}, item {number} of {len(task.items)}: {error}") from None
        requests.append(fitting)
        shortened += fitting != wanted
    return _Prepared(task, requests, shortened)


def _evaluate_task(ask: _Asking, prepared: _Prepared, dense: TaskRun | None, runs: Sequence[_Run]) -> TaskResult:
    everything = [*([_Run("dense", plan_of(ask.model), 0.0)] if dense is None else []), *runs]
    meters = [SparsityMeter(ask.model) for _ in everything]
    found: list[list[Any]] = [[None] * sum(map(len, prepared.requests)) for _ in everything]
    for indices, requests in _batches(ask, prepared):
        for answers, run, meter in zip(found, everything, meters, strict=True):
            apply_plan(ask.model, run.plan, run.level)
            for index, answer in zip(indices, _ask(ask, prepared.task.kind, requests, meter), strict=True):
                answers[index] = answer
    measured = [
        replace(_judge(prepared.task, answers), plan=run.name, level=run.level, sparsity=meter.sparsity())
        for answers, run, meter in zip(found, everything, meters, strict=True)
    ]
    dense, *sparse = measured if dense is None else [dense, *measured]
    task = prepared.task
    return TaskResult(task.name, task.kind, len(task.items), task.shots, task.chance, prepared.shortened, dense, sparse)


def _batches(ask: _Asking, prepared: _Prepared) -> Iterator[tuple[list[int], list[TokenRequest]]]:
    requests = [request for of_item in prepared.requests for request in of_item]
    parts = list(batches([len(request.ids) for request in requests], ask.batch))
    for indices in track(parts, prepared.task.name, len(parts), ask.show_progress):
        yield indices, [requests[index] for index in indices]


def _ask(ask: _Asking, kind: str, requests: Sequence[TokenRequest], meter: SparsityMeter) -> Sequence[Any]:
    if kind == ANSWER:
        prompts = [request.ids for request in requests]
        return continue_greedily(ask.model, ask.tokenizer, prompts, STOP, ask.max_new_tokens, meter.measuring)
    with sparse_from(ask.model, ask.dense_tokens):
        return score(ask.model, requests, ask.dense_tokens, meter.measuring)


def _judge(task: Task, answers: Sequence[Any]) -> TaskRun:
    """From the answers to all requests of a task, in order, its run; plan, level and sparsity are the caller's."""
    run = partial(TaskRun, "", 0.0, 0.0)
    if task.kind == ANSWER:
        right = [is_right(text, item.pairs[0][1]) for text, item in zip(answers, task.items, strict=True)]
        return run([int(value) for value in right])
    if task.kind == WORD:
        return run([int(found.is_greedy) for found in answers], loss=[-found.log_likelihood for found in answers])
    asked = iter(answers)
    choices = [(item, [next(asked).log_likelihood for _ in item.pairs]) for item in task.items]
    normalized = [_picks_gold(item, item.per_character(values)) for item, values in choices if item.lengths]
    return run(
        [_picks_gold(item, values) for item, values in choices],
        normalized if len(normalized) == len(choices) else [],
        [-values[item.gold] for item, values in choices],
    )


def _picks_gold(item: Item, values: Sequence[float]) -> int:
    """Whether the largest value, the first of equal ones, is that of the right choice."""
    return int(max(range(len(values)), key=values.__getitem__) == item.gold)
