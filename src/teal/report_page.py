"""report_page: one self-contained HTML page of everything that was measured into a directory."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from html import escape
from pathlib import Path
from typing import Any, Generic, TypeVar

from safetensors import SafetensorError, safe_open
from torch import Tensor

from teal import benchmark, charts, evaluation, plan, report, statistics, task_evaluation, tuning
from teal.artifacts import check_header, check_keys, read_json, write_atomically, write_json
from teal.benchmark import Benchmark
from teal.errors import TealError
from teal.evaluation import Evaluation, Measurement, texts_from_json
from teal.plan import SparsityPlan
from teal.sparse_model import SETTINGS_FILE, default_level
from teal.statistics import ActivationStatistics
from teal.structure import ModelIdentity
from teal.task_evaluation import TaskEvaluation
from teal.tuning import Tuning

SAMPLES_FORMAT = "teal.samples"
SAMPLES_VERSION = 1
STYLE = Path(__file__).with_suffix(".css")
MISSING = {
    "statistics": "`teal calibrate`", "plans": "`teal allocate`", "evaluations": "`teal evaluate --json FILE`",
    "tasks": "`teal tasks --json FILE`", "tunings": "`teal tune`", "benchmarks": "`teal bench --json FILE`",
}  # fmt: skip

Content = TypeVar("Content")


@dataclass(frozen=True)
class Artifact(Generic[Content]):
    """One file of the directory: its name there, when it was written, and what it holds."""

    name: str
    made: str
    content: Content

    @property
    def stem(self) -> str:
        return Path(self.name).stem


@dataclass
class Artifacts:
    """All that a page can show, by kind, in the order of names. `texts`: evaluations of several texts, by their names;
    `samples`: pieces of generated text.
    """

    statistics: list[Artifact[ActivationStatistics]] = field(default_factory=list)
    plans: list[Artifact[SparsityPlan]] = field(default_factory=list)
    evaluations: list[Artifact[Evaluation]] = field(default_factory=list)
    texts: list[Artifact[dict[str, Evaluation]]] = field(default_factory=list)
    tasks: list[Artifact[TaskEvaluation]] = field(default_factory=list)
    tunings: list[Artifact[Tuning]] = field(default_factory=list)
    benchmarks: list[Artifact[Benchmark]] = field(default_factory=list)
    samples: list[Artifact[dict[str, Any]]] = field(default_factory=list)

    @classmethod
    def of(cls, directory: Path) -> "Artifacts":
        """Read the artifacts of a directory and the directories in it; files that are not teal's are left alone.

        Raises TealError, naming it, for a file that is damaged, and if there is no artifact at all.
        """
        if not directory.is_dir():
            raise TealError(f"{directory} is not a directory; name one that holds statistics, plans or results")
        found = cls()
        for path in sorted([*directory.glob("*"), *directory.glob("*/*")]):
            if path.is_file() and path.suffix in (".json", ".safetensors") and ".partial" not in str(path):
                found._add(directory, path)
        if not any(vars(found).values()):
            raise TealError(
                f"{directory} holds no statistics, plan or result of teal; run {MISSING['statistics']} first"
            )
        return found

    def _add(self, directory: Path, path: Path) -> None:
        made = datetime.fromtimestamp(path.stat().st_mtime, timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
        name = path.relative_to(directory).as_posix()
        if path.suffix == ".safetensors":
            if _tensors_format(path) == statistics.FORMAT:
                self.statistics.append(Artifact(name, made, ActivationStatistics.load(path)))
            return
        payload = read_json(path)
        readers: dict[str, tuple[list[Artifact[Any]], Callable[[], Any]]] = {
            evaluation.FORMAT: (self.evaluations, lambda: Evaluation.from_json(payload, path)),
            evaluation.TEXTS_FORMAT: (self.texts, lambda: texts_from_json(payload, path)),
            task_evaluation.FORMAT: (self.tasks, lambda: TaskEvaluation.from_json(payload, path)),
            tuning.FORMAT: (self.tunings, lambda: Tuning.from_json(payload, path)),
            benchmark.FORMAT: (self.benchmarks, lambda: Benchmark.from_json(payload, path)),
            SAMPLES_FORMAT: (self.samples, lambda: _read_samples(payload, path)),
        }
        if not (path.parent / SETTINGS_FILE).exists():  # else it is a copy of the plan that was tuned or saved
            readers[plan.FORMAT] = (self.plans, lambda: SparsityPlan.load(path))
        if payload.get("format") in readers:
            kind, read = readers[payload["format"]]
            kind.append(Artifact(name, made, read()))


def write_samples(path: Path, samples: Sequence[dict[str, Any]], sampling: str) -> None:
    """Write generated text: pieces with `level`, `prompt` and `text`; `sampling` says how they were drawn."""
    payload = {"format": SAMPLES_FORMAT, "version": SAMPLES_VERSION, "sampling": sampling, "samples": list(samples)}
    write_json(path, payload)


def _read_samples(payload: dict[str, Any], where: object) -> dict[str, Any]:
    check_header(payload, SAMPLES_FORMAT, SAMPLES_VERSION, where)
    keys = ("format", "version", "sampling", "samples")
    check_keys(payload, keys, where, keys)
    for sample in payload["samples"]:
        check_keys(sample, ("level", "prompt", "text"), where, ("level", "prompt", "text"))
    return payload


def _tensors_format(path: Path) -> str | None:
    """The format that a safetensors file of ours names in its header; None for others, such as weights."""
    try:
        with safe_open(path, framework="pt") as file:
            return json.loads((file.metadata() or {}).get("teal", "{}")).get("format")
    except (OSError, SafetensorError, json.JSONDecodeError, AttributeError) as error:
        raise TealError(f"{path} is truncated, corrupt or not safetensors ({error}); make it anew") from error


def write_report(directory: Path, output: Path, title: str, level: float | None = None) -> Artifacts:
    """Write the page on the artifacts of `directory` to `output`; returns what it shows.

    `level` is that of the heat maps, by default the tuned one, or 0.5. The page needs no other file and no network.
    Raises TealError for a directory without artifacts, a damaged file, or a level that a plan does not cover.
    """
    artifacts = Artifacts.of(directory)
    text = page(artifacts, title, level)
    write_atomically(output, lambda path: path.write_text(text, encoding="utf-8"))
    return artifacts


def page(artifacts: Artifacts, title: str, level: float | None = None) -> str:
    """The HTML page."""
    figures = _Figures()
    sections = [
        ("quality", "Quality against sparsity", _quality(artifacts, figures)),
        ("tasks", "Tasks", _tasks(artifacts)),
        ("tuning", "The level for a loss", _tuning(artifacts, figures)),
        ("sparsity", "Sparsity of each projection", _sparsity(artifacts, figures, level)),
        ("activations", "Activations and thresholds", _activations(artifacts, figures)),
        ("speed", "Decode speed", _speed(artifacts, figures)),
        ("text", "Generated text", _samples(artifacts)),
        ("sources", "What was measured, and how", _sources(artifacts)),
    ]
    shown = [(anchor, heading, body) for anchor, heading, body in sections if body]
    links = "".join(f'<li><a href="#{anchor}">{heading}</a></li>' for anchor, heading, _ in shown)
    body = "".join(
        f'<section id="{anchor}" aria-labelledby="{anchor}-h"><h2 id="{anchor}-h">{heading}</h2>{content}</section>'
        for anchor, heading, content in shown
    )
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{escape(title)}</title>'
        f"<style>{STYLE.read_text(encoding='utf-8')}</style></head><body>"
        f'<header><h1>{escape(title)}</h1><p class="lead">{escape(_models(artifacts))}</p>'
        f'{_facts(artifacts)}<nav aria-label="Sections"><ul>{links}</ul></nav></header>'
        f"<main>{body}</main><footer>Written by teal report. Losses are of the text and the rule stated beside them, "
        "speeds of the machine they were measured on.</footer></body></html>\n"
    )


class _Figures:
    """Makes figures of pictures, each with ids of its own."""

    def __init__(self) -> None:
        self._count = 0

    def __call__(self, svg: str, caption: str) -> str:
        self._count += 1
        svg = charts.with_unique_ids(svg, f"f{self._count}")
        return f"<figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>"


@contextmanager
def _showing(artifact: Artifact[Any]) -> Iterator[None]:
    """A file whose values are not what their names promise gives one clear line."""
    try:
        yield
    except (TypeError, ValueError, KeyError, IndexError, AttributeError, OverflowError) as error:
        raise TealError(f"{artifact.name} is damaged ({type(error).__name__}: {error}); make it anew") from error


def _table(table: report.Table, caption: str, words: bool = False) -> str:
    columns, rows = table
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in columns)
    lines = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>' + "".join(f"<td>{escape(cell)}</td>" for cell in row[1:]) + "</tr>"
        for row in rows
    )
    kind = ' class="words"' if words else ""
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(caption)}"><table{kind}><caption>'
        f"{escape(caption)}</caption><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table></div>"
    )


def _folded(summary: str, content: str) -> str:
    return f"<details><summary>{escape(summary)}</summary>{content}</details>"


def _grid(figures: Sequence[str]) -> str:
    return f'<div class="figures">{"".join(figures)}</div>'


def _note(text: str) -> str:
    return f'<p class="note">{escape(text[:1].upper() + text[1:])}.</p>'


def _identities(artifacts: Artifacts) -> dict[str, ModelIdentity]:
    """The models that the artifacts belong to, by the file that names them first."""
    found: dict[str, ModelIdentity] = {}
    sized: Sequence[Artifact[Any]] = [
        *artifacts.statistics, *artifacts.plans, *artifacts.evaluations, *artifacts.tasks,
    ]  # fmt: skip
    for artifact in sized:
        if artifact.content.identity not in found.values():
            found[artifact.name] = artifact.content.identity
    return found


def _models(artifacts: Artifacts) -> str:
    identities = _identities(artifacts)
    if not identities:
        return "No file here names its model."
    said = "; ".join(_model(identity) for identity in identities.values())
    return said if len(identities) == 1 else f"Results of {len(identities)} different models stand side by side: {said}"


def _model(identity: ModelIdentity) -> str:
    total = sum(n * k for block in identity.shapes for n, k in block.values())
    weights = f", weights {identity.weights[:12]}" if identity.weights else ""
    return f"{identity.model_type}, {len(identity.shapes)} blocks, {total / 1e6:.1f} M block weights{weights}"


def _facts(artifacts: Artifacts) -> str:
    """The few figures to read first."""
    facts: list[tuple[str, str, str]] = []
    for artifact in artifacts.tunings[:1]:
        with _showing(artifact):
            found = artifact.content
            if found.level:
                bound = found.budget.show(found.bound)
                facts.append(("Tuned", f"{100 * found.sparsity:.0f} % sparse", f"at most {bound} {found.budget.name}"))
            else:
                facts.append(("Tuned", "dense", f"no level is shown to lose at most {found.budget.text}"))
    for artifact in artifacts.evaluations[:1]:
        with _showing(artifact):
            result = artifact.content
            facts.append(("Perplexity, dense", f"{result.dense_perplexity:.2f}", _text_of(result.details)))
            level = min((m.level for m in result.measurements), key=lambda at: abs(at - 0.5), default=None)
            at_level = [m for m in result.measurements if m.level == level]
            if at_level:
                best = min(at_level, key=lambda m: m.increase)
                facts.append(
                    (f"Perplexity at {100 * best.sparsity:.0f} %", f"{best.increase:+.1f} %", f"plan {best.plan}")
                )
    for artifact in artifacts.benchmarks[:1]:
        with _showing(artifact):
            sparse = [speed for speed in artifact.content.speeds if speed.level]
            if sparse:
                fastest = max(sparse, key=lambda speed: speed.speedup)
                name = f"Decode speed at {100 * fastest.sparsity:.0f} %"
                facts.append((name, f"{fastest.speedup:.2f} times dense", f"{fastest.tokens_per_second:.1f} tokens/s"))
    items = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}<small>{escape(more)}</small></dd></div>"
        for name, value, more in facts
    )
    return f'<dl class="facts">{items}</dl>' if items else ""


def _quality(artifacts: Artifacts, figures: _Figures) -> str:
    parts = []
    for artifact in artifacts.evaluations:
        with _showing(artifact):
            parts.append(_evaluation(artifact, figures))
    for texts in artifacts.texts:
        with _showing(texts):
            parts.append(
                f"<h3>Text by text <small>({escape(texts.name)})</small></h3>"
                + _grid([figures(*_texts_chart(texts))])
                + _table(report.texts_table(texts.content), "Quality of each text")
                + "".join(_note(f"{text}: {report.evaluation_rule(result)}") for text, result in texts.content.items())
            )
    return "".join(parts)


def _texts_chart(artifact: Artifact[dict[str, Evaluation]]) -> tuple[str, str]:
    """What sparsity costs on each text with each plan."""
    plans = {measured.plan for result in artifact.content.values() for measured in result.measurements}
    series = []
    for text, result in artifact.content.items():
        for name in sorted(plans):
            points = sorted((m.sparsity, m.increase, m.increase_error) for m in result.measurements if m.plan == name)
            called = text if len(plans) == 1 else f"{text}, {name}"
            sparsity, increase, error = ([point[index] for point in points] for index in range(3))
            series.append(charts.Series(called, [100 * share for share in sparsity], increase, error))
    svg = charts.lines(
        series, "realised sparsity (%)", "perplexity over dense (%)",
        title=f"What sparsity costs on each text, {artifact.name}",
        description="; ".join(f"{one.name}: {max(one.y, default=0):+.1f} % at most" for one in series),
    )  # fmt: skip
    return svg, "Increase of the perplexity over dense on each text. Bars: one standard error of the paired difference."


def _tasks(artifacts: Artifacts) -> str:
    parts = []
    for artifact in artifacts.tasks:
        with _showing(artifact):
            parts.append(
                f"<h3>{escape(artifact.name)}</h3>"
                + _table(report.tasks_table(artifact.content), "Accuracy of each task, dense and sparse")
                + "".join(_note(line) for line in report.tasks_rule(artifact.content))
            )
    return "".join(parts)


def _evaluation(artifact: Artifact[Evaluation], figures: _Figures) -> str:
    result, name = artifact.content, artifact.name
    return (
        f"<h3>{escape(_text_of(result.details))} <small>({escape(name)})</small></h3>"
        + _grid(_quality_charts(artifact, figures))
        + _table(report.evaluation_table(result), "Quality at each level")
        + _note(report.evaluation_rule(result))
        + _folded("By position in the sequence", _table(report.position_table(result), "Loss by position"))
    )


def _quality_charts(artifact: Artifact[Evaluation], figures: _Figures) -> list[str]:
    """Perplexity and divergence against realised sparsity; none for an evaluation of the dense model alone."""
    result, name = artifact.content, artifact.name
    by_plan: dict[str, list[Measurement]] = {}
    for measured in result.measurements:
        by_plan.setdefault(measured.plan, []).append(measured)
    if not any(measured.level for measured in result.measurements):
        return []
    for several in by_plan.values():
        several.sort(key=lambda measured: measured.sparsity)
    dense = result.dense_perplexity
    perplexity = [
        charts.Series(
            plan_name, [100 * m.sparsity for m in measured], [m.perplexity for m in measured],
            [dense * m.increase_error / 100 for m in measured],
        )
        for plan_name, measured in by_plan.items()
    ]  # fmt: skip
    kl = [
        charts.Series(plan_name, [100 * m.sparsity for m in ms], [m.kl for m in ms], [m.kl_error for m in ms])
        for plan_name, ms in by_plan.items()
    ]
    return [
        figures(
            charts.lines(
                perplexity, "realised sparsity (%)", "perplexity", log_y=True, level_line=(dense, "dense"),
                title=f"Perplexity against realised sparsity, {name}",
                description="; ".join(f"{m.plan}: {m.perplexity:.2f} at {m.sparsity:.3f}" for m in result.measurements),
            ),
            "Perplexity against the sparsity that was realised on this text, logarithmic. Bars: one standard error of "
            "the paired difference to dense.",
        ),
        figures(
            charts.lines(
                kl, "realised sparsity (%)", "KL divergence (nats per token)", log_y=True,
                title=f"KL divergence from dense against realised sparsity, {name}",
                description="; ".join(f"{m.plan}: {m.kl:.4f} at {m.sparsity:.3f}" for m in result.measurements),
            ),
            "Divergence of the sparse from the dense model's distribution, logarithmic. Bars: one standard error.",
        ),
    ]  # fmt: skip


def _tuning(artifacts: Artifacts, figures: _Figures) -> str:
    parts = []
    for artifact in artifacts.tunings:
        with _showing(artifact):
            result = artifact.content
            said = "".join(f"<p>{escape(line[:1].upper() + line[1:])}.</p>" for line in report.tuning_summary(result))
            parts.append(
                f"<h3>{escape(result.budget.name)}: at most {escape(result.budget.text)} "
                f"<small>({escape(artifact.name)})</small></h3>{said}"
            )
            if result.trials:
                parts.append(_grid([figures(*_tuning_chart(result))]))
                parts.append(_folded("Every level that was tried", _table(report.tuning_table(result), "Levels tried")))
            if isinstance(result.confirmation, TaskEvaluation):
                table = _table(report.tasks_table(result.confirmation), "Accuracy on the items that confirm")
                parts.append(_folded("Task by task, on the items that confirm", table))
    return "".join(parts)


def _tuning_chart(result: Tuning) -> tuple[str, str]:
    """Losses with their upper bounds, on both parts, and the budget."""
    budget = result.budget
    tried = {
        f"search, {name}": [trial for trial in result.trials if trial.plan == name]
        for name in dict.fromkeys(trial.plan for trial in result.trials)
    }
    if result.confirmation is not None:
        tried["confirmation"] = budget.trials(result.confirmation)
    near = {
        name: sorted((t.level, budget.loss(t)) for t in trials if t.loss <= 3 * budget.limit)
        for name, trials in tried.items()
    }
    series = [
        charts.Series(
            name, [level for level, _ in points], [budget.value(loss.mean) for _, loss in points],
            [budget.value(loss.bound(result.confidence)) - budget.value(loss.mean) for _, loss in points],
            [0.0] * len(points), line=False,
        )
        for name, points in near.items() if points
    ]  # fmt: skip
    svg = charts.lines(
        series, "level", f"{budget.name} ({budget.unit})", level_line=(budget.value(budget.limit), "allowed"),
        title=f"Loss at the levels tried, {budget.name}",
        description=f"Chosen: level {result.level:g}. " + "; ".join(report.tuning_summary(result)[:1]),
    )  # fmt: skip
    bars = f"bars reach up to the {100 * result.confidence:g} % bound"
    return svg, f"Loss at each level tried; {bars}. Losses beyond three times the budget are left out."


def _sparsity(artifacts: Artifacts, figures: _Figures, asked: float | None) -> str:
    tuned = next((artifact.content.level for artifact in artifacts.tunings if artifact.content.level), None)
    drawn, tables = [], []
    for artifact in artifacts.plans:
        with _showing(artifact):
            chosen, name = artifact.content, artifact.stem
            level = asked if asked is not None else default_level(chosen)
            if asked is None and tuned is not None and chosen.levels[0] <= tuned <= chosen.levels[-1]:
                level = tuned
            called = name if name == chosen.method else f"{name} ({chosen.method})"
            rows = [{at: setting.sparsity for at, setting in block.items()} for block in chosen.settings(level)]
            drawn.append(
                figures(
                    charts.heat_map(
                        rows,
                        title=f"Sparsity by block and projection at level {level:g}, {name}",
                        description=f"Expected: {chosen.expected_sparsity(level):.3f} of the block weights.",
                    ),
                    f"{called} at level {level:g}: share of its inputs that each projection drops.",
                )
            )
            table = _table(report.plan_table(chosen, level), f"Sparsity at level {level:g}, {name}")
            if thresholds := report.channel_thresholds(chosen, level):
                drawn.append(
                    figures(
                        _channel_thresholds(thresholds, level, name),
                        f"{called} at level {level:g}: "
                        "thresholds on |x| of channels that are sometimes read. Half of them lie in a box, nine tenths "
                        "between its ends.",
                    )
                )
                table += _table(report.channel_table(thresholds), f"Thresholds of channels at level {level:g}, {name}")
            tables.append(_folded(f"{name} in numbers", table))
    return _grid(drawn) + "".join(tables) if drawn else ""


def _channel_thresholds(thresholds: dict[str, Tensor], level: float, name: str) -> str:
    finite = {
        at: [value for value in values.tolist() if 0 < value < report.NEVER_READ] for at, values in thresholds.items()
    }
    return charts.spreads(
        finite,
        "threshold",
        title=f"Thresholds of channels by projection at level {level:g}, {name}",
        description=f"{sum(map(len, thresholds.values()))} channels of all blocks.",
    )


def _activations(artifacts: Artifacts, figures: _Figures) -> str:
    parts, levels = [], (0.25, 0.5, 0.65)
    for artifact in artifacts.statistics:
        with _showing(artifact):
            counted = artifact.content
            drawn = [
                figures(
                    charts.distribution(
                        [block[name] for block in counted.blocks],
                        levels,
                        title=f"Distribution of |x|, {_input(name)}, {artifact.name}",
                        description=f"{len(counted.blocks)} blocks, thresholds at {', '.join(map(str, levels))}.",
                    ),
                    f"{_input(name)}: how |x| is distributed in each block. At a level, a uniform plan drops what lies "
                    "left of the mark.",
                )
                for name in counted.blocks[0]
            ]
            table = _table(report.threshold_table(counted, levels), f"Thresholds, {artifact.name}")
            parts.append(
                f"<h3>{escape(_texts_of(counted.details))} <small>({escape(artifact.name)})</small></h3>"
                + _grid(drawn)
                + _folded("Thresholds in numbers", table)
            )
    return "".join(parts)


def _input(name: str) -> str:
    """An input of a block, for people."""
    words = name.replace("_", " ")
    return words.replace("mlp", "MLP") if words.startswith("mlp") else words.capitalize()


def _speed(artifacts: Artifacts, figures: _Figures) -> str:
    parts = []
    methods = {artifact.stem: artifact.content.method for artifact in artifacts.plans}
    speeds = [(artifact, artifact.content) for artifact in artifacts.benchmarks]
    speeds += [(a, a.content.speed) for a in artifacts.tunings if a.content.speed is not None]
    for artifact, result in speeds:
        with _showing(artifact):
            series = charts.Series(
                "measured", [100 * s.sparsity for s in result.speeds], [s.tokens_per_second for s in result.speeds],
                [s.fastest - s.tokens_per_second for s in result.speeds],
                [s.tokens_per_second - s.slowest for s in result.speeds],
            )  # fmt: skip
            drawn = [
                figures(
                    charts.lines(
                        [series], "realised sparsity (%)", "tokens per second",
                        title=f"Decode speed against realised sparsity, {artifact.name}",
                        description="; ".join(f"{s.tokens_per_second:.1f} at {s.sparsity:.3f}" for s in result.speeds),
                    ),
                    "Decode speed, median; bars from the slowest to the fastest repeat.",
                )
            ]  # fmt: skip
            if against := _speed_against_quality(artifacts, artifact, result, methods):
                drawn.append(figures(*against))
            said = [*report.speed_rule(result), report.reads_every_weight(result)]
            parts.append(
                f"<h3>{escape(str(result.details['model']))} <small>({escape(artifact.name)})</small></h3>"
                + _grid(drawn)
                + _table(report.speed_table(result), "Decode speed, bytes and bandwidth")
                + "".join(_note(line) for line in said if line)
            )
    return "".join(parts)


def _speed_against_quality(
    artifacts: Artifacts, artifact: Artifact[Any], result: Benchmark, methods: dict[str, str]
) -> tuple[str, str] | None:
    """Speed over the loss measured with the same plan at the same level, where an evaluation lies beside."""
    speeds = {speed.level: speed for speed in result.speeds if speed.level}
    own = artifact.content.confirmation if isinstance(artifact.content, Tuning) else None
    beside = [own] if isinstance(own, Evaluation) else []
    beside += [other.content for other in artifacts.evaluations]
    for found in beside:
        points = [
            (measured, speeds[measured.level])
            for measured in found.measurements
            if measured.level in speeds and methods.get(measured.plan, measured.plan) == result.details["plan"]
        ]
        if len(points) > 1:
            series = charts.Series(
                str(result.details["plan"]), [m.increase for m, _ in points], [s.speedup for _, s in points],
                [s.speedup_fastest - s.speedup for _, s in points], [s.speedup - s.speedup_slowest for _, s in points],
            )  # fmt: skip
            svg = charts.lines(
                [series], "perplexity over dense (%)", "times as fast as dense", level_line=(1.0, "dense"),
                title=f"Speed against quality, {artifact.name}",
                description="; ".join(f"{s.speedup:.2f} times at {m.increase:+.1f} %" for m, s in points),
            )  # fmt: skip
            return (
                svg,
                f"What the loss buys with plan {result.details['plan']}. Bars: from the slowest to the fastest repeat.",
            )
    return None


def _samples(artifacts: Artifacts) -> str:
    parts = []
    for artifact in artifacts.samples:
        with _showing(artifact):
            parts.append(_note(f"{artifact.content['sampling']} ({artifact.name})"))
            for sample in artifact.content["samples"]:
                title = "Dense" if sample["level"] == 0 else f"Sparsity {sample['level']:g}"
                text = (sample["prompt"] + sample["text"]).strip()
                parts.append(f"<h3>{escape(title)}</h3><blockquote>{escape(text)}</blockquote>")
    return "".join(parts)


def _sources(artifacts: Artifacts) -> str:
    rows = []
    for one in artifacts.statistics:
        said = f"{_texts_of(one.content.details)}; first {one.content.dense_tokens} tokens of each block not counted"
        rows.append([one.name, "statistics", one.made, said])
    for one in artifacts.plans:
        covers = f"levels {one.content.levels[0]:g} to {one.content.levels[-1]:g}"
        rows.append([one.name, f"plan, {one.content.method}", one.made, covers])
    for one in artifacts.evaluations:
        with _showing(one):
            said = f"{_text_of(one.content.details)}; {report.evaluation_rule(one.content)}"
            rows.append([one.name, "evaluation", one.made, said])
    rows += [[one.name, "evaluation, text by text", one.made, ", ".join(one.content)] for one in artifacts.texts]
    rows += [
        [one.name, "tasks", one.made, ", ".join(task.name for task in one.content.tasks)] for one in artifacts.tasks
    ]
    for one in artifacts.tunings:
        with _showing(one):
            text = [] if "tasks" in one.content.details else [_text_of(one.content.details)]
            rows.append([one.name, "tuning", one.made, "; ".join([*text, report.tuning_parts(one.content)])])
    for one in artifacts.benchmarks:
        with _showing(one):
            rows.append([one.name, "benchmark", one.made, report.speed_rule(one.content)[0]])
    rows += [[one.name, "samples", one.made, str(one.content["sampling"])] for one in artifacts.samples]
    missing = [f"no {kind} ({command})" for kind, command in MISSING.items() if not getattr(artifacts, kind)]
    table = _table((["file", "kind", "written", "what and how"], rows), "Files that this page shows", words=True)
    models = "".join(_note(f"{name}: {_model(identity)}") for name, identity in _identities(artifacts).items())
    return table + models + (_note(f"not here: {', '.join(missing)}") if missing else "")


def _text_of(details: dict[str, Any]) -> str:
    """The names of the texts in what `TokenBlocks.describe` said."""
    return ", ".join(map(str, details.get("text", ()))) or "a text that is not named"


def _texts_of(details: dict[str, Any]) -> str:
    return " and ".join(_text_of(part) for part in details.get("merged", [details]))
