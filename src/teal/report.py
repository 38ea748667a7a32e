"""report: what was found, as tables and sentences that the terminal and the page share."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from teal.benchmark import Benchmark
from teal.evaluation import Evaluation
from teal.plan import SparsityPlan, drops_all
from teal.statistics import ActivationStatistics
from teal.task_evaluation import Figure, TaskEvaluation, TaskResult, TaskRun
from teal.tasks import ANSWER
from teal.tuning import Trial, Tuning

Table = tuple[list[str], list[list[str]]]  # columns and rows


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def evaluation_table(result: Evaluation) -> Table:
    """Quality against sparsity, dense first; without errors for a single sequence, which has none to give."""
    several = result.rule["sequences"] > 1

    def with_error(value: float, error: float, digits: str) -> str:
        return f"{value:{digits}} ± {error:{digits.removeprefix('+')}}" if several else f"{value:{digits}}"

    dense = with_error(result.dense_perplexity, result.dense_perplexity_error, ".3f")
    rows = [
        [
            m.plan,
            f"{m.level:g}",
            f"{m.sparsity:.4f}",
            with_error(m.perplexity, m.perplexity_error, ".3f"),
            with_error(m.increase, m.increase_error, "+.2f"),
            with_error(m.kl, m.kl_error, ".4f"),
            with_error(100 * m.top1_agreement, 100 * m.top1_error, ".2f"),
        ]
        for m in result.measurements
    ]
    columns = ["plan", "nominal", "realised", "perplexity", "increase %", "KL (nats)", "top-1 %"]
    return columns, [["dense", "0", "0", dense, "", "", ""], *rows]


def position_table(result: Evaluation) -> Table:
    """The loss by position: dense in nats, then the increase of the perplexity in per cent for each plan and level."""
    several = result.rule["sequences"] > 1
    columns = ["positions", "dense (nats)", *(f"{m.plan} {m.level:g}, increase %" for m in result.measurements)]
    rows = []
    for same in zip(*(m.positions for m in result.measurements), strict=True):
        errors = (f" ± {found.increase_error:.2f}" if several else "" for found in same)
        cells = [f"{found.increase:+.2f}{error}" for found, error in zip(same, errors, strict=True)]
        rows.append([f"{same[0].first}-{same[0].last}", f"{same[0].dense:.3f}", *cells])
    return columns, rows


def texts_table(results: Mapping[str, Evaluation]) -> Table:
    """`evaluation_table` of every text, one below the other."""
    columns: list[str] = []
    rows: list[list[str]] = []
    for text, result in results.items():
        columns, found = evaluation_table(result)
        rows += [[text if index == 0 else "", *row] for index, row in enumerate(found)]
    return ["text", *columns], rows


def tasks_table(result: TaskEvaluation) -> Table:
    """Tasks dense and sparse, the mean over several tasks last; columns that no task fills are left out."""
    columns = [
        "task", "plan", "nominal", "realised", "accuracy %", "to dense", "per character %", "to dense", "perplexity",
        "loss to dense (nats)",
    ]  # fmt: skip
    rows = [
        [
            task.name if run is task.dense else "", run.plan, f"{run.level:g}", f"{run.sparsity:.4f}",
            *_figure_cells(task.accuracy(run), 100, run is task.dense),
            *_figure_cells(task.normalized_accuracy(run), 100, run is task.dense),
            _figure_cells(task.perplexity(run), 1, run is task.dense)[0],
            _figure_cells(task.mean_loss(run), 1, run is task.dense)[1],
        ]
        for task in result.tasks
        for run in (task.dense, *task.runs)
    ]  # fmt: skip
    if len(result.tasks) > 1:
        for index, run in ((None, result.tasks[0].dense), *enumerate(result.tasks[0].runs)):
            name = f"mean of {len(result.tasks)}" if index is None else ""
            cells = _figure_cells(result.mean_accuracy(index), 100, index is None)
            rows.append([name, run.plan, f"{run.level:g}", "", *cells, "", "", "", ""])
    filled = [index for index in range(len(columns)) if any(row[index] for row in rows)]
    return [columns[index] for index in filled], [[row[index] for index in filled] for row in rows]


def _figure_cells(figure: Figure | None, scale: float, is_dense: bool) -> tuple[str, str]:
    """A figure, and its difference to dense."""
    if figure is None:
        return "", ""
    difference = f"{scale * figure.difference:+.2f} ± {scale * figure.difference_error:.2f}"
    return f"{scale * figure.value:.2f} ± {scale * figure.error:.2f}", "" if is_dense else difference


def tasks_rule(result: TaskEvaluation) -> list[str]:
    """What the figures of tasks mean."""
    rule, lines = result.rule, []
    for task in result.tasks:
        extras = [
            f"guessing gives {100 * task.chance:.1f} %" if task.chance else "",
            f"after {count(task.shots, 'example')}" if task.shots else "",
            f"{count(task.shortened, 'context')} shortened to fit the model" if task.shortened else "",
        ]
        lines.append("; ".join([f"{task.name}: {count(task.items, 'item')}, {task.kind}", *filter(None, extras)]))
        if any(run.level > 0 and run.sparsity == 0 for run in task.runs):
            lines.append(f"{task.name}: nothing was sparse, its items end among the dense tokens (--dense-tokens)")
    kinds = {task.kind for task in result.tasks}
    if kinds != {ANSWER}:
        lines.append(f"scored: {rule['scored']}")
    if ANSWER in kinds:
        lines.append(f"written: {rule['written']}")
    lines.append(
        f"{rule['dtype']}, weights {rule['weights']}; ± is one standard error over items, paired for differences"
    )
    return lines


def evaluation_rule(result: Evaluation) -> str:
    """What an evaluation's figures mean."""
    rule = result.rule
    weights = f", weights rounded to {result.details['weights']}" if "weights" in result.details else ""
    errors = "± is one standard error over sequences, of the increase paired"
    if rule["sequences"] == 1:
        errors = "a single sequence gives no standard error"
    return (
        f"{rule['tokens_counted']} predictions in {count(rule['sequences'], 'sequence')} of {rule['sequence_length']} "
        f"tokens, {rule['dtype']}{weights}; sparse: {rule['sparse']}; {errors}"
    )


