"""Measure what sparsity costs: perplexity, KL divergence and top-1 agreement against the dense model.

examples:
  teal evaluate                                             the embedded model on the embedded text
  teal evaluate ./Llama-3.2-1B --text wiki.test.tokens --wikitext --length 512
  teal evaluate ./Llama-3.2-1B --plan uniform.json blockwise.json --levels 0.4 0.5
  teal evaluate ./Llama-3.2-1B --text wiki.txt code.txt --each-text --tokens 32768
  teal evaluate ./Llama-3.2-1B --simulate-bits 3

The rule: in each sequence the first --dense-tokens positions are dense, all others are computed as if decoded,
and the predictions made at those count. Sparsity is what was realised on these tokens, not the nominal level.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from teal.commands import common

if TYPE_CHECKING:
    from teal.data import TokenBlocks
    from teal.evaluation import Evaluation
    from teal.plan import SparsityPlan


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.add_model(parser)
    common.add_plans(parser)
    common.add_levels(parser, common.DEFAULT_LEVELS)
    common.add_text(parser, "the embedded evaluation text")
    parser.add_argument("--each-text", action="store_true", help="measure every source of --text on its own")
    parser.add_argument("--tokens", type=common.positive, help="tokens to read, in whole sequences (default: all)")
    parser.add_argument(
        "--length", type=common.positive, help="tokens in a sequence (default: the context, at most 2048)"
    )
    parser.add_argument("--dense-tokens", type=common.natural, help="dense positions of each sequence (default: 8)")
    parser.add_argument(
        "--batch", type=common.positive, default=1, help="sequences at a time; a GPU wants many (default: 1)"
    )
    parser.add_argument("--by-position", action="store_true", help="show the loss by position in the sequence, too")
    common.add_dtype(parser)
    common.add_weights(parser)
    parser.add_argument(
        "--simulate-bits", type=int, choices=(8, 4, 3, 2),
        help="round the projections to nearest but keep them in their dtype, on any device (default: as they are)",
    )  # fmt: skip
    common.add_device(parser)
    common.add_json(parser)


def run(arguments: argparse.Namespace) -> None:
    from teal.checkpoint import resolve_model
    from teal.data import EVALUATION_TEXT
    from teal.evaluation import texts_to_json

    common.check_device(arguments.device)
    plans = common.load_plans(arguments)
    directory = resolve_model(arguments.model)
    sources = arguments.text or [EVALUATION_TEXT]
    texts = [[source] for source in sources] if arguments.each_text else [sources]
    blocks = [_read_blocks(arguments, directory, text) for text in texts]
    model = common.load_model(directory, common.dtype_of(arguments), arguments.device)
    results = [_evaluate(arguments, model, block, plans) for block in blocks]
    if arguments.each_text:
        named = dict(zip(common.distinct([Path(str(source)) for source in sources]), results, strict=True))
        common.write_result(arguments, texts_to_json(named))
        show_texts(arguments, named, arguments.by_position)
    else:
        common.write_result(arguments, results[0].to_json())
        show(arguments, results[0], arguments.by_position)


def _read_blocks(arguments: argparse.Namespace, directory: Path, sources: Sequence[str | Path]) -> "TokenBlocks":
    of_these = argparse.Namespace(**{**vars(arguments), "text": sources})
    return common.read_blocks(of_these, directory, Path(sources[0]), arguments.length, arguments.tokens, None)


def _evaluate(
    arguments: argparse.Namespace, model: Any, blocks: "TokenBlocks", plans: "dict[str, SparsityPlan]"
) -> "Evaluation":
    from teal.evaluation import evaluate

    return evaluate(
        model,
        blocks,
        plans,
        arguments.levels,
        dense_tokens=common.dense_tokens(arguments),
        batch=arguments.batch,
        quantization=arguments.weights,
        simulate_bits=arguments.simulate_bits,
        strict=arguments.strict,
        show_progress=True,
    )


def show(arguments: argparse.Namespace, result: "Evaluation", by_position: bool = False) -> None:
    """Print an evaluation as a table, with the token rule below it."""
    from teal.report import evaluation_rule, evaluation_table, position_table

    common.print_table(arguments, *evaluation_table(result))
    if by_position:
        common.say(arguments, "")
        common.print_table(arguments, *position_table(result))
    common.say(arguments, evaluation_rule(result))


def show_texts(arguments: argparse.Namespace, results: "Mapping[str, Evaluation]", by_position: bool = False) -> None:
    """Print the evaluations of several texts as one table, with what each measured below it."""
    from teal.report import evaluation_rule, position_table, texts_table

    common.print_table(arguments, *texts_table(results))
    if by_position:
        for text, result in results.items():
            common.say(arguments, "", text)
            common.print_table(arguments, *position_table(result))
    common.say(arguments, *(f"{text}: {evaluation_rule(result)}" for text, result in results.items()))
