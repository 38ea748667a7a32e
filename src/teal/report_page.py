"""report_page: one self-contained HTML page of everything that was measured into a directory."""

from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, TypeVar

from teal import charts, report, report_pictures
from teal.artifact_directory import Artifact, Artifacts, Content
from teal.artifacts import write_atomically
from teal.benchmark import Benchmark
from teal.errors import TealError
from teal.evaluation import Evaluation
from teal.plan import SparsityPlan
from teal.report_pictures import Picture
from teal.sparse_model import default_level
from teal.statistics import ActivationStatistics
from teal.structure import ModelIdentity
from teal.task_evaluation import TaskEvaluation
from teal.tuning import Tuning

STYLE = Path(__file__).with_suffix(".css")
THRESHOLDS_AT = (0.25, 0.5, 0.65)  # levels at which the thresholds of statistics are shown

Shown = TypeVar("Shown")
Fact = tuple[str, str, str]  # name, value, and what to know of it


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
        ("tasks", "Tasks", _all(artifacts.tasks, _tasks)),
        ("tuning", "The level for a loss", _all(artifacts.tunings, lambda one: _tuning(one, figures))),
        ("sparsity", "Sparsity of each projection", _sparsity(artifacts, figures, level)),
        (
            "activations",
            "Activations and thresholds",
            _all(artifacts.statistics, lambda one: _activations(one, figures)),
        ),
        ("speed", "Decode speed", _speed(artifacts, figures)),
        ("text", "Generated text", _all(artifacts.samples, _samples)),
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

    def __call__(self, picture: Picture) -> str:
        self._count += 1
        svg, caption = picture
        svg = charts.with_unique_ids(svg, f"f{self._count}")
        return f"<figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>"


def _each(artifacts: Sequence[Artifact[Content]], show: Callable[[Artifact[Content]], Shown]) -> list[Shown]:
    """What `show` makes of each file; one whose values are not what their names promise gives one clear line."""
    shown = []
    for artifact in artifacts:
        try:
            shown.append(show(artifact))
        except (TypeError, ValueError, KeyError, IndexError, AttributeError, OverflowError) as error:
            raise TealError(f"{artifact.name} is damaged ({type(error).__name__}: {error}); make it anew") from error
    return shown


def _all(artifacts: Sequence[Artifact[Content]], show: Callable[[Artifact[Content]], str]) -> str:
    return "".join(_each(artifacts, show))


def _heading(text: str, name: str) -> str:
    """What a file shows, with its name."""
    return f"<h3>{escape(text)} <small>({escape(name)})</small></h3>"


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
    return f'<p class="note">{escape(_sentence(text))}</p>'


def _sentence(text: str) -> str:
    return f"{text[:1].upper() + text[1:]}."


def _models(artifacts: Artifacts) -> str:
    identities = artifacts.identities()
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
    facts = [
        *_each(artifacts.tunings[:1], lambda one: [_tuned_fact(one.content)]),
        *_each(artifacts.evaluations[:1], lambda one: _quality_facts(one.content)),
        *_each(artifacts.benchmarks[:1], lambda one: _speed_facts(one.content)),
    ]
    items = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}<small>{escape(more)}</small></dd></div>"
        for of_file in facts
        for name, value, more in of_file
    )
    return f'<dl class="facts">{items}</dl>' if items else ""


def _tuned_fact(result: Tuning) -> Fact:
    if not result.level:
        return "Tuned", "dense", f"no level is shown to lose at most {result.budget.text}"
    bound = result.budget.show(result.bound)
    return "Tuned", f"{100 * result.sparsity:.0f} % sparse", f"at most {bound} {result.budget.name}"


def _quality_facts(result: Evaluation) -> list[Fact]:
    """Dense, and the best plan at the level nearest to 0.5."""
    dense = ("Perplexity, dense", f"{result.dense_perplexity:.2f}", _text_of(result.details))
    if not result.measurements:
        return [dense]
    level = min((m.level for m in result.measurements), key=lambda at: abs(at - 0.5))
    best = min((m for m in result.measurements if m.level == level), key=lambda m: m.increase)
    return [dense, (f"Perplexity at {100 * best.sparsity:.0f} %", f"{best.increase:+.1f} %", f"plan {best.plan}")]


