"""Find the level that reads the fewest bytes within a loss that you set, by measurement on held-out text or tasks.

examples:
  teal tune --max-loss 2%                                perplexity of the embedded model may rise by 2 %
  teal tune ./Llama-3.2-1B --max-loss 2% --text held-out.jsonl
  teal tune ./Llama-3.2-1B --max-loss 0.02nats --metric kl --plan uniform.json blockwise.json --bench
  teal tune ./Llama-3.2-1B --max-loss 1% --metric accuracy --task arc_easy.jsonl piqa.jsonl

One half of the text serves to search, the other to confirm: what is claimed is an upper bound (95 %) measured there.
Of tasks it is every other item; 1% is one percentage point of accuracy, over all items together, and takes thousands.
What served here is spent; a test of the result needs other text, or other items. Without a plan, `teal calibrate` and
`teal allocate` are run first. `teal generate`, `chat` and `bench` use the result from then on.
"""

import argparse
import contextlib
import gc
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from teal.commands import allocate, calibrate, common
from teal.errors import TealError, UnsupportedModelError, UsageError

if TYPE_CHECKING:
    from teal.benchmark import Benchmark
    from teal.data import TokenBlocks
    from teal.plan import SparsityPlan
    from teal.tuning import Tuning

INTERRUPTED = "interrupted; statistics and plan are kept, repeat the command to search anew"
TUNING = "tuning.json"
TOKENS = 32768
LENGTH = 512  # many short sequences tell more of the spread than a few long ones


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.add_model(parser)
    parser.add_argument(
        "--max-loss", required=True, metavar="LOSS",
        help="the loss allowed over dense: 2%% of perplexity, 0.02nats per token, or 1%% (one point) of accuracy",
    )  # fmt: skip
    parser.add_argument(
        "--metric", default="perplexity", metavar="NAME",
        help="perplexity; kl: the divergence from dense, in nats; accuracy: of --task (default: perplexity)",
    )  # fmt: skip
    parser.add_argument(
        "--plan", type=Path, nargs="+", metavar="FILE",
        help="plans to choose from (default: teal-MODEL/plan.json, made if missing)",
    )  # fmt: skip
    common.add_strict(parser)
    common.add_text(parser, "the embedded evaluation text")
    parser.add_argument(
        "--tokens", type=common.positive,
        help=f"tokens of it, in whole sequences; more resolve smaller losses (default: {TOKENS})",
    )  # fmt: skip
    parser.add_argument(
        "--length", type=common.positive, help=f"tokens in a sequence (default: {LENGTH}, at most the context)"
    )
    common.add_tasks(parser)
    parser.add_argument("--dense-tokens", type=common.natural, help="dense positions of each sequence (default: 8)")
    parser.add_argument(
        "--batch", type=common.positive,
        help="sequences at a time; a GPU wants many (default: 1, of tasks 16 texts)",
    )  # fmt: skip
    parser.add_argument("--bench", action="store_true", help="also measure what the result buys in decode speed")
    parser.add_argument("--output", type=Path, metavar="DIR", help="where to write (default: teal-MODEL/tuned)")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier result")
    common.add_dtype(parser)
    common.add_weights(parser)
    common.add_device(parser)
    common.add_json(parser)


def run(arguments: argparse.Namespace) -> None:
    from dataclasses import replace

    from teal.artifacts import write_json
    from teal.checkpoint import load_tokenizer, resolve_model
    from teal.scoring import encode
    from teal.sparse_model import save_settings
    from teal.tuning import LossBudget, tune

    budget = LossBudget.parse(arguments.max_loss, arguments.metric)
    _check_sources(arguments)
    output = _output(arguments)
    common.check_device(arguments.device)
    if arguments.weights and not common.is_cpu(arguments.device):
        raise UsageError("--weights is for --device cpu")
    tasks = common.read_tasks(arguments) if arguments.task else []
    directory = resolve_model(arguments.model)
    tokenizer = load_tokenizer(directory)
    plans = _plans(arguments)
    if tasks:
        held_out, prompt = tasks, encode(tokenizer, tasks[0].items[0].pairs[0][0])
    else:
        held_out = _held_out_text(arguments, directory, plans)
        prompt = held_out.ids[0].tolist()
    model = common.load_model(directory, common.dtype_of(arguments), arguments.device)
    result = tune(
        model,
        held_out,
        plans,
        budget,
        tokenizer=tokenizer,
        dense_tokens=common.dense_tokens(arguments),
        max_new_tokens=arguments.max_new_tokens,
        batch=arguments.batch,
        quantization=arguments.weights,
        strict=arguments.strict,
        show_progress=True,
    )
    save_settings(plans[result.plan], result.level, output)
    if arguments.bench and result.level:
        del model  # two models at a time may not fit into memory
        gc.collect()
        result = replace(result, speed=_speed(arguments, directory, prompt, plans[result.plan], result.level))
    write_json(output / TUNING, result.to_json())
    show(arguments, result)
    used = f"--plan {output} uses it in" if arguments.output else "used from now on by"
    common.say(arguments, f"-> {output}, {used} teal generate, chat and bench")
    common.write_result(arguments, result.to_json())


def show(arguments: argparse.Namespace, result: "Tuning") -> None:
    """Print what was tried and what is claimed."""
    from teal.report import tuning_summary, tuning_table

    if result.trials:
        common.print_table(arguments, *tuning_table(result))
        common.say(arguments, "")
    common.say(arguments, *tuning_summary(result))