def speed_table(result: Benchmark) -> Table:
    """Decode speed, bytes and bandwidth, dense first."""
    rows = [
        [
            "dense" if speed.level == 0 else f"{speed.level:g}",
            f"{speed.sparsity:.4f}",
            f"{speed.tokens_per_second:.2f} ({speed.slowest:.2f}-{speed.fastest:.2f})",
            f"{speed.speedup:.2f} ({speed.speedup_slowest:.2f}-{speed.speedup_fastest:.2f})",
            f"{speed.bytes_needed / 1e6:.1f}",
            f"{speed.bytes_read / 1e6:.1f}",
            f"{100 * speed.bandwidth_share:.0f}",
        ]
        for speed in result.speeds
    ]
    spreads = ["tokens/s (spread)", "x dense (spread)"]
    return ["level", "realised", *spreads, "MB needed", "MB read", "% of bandwidth"], rows


def plan_table(plan: SparsityPlan, level: float) -> Table:
    """The sparsity of every projection at one level."""
    settings = plan.settings(level)
    names = list(dict.fromkeys(name for block in settings for name in block))
    rows = [
        [str(index), *(f"{block[name].sparsity:.3f}" if name in block else "" for name in names)]
        for index, block in enumerate(settings)
    ]
    return ["block", *(name.rpartition(".")[2] for name in names)], rows


def channel_thresholds(plan: SparsityPlan, level: float) -> dict[str, Tensor]:
    """The thresholds of every projection at one level, of the channels of all blocks together; empty if a plan has one
    threshold for all channels of a projection.
    """
    found: dict[str, list[Tensor]] = {}
    for block in plan.settings(level):
        for name, setting in block.items():
            if isinstance(setting.threshold, Tensor) and setting.threshold.ndim:
                found.setdefault(name.rpartition(".")[2], []).append(setting.threshold)
    return {name: torch.cat(thresholds) for name, thresholds in found.items()}


def channel_table(thresholds: dict[str, Tensor]) -> Table:
    """What `channel_thresholds` gave in numbers: channels that are always or never read, and the spread of the rest."""
    rows = []
    for name, values in thresholds.items():
        always, never = values <= 0, drops_all(values)
        between = values[~always & ~never]
        spread = between.quantile(torch.tensor([0.05, 0.5, 0.95])).tolist() if len(between) else []
        shares = [f"{100 * float(mask.float().mean()):.1f}" for mask in (always, never)]
        rows.append([name, str(len(values)), *shares, *([f"{value:.3g}" for value in spread] or ["", "", ""])])
    return ["projection", "channels", "always read %", "never read %", "lowest 5 %", "median", "highest 5 %"], rows


def threshold_table(statistics: ActivationStatistics, levels: Sequence[float]) -> Table:
    """The threshold of every input of every block at some levels, and the tokens that were counted."""
    rows = [
        [str(index), name.replace("_", " "), str(entry.tokens), *(f"{entry.threshold(level):.4g}" for level in levels)]
        for index, block in enumerate(statistics.blocks)
        for name, entry in block.items()
    ]
    return ["block", "input", "tokens", *(f"|x| dropped at {level:g}" for level in levels)], rows


