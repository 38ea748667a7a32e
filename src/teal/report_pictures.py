"""report_pictures: what was found, as charts with captions for the page; `report` has the tables and sentences."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from teal import charts, report
from teal.benchmark import Benchmark
from teal.evaluation import Evaluation, Measurement
from teal.plan import SparsityPlan, drops_all
from teal.statistics import ActivationStatistics
from teal.tuning import Tuning

Picture = tuple[str, str]  # an <svg> element and its caption


def evaluation_pictures(result: Evaluation, name: str) -> list[Picture]:
    """Perplexity and divergence against realised sparsity; none for an evaluation of the dense model alone."""
    if not any(measured.level for measured in result.measurements):
        return []
    return [_perplexity(result, name), _divergence(result, name)]


def _perplexity(result: Evaluation, name: str) -> Picture:
    dense = result.dense_perplexity
    series = [
        charts.Series(
            plan, [100 * m.sparsity for m in measured], [m.perplexity for m in measured],
            [dense * m.increase_error / 100 for m in measured],
        )
        for plan, measured in _by_plan(result).items()
    ]  # fmt: skip
    svg = charts.lines(
        series, "realised sparsity (%)", "perplexity", log_y=True, level_line=(dense, "dense"),
        title=f"Perplexity against realised sparsity, {name}",
        description="; ".join(f"{m.plan}: {m.perplexity:.2f} at {m.sparsity:.3f}" for m in result.measurements),
    )  # fmt: skip
    return (
        svg,
        "Perplexity against the sparsity that was realised on this text, logarithmic. Bars: one standard error of "
        "the paired difference to dense.",
    )


def _divergence(result: Evaluation, name: str) -> Picture:
    series = [
        charts.Series(
            plan, [100 * m.sparsity for m in measured], [m.kl for m in measured], [m.kl_error for m in measured]
        )
        for plan, measured in _by_plan(result).items()
    ]
    svg = charts.lines(
        series, "realised sparsity (%)", "KL divergence (nats per token)", log_y=True,
        title=f"KL divergence from dense against realised sparsity, {name}",
        description="; ".join(f"{m.plan}: {m.kl:.4f} at {m.sparsity:.3f}" for m in result.measurements),
    )  # fmt: skip
    return svg, "Divergence of the sparse from the dense model's distribution, logarithmic. Bars: one standard error."


def _by_plan(result: Evaluation) -> dict[str, list[Measurement]]:
    """The measurements of each plan, the sparsest last."""
    return {
        plan: sorted((m for m in result.measurements if m.plan == plan), key=lambda measured: measured.sparsity)
        for plan in dict.fromkeys(m.plan for m in result.measurements)
    }


def texts_picture(results: Mapping[str, Evaluation], name: str) -> Picture:
    """What sparsity costs on each text with each plan."""
    plans = {measured.plan for result in results.values() for measured in result.measurements}
    series = []
    for text, result in results.items():
        for plan in sorted(plans):
            points = sorted((m.sparsity, m.increase, m.increase_error) for m in result.measurements if m.plan == plan)
            called = text if len(plans) == 1 else f"{text}, {plan}"
            sparsity, increase, error = ([point[index] for point in points] for index in range(3))
            series.append(charts.Series(called, [100 * share for share in sparsity], increase, error))
    svg = charts.lines(
        series, "realised sparsity (%)", "perplexity over dense (%)",
        title=f"What sparsity costs on each text, {name}",
        description="; ".join(f"{one.name}: {max(one.y, default=0):+.1f} % at most" for one in series),
    )  # fmt: skip
    return svg, "Increase of the perplexity over dense on each text. Bars: one standard error of the paired difference."


def tuning_picture(result: Tuning) -> Picture:
    """Losses with their upper bounds, on both parts, and the budget."""
    budget = result.budget
    svg = charts.lines(
        _tried(result), "level", f"{budget.name} ({budget.unit})", level_line=(budget.value(budget.limit), "allowed"),
        title=f"Loss at the levels tried, {budget.name}",
        description=f"Chosen: level {result.level:g}. " + "; ".join(report.tuning_summary(result)[:1]),
    )  # fmt: skip
    bars = f"bars reach up to the {100 * result.confidence:g} % bound"
    return svg, f"Loss at each level tried; {bars}. Losses beyond three times the budget are left out."


def _tried(result: Tuning) -> list[charts.Series]:
    budget = result.budget
    tried = {
        f"search, {plan}": [trial for trial in result.trials if trial.plan == plan]
        for plan in dict.fromkeys(trial.plan for trial in result.trials)
    }
    if result.confirmation is not None:
        tried["confirmation"] = budget.trials(result.confirmation)
    near = {
        part: sorted((t.level, budget.loss(t)) for t in trials if t.loss <= 3 * budget.limit)
        for part, trials in tried.items()
    }
    return [
        charts.Series(
            part, [level for level, _ in points], [budget.value(loss.mean) for _, loss in points],
            [budget.value(loss.bound(result.confidence)) - budget.value(loss.mean) for _, loss in points],
            [0.0] * len(points), line=False,
        )
        for part, points in near.items() if points
    ]  # fmt: skip


def plan_picture(plan: SparsityPlan, level: float, name: str) -> Picture:
    """The sparsity of every projection at one level."""
    svg = charts.heat_map(
        [{at: setting.sparsity for at, setting in block.items()} for block in plan.settings(level)],
        title=f"Sparsity by block and projection at level {level:g}, {name}",
        description=f"Expected: {plan.expected_sparsity(level):.3f} of the block weights.",
    )
    return svg, f"{_called(plan, name)} at level {level:g}: share of its inputs that each projection drops."


def channel_picture(thresholds: Mapping[str, Tensor], plan: SparsityPlan, level: float, name: str) -> Picture:
    """The spread of what `report.channel_thresholds` gave."""
    svg = charts.spreads(
        {at: values[(values > 0) & ~drops_all(values)].tolist() for at, values in thresholds.items()},
        "threshold",
        title=f"Thresholds of channels by projection at level {level:g}, {name}",
        description=f"{sum(map(len, thresholds.values()))} channels of all blocks.",
    )
    return (
        svg,
        f"{_called(plan, name)} at level {level:g}: thresholds on |x| of channels that are sometimes read. Half of "
        "them lie in a box, nine tenths between its ends.",
    )


def _called(plan: SparsityPlan, name: str) -> str:
    return name if name == plan.method else f"{name} ({plan.method})"


def input_picture(statistics: ActivationStatistics, name: str, levels: Sequence[float], of: str) -> Picture:
    """How input `name` of each block is distributed in statistics `of` that name."""
    words = name.replace("_", " ")
    words = words.replace("mlp", "MLP") if words.startswith("mlp") else words.capitalize()
    svg = charts.distribution(
        [block[name] for block in statistics.blocks],
        levels,
        title=f"Distribution of |x|, {words}, {of}",
        description=f"{len(statistics.blocks)} blocks, thresholds at {', '.join(map(str, levels))}.",
    )
    return (
        svg,
        f"{words}: how |x| is distributed in each block. At a level, a uniform plan drops what lies left of the mark.",
    )


def speed_picture(result: Benchmark, name: str) -> Picture:
    """Decode speed against realised sparsity."""
    series = charts.Series(
        "measured", [100 * s.sparsity for s in result.speeds], [s.tokens_per_second for s in result.speeds],
        [s.fastest - s.tokens_per_second for s in result.speeds],
        [s.tokens_per_second - s.slowest for s in result.speeds],
    )  # fmt: skip
    svg = charts.lines(
        [series], "realised sparsity (%)", "tokens per second",
        title=f"Decode speed against realised sparsity, {name}",
        description="; ".join(f"{s.tokens_per_second:.1f} at {s.sparsity:.3f}" for s in result.speeds),
    )  # fmt: skip
    return svg, "Decode speed, median; bars from the slowest to the fastest repeat."


def speed_against_quality_picture(
    result: Benchmark, evaluations: Sequence[Evaluation], methods: Mapping[str, str], name: str
) -> Picture | None:
    """Speed over the loss measured with the same plan at the same level, in the first evaluation that has several such
    levels; None if none has. `methods` of the plans, by the names that evaluations know them by.
    """
    speeds = {speed.level: speed for speed in result.speeds if speed.level}
    for found in evaluations:
        points = [
            (measured, speeds[measured.level])
            for measured in found.measurements
            if measured.level in speeds and methods.get(measured.plan, measured.plan) == result.details["plan"]
        ]
        if len(points) > 1:
            break
    else:
        return None
    series = charts.Series(
        str(result.details["plan"]), [m.increase for m, _ in points], [s.speedup for _, s in points],
        [s.speedup_fastest - s.speedup for _, s in points], [s.speedup - s.speedup_slowest for _, s in points],
    )  # fmt: skip
    svg = charts.lines(
        [series], "perplexity over dense (%)", "times as fast as dense", level_line=(1.0, "dense"),
        title=f"Speed against quality, {name}",
        description="; ".join(f"{s.speedup:.2f} times at {m.increase:+.1f} %" for m, s in points),
    )  # fmt: skip
    return svg, f"What the loss buys with plan {result.details['plan']}. Bars: from the slowest to the fastest repeat."