def _check_sources(arguments: argparse.Namespace) -> None:
    """Text or tasks, as the metric asks for, and no option of the other."""
    if arguments.metric == "accuracy" and not arguments.task:
        raise UsageError("--metric accuracy is measured on tasks; name their files with --task")
    if arguments.task and arguments.metric != "accuracy":
        raise UsageError(f"--task goes with --metric accuracy; {arguments.metric} is measured on --text")
    if arguments.task and (of_text := _given(arguments, "text", "tokens", "length", "wikitext")):
        raise UsageError(f"{of_text} is for text; leave it out with --task")
    if not arguments.task and (of_tasks := _given(arguments, "limit", "shots")):
        raise UsageError(f"{of_tasks} is for --task, which goes with --metric accuracy")


def _given(arguments: argparse.Namespace, *options: str) -> str | None:
    """The first of the options that was given."""
    return next((f"--{option}" for option in options if getattr(arguments, option)), None)


def _held_out_text(
    arguments: argparse.Namespace, directory: Path, plans: "Mapping[str, SparsityPlan]"
) -> "TokenBlocks":
    """The text that was named, which no plan may have been made on."""
    from teal.checkpoint import context_length, load_config
    from teal.data import EVALUATION_TEXT

    length = arguments.length or min(LENGTH, context_length(load_config(directory)))
    blocks = common.read_blocks(arguments, directory, EVALUATION_TEXT, length, arguments.tokens or TOKENS, None)
    for plan in plans.values():
        _check_text(arguments, directory, EVALUATION_TEXT, plan)
    return blocks


def _output(arguments: argparse.Namespace) -> Path:
    """The directory of the result; fails early if it holds one or cannot be written."""
    from teal.sparse_model import PLAN_FILE, SETTINGS_FILE

    output = arguments.output or common.work_directory(arguments.model) / common.TUNED
    for path in (output / PLAN_FILE, output / SETTINGS_FILE, output / TUNING):
        if any(common.is_same(own, Path(plan)) for plan in arguments.plan or () for own in (path, output)):
            raise UsageError(f"the output {output} holds a plan that this command reads; name another --output")
        common.claim(arguments, path)
    return output


def _plans(arguments: argparse.Namespace) -> dict[str, "SparsityPlan"]:
    """The plans that were named, or the model's own, made now if there is none."""
    work = common.work_directory(arguments.model)
    if not arguments.plan and not (work / common.PLAN).exists():
        for verb, made in ((calibrate, common.STATISTICS), (allocate, common.PLAN)):
            if not (work / made).exists():
                _run_verb(arguments, verb)
    return common.load_plans(arguments)


def _run_verb(arguments: argparse.Namespace, verb: Any) -> None:
    """What the user would run by hand, with its defaults; what it says goes where our own text goes."""
    parser = argparse.ArgumentParser()
    verb.add_arguments(parser)
    options = ["--dtype", arguments.dtype, "--device", arguments.device]
    given = parser.parse_args([*([arguments.model] if arguments.model else []), *options])
    with contextlib.redirect_stdout(common.human_stream(arguments)):
        verb.run(given)


def _check_text(arguments: argparse.Namespace, directory: Path, default_text: Path, plan: "SparsityPlan") -> None:
    """Refuse text that the plan was made on; warn where only names are the same."""
    from teal.data import DATASET
    from teal.tuning import calibration_texts

    sources = list(map(str, arguments.text or [default_text]))
    can_be_read_again = not any(source == "-" or source.startswith(DATASET) for source in sources)
    for text in calibration_texts(plan):
        if can_be_read_again and _is_text(text, arguments, directory, default_text):
            raise TealError("the plan was made on this very text; name held-out text with --text")
        if shared := {Path(source).name for source in sources} & set(text.get("text", ())):
            warnings.warn(f"the plan was made on a text called {min(shared)}, too; tune on held-out text", stacklevel=2)


def _is_text(text: dict[str, Any], arguments: argparse.Namespace, directory: Path, default_text: Path) -> bool:
    """Whether the text that was named, cut as `text` (see `TokenBlocks.describe`) was cut, is that text."""
    from teal.data import hash_tokens

    if not {"block_length", "blocks", "seed"} <= set(text):
        return False
    try:
        tokens = text["block_length"] * text["blocks"]
        blocks = common.read_blocks(arguments, directory, default_text, text["block_length"], tokens, text["seed"])
    except TealError:  # it has less text than that
        return False
    return hash_tokens(blocks.ids) == text["tokens_sha256"]


def _speed(
    arguments: argparse.Namespace, directory: Path, prompt: "list[int]", plan: "SparsityPlan", level: float
) -> "Benchmark | None":
    """Decode speed, dense and at the level; None, with a warning, for a model that the engine does not know."""
    from teal.benchmark import benchmark
    from teal.engine.load import load_engine

    try:
        options = {"quantization": arguments.weights, "head_quantization": "int8" if arguments.weights else None}
        engine = load_engine(directory, common.dtype_of(arguments), arguments.device, **options)
    except UnsupportedModelError as reason:
        warnings.warn(f"no speed was measured: {reason}", stacklevel=2)
        return None
    name = arguments.model or "the embedded model"
    return benchmark(engine, plan, [level], prompt[:64], name=name, strict=arguments.strict, show_progress=True)