def reads_every_weight(result: Benchmark) -> str | None:
    """What there is to say of a layout that is not faster, if it is none of those that skip channels."""
    if all(speed.bytes_read <= speed.bytes_needed for speed in result.speeds):
        return None
    return (
        f"layout {result.details['layout']} computes with zeroed inputs and reads every weight: right, but not faster"
    )


def speed_rule(result: Benchmark) -> list[str]:
    """What a benchmark was measured on, and that its products are right."""
    d = result.details
    return [
        f"{d['model']}, {d['dtype']} on {d['device']}, layout {d['layout']}, {count(d['threads'], 'thread')}, "
        f"torch {d['torch']}; {count(d['repeats'], 'repeat')} of {d['new_tokens']} tokens after {d['prompt_tokens']}; "
        "medians",
        f"read bandwidth {result.bandwidth / 1e9:.1f} GB/s, measured in the same run; {d['rule']}",
        f"correct: products differ from the reference by at most {d['largest_relative_error']:.1e} of the largest "
        f"output (allowed {d['tolerance']:.1e})",
    ]


def tuning_table(result: Tuning) -> Table:
    """Every level that was tried: on the search part, then on the other."""
    budget = result.budget

    def row(part: str, trial: Trial) -> list[str]:
        bound = budget.loss(trial).bound(result.confidence)
        verdict = "yes" if bound <= budget.limit else "no"
        figures = [budget.show(trial.loss), budget.show(bound), verdict, str(trial.sequences)]
        return [part, trial.plan, f"{trial.level:g}", f"{trial.sparsity:.4f}", *figures]

    rows = [row("search", trial) for trial in result.trials]
    if result.confirmation is not None:
        rows += [row("confirm", trial) for trial in budget.trials(result.confirmation)]
    columns = ["part", "plan", "level", "realised", budget.name, "at most", "fits", f"{budget.noun}s"]
    return columns, rows


def tuning_parts(result: Tuning) -> str:
    """What served to search, and what to confirm."""
    details, several = result.details, f"{result.budget.noun}s"
    said = f"{details[f'search_{several}']} {several} to search, {details[f'confirmation_{several}']} to confirm"
    if "tasks" not in details:
        return f"{said}, of {details['sequence_length']} tokens"
    tasks = ", ".join(f"{task['name']} ({count(task['items'], 'item')}, {task['kind']})" for task in details["tasks"])
    return f"{tasks}; {said}"


def tuning_summary(result: Tuning) -> list[str]:
    """What was found and is claimed, what it saves, and what it cost to find."""
    budget = result.budget
    lines = []
    if result.level:
        lines = [
            f"{result.plan} at level {result.level:g}: {budget.name} {budget.show(result.loss)}, with "
            f"{100 * result.confidence:g} % confidence at most {budget.show(result.bound)} (allowed: {budget.text}), "
            f"measured on {count(result.details[f'confirmation_{budget.noun}s'], budget.noun)} that played no part in "
            "the search",
            f"realised sparsity {result.sparsity:.4f}; weights read per token, LM head included: "
            f"{result.dense_bytes / 1e6:.1f} MB dense, {result.sparse_bytes / 1e6:.1f} MB sparse "
            f"({100 * result.sparse_bytes / result.dense_bytes:.0f} %)",
        ]
        lines += _accuracies(result)
    if result.speed is not None and len(result.speed.speeds) > 1:
        dense, sparse = result.speed.speeds[:2]
        lines.append(
            f"decode {dense.tokens_per_second:.2f} tokens/s dense, {sparse.tokens_per_second:.2f} sparse: "
            f"{sparse.speedup:.2f} times ({sparse.speedup_slowest:.2f} to {sparse.speedup_fastest:.2f})"
        )
    cost = f"{result.tokens_evaluated} tokens run in {result.seconds:.0f} s, {count(len(result.trials), 'level')} tried"
    return [*lines, *result.notes, *([cost] if result.trials else [])]


def _accuracies(result: Tuning) -> list[str]:
    """Of each task, dense and at the level found, on the items that confirm it."""
    if not isinstance(result.confirmation, TaskEvaluation):
        return []
    found = [(task, run) for task in result.confirmation.tasks for run in task.runs if run.level == result.level]
    said = (f"{task.name} {_percent(task, task.dense)} dense, {_percent(task, run)} sparse" for task, run in found)
    return [f"accuracy there: {'; '.join(said)}"]


def _percent(task: TaskResult, run: TaskRun) -> str:
    return f"{100 * task.accuracy(run).value:.1f} %"
