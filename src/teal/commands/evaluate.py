"""Measure what sparsity costs: perplexity, KL divergence and top-1 agreement against the dense model.

examples:
  teal evaluate                                             the embedded model on the embedded text
  teal evaluate ./Llama-3.2-1B --text wiki.test.tokens --wikitext --length 512
  teal evaluate ./Llama-3.2-1B --plan uniform.json blockwise.json --levels 0.4 0.5

The rule: in each sequence the first --dense-tokens positions are dense, all others are computed as if decoded,
and the predictions made at those count. Sparsity is what was realised on these tokens, not the nominal level.
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from teal.commands import common

if TYPE_CHECKING:
    from teal.evaluation import Evaluation


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.add_model(parser)
    parser.add_argument(
        "--plan",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="one or more plans (default: teal-MODEL/plan.json)",
    )
    parser.add_argument("--strict", action="store_true", help="refuse a plan made for other weights")
    common.add_levels(parser, common.DEFAULT_LEVELS)
    common.add_text(parser, "the embedded evaluation text")
    parser.add_argument("--tokens", type=common.positive, help="tokens to read, in whole sequences (default: all)")
    parser.add_argument(
        "--length", type=common.positive, help="tokens in a sequence (default: the context, at most 2048)"
    )
    parser.add_argument("--dense-tokens", type=common.natural, help="dense positions of each sequence (default: 8)")
    parser.add_argument(
        "--batch", type=common.positive, default=1, help="sequences at a time; a GPU wants many (default: 1)"
    )
    common.add_dtype(parser)
    common.add_weights(parser)
    common.add_device(parser)
    common.add_json(parser)


def run(arguments: argparse.Namespace) -> None:
    from teal.calibration import DENSE_TOKENS
    from teal.checkpoint import resolve_model
    from teal.data import EVALUATION_TEXT
    from teal.evaluation import evaluate

    common.check_device(arguments.device)
    plans = common.load_plans(arguments)
    directory = resolve_model(arguments.model)
    blocks = common.read_blocks(arguments, directory, EVALUATION_TEXT, arguments.length, arguments.tokens, None)
    result = evaluate(
        common.load_model(directory, common.dtype_of(arguments), arguments.device),
        blocks,
        plans,
        arguments.levels,
        dense_tokens=DENSE_TOKENS if arguments.dense_tokens is None else arguments.dense_tokens,
        batch=arguments.batch,
        quantization=arguments.weights,
        strict=arguments.strict,
        show_progress=True,
    )
    common.write_result(arguments, result.to_json())
    show(arguments, result)


def show(arguments: argparse.Namespace, result: "Evaluation") -> None:
    """Print an evaluation as a table, with the token rule below it."""
    from teal.report import evaluation_rule, evaluation_table

    common.print_table(arguments, *evaluation_table(result))
    common.say(arguments, evaluation_rule(result))
