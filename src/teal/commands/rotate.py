"""Write a model in other axes: the same function, but sparsity costs it less.

examples:
  teal rotate                                      the embedded model -> ./embedded-rotated
  teal rotate ./Llama-3.2-1B                       -> ./Llama-3.2-1B-rotated, on the embedded text
  teal rotate ./Llama-3.2-1B --text c4.jsonl       on a text of yours
  teal calibrate ./Llama-3.2-1B-rotated            from here on as with any model

Hidden states and values are turned to their principal components, so that few channels hold most of what projections
read. The result is an ordinary checkpoint of the same size (a tied LM head is stored apart), for any program that reads
it. Finished parts are kept beside the output until it is complete: an interrupted command, repeated, continues.
"""

import argparse
from pathlib import Path

from teal.commands import common

INTERRUPTED = "interrupted; finished parts are kept, repeat the command to continue"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.add_model(parser)
    parser.add_argument("--output", type=Path, metavar="DIR", help="where to write (default: ./MODEL-rotated)")
    common.add_text(parser, "the embedded calibration text")
    parser.add_argument(
        "--tokens", type=common.positive, default=20480, help="tokens to read, in whole blocks (default: 20480)"
    )
    parser.add_argument("--length", type=common.positive, help="tokens in a block (default: the context, at most 2048)")
    parser.add_argument("--dense-tokens", type=common.natural, help="positions of each block not counted (default: 8)")
    parser.add_argument("--seed", type=common.seed, default=0, help="which blocks of the text are taken")
    parser.add_argument(
        "--dtype", choices=common.DTYPES, default="auto", help="store the weights as (default: as they were)"
    )
    common.add_device(parser)
    common.add_json(parser)


def run(arguments: argparse.Namespace) -> None:
    from teal.checkpoint import resolve_model
    from teal.data import CALIBRATION_TEXT
    from teal.rotation import rotate

    directory = resolve_model(arguments.model)
    output = arguments.output or Path(f"{common.model_name(arguments.model)}-rotated")
    blocks = common.read_blocks(
        arguments, directory, CALIBRATION_TEXT, arguments.length, arguments.tokens, arguments.seed
    )
    common.hide_loading()
    rotation = rotate(
        directory,
        blocks,
        output,
        dense_tokens=common.dense_tokens(arguments),
        dtype=common.dtype_of(arguments),
        device=common.check_device(arguments.device),
        show_progress=True,
    )
    channels = len(rotation.spectrum)
    held = {f"{share:.0%}": rotation.channels_holding(share) for share in (0.5, 0.9)}
    shares = ", ".join(f"{share} of their energy in {count}" for share, count in held.items())
    common.say(arguments, f"hidden states of {channels} channels: {shares} -> {output}")
    common.write_result(
        arguments,
        {"output": str(output), "channels": channels, "channels_holding": held, "text": blocks.describe()},
    )
