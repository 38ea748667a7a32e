"""Decide how sparse each projection is at each level, what goes first there and what makes up for it.

examples:
  teal allocate                                        one budget for the whole embedded model
  teal allocate ./Llama-3.2-1B                         from teal-Llama-3.2-1B/statistics.safetensors
  teal allocate ./Llama-3.2-1B --device cuda --batch 8
  teal allocate ./Llama-3.2-1B --method blockwise --output blockwise.json            the paper's Algorithm 1
  teal allocate ./Llama-3.2-1B --method uniform --score l2 --output wina.json        the score of WINA

Finished parts are kept beside the output until it is complete: an interrupted command, repeated, continues.
"""

import argparse
from pathlib import Path

from teal.commands import common

INTERRUPTED = "interrupted; finished parts are kept, repeat the command to continue"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.add_model(parser)
    parser.add_argument(
        "--statistics",
        type=Path,
        metavar="FILE",
        help="from teal calibrate (default: teal-MODEL/statistics.safetensors)",
    )
    parser.add_argument(
        "--method", choices=("uniform", "blockwise", "global"), default="global",
        help="the same sparsity everywhere, greedy in each block, or one budget for the model (default: global)",
    )  # fmt: skip
    parser.add_argument(
        "--score", choices=("magnitude", "l2", "l1", "sensitivity"),
        help="what goes first: small inputs, small times the L2 or L1 norm of their weights, or what changes the "
        "model's output the least (default: magnitude, for global sensitivity)",
    )  # fmt: skip
    parser.add_argument(
        "--compensate", action=argparse.BooleanOptionalAction,
        help="a bias on sparse tokens that stands for what is dropped (default: for global)",
    )  # fmt: skip
    parser.add_argument(
        "--levels", type=common.level, nargs="+", metavar="S", help="the plan's grid of sparsities (default: 0 to 0.9)"
    )
    common.add_output(parser, common.PLAN)
    common.add_text(parser, "the embedded calibration text")
    parser.add_argument(
        "--tokens", type=common.positive, help="tokens to measure on (default: 8192, for blockwise 2048)"
    )
    parser.add_argument(
        "--batch", type=common.positive, default=1, help="sequences at a time; a GPU wants many (default: 1)"
    )
    parser.add_argument("--length", type=common.positive, help="tokens in a block of text (default: 512)")
    parser.add_argument("--seed", type=common.seed, default=0, help="which blocks of the text are taken")
    parser.add_argument(
        "--step", type=float, default=0.005, help="share of a block's weights per greedy step (default: 0.005)"
    )
    parser.add_argument(
        "--stride", type=float, default=0.15, help="rise after which global measures anew (default: 0.15)"
    )
    parser.add_argument("--strict", action="store_true", help="refuse statistics made for other weights")
    common.add_dtype(parser)
    common.add_device(parser)
    common.add_json(parser)


def run(arguments: argparse.Namespace) -> None:
    from teal.allocation import allocate
    from teal.blockwalk import discard_spool
    from teal.blockwise_allocation import GreedyConfig
    from teal.checkpoint import context_length, load_config, resolve_model
    from teal.data import CALIBRATION_TEXT
    from teal.errors import TealError
    from teal.plan import level_grid
    from teal.sparse_model import check_weights
    from teal.statistics import ActivationStatistics

    output = common.output_path(arguments, common.PLAN)
    directory = resolve_model(arguments.model)
    path = arguments.statistics or common.work_directory(arguments.model) / common.STATISTICS
    if arguments.statistics is None and not path.exists():
        calibrate = common.command_for("calibrate", arguments.model)
        raise TealError(f"no statistics at {path}; run {calibrate} first, or name them with --statistics")
    statistics = ActivationStatistics.load(path)
    source = common.open_blocks(arguments, directory)
    statistics.identity.check_fits(source.identity, "the statistics")
    check_weights(statistics.identity, source.identity, "the statistics", arguments.strict)
    length = arguments.length or min(512, context_length(load_config(directory)))
    tokens = arguments.tokens or (2048 if arguments.method == "blockwise" else 8192)
    blocks = common.read_blocks(arguments, directory, CALIBRATION_TEXT, length, tokens, arguments.seed)
    plan = allocate(
        statistics,
        arguments.method,
        score=arguments.score,
        compensate=arguments.compensate,
        levels=sorted(set(arguments.levels)) if arguments.levels else level_grid(),
        model=source,
        tokens=blocks,
        greedy=GreedyConfig(arguments.step),
        stride=arguments.stride,
        batch=arguments.batch,
        spool=common.spool_directory(output),
        show_progress=True,
    )
    plan.save(output)
    discard_spool(common.spool_directory(output))
    covered = f"{plan.levels[0]:g} to {plan.levels[-1]:g}"
    common.say(arguments, f"{plan.method} plan for {len(plan.blocks)} blocks, levels {covered} -> {output}")
    common.write_result(arguments, {"output": str(output), "method": plan.method, "levels": list(plan.levels)})