def _speed_facts(result: Benchmark) -> list[Fact]:
    sparse = [speed for speed in result.speeds if speed.level]
    if not sparse:
        return []
    fastest = max(sparse, key=lambda speed: speed.speedup)
    name = f"Decode speed at {100 * fastest.sparsity:.0f} %"
    return [(name, f"{fastest.speedup:.2f} times dense", f"{fastest.tokens_per_second:.1f} tokens/s")]


def _quality(artifacts: Artifacts, figures: _Figures) -> str:
    of_evaluations = _all(artifacts.evaluations, lambda one: _evaluation(one, figures))
    return of_evaluations + _all(artifacts.texts, lambda one: _texts(one, figures))


def _evaluation(artifact: Artifact[Evaluation], figures: _Figures) -> str:
    result, name = artifact.content, artifact.name
    return (
        _heading(_text_of(result.details), name)
        + _grid([figures(picture) for picture in report_pictures.evaluation_pictures(result, name)])
        + _table(report.evaluation_table(result), "Quality at each level")
        + _note(report.evaluation_rule(result))
        + _folded("By position in the sequence", _table(report.position_table(result), "Loss by position"))
    )


def _texts(artifact: Artifact[dict[str, Evaluation]], figures: _Figures) -> str:
    results, name = artifact.content, artifact.name
    return (
        _heading("Text by text", name)
        + _grid([figures(report_pictures.texts_picture(results, name))])
        + _table(report.texts_table(results), "Quality of each text")
        + "".join(_note(f"{text}: {report.evaluation_rule(result)}") for text, result in results.items())
    )


def _tasks(artifact: Artifact[TaskEvaluation]) -> str:
    return (
        f"<h3>{escape(artifact.name)}</h3>"
        + _table(report.tasks_table(artifact.content), "Accuracy of each task, dense and sparse")
        + "".join(_note(line) for line in report.tasks_rule(artifact.content))
    )


def _tuning(artifact: Artifact[Tuning], figures: _Figures) -> str:
    result = artifact.content
    parts = [_heading(f"{result.budget.name}: at most {result.budget.text}", artifact.name)]
    parts += [f"<p>{escape(_sentence(line))}</p>" for line in report.tuning_summary(result)]
    if result.trials:
        parts.append(_grid([figures(report_pictures.tuning_picture(result))]))
        parts.append(_folded("Every level that was tried", _table(report.tuning_table(result), "Levels tried")))
    if isinstance(result.confirmation, TaskEvaluation):
        table = _table(report.tasks_table(result.confirmation), "Accuracy on the items that confirm")
        parts.append(_folded("Task by task, on the items that confirm", table))
    return "".join(parts)


def _sparsity(artifacts: Artifacts, figures: _Figures, asked: float | None) -> str:
    if not artifacts.plans:
        return ""
    tuned = next((artifact.content.level for artifact in artifacts.tunings if artifact.content.level), None)
    shown = _each(artifacts.plans, lambda one: _plan(one, _level_of(one.content, asked, tuned), figures))
    return _grid([figure for drawn, _ in shown for figure in drawn]) + "".join(tables for _, tables in shown)


def _level_of(plan: SparsityPlan, asked: float | None, tuned: float | None) -> float:
    if asked is not None:
        return asked
    if tuned is not None and plan.levels[0] <= tuned <= plan.levels[-1]:
        return tuned
    return default_level(plan)


def _plan(artifact: Artifact[SparsityPlan], level: float, figures: _Figures) -> tuple[list[str], str]:
    """Its figures, and its tables."""
    plan, name = artifact.content, artifact.stem
    drawn = [figures(report_pictures.plan_picture(plan, level, name))]
    tables = _table(report.plan_table(plan, level), f"Sparsity at level {level:g}, {name}")
    if thresholds := report.channel_thresholds(plan, level):
        drawn.append(figures(report_pictures.channel_picture(thresholds, plan, level, name)))
        tables += _table(report.channel_table(thresholds), f"Thresholds of channels at level {level:g}, {name}")
    return drawn, _folded(f"{name} in numbers", tables)


def _activations(artifact: Artifact[ActivationStatistics], figures: _Figures) -> str:
    counted, name = artifact.content, artifact.name
    drawn = [figures(report_pictures.input_picture(counted, at, THRESHOLDS_AT, name)) for at in counted.blocks[0]]
    table = _table(report.threshold_table(counted, THRESHOLDS_AT), f"Thresholds, {name}")
    return _heading(_texts_of(counted.details), name) + _grid(drawn) + _folded("Thresholds in numbers", table)


