"""Run the whole pipeline on the embedded model: rotate, calibrate, allocate, evaluate, generate, bench, report.

example:
  teal demo --output teal-demo

Needs no download and a few minutes on two cores. Writes the artifacts and report.html into one directory.
An interrupted demo, repeated without --overwrite, continues after its last finished step.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from shutil import rmtree
from typing import TYPE_CHECKING, Any, TypeVar

from teal.commands import bench, common, evaluate
from teal.errors import TealError

if TYPE_CHECKING:
    from teal.benchmark import Benchmark
    from teal.data import TokenBlocks
    from teal.engine.model import DecoderModel
    from teal.evaluation import Evaluation
    from teal.plan import SparsityPlan
    from teal.statistics import ActivationStatistics

OPERANDS = ""
INTERRUPTED = "interrupted; finished steps are kept, repeat the command without --overwrite to continue"
PROMPT = "The city of"
UNFINISHED = "unfinished"  # marks the output until the report is written
MODEL, STATISTICS, UNIFORM, GLOBAL = "model", "statistics.safetensors", "uniform.json", "global.json"
EVALUATION, BENCH, SAMPLES, REPORT = "evaluation.json", "bench.json", "samples.json", "report.html"
TO = 0.7  # levels of the plans
SAMPLING = "One draw each, temperature 0.7, top-p 0.95, the same seed"

Result = TypeVar("Result")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=Path, default=Path("teal-demo"), metavar="DIR", help="(default: teal-demo)")
    parser.add_argument("--overwrite", action="store_true", help="replace the artifacts of an earlier demo")
    common.add_json(parser)


def run(arguments: argparse.Namespace) -> None:
    from teal.engine.load import load_engine
    from teal.report_page import write_report
    from teal.samples import write_samples
    from teal.sparse_model import sparsify

    started = time.monotonic()
    out: Path = arguments.output
    _claim(out, arguments.overwrite)
    _rotate(out)
    plans = _plans(out, _statistics(out))
    quality = _quality(out, plans)
    evaluate.show(arguments, quality)
    engine = load_engine(out / MODEL, context=256)
    sparsify(engine, plans["global"], 0.0)
    samples = _samples(arguments, engine)
    speed = _speed(out, engine, plans["global"])
    bench.show(arguments, speed)
    write_samples(out / SAMPLES, samples, SAMPLING)
    write_report(out, out / REPORT, "teal demo: the embedded model, dense and sparse")
    (out / UNFINISHED).unlink()
    seconds = time.monotonic() - started
    common.say(arguments, f"{seconds:.0f} s; artifacts and report: {out / REPORT}")
    common.write_result(
        arguments,
        {
            "output": str(out),
            "seconds": seconds,
            "evaluation": quality.to_json(),
            "bench": speed.to_json(),
            "samples": samples,
        },
    )


def _claim(out: Path, overwrite: bool) -> None:
    """Mark the output as ours and unfinished. Raises TealError if it holds anything but an unfinished demo."""
    from teal.artifacts import check_writable, write_atomically
    from teal.blockwalk import discard_spool

    if (out / UNFINISHED).is_file() and not overwrite:
        return
    if out.exists() and not (out.is_dir() and (overwrite or not any(out.iterdir()))):
        raise TealError(f"{out} exists and is not empty; name another --output or pass --overwrite")
    check_writable(out / REPORT)
    write_atomically(out / UNFINISHED, lambda path: path.write_text("Repeat `teal demo` to continue.\n"))
    rmtree(out / MODEL, ignore_errors=True)
    rmtree(common.spool_directory(out / MODEL), ignore_errors=True)
    for name in (STATISTICS, UNIFORM, GLOBAL, EVALUATION, BENCH, SAMPLES, REPORT):
        (out / name).unlink(missing_ok=True)
        (out / f"{Path(name).stem}.vectors.safetensors").unlink(missing_ok=True)
        discard_spool(common.spool_directory(out / name))


def _kept(path: Path, load: Callable[[Path], Result], make: Callable[[], Result]) -> Result:
    """What an interrupted demo has left at `path`, else what `make` gives and writes there."""
    return load(path) if path.exists() else make()


def _calibration_blocks(count: int) -> "TokenBlocks":
    from teal.checkpoint import EMBEDDED_MODEL, load_tokenizer
    from teal.data import CALIBRATION_TEXT, token_blocks

    return token_blocks([CALIBRATION_TEXT], load_tokenizer(EMBEDDED_MODEL), length=512, count=count, seed=0)


def _rotate(out: Path) -> None:
    """The embedded model in the axes of its principal components."""
    from teal.checkpoint import EMBEDDED_MODEL
    from teal.rotation import rotate

    if not (out / MODEL).exists():
        rotate(EMBEDDED_MODEL, _calibration_blocks(20), out / MODEL, show_progress=True)


def _statistics(out: Path) -> "ActivationStatistics":
    from teal.blockwalk import discard_spool
    from teal.calibration import calibrate
    from teal.statistics import ActivationStatistics

    path = out / STATISTICS
    spool = common.spool_directory(path)

    def make() -> ActivationStatistics:
        statistics = calibrate(out / MODEL, _calibration_blocks(40), spool=spool, show_progress=True)
        statistics.save(path)
        discard_spool(spool)
        return statistics

    return _kept(path, ActivationStatistics.load, make)


def _plans(out: Path, statistics: "ActivationStatistics") -> dict[str, "SparsityPlan"]:
    from teal.allocation import allocate
    from teal.blockwalk import discard_spool
    from teal.plan import SparsityPlan, level_grid

    path = out / GLOBAL
    spool = common.spool_directory(path)

    def measured() -> SparsityPlan:
        plan = allocate(
            statistics,
            "global",
            levels=level_grid(TO),
            model=out / MODEL,
            tokens=_calibration_blocks(8),
            spool=spool,
            show_progress=True,
        )
        plan.save(path)
        discard_spool(spool)
        return plan

    uniform = allocate(statistics, "uniform", levels=level_grid(TO))
    uniform.save(out / UNIFORM)
    return {"uniform": uniform, "global": _kept(path, SparsityPlan.load, measured)}


def _quality(out: Path, plans: dict[str, "SparsityPlan"]) -> "Evaluation":
    from teal.artifacts import read_json, write_json
    from teal.checkpoint import EMBEDDED_MODEL, load_tokenizer
    from teal.data import EVALUATION_TEXT, token_blocks
    from teal.evaluation import Evaluation
    from teal.evaluation import evaluate as measure

    def make() -> Evaluation:
        sequences = token_blocks([EVALUATION_TEXT], load_tokenizer(EMBEDDED_MODEL), length=512, count=32)
        model = common.load_model(out / MODEL)
        quality = measure(model, sequences, plans, common.DEFAULT_LEVELS, show_progress=True)
        write_json(out / EVALUATION, quality.to_json())
        return quality

    return _kept(out / EVALUATION, lambda path: Evaluation.from_json(read_json(path), path), make)


def _samples(arguments: argparse.Namespace, engine: "DecoderModel") -> list[dict[str, Any]]:
    """The same prompt continued at each level."""
    from teal.checkpoint import EMBEDDED_MODEL, load_tokenizer
    from teal.engine.generate import generate
    from teal.engine.sampling import SamplingConfig
    from teal.engine.text import encode_prompt
    from teal.sparse_model import set_sparsity

    tokenizer = load_tokenizer(EMBEDDED_MODEL)
    sampling = SamplingConfig(temperature=0.7, top_p=0.95, seed=0)
    samples = []
    for level in (0.0, *common.DEFAULT_LEVELS):
        set_sparsity(engine, level)
        text = generate(engine, tokenizer, encode_prompt(tokenizer, PROMPT), 60, sampling).result.text
        samples.append({"level": level, "prompt": PROMPT, "text": text})
        common.say(arguments, f"\nsparsity {level:g}: {PROMPT}{text}")
    common.say(arguments, "")
    return samples


def _speed(out: Path, engine: "DecoderModel", plan: "SparsityPlan") -> "Benchmark":
    from teal.artifacts import read_json, write_json
    from teal.benchmark import Benchmark, benchmark
    from teal.checkpoint import EMBEDDED_MODEL, load_tokenizer
    from teal.engine.text import encode_prompt

    def make() -> Benchmark:
        prompt_ids = encode_prompt(load_tokenizer(EMBEDDED_MODEL), PROMPT)
        name = "the embedded model"
        speed = benchmark(engine, plan, common.DEFAULT_LEVELS, prompt_ids, name=name, show_progress=True)
        write_json(out / BENCH, speed.to_json())
        return speed

    return _kept(out / BENCH, lambda path: Benchmark.from_json(read_json(path), path), make)
