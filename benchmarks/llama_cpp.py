"""Decode speed of teal and of llama.cpp on the same random weights, side by side in one run.

Both sides get the same weights of a named shape, the same prompt, the same tokens to decode one by one, the same
number of threads, and a format of the same class: bf16/F16, int8/Q8_0, int4/Q4_0. Each runs in a process of its own
and they take turns, a round being one measurement of every row; each round starts with another row. A ratio compares
measurements of the same round; printed are the median over the rounds and, in brackets, the lowest and the highest.
Before anything is timed, the logits of both sides must agree; a round in which other processes used more than 5 % of
the processors is measured again. llama.cpp reads its weights into its own memory
(no mmap) and repacks them as it likes.

  python benchmarks/llama_cpp.py --shape llama-3.2-1b
  python benchmarks/llama_cpp.py --shape llama-3-8b --formats int4/Q4_0 --tokens 12 --json result.json

The weights are random and the thresholds are quantiles of the model's own activations: speed is real, text is not.
GGUF files are kept in --directory and used again.
"""

import argparse
import importlib.metadata
import itertools
import platform
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from side_by_side.gguf_file import GgufPlan, ensure_gguf, plan_gguf
from side_by_side.rounds import Agreement, Quiet, Spread, Worker, rotated, speedup, tokens_per_second, wait_policy
from side_by_side.weights import SharedWeights

from teal.artifacts import check_writable, write_json
from teal.engine.cache import whole_extents
from teal.errors import TealError, UsageError
from teal.report import Table, markdown_table
from teal.shapes import shape_config

CMAKE_ARGS = (
    "-DCMAKE_BUILD_TYPE=Release -DGGML_OPENMP=ON -DGGML_NATIVE=OFF -DGGML_AVX=ON -DGGML_AVX2=ON -DGGML_FMA=ON "
    "-DGGML_F16C=ON -DGGML_BMI2=ON -DGGML_AVX512=ON -DGGML_AVX512_VBMI=ON -DGGML_AVX512_VNNI=ON -DGGML_AVX512_BF16=ON"
)
BUILD = f"""CMAKE_ARGS="{CMAKE_ARGS}" \\
  pip install --no-cache-dir --no-binary llama-cpp-python -c constraints.txt ".[llama-cpp]\""""
INSTALLATION = f"""installation, from source and for this processor:
  {BUILD}

Some virtual machines report AMX and trap on it: llama.cpp, built for the machine it finds (GGML_NATIVE), then dies of
an illegal instruction, in Q8_0 first. The command above names the AVX-512 options instead and leaves AMX out. Leave out
the AVX512 options that /proc/cpuinfo does not list; a build that is installed already goes with --force-reinstall.
"""
SEED = 0
PAUSE = 0.05  # seconds in which the other side's idle threads stop spinning
COMPARED_TOKENS = 8
CALIBRATION_TOKENS = 24
MOST_OTHERS = 0.05  # of the processors that other processes may use in a round that counts


@dataclass(frozen=True)
class FormatClass:
    """How both sides store the blocks' weights, and the least correlation of logits that shows the same model."""

    teal: str
    gguf: str
    least_correlation: float


FORMATS = {
    "bf16/F16": FormatClass("bf16", "F16", 0.999),
    "bf16/BF16": FormatClass("bf16", "BF16", 0.999),
    "int8/Q8_0": FormatClass("int8", "Q8_0", 0.99),
    "int4/Q4_0": FormatClass("int4", "Q4_0", 0.9),
}
DEFAULT_FORMATS = ["bf16/F16", "int8/Q8_0", "int4/Q4_0"]


@dataclass(frozen=True)
class Variant:
    """One row: a side at a level, with a dense or a sparse LM head."""

    side: str
    level: float = 0.0
    sparse_head: bool = False

    @property
    def label(self) -> str:
        if self.side != "teal":
            return self.side
        level = f"{self.level:.0%}" if self.level else "dense"
        return f"teal {level}{', sparse head' if self.sparse_head else ''}"


