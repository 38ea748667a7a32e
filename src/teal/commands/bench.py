"""Measure decode speed, dense and at each level, interleaved in one run, with the bytes behind it.

examples:
  teal bench                                            the embedded model with its plan
  teal bench ./Llama-3.2-1B --levels 0.4 0.5
  teal bench --shape llama-3.2-1b --tokens 8 --repeats 3   random weights of a real shape

A shape's weights are random, its thresholds are calibrated on them: the speed is real, the text is not.
These machines are noisy: quote the ratio, with its spread.
"""

import argparse
from typing import TYPE_CHECKING, Any

from teal.commands import common
from teal.errors import UsageError

if TYPE_CHECKING:
    from teal.benchmark import Benchmark
    from teal.engine.model import DecoderModel
    from teal.plan import SparsityPlan


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.add_model(parser)
    parser.add_argument(
        "--shape", metavar="NAME", help="random weights of this shape instead of a model, e.g. llama-3.2-1b"
    )
    common.add_plan(parser)
    common.add_levels(parser, common.DEFAULT_LEVELS)
    parser.add_argument("--context", type=common.positive, default=64, help="prompt tokens (default: 64)")
    parser.add_argument("--tokens", type=common.positive, default=32, help="tokens decoded in a repeat (default: 32)")
    parser.add_argument("--repeats", type=common.positive, default=5, help="interleaved repeats (default: 5)")
    common.add_dtype(parser)
    common.add_device(parser)
    common.add_json(parser)


def run(arguments: argparse.Namespace) -> None:
    from teal.benchmark import benchmark

    if arguments.shape and (arguments.model or arguments.plan):
        raise UsageError("--shape stands alone: it has random weights and thresholds of its own")
    if arguments.tokens < 2:
        raise UsageError("--tokens must be at least 2: prefill gives the first one, which is not timed")
    common.check_device(arguments.device)
    load = _random_engine if arguments.shape else _engine
    engine, plan, prompt_ids, name = load(arguments)
    result = benchmark(
        engine,
        plan,
        arguments.levels,
        prompt_ids,
        name=name,
        new_tokens=arguments.tokens,
        repeats=arguments.repeats,
        strict=arguments.strict,
        show_progress=True,
    )
    common.write_result(arguments, result.to_json())
    show(arguments, result)


def show(arguments: argparse.Namespace, result: "Benchmark") -> None:
    """Print a benchmark as a table, with what it was measured on below."""
    from teal.report import speed_rule, speed_table

    common.print_table(arguments, *speed_table(result))
    common.say(arguments, *speed_rule(result))


def _engine(arguments: argparse.Namespace) -> tuple["DecoderModel", "SparsityPlan", list[int], str]:
    from teal.checkpoint import resolve_model
    from teal.data import EVALUATION_TEXT
    from teal.engine.load import load_engine

    plan = common.load_plan(arguments)
    directory = resolve_model(arguments.model)
    arguments.text, arguments.field, arguments.wikitext = None, "text", False
    prompt = common.read_blocks(arguments, directory, EVALUATION_TEXT, arguments.context, arguments.context, None)
    engine = load_engine(directory, common.dtype_of(arguments), arguments.device)
    return engine, plan, prompt.ids[0].tolist(), arguments.model or "the embedded model"


def _random_engine(arguments: argparse.Namespace) -> tuple["DecoderModel", "SparsityPlan", list[int], str]:
    import torch

    from teal.allocation import allocate
    from teal.calibration import calibrate
    from teal.engine.config import EngineConfig
    from teal.engine.model import DecoderModel
    from teal.shapes import random_model, shape_config

    config = shape_config(arguments.shape)
    model: Any = random_model(config, common.dtype_of(arguments) or torch.bfloat16)
    tokens = torch.randint(config.vocab_size, (2, 256), generator=torch.Generator().manual_seed(0))
    plan = allocate(calibrate(model, tokens, show_progress=True), "uniform")
    weights = {name.removeprefix("model."): tensor for name, tensor in model.state_dict().items()}
    del model

    def take(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        return weights[name].to(arguments.device)

    context = arguments.context + arguments.tokens
    engine = DecoderModel(EngineConfig.of(config), take, context).eval()
    return engine, plan, tokens[0, : arguments.context].tolist(), f"random weights of {arguments.shape}"
