"""artifact_directory: which files of a directory are teal's, and what each of them holds."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Generic, TypeVar

from safetensors import SafetensorError, safe_open

from teal import benchmark, evaluation, plan, samples, statistics, task_evaluation, tuning
from teal.artifacts import read_json
from teal.benchmark import Benchmark
from teal.errors import TealError
from teal.evaluation import Evaluation
from teal.plan import SparsityPlan
from teal.sparse_model import SETTINGS_FILE
from teal.statistics import ActivationStatistics
from teal.structure import ModelIdentity
from teal.task_evaluation import TaskEvaluation
from teal.tuning import Tuning

Content = TypeVar("Content")

MADE_BY = {
    "statistics": "`teal calibrate`", "plans": "`teal allocate`", "evaluations": "`teal evaluate --json FILE`",
    "tasks": "`teal tasks --json FILE`", "tunings": "`teal tune`", "benchmarks": "`teal bench --json FILE`",
}  # fmt: skip
READERS: dict[str, tuple[str, Callable[[dict[str, Any], Path], Any]]] = {  # of JSON, by format; first the kind
    plan.FORMAT: ("plans", lambda _, path: SparsityPlan.load(path)),  # its vectors are beside it
    evaluation.FORMAT: ("evaluations", Evaluation.from_json),
    evaluation.TEXTS_FORMAT: ("texts", evaluation.texts_from_json),
    task_evaluation.FORMAT: ("tasks", TaskEvaluation.from_json),
    tuning.FORMAT: ("tunings", Tuning.from_json),
    benchmark.FORMAT: ("benchmarks", Benchmark.from_json),
    samples.FORMAT: ("samples", samples.samples_from_json),
}


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
    """All that a directory holds, by kind, in the order of names. `texts`: evaluations of several texts, by their
    names; `samples`: pieces of generated text.
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
                f"{directory} holds no statistics, plan or result of teal; run {MADE_BY['statistics']} first"
            )
        return found

    def _add(self, directory: Path, path: Path) -> None:
        read = _read_tensors if path.suffix == ".safetensors" else _read_json
        if (found := read(path)) is not None:
            kind, content = found
            made = datetime.fromtimestamp(path.stat().st_mtime, timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
            getattr(self, kind).append(Artifact(path.relative_to(directory).as_posix(), made, content))

    def identities(self) -> dict[str, ModelIdentity]:
        """The models that the artifacts belong to, by the file that names them first."""
        found: dict[str, ModelIdentity] = {}
        for artifact in (*self.statistics, *self.plans, *self.evaluations, *self.tasks):
            if artifact.content.identity not in found.values():
                found[artifact.name] = artifact.content.identity
        return found

    def missing(self) -> dict[str, str]:
        """The kinds that are not there, with the command that makes each."""
        return {kind: command for kind, command in MADE_BY.items() if not getattr(self, kind)}


def _read_json(path: Path) -> tuple[str, Any] | None:
    """Kind and content of a JSON file of ours; None for others, and for copies of a plan that was tuned or saved."""
    format_name = _format_of(path)
    if format_name not in READERS or (format_name == plan.FORMAT and (path.parent / SETTINGS_FILE).exists()):
        return None
    kind, read = READERS[format_name]
    return kind, read(read_json(path), path)


def _format_of(path: Path) -> str:
    """What a JSON file says that it is; "" for one that is not ours."""
    try:
        payload = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        payload = read_json(path)  # which says what is wrong
    return str(payload.get("format", "")) if isinstance(payload, dict) else ""


def _read_tensors(path: Path) -> tuple[str, Any] | None:
    """Kind and content of statistics; None for other tensors, such as weights."""
    try:
        with safe_open(path, framework="pt") as file:
            format_name = json.loads((file.metadata() or {}).get("teal", "{}")).get("format")
    except (OSError, SafetensorError, json.JSONDecodeError, AttributeError) as error:
        raise TealError(f"{path} is truncated, corrupt or not safetensors ({error}); make it anew") from error
    return ("statistics", ActivationStatistics.load(path)) if format_name == statistics.FORMAT else None