@dataclass(frozen=True)
class Round:
    """Seconds of every variant, the bandwidth of a plain read, and the most that others used of the processors."""

    seconds: dict[Variant, float]
    bandwidth: float
    others: float | None


@dataclass(frozen=True)
class Row:
    """What was measured of one variant. `bytes` are read per token, KV cache included."""

    variant: Variant
    sparsity: float
    bytes: int
    tokens_per_second: Spread
    speedup: Spread


@dataclass(frozen=True)
class Comparison:
    """One format class, llama.cpp first. `others` is the most that other processes used of the processors in a
    round that counts, `discarded` how many rounds do not count because of it."""

    format: str
    head: dict[str, str]
    agreement: Agreement
    bandwidth: float
    others: float | None
    discarded: int
    rows: list[Row]
    details: dict[str, Any]


def main() -> int:
    try:
        arguments = parse()
        check_installed()
        if arguments.json:
            check_writable(arguments.json)
        comparisons = compare_all(arguments)
    except TealError as error:
        print(f"llama_cpp.py: {error}", file=sys.stderr)
        return error.exit_code
    if arguments.json:
        write_json(arguments.json, to_json(arguments, comparisons))
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=INSTALLATION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default="llama-3.2-1b", help="a shape that `teal bench --shape` knows")
    parser.add_argument(
        "--formats", nargs="+", default=DEFAULT_FORMATS, choices=FORMATS, metavar="TEAL/GGUF",
        help=f"of {', '.join(FORMATS)} (default: {' '.join(DEFAULT_FORMATS)})",
    )  # fmt: skip
    parser.add_argument("--levels", nargs="+", type=float, default=[0.4, 0.5], help="(default: 0.4 0.5)")
    parser.add_argument("--heads", nargs="+", default=["dense", "sparse"], choices=["dense", "sparse"])
    parser.add_argument("--threads", type=int, default=2, help="of each side (default: 2)")
    parser.add_argument("--context", type=int, default=64, help="prompt tokens (default: 64)")
    parser.add_argument("--tokens", type=int, default=16, help="tokens timed in a measurement (default: 16)")
    parser.add_argument("--rounds", type=int, default=7, help="measurements of each row (default: 7)")
    parser.add_argument("--directory", type=Path, default=Path("teal-gguf"), help="for GGUF files (default: teal-gguf)")
    parser.add_argument("--write-only", action="store_true", help="write the GGUF files and stop")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the result as JSON")
    arguments = parser.parse_args()
    for name in ("threads", "context", "tokens", "rounds"):
        if getattr(arguments, name) < 1:
            raise UsageError(f"--{name} must be at least 1, got {getattr(arguments, name)}")
    if wrong := [level for level in arguments.levels if not 0 < level < 1]:
        raise UsageError(f"levels lie between 0 and 1, got {wrong[0]:g}; dense is always measured")
    return arguments


def check_installed() -> None:
    missing = [name for name in ("llama_cpp", "gguf") if not _installed(name)]
    if missing:
        raise TealError(f"{' and '.join(missing)} not installed; see `python {sys.argv[0]} --help` for the command")


def _installed(package: str) -> bool:
    """Asks the installed distributions: this file has the name of one of the packages."""
    return package in importlib.metadata.packages_distributions()


def compare_all(arguments: argparse.Namespace) -> list[Comparison]:
    """Measure format after format, printing each when it is done."""
    config = shape_config(arguments.shape)
    weights = SharedWeights(config, SEED)
    files = {}
    for name in dict.fromkeys(arguments.formats):
        gguf = FORMATS[name].gguf
        plan = plan_gguf(config, weights, gguf, gguf, SEED)
        path = arguments.directory / f"{arguments.shape}-{gguf}.gguf"
        written = ensure_gguf(path, plan, weights, show_progress=True)
        say(f"{path}: {plan.bytes / 1e9:.2f} GB, {'written' if written else 'reused'}")
        files[name] = (path, plan)
    del weights
    comparisons = []
    for name, (path, plan) in files.items() if not arguments.write_only else ():
        comparisons.append(compare(arguments, name, path, plan))
        print(f"\n## {arguments.shape}, {name}\n\n{markdown_table(*table(comparisons[-1]))}\n")
        print("\n".join(f"- {line}" for line in notes(arguments, comparisons[-1])), flush=True)
    return comparisons


