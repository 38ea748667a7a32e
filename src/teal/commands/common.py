"""Options and habits that several verbs share."""

import argparse
import json
import os
import sys
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from teal.errors import TealError, UsageError, reason_of

if TYPE_CHECKING:
    import torch

    from teal.blockwalk import BlockSource
    from teal.data import TokenBlocks
    from teal.plan import SparsityPlan
    from teal.tasks import Task

STATISTICS, PLAN, TUNED = "statistics.safetensors", "plan.json", "tuned"  # in a model's work directory
DTYPES = ("auto", "float32", "bfloat16", "float16")
DEFAULT_LEVELS = (0.25, 0.4, 0.5, 0.65)
# Arguments that name what is read.
INPUTS = ("model", "path", "directory", "plan", "statistics", "merge", "text", "task")
READ_BESIDE_WEIGHTS = ("*config.json", "*.index.json", "tok*.json", "vocab.json", "plan.json", "teal.json")


def add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help="local directory or hub name; nothing means the embedded model",
    )


def add_output(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument("--output", type=Path, metavar="FILE", help=f"where to write (default: teal-MODEL/{default})")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--json", type=json_target, metavar="PATH", help="write the result as JSON to PATH, - for standard output"
    )


def add_text(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument(
        "--text", nargs="+", metavar="SOURCE",
        help=f"text files, .jsonl, directories, - (standard input) or hf:DATASET (default: {default})",
    )  # fmt: skip
    parser.add_argument("--field", default="text", help="the field that holds the text in .jsonl and datasets")
    parser.add_argument("--wikitext", action="store_true", help="undo WikiText's tokenization")


def add_tasks(parser: argparse.ArgumentParser, required: bool = False) -> None:
    parser.add_argument(
        "--task", type=Path, nargs="+", required=required, metavar="FILE", help="one .jsonl file per task"
    )
    parser.add_argument("--limit", type=positive, metavar="N", help="the first N items of each task (default: all)")
    parser.add_argument(
        "--shots", type=natural, default=0, metavar="N",
        help="show the first N items, solved, before each of the others (default: 0)",
    )  # fmt: skip
    parser.add_argument(
        "--max-new-tokens", type=positive, default=256, metavar="N", help="of an exact answer, at most (default: 256)"
    )


def add_dtype(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="load the weights as (default: as stored)")


def add_weights(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--weights", choices=("int8", "int4"),
        help="round the projections' weights to nearest while loading, on a CPU (default: as they are)",
    )  # fmt: skip


def add_head(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--head-weights", choices=("int8", "int4"), help="the same for the LM head (default: int8 with --weights)"
    )
    parser.add_argument(
        "--head-sparsity", type=level, default=0.0, metavar="S",
        help="drop this share of the LM head's smallest inputs at each token (default: 0)",
    )  # fmt: skip


def quantization_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """The keywords of `load_engine` for --weights and --head-weights. Refuses them off the CPU."""
    if (arguments.weights or arguments.head_weights) and not is_cpu(arguments.device):
        raise UsageError("--weights and --head-weights are for --device cpu")
    head = arguments.head_weights or ("int8" if arguments.weights else None)
    return {"quantization": arguments.weights, "head_quantization": head}


def is_cpu(device: str) -> bool:
    """Whether a --device is the CPU, whatever its number."""
    return device.partition(":")[0] == "cpu"


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ... (default: cpu)")


def add_plan(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--plan", type=Path, metavar="FILE",
        help="sparsity plan, or a directory of teal tune or teal.save, whose level counts too "
        "(default: teal-MODEL/tuned, without it teal-MODEL/plan.json)",
    )  # fmt: skip
    add_strict(parser)


def add_strict(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--strict", action="store_true", help="refuse a plan made for other weights")


def add_plans(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--plan", type=Path, nargs="+", metavar="FILE", help="one or more plans (default: teal-MODEL/plan.json)"
    )
    add_strict(parser)


def add_levels(parser: argparse.ArgumentParser, default: tuple[float, ...], tuned: bool = False) -> None:
    """--levels; with `tuned` it is None unless given, for a level that was tuned goes before the default."""
    parser.add_argument(
        "--levels", type=level, nargs="+", metavar="S", default=None if tuned else list(default),
        help="sparsities from 0 to below 1 "
        f"(default: {'as tuned, else ' if tuned else ''}{' '.join(map(str, default))})",
    )  # fmt: skip


def json_target(text: str) -> str:
    """Where JSON goes; what cannot be written is refused before the work, not after."""
    from teal.artifacts import check_writable

    if text != "-":
        check_writable(Path(text))
    return text


def check_json(arguments: argparse.Namespace) -> None:
    """Raise UsageError if --json would overwrite what the command reads."""
    if getattr(arguments, "json", None) in (None, "-"):
        return
    target = Path(arguments.json)
    for name in _inputs(arguments):
        if is_same(target, name) or _is_read_in(target, name):
            raise UsageError(f"--json {target} would overwrite what this command reads; name another file")


def _inputs(arguments: argparse.Namespace, but: Collection[str] = ()) -> Iterator[Path]:
    for option in set(INPUTS) - set(but):
        given = getattr(arguments, option, None)
        for name in map(Path, given if isinstance(given, list) else [] if given is None else [given]):
            yield name
            yield name.parent / f"{name.stem}.vectors.safetensors"  # beside the plans of some methods
    for option, default in (("plan", PLAN), ("statistics", STATISTICS)):
        if getattr(arguments, option, True) is None:
            yield work_directory(arguments.model) / default
            yield from (work_directory(arguments.model) / TUNED / name for name in (PLAN, "teal.json"))


def is_same(target: Path, other: Path) -> bool:
    return target.resolve() == other.resolve() or (target.exists() and other.exists() and target.samefile(other))


def _is_read_in(target: Path, directory: Path) -> bool:
    """Whether `target` is a file that a verb may read in the directory of a model or of texts."""
    if not directory.is_dir() or not target.exists() or directory.resolve() not in target.resolve().parents:
        return False
    return target.suffix != ".json" or any(target.match(pattern) for pattern in READ_BESIDE_WEIGHTS)


def level(text: str) -> float:
    """A sparsity on the command line."""
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number") from None
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"sparsity must be at least 0 and below 1, got {text}; 0.5 means half")
    return value


def level_name(level: float) -> str:
    """How a level is called beside generated text."""
    return f"sparsity {level:g}" if level else "dense"


def positive(text: str) -> int:
    """A whole number from 1 on the command line."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1, got {text!r}")
    return int(text)


def natural(text: str) -> int:
    """A whole number from 0 on the command line."""
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"expected a whole number from 0, got {text!r}")
    return int(text)


def seed(text: str) -> int:
    """A seed on the command line."""
    value = natural(text)
    if value >= 2**63:
        raise argparse.ArgumentTypeError(f"a seed must be below 2**63, got {text}")
    return value


def model_name(model: str | None) -> str:
    """The last part of a model's directory or hub name."""
    return os.path.basename(os.path.abspath(model)) if model else "embedded"


def work_directory(model: str | None) -> Path:
    """Where a model's artifacts go unless told otherwise: ./teal-NAME."""
    return Path(f"teal-{model_name(model)}")


def output_path(arguments: argparse.Namespace, default: str, in_place: Collection[str] = ()) -> Path:
    """Where the result goes; fails early if it exists, cannot be written, or is read by the command, unless by one of
    the options `in_place`.
    """
    path = arguments.output or work_directory(arguments.model) / default
    claim(arguments, path)
    for name in _inputs(arguments, in_place):
        if is_same(path, name) or (path.name not in (STATISTICS, PLAN) and _is_read_in(path, name)):
            raise UsageError(f"the output {path} would overwrite what this command reads; name another --output")
    return path


def claim(arguments: argparse.Namespace, path: Path) -> None:
    """Refuse a file of the result that cannot be written, that --json would overwrite, or that exists."""
    from teal.artifacts import check_writable

    check_writable(path)
    if arguments.json not in (None, "-") and is_same(Path(arguments.json), path):
        raise UsageError(f"--json would overwrite the output {path}; name another file")
    if path.exists() and not arguments.overwrite:
        raise TealError(f"{path} exists; name another --output or pass --overwrite")


def spool_directory(output: Path) -> Path:
    """Where unfinished work for `output` is kept."""
    return output.with_name(f"{output.name}.partial")


def dtype_of(arguments: argparse.Namespace) -> "torch.dtype | None":
    import torch

    return None if arguments.dtype == "auto" else getattr(torch, arguments.dtype)


def check_device(device: str) -> str:
    """Refuse a device that is not there before anything is loaded."""
    import torch

    try:
        kind = torch.device(device)
    except RuntimeError:
        raise UsageError(f"unknown device {device!r}; use cpu or cuda") from None
    if kind.type == "meta":
        raise UsageError("nothing can be computed on the device meta; use cpu or cuda")
    if kind.type == "cuda" and not torch.cuda.is_available():
        raise TealError("no CUDA device is available here; use --device cpu (teal doctor says more)")
    try:
        torch.empty(0, device=kind)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = reason_of(error).partition(". ")[0]  # some go on with every device that torch knows
        raise TealError(f"there is no device {device} here ({reason}); use --device cpu") from None
    return device


def command_for(verb: str, model: str | None) -> str:
    """What to type to run a verb on a model."""
    return f"`teal {verb} {model}`" if model else f"`teal {verb}`"


def chosen_plan(arguments: argparse.Namespace) -> "tuple[SparsityPlan, float | None]":
    """The plan to decode with, and the level that was chosen with it, if any.

    What was named: a plan, or a directory of `teal tune` or `teal.save`; else what was tuned for the model, else its
    plan.
    """
    from teal.sparse_model import SETTINGS_FILE, load_settings

    tuned = work_directory(arguments.model) / TUNED
    directory = arguments.plan if arguments.plan is not None and arguments.plan.is_dir() else None
    if arguments.plan is None and (tuned / SETTINGS_FILE).is_file():
        directory = tuned
    if directory is None:
        return load_plan(arguments), None
    if not (directory / SETTINGS_FILE).exists():
        raise TealError(
            f"{directory} is a directory without {SETTINGS_FILE}, which teal tune and teal.save write; "
            f"name one that has it, or a plan, such as {directory / PLAN}"
        )
    plan, level = load_settings(directory)
    print(f"{directory}: level {level:g}" if level else f"{directory}: dense", file=sys.stderr)
    return plan, level


def load_plan(arguments: argparse.Namespace) -> "SparsityPlan":
    """The plan that was named, or the model's own in its work directory."""
    from teal.plan import SparsityPlan

    path = arguments.plan or work_directory(arguments.model) / PLAN
    if arguments.plan is None and not path.exists():
        calibrate, allocate = (command_for(verb, arguments.model) for verb in ("calibrate", "allocate"))
        raise TealError(f"no plan at {path}; run {calibrate} and {allocate} first, or name one with --plan")
    return SparsityPlan.load(path)


def load_plans(arguments: argparse.Namespace) -> "dict[str, SparsityPlan]":
    """The plans that were named, by the names of their files, or the model's own by its method."""
    from teal.plan import SparsityPlan

    if not arguments.plan:
        plan = load_plan(arguments)
        return {plan.method: plan}
    return {name: SparsityPlan.load(path) for name, path in zip(distinct(arguments.plan), arguments.plan, strict=True)}


def distinct(paths: Sequence[Path]) -> list[str]:
    """What to call the files in a table: by their stems if these differ, else by their paths."""
    stems = [path.stem for path in paths]
    return stems if len(set(stems)) == len(stems) else [str(path) for path in paths]


def read_blocks(
    arguments: argparse.Namespace,
    directory: Path,
    default_text: Path,
    length: int | None,
    tokens: int | None,
    seed: int | None,
) -> "TokenBlocks":
    """Blocks of the text that was named: `tokens` tokens altogether, rounded up to whole blocks (None: all).

    `length` is that of a block, by default the model's context, at most 2048 and at most `tokens`.
    """
    from teal.checkpoint import context_length, load_config, load_tokenizer
    from teal.data import token_blocks

    context = context_length(load_config(directory))
    length = min(2048, context, tokens or context) if length is None else length
    if length > context:
        raise UsageError(
            f"blocks of {length} tokens do not fit the model's context of {context}; pass a smaller --length"
        )
    count = None if tokens is None else -(-tokens // length)
    sources = arguments.text or [default_text]
    tokenizer = load_tokenizer(directory)
    return token_blocks(
        sources,
        tokenizer,
        length=length,
        count=count,
        seed=seed,
        field=arguments.field,
        wikitext=arguments.wikitext,
    )


def read_tasks(arguments: argparse.Namespace) -> "list[Task]":
    """The tasks that were named."""
    from teal.tasks import read_task

    return [
        read_task(path, name=name, shots=arguments.shots, limit=arguments.limit)
        for path, name in zip(arguments.task, distinct(arguments.task), strict=True)
    ]


def dense_tokens(arguments: argparse.Namespace) -> int:
    """--dense-tokens, or the number that calibration leaves out by default."""
    from teal.calibration import DENSE_TOKENS

    return DENSE_TOKENS if arguments.dense_tokens is None else arguments.dense_tokens


def load_model(directory: Path, dtype: "torch.dtype | None" = None, device: str = "cpu") -> Any:
    """The transformers model of a directory, without the library's own progress bar."""
    from teal.checkpoint import load_model

    hide_loading()
    return load_model(directory, dtype, device)


def hide_loading() -> None:
    """No progress bar of transformers' own."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()


def open_blocks(arguments: argparse.Namespace, directory: Path) -> "BlockSource":
    """The blocks of a model directory in --dtype: read one at a time, or all at once onto a --device."""
    from teal.blockwalk import open_blocks

    hide_loading()
    return open_blocks(directory, dtype_of(arguments), check_device(arguments.device))


def write_result(arguments: argparse.Namespace, payload: dict[str, Any]) -> None:
    """Write the machine-readable result where --json asks for it."""
    from teal.artifacts import write_json

    if arguments.json == "-":
        json.dump(payload, sys.stdout, indent=1)
        print()
    elif arguments.json:
        write_json(Path(arguments.json), payload)


def human_stream(arguments: argparse.Namespace) -> TextIO:
    """Where text for people goes: standard output, or standard error if --json - uses that."""
    return sys.stderr if getattr(arguments, "json", None) == "-" else sys.stdout


def say(arguments: argparse.Namespace, *lines: str) -> None:
    """Print for people."""
    for line in lines:
        print(line, file=human_stream(arguments))


def print_table(arguments: argparse.Namespace, columns: list[str], rows: list[list[str]]) -> None:
    """A table for people: the first column to the left, the others, numbers, to the right."""
    widths = [max(map(len, cells)) for cells in zip(columns, *rows, strict=True)]
    for row in (columns, *rows):
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        say(arguments, "  ".join([row[0].ljust(widths[0]), *cells[1:]]).rstrip())
