"""Run the whole pipeline on the embedded model: calibrate, allocate, evaluate, generate, bench, report.

example:
  teal demo --output teal-demo

Needs no download and a few minutes on two cores. Writes the artifacts and report.md into one directory.
"""

import argparse
import time
from pathlib import Path

from teal.commands import bench, common, evaluate
from teal.errors import TealError

OPERANDS = ""
PROMPT = "The city of"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=Path, default=Path("teal-demo"), metavar="DIR", help="(default: teal-demo)")
    parser.add_argument("--overwrite", action="store_true", help="replace the artifacts of an earlier demo")
    common.add_json(parser)


def run(arguments: argparse.Namespace) -> None:
    from teal import report
    from teal.allocation import GreedyConfig, allocate
    from teal.artifacts import check_writable, write_atomically, write_json
    from teal.benchmark import benchmark
    from teal.calibration import calibrate
    from teal.checkpoint import EMBEDDED_MODEL, load_tokenizer
    from teal.data import CALIBRATION_TEXT, EVALUATION_TEXT, token_blocks
    from teal.engine.generate import generate
    from teal.engine.load import load_engine
    from teal.engine.sampling import SamplingConfig
    from teal.engine.text import encode_prompt
    from teal.evaluation import evaluate as measure
    from teal.sparse_model import set_sparsity, sparsify

    started = time.monotonic()
    out: Path = arguments.output
    if out.exists() and not (out.is_dir() and (arguments.overwrite or not any(out.iterdir()))):
        raise TealError(f"{out} exists and is not empty; name another --output or pass --overwrite")
    check_writable(out / "report.md")

    tokenizer = load_tokenizer(EMBEDDED_MODEL)
    many = token_blocks([CALIBRATION_TEXT], tokenizer, length=512, count=40, seed=0)
    statistics = calibrate(EMBEDDED_MODEL, many, show_progress=True)
    statistics.save(out / "statistics.safetensors")

    few = token_blocks([CALIBRATION_TEXT], tokenizer, length=512, count=2, seed=0)
    plans = {
        "uniform": allocate(statistics, "uniform"),
        "blockwise": allocate(
            statistics,
            "blockwise",
            model=EMBEDDED_MODEL,
            tokens=few,
            greedy=GreedyConfig(step=0.01),
            show_progress=True,
        ),
    }
    for name, plan in plans.items():
        plan.save(out / f"{name}.json")

    sequences = token_blocks([EVALUATION_TEXT], tokenizer, length=512, count=32)
    quality = measure(common.load_model(EMBEDDED_MODEL), sequences, plans, common.DEFAULT_LEVELS, show_progress=True)
    evaluate.show(arguments, quality)
    write_json(out / "evaluation.json", quality.to_json())

    engine = load_engine(EMBEDDED_MODEL, context=256)
    sparsify(engine, plans["blockwise"], 0.0)
    prompt_ids = encode_prompt(tokenizer, PROMPT)
    sampling = SamplingConfig(temperature=0.7, top_p=0.95, seed=0)
    samples = []
    for level in (0.0, *common.DEFAULT_LEVELS):
        set_sparsity(engine, level)
        text = generate(engine, tokenizer, prompt_ids, 60, sampling).result.text
        samples.append({"level": level, "prompt": PROMPT, "text": text})
        common.say(arguments, f"\nsparsity {level:g}: {PROMPT}{text}")
    common.say(arguments, "")
    speed = benchmark(
        engine, plans["blockwise"], common.DEFAULT_LEVELS, prompt_ids, name="the embedded model", show_progress=True
    )
    bench.show(arguments, speed)
    write_json(out / "bench.json", speed.to_json())

    sections = [
        "# teal demo: the embedded model, dense and sparse",
        "Calibrated on the embedded calibration text, measured on the embedded evaluation text, both held out from "
        "the model's training. The model has 15 M parameters and is far more sensitive than a model of billions.",
        report.quality_section(quality),
        report.allocation_section(plans["blockwise"], 0.5),
        report.samples_section(samples),
        report.speed_section(speed),
    ]
    page = "\n\n".join(sections) + "\n"
    write_atomically(out / "report.md", lambda path: path.write_text(page, encoding="utf-8"))
    seconds = time.monotonic() - started
    common.say(arguments, f"{seconds:.0f} s; artifacts and report: {out}/report.md")
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