def compare(arguments: argparse.Namespace, name: str, path: Path, plan: GgufPlan) -> Comparison:
    """Load both sides, check that they agree, and measure every row once a round."""
    format_ = FORMATS[name]
    numbers = np.random.default_rng(SEED)
    steps = arguments.tokens + 1
    prompt, tokens, calibration, compared = (
        numbers.integers(plan.config.vocab_size, size=size).tolist()
        for size in (arguments.context, steps, CALIBRATION_TOKENS, COMPARED_TOKENS)
    )
    context = whole_extents(len(prompt) + max(steps, CALIBRATION_TOKENS))
    task = {"threads": arguments.threads, "prompt": prompt, "context": context}
    teal_task = {
        "side": "teal", "shape": arguments.shape, "seed": SEED, "weights": format_.teal, "head": format_.teal,
        "calibration": calibration, "levels": arguments.levels,
    }  # fmt: skip
    variants = [Variant("llama.cpp"), Variant("teal")]
    variants += [Variant("teal", level, head == "sparse") for head in arguments.heads for level in arguments.levels]
    with ExitStack() as stack:
        workers = {}
        for side_task in ({"side": "llama.cpp", "gguf": str(path)}, teal_task):
            worker = Worker({**task, **side_task}, f"Rebuild it without AMX: {BUILD}")
            workers[worker.side] = stack.enter_context(worker)
        agreement = compare_logits(workers, compared)
        if agreement.correlation < format_.least_correlation:
            raise TealError(
                f"{name}: the logits of both sides correlate by only {agreement.correlation:.4f} "
                f"(at least {format_.least_correlation}); they do not compute the same model, so no speed is given"
            )
        counts = {
            variant: workers[variant.side].ask("count", tokens=tokens, **choice(variant)) for variant in variants[1:]
        }
        rounds, discarded = measure(workers, variants, tokens, arguments.rounds)
        details = {side: worker.details for side, worker in workers.items()}
    position = arguments.context + steps // 2
    llama_bytes = plan.bytes_per_token + 4 * plan.config.blocks * plan.config.kv_heads * plan.config.head_dim * position
    rows = [
        Row(
            variant,
            counts[variant]["sparsity"] if variant in counts else 0.0,
            counts[variant]["bytes"] if variant in counts else llama_bytes,
            tokens_per_second([round_.seconds[variant] for round_ in rounds], arguments.tokens),
            speedup(*([round_.seconds[one] for round_ in rounds] for one in (variant, variants[0]))),
        )
        for variant in variants
    ]
    head = {"llama.cpp": plan.head_format, "teal": details["teal"]["head"]}
    bandwidth = Spread.of([round_.bandwidth for round_ in rounds]).median
    others = None if rounds[0].others is None else max(round_.others or 0 for round_ in rounds)
    return Comparison(name, head, agreement, bandwidth, others, discarded, rows, details)


def choice(variant: Variant) -> dict[str, Any]:
    return {"level": variant.level, "sparse_head": variant.sparse_head}


def compare_logits(workers: dict[str, Worker], tokens: list[int]) -> Agreement:
    """Both sides' dense logits after each of `tokens`."""
    with tempfile.TemporaryDirectory() as folder:
        logits = {}
        for side, worker in workers.items():
            path = Path(folder) / f"{side}.npy"
            worker.ask("logits", tokens=tokens, path=str(path))
            logits[side] = np.load(path)
    return Agreement.of(logits["llama.cpp"], logits["teal"])


