"""Measure the distribution of the inputs of every projection on a little generic text.

examples:
  teal calibrate                                   the embedded model on the embedded text
  teal calibrate ./Llama-3.2-1B                    any local model, block by block
  teal calibrate ./Llama-3.2-1B --text c4.jsonl    on a text of yours

Finished blocks are kept beside the output until it is complete: an interrupted command, repeated, continues.
"""

import argparse

from teal.commands import common

INTERRUPTED = "interrupted; finished blocks are kept, repeat the command to continue"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.add_model(parser)
    common.add_text(parser, "the embedded calibration text")
    common.add_output(parser, common.STATISTICS)
    parser.add_argument(
        "--tokens", type=common.positive, default=20480, help="tokens to read, in whole blocks (default: 20480)"
    )
    parser.add_argument("--length", type=common.positive, help="tokens in a block (default: the context, at most 2048)")
    parser.add_argument("--dense-tokens", type=common.natural, help="positions of each block not counted (default: 8)")
    parser.add_argument("--seed", type=common.seed, default=0, help="which blocks of the text are taken")
    parser.add_argument("--merge", nargs="+", metavar="FILE", help="add earlier statistics of this model to the result")
    common.add_dtype(parser)
    common.add_device(parser)
    common.add_json(parser)


def run(arguments: argparse.Namespace) -> None:
    from teal.blockwalk import discard_spool
    from teal.calibration import calibrate
    from teal.checkpoint import resolve_model
    from teal.data import CALIBRATION_TEXT
    from teal.statistics import ActivationStatistics

    output = common.output_path(arguments, common.STATISTICS, in_place=("merge",))
    earlier = [ActivationStatistics.load(path) for path in arguments.merge or []]
    directory = resolve_model(arguments.model)
    blocks = common.read_blocks(
        arguments, directory, CALIBRATION_TEXT, arguments.length, arguments.tokens, arguments.seed
    )
    source = common.open_blocks(arguments, directory)
    dense_tokens = common.dense_tokens(arguments)
    for other in earlier:
        other.check_merges(source.identity, dense_tokens)  # now, not after the work
    statistics = calibrate(
        source,
        blocks,
        dense_tokens=dense_tokens,
        spool=common.spool_directory(output),
        show_progress=True,
    )
    for other in earlier:
        statistics = other.merge(statistics)
    statistics.save(output)
    discard_spool(common.spool_directory(output))
    tokens = statistics.blocks[0]["attention_input"].tokens
    common.say(arguments, f"{tokens} tokens counted at 4 inputs of {len(statistics.blocks)} blocks -> {output}")
    common.write_result(
        arguments,
        {
            "output": str(output),
            "tokens": tokens,
            "blocks": len(statistics.blocks),
            "text": blocks.describe(),
        },
    )
