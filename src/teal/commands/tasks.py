"""Measure what sparsity costs in tasks: multiple choice, last words and exact answers, against the dense model.

examples:
  teal tasks ./Llama-3.2-1B --task arc_easy.jsonl hellaswag.jsonl lambada.jsonl --limit 500
  teal tasks ./Llama-3.2-1B --task gsm8k.jsonl --shots 5 --levels 0.5
  teal tasks ./Llama-3.2-1B --task piqa.jsonl --plan uniform.json blockwise.json --json tasks.json

A task is a file of JSON lines, one item each; docs/formats.md describes the fields. Texts that are scored are
computed as if decoded from position --dense-tokens on; exact answers are decoded. Sparsity is what was realised.
"""

import argparse
from typing import TYPE_CHECKING

from teal.commands import common

if TYPE_CHECKING:
    from teal.task_evaluation import TaskEvaluation


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.add_model(parser)
    common.add_tasks(parser, required=True)
    common.add_plans(parser)
    common.add_levels(parser, (0.4, 0.5))
    parser.add_argument("--dense-tokens", type=common.natural, help="dense positions of each text (default: 8)")
    parser.add_argument("--batch", type=common.positive, default=16, metavar="N", help="texts at a time (default: 16)")
    common.add_dtype(parser)
    common.add_weights(parser)
    common.add_device(parser)
    common.add_json(parser)


def run(arguments: argparse.Namespace) -> None:
    from teal.checkpoint import load_tokenizer, resolve_model
    from teal.task_evaluation import evaluate_tasks

    common.check_device(arguments.device)
    tasks = common.read_tasks(arguments)
    plans = common.load_plans(arguments)
    directory = resolve_model(arguments.model)
    tokenizer = load_tokenizer(directory)
    result = evaluate_tasks(
        common.load_model(directory, common.dtype_of(arguments), arguments.device),
        tokenizer,
        tasks,
        plans,
        arguments.levels,
        dense_tokens=common.dense_tokens(arguments),
        max_new_tokens=arguments.max_new_tokens,
        batch=arguments.batch,
        quantization=arguments.weights,
        strict=arguments.strict,
        show_progress=True,
    )
    common.write_result(arguments, result.to_json())
    show(arguments, result)


def show(arguments: argparse.Namespace, result: "TaskEvaluation") -> None:
    """Print a task evaluation as a table, with what was asked below it."""
    from teal.report import tasks_rule, tasks_table

    common.print_table(arguments, *tasks_table(result))
    common.say(arguments, *tasks_rule(result))