def measure(
    workers: dict[str, Worker], variants: list[Variant], tokens: list[int], rounds: int
) -> tuple[list[Round], int]:
    """`rounds` quiet rounds, each with one measurement of every variant, and how many others were discarded.

    When twice as many rounds were disturbed as were asked for, the quietest serve.
    """
    measured: list[Round] = []
    for index in itertools.count():
        quiet = [round_ for round_ in measured if (round_.others or 0) <= MOST_OTHERS]
        if len(quiet) == rounds or len(measured) == 3 * rounds:
            break
        say(f"round {len(quiet) + 1} of {rounds}, {len(measured) - len(quiet)} disturbed")
        measured.append(measure_round(workers, rotated(variants, index), tokens))
    chosen = sorted(measured, key=lambda round_: round_.others or 0)[:rounds] if len(quiet) < rounds else quiet
    return chosen, len(measured) - len(chosen)


def measure_round(workers: dict[str, Worker], variants: list[Variant], tokens: list[int]) -> Round:
    bandwidth = workers["teal"].ask("bandwidth")["bandwidth"]
    seconds, others = {}, []
    for variant in variants:
        time.sleep(PAUSE)
        quiet = Quiet()
        reply = workers[variant.side].ask("decode", tokens=tokens, **choice(variant))
        others.append(quiet.others(reply["processor_seconds"]))
        seconds[variant] = reply["seconds"]
    return Round(seconds, bandwidth, None if None in others else max(others))


def table(comparison: Comparison) -> Table:
    rows = [
        [
            row.variant.label,
            f"{row.sparsity:.4f}",
            row.tokens_per_second.text(),
            f"{row.bytes / 1e6:.0f}",
            f"{row.bytes * row.tokens_per_second.median / 1e9:.1f}",
            f"{100 * row.bytes * row.tokens_per_second.median / comparison.bandwidth:.0f}",
            row.speedup.text(),
        ]
        for row in comparison.rows
    ]
    columns = ["", "realised", "tokens/s (spread)", "MB/token", "GB/s", "% of bandwidth", "x llama.cpp (spread)"]
    return columns, rows


def notes(arguments: argparse.Namespace, comparison: Comparison) -> list[str]:
    """What the figures were measured on, and that both sides compute the same model."""
    llama, teal = (comparison.details[side] for side in ("llama.cpp", "teal"))
    agreement = comparison.agreement
    return [
        f"{processor()}; {arguments.threads} threads on each side, OMP_WAIT_POLICY {wait_policy()}; a process each, "
        f"in turns; {arguments.rounds} rounds of {arguments.tokens} tokens after a prompt of {arguments.context}",
        f"LM head and embedding: llama.cpp {comparison.head['llama.cpp']}, teal {comparison.head['teal']}; "
        f"KV cache: {llama['cache']}, {teal['cache']}; context: {llama['context']}, {teal['context']}",
        f"plain read in the same run: {comparison.bandwidth / 1e9:.1f} GB/s; realised sparsity is that of the blocks",
        disturbance(comparison),
        f"same model: logits of {COMPARED_TOKENS} tokens correlate by at least {agreement.correlation:.5f}, the same "
        f"first choice in {agreement.top1:.0%}; teal's products differ from its reference by at most "
        f"{teal['largest_relative_error']:.1e} of the largest output",
        f"llama-cpp-python {llama['version']} ({llama['build']}), no mmap; torch {teal['version']}, layout "
        f"{teal['layout']}",
    ]


def disturbance(comparison: Comparison) -> str:
    if comparison.others is None:
        return "whether other processes disturbed the rounds is not known on this system"
    verdict = "quiet" if comparison.others <= MOST_OTHERS else "DISTURBED, do not quote"
    return (
        f"{verdict}: other processes used at most {comparison.others:.0%} of the processors in the rounds that count; "
        f"{comparison.discarded} rounds were discarded"
    )


def processor() -> str:
    """The processor's name as Linux gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def to_json(arguments: argparse.Namespace, comparisons: list[Comparison]) -> dict[str, Any]:
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(arguments).items()}
    machine = {"processor": processor(), "wait_policy": wait_policy()}
    return {
        "format": "teal.llama_cpp", "version": 1, "settings": settings, "machine": machine,
        "comparisons": [asdict(comparison) for comparison in comparisons],
    }  # fmt: skip


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