def _speed(artifacts: Artifacts, figures: _Figures) -> str:
    """Benchmarks and those of tunings, each with the evaluations that may tell what its speed costs."""
    methods = {artifact.stem: artifact.content.method for artifact in artifacts.plans}
    evaluations = [artifact.content for artifact in artifacts.evaluations]

    def of_benchmark(artifact: Artifact[Benchmark]) -> str:
        return _benchmark(artifact.name, artifact.content, evaluations, methods, figures)

    def of_tuning(artifact: Artifact[Tuning]) -> str:
        result, own = artifact.content, artifact.content.confirmation
        beside = [own, *evaluations] if isinstance(own, Evaluation) else evaluations
        return "" if result.speed is None else _benchmark(artifact.name, result.speed, beside, methods, figures)

    return _all(artifacts.benchmarks, of_benchmark) + _all(artifacts.tunings, of_tuning)


def _benchmark(
    name: str, result: Benchmark, evaluations: Sequence[Evaluation], methods: Mapping[str, str], figures: _Figures
) -> str:
    against = report_pictures.speed_against_quality_picture(result, evaluations, methods, name)
    pictures = [report_pictures.speed_picture(result, name), *([against] if against else [])]
    said = [*report.speed_rule(result), report.reads_every_weight(result)]
    return (
        _heading(str(result.details["model"]), name)
        + _grid([figures(picture) for picture in pictures])
        + _table(report.speed_table(result), "Decode speed, bytes and bandwidth")
        + "".join(_note(line) for line in said if line)
    )


def _samples(artifact: Artifact[dict[str, Any]]) -> str:
    parts = [_note(f"{artifact.content['sampling']} ({artifact.name})")]
    for sample in artifact.content["samples"]:
        title = "Dense" if sample["level"] == 0 else f"Sparsity {sample['level']:g}"
        text = (sample["prompt"] + sample["text"]).strip()
        parts.append(f"<h3>{escape(title)}</h3><blockquote>{escape(text)}</blockquote>")
    return "".join(parts)


def _sources(artifacts: Artifacts) -> str:
    """The files, their models, and what is missing."""
    rows = [
        *_rows(artifacts.statistics, "statistics", _counted),
        *[row for plan in artifacts.plans for row in _rows([plan], f"plan, {plan.content.method}", _covered)],
        *_rows(artifacts.evaluations, "evaluation", lambda e: f"{_text_of(e.details)}; {report.evaluation_rule(e)}"),
        *_rows(artifacts.texts, "evaluation, text by text", ", ".join),
        *_rows(artifacts.tasks, "tasks", lambda result: ", ".join(task.name for task in result.tasks)),
        *_rows(artifacts.tunings, "tuning", _tuned_on),
        *_rows(artifacts.benchmarks, "benchmark", lambda result: report.speed_rule(result)[0]),
        *_rows(artifacts.samples, "samples", lambda samples: str(samples["sampling"])),
    ]
    missing = [f"no {kind} ({command})" for kind, command in artifacts.missing().items()]
    table = _table((["file", "kind", "written", "what and how"], rows), "Files that this page shows", words=True)
    models = "".join(_note(f"{name}: {_model(identity)}") for name, identity in artifacts.identities().items())
    return table + models + (_note(f"not here: {', '.join(missing)}") if missing else "")


def _rows(artifacts: Sequence[Artifact[Content]], kind: str, say: Callable[[Content], str]) -> list[list[str]]:
    return _each(artifacts, lambda one: [one.name, kind, one.made, say(one.content)])


def _counted(statistics: ActivationStatistics) -> str:
    return f"{_texts_of(statistics.details)}; first {statistics.dense_tokens} tokens of each block not counted"


def _covered(plan: SparsityPlan) -> str:
    return f"levels {plan.levels[0]:g} to {plan.levels[-1]:g}"


def _tuned_on(result: Tuning) -> str:
    text = [] if "tasks" in result.details else [_text_of(result.details)]
    return "; ".join([*text, report.tuning_parts(result)])


def _text_of(details: dict[str, Any]) -> str:
    """The names of the texts in what `TokenBlocks.describe` said."""
    return ", ".join(map(str, details.get("text", ()))) or "a text that is not named"


def _texts_of(details: dict[str, Any]) -> str:
    return " and ".join(_text_of(part) for part in details.get("merged", [details]))
