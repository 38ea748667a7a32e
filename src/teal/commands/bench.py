"""Measure decode speed, dense and at each level, interleaved in one run, with the bytes behind it.

examples:
  teal bench                                            the embedded model with its plan
  teal bench ./Llama-3.2-1B --levels 0.4 0.5
  teal bench --shape llama-3.2-1b --tokens 8 --repeats 3   random weights of a real shape
  teal bench --shape llama-3.2-1b --weights int8 --head-sparsity 0.5
  teal bench --kernels --shape llama-3-8b --weights int4   each projection's CPU kernel alone

A shape's weights are random, its thresholds are calibrated on them: the speed is real, the text is not.
These machines are noisy: quote the ratio, with its spread.
"""

import argparse
from typing import TYPE_CHECKING

from teal.commands import common
from teal.errors import UsageError

if TYPE_CHECKING:
    from teal.benchmark import Benchmark
    from teal.engine.model import DecoderModel
    from teal.kernel_benchmark import KernelBenchmark
    from teal.plan import SparsityPlan


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.add_model(parser)
    parser.add_argument(
        "--shape", metavar="NAME", help="random weights of this shape instead of a model, e.g. llama-3.2-1b"
    )
    parser.add_argument(
        "--kernels", action="store_true",
        help="measure the CPU kernel of each projection shape on random weights, against a plain read and torch",
    )  # fmt: skip
    common.add_plan(parser)
    common.add_levels(parser, common.DEFAULT_LEVELS, tuned=True)
    parser.add_argument("--context", type=common.positive, default=64, help="prompt tokens (default: 64)")
    parser.add_argument("--tokens", type=common.positive, default=32, help="tokens decoded in a repeat (default: 32)")
    parser.add_argument("--repeats", type=common.positive, default=5, help="interleaved repeats (default: 5)")
    common.add_dtype(parser)
    common.add_weights(parser)
    common.add_head(parser)
    common.add_device(parser)
    common.add_json(parser)


def run(arguments: argparse.Namespace) -> None:
    from teal.benchmark import benchmark

    if arguments.shape and (arguments.model or arguments.plan):
        raise UsageError("--shape stands alone: it has random weights and thresholds of its own")
    if arguments.tokens < 2:
        raise UsageError("--tokens must be at least 2: prefill gives the first one, which is not timed")
    if arguments.kernels:
        if not common.is_cpu(arguments.device):
            raise UsageError("--kernels is for --device cpu; bench without it measures whole steps on a GPU")
        return _run_kernels(arguments)
    common.check_device(arguments.device)
    load = _random_engine if arguments.shape else _engine
    engine, plan, level, prompt_ids, name = load(arguments)
    engine.lm_head.set_sparsity(arguments.head_sparsity)
    result = benchmark(
        engine,
        plan,
        arguments.levels or ([level] if level else common.DEFAULT_LEVELS),
        prompt_ids,
        name=name,
        new_tokens=arguments.tokens,
        repeats=arguments.repeats,
        strict=arguments.strict,
        show_progress=True,
    )
    common.write_result(arguments, result.to_json())
    show(arguments, result)


def _run_kernels(arguments: argparse.Namespace) -> None:
    import torch

    from teal.checkpoint import resolve_model, structure_from_config
    from teal.kernel_benchmark import benchmark_kernels, projection_shapes
    from teal.shapes import shape_structure

    if arguments.shape:
        structure = shape_structure(arguments.shape)
    else:
        structure = structure_from_config(resolve_model(arguments.model))
    result = benchmark_kernels(
        projection_shapes(structure),
        arguments.levels or common.DEFAULT_LEVELS,
        quantization=common.quantization_of(arguments)["quantization"],
        dtype=common.dtype_of(arguments) or torch.bfloat16,
        repeats=arguments.repeats,
        show_progress=True,
    )
    common.write_result(arguments, result.to_json())
    show_kernels(arguments, result)


def show(arguments: argparse.Namespace, result: "Benchmark") -> None:
    """Print a benchmark as a table, with what it was measured on below."""
    from teal.report import speed_rule, speed_table

    common.print_table(arguments, *speed_table(result))
    common.say(arguments, *speed_rule(result))


def show_kernels(arguments: argparse.Namespace, result: "KernelBenchmark") -> None:
    """Print a benchmark of kernels as a table, with what it was measured on below."""
    from teal.kernel_benchmark import kernel_rule, kernel_table

    common.print_table(arguments, *kernel_table(result))
    common.say(arguments, kernel_rule(result))


Loaded = tuple["DecoderModel", "SparsityPlan", float | None, list[int], str]  # with the level chosen and a name


def _engine(arguments: argparse.Namespace) -> Loaded:
    from teal.checkpoint import context_length, load_config, resolve_model
    from teal.data import EVALUATION_TEXT
    from teal.engine.load import load_engine

    plan, level = common.chosen_plan(arguments)
    directory = resolve_model(arguments.model)
    context, most = arguments.context + arguments.tokens, context_length(load_config(directory))
    if context > most:
        raise UsageError(f"--context and --tokens need {context} positions, the model has {most}; ask for fewer")
    arguments.text, arguments.field, arguments.wikitext = None, "text", False
    prompt = common.read_blocks(arguments, directory, EVALUATION_TEXT, arguments.context, arguments.context, None)
    engine = load_engine(
        directory, common.dtype_of(arguments), arguments.device, context=context, **common.quantization_of(arguments)
    )
    return engine, plan, level, prompt.ids[0].tolist(), arguments.model or "the embedded model"


def _random_engine(arguments: argparse.Namespace) -> Loaded:
    import torch

    from teal.benchmark import plan_of_activations
    from teal.shapes import random_engine

    context = arguments.context + arguments.tokens
    dtype = common.dtype_of(arguments) or torch.bfloat16
    engine = random_engine(arguments.shape, context, dtype, arguments.device, **common.quantization_of(arguments))
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(engine.config.vocab_size, (arguments.context,), generator=generator).tolist()
    plan = plan_of_activations(engine, prompt)
    return engine, plan, None, prompt, f"random weights of {arguments.shape}"
