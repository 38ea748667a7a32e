"""Decide how sparse each projection is at each level: uniform, or the paper's block-wise greedy.

examples:
  teal allocate                                        block-wise greedy for the embedded model
  teal allocate ./Llama-3.2-1B                         from teal-Llama-3.2-1B/statistics.safetensors
  teal allocate ./Llama-3.2-1B --method uniform --output uniform.json

Finished blocks are kept beside the output until it is complete: an interrupted command, repeated, continues.
"""

import argparse
from pathlib import Path

from teal.commands import common

INTERRUPTED = "interrupted; finished blocks are kept, repeat the command to continue"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.add_model(parser)
    parser.add_argument(
        "--statistics",
        type=Path,
        metavar="FILE",
        help="from teal calibrate (default: teal-MODEL/statistics.safetensors)",
    )
    parser.add_argument(
        "--method", choices=("uniform", "blockwise"), default="blockwise",
        help="the same sparsity everywhere, or greedy in each block (default: blockwise)",
    )  # fmt: skip
    parser.add_argument(
        "--levels", type=common.level, nargs="+", metavar="S", help="the plan's grid of sparsities (default: 0 to 0.9)"
    )
    common.add_output(parser, common.PLAN)
    common.add_text(parser, "the embedded calibration text")
    parser.add_argument(
        "--tokens", type=common.positive, default=2048, help="tokens that greedy measures on (default: 2048)"
    )
    parser.add_argument("--length", type=common.positive, help="tokens in a block of text (default: 512)")
    parser.add_argument("--seed", type=common.seed, default=0, help="which blocks of the text are taken")
    parser.add_argument(
        "--step", type=float, default=0.005, help="share of a block's weights per greedy step (default: 0.005)"
    )
    parser.add_argument("--strict", action="store_true", help="refuse statistics made for other weights")
    common.add_dtype(parser)
    common.add_json(parser)


def run(arguments: argparse.Namespace) -> None:
    from teal.allocation import GreedyConfig, allocate
    from teal.blockwalk import discard_spool, open_blocks
    from teal.checkpoint import load_config, resolve_model
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
    source = open_blocks(directory, common.dtype_of(arguments))
    statistics.identity.check_fits(source.identity, "the statistics")
    check_weights(statistics.identity, source.identity, "the statistics", arguments.strict)
    blocks = None
    if arguments.method == "blockwise":
        length = arguments.length or min(512, common.context_length(load_config(directory)))
        blocks = common.read_blocks(arguments, directory, CALIBRATION_TEXT, length, arguments.tokens, arguments.seed)
    plan = allocate(
        statistics,
        arguments.method,
        levels=sorted(set(arguments.levels)) if arguments.levels else level_grid(),
        model=source,
        tokens=blocks,
        greedy=GreedyConfig(arguments.step),
        spool=common.spool_directory(output),
        show_progress=True,
    )
    plan.save(output)
    discard_spool(common.spool_directory(output))
    covered = f"{plan.levels[0]:g} to {plan.levels[-1]:g}"
    common.say(arguments, f"{plan.method} plan for {len(plan.blocks)} blocks, levels {covered} -> {output}")
    common.write_result(arguments, {"output": str(output), "method": plan.method, "levels": list(plan.levels)})
