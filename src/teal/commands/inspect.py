"""Show what a plan, statistics, a result, a saved sparse model or a checkpoint holds.

examples:
  teal inspect                                     the embedded model
  teal inspect teal-embedded/plan.json --level 0.5
  teal inspect teal-embedded/statistics.safetensors
  teal inspect evaluation.json                     written by teal evaluate --json
  teal inspect ./Llama-3.2-1B
"""

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from teal.commands import bench, common, evaluate, tasks, tune
from teal.errors import TealError

if TYPE_CHECKING:
    from teal.checkpoint import Checkpoint
    from teal.plan import Setting
    from teal.structure import ModelIdentity, ModelStructure


OPERANDS = "[PATH] "


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", nargs="?", metavar="PATH", help="an artifact, a model directory or hub name")
    parser.add_argument("--level", type=common.level, help="the sparsity to show (default: 0.5)")
    common.add_json(parser)


def run(arguments: argparse.Namespace) -> None:
    from teal.checkpoint import EMBEDDED_MODEL
    from teal.sparse_model import PLAN_FILE, SETTINGS_FILE

    path = Path(arguments.path or EMBEDDED_MODEL)
    if path.is_file():
        shown = (_statistics if path.suffix == ".safetensors" else _json_artifact)(arguments, path)
    elif (path / SETTINGS_FILE).is_file():
        shown = _json_artifact(arguments, path / PLAN_FILE)
    else:
        shown = _model(arguments)
    common.write_result(arguments, shown)


def _identity(arguments: argparse.Namespace, identity: "ModelIdentity") -> None:
    total = sum(n * k for block in identity.shapes for n, k in block.values())
    common.say(
        arguments,
        f"model        {identity.model_type}, {len(identity.shapes)} blocks, {total / 1e6:.1f} M block weights",
        f"weights      {identity.weights[:16] or 'not known'}",
    )


def _json_artifact(arguments: argparse.Namespace, path: Path) -> dict[str, Any]:
    from teal import kernel_benchmark
    from teal.artifact_directory import READERS
    from teal.artifacts import read_json

    payload = read_json(path)
    readers = READERS | {kernel_benchmark.FORMAT: ("kernels", kernel_benchmark.KernelBenchmark.from_json)}
    if (format_name := payload.get("format")) not in readers:
        raise TealError(f"{path} has format {format_name!r}, expected 'teal.plan' or one of teal's results")
    kind, read = readers[format_name]
    if kind == "plans":
        return _plan(arguments, path)
    show: dict[str, Callable[[argparse.Namespace, Any], None]] = {
        "evaluations": evaluate.show, "texts": evaluate.show_texts, "tasks": tasks.show, "tunings": tune.show,
        "benchmarks": bench.show, "kernels": bench.show_kernels, "samples": _samples,
    }  # fmt: skip
    show[kind](arguments, read(payload, path))
    return payload


def _samples(arguments: argparse.Namespace, content: dict[str, Any]) -> None:
    common.say(arguments, content["sampling"])
    for sample in content["samples"]:
        common.say(arguments, f"\n{common.level_name(sample['level'])}: {sample['prompt']}{sample['text']}")


def _plan(arguments: argparse.Namespace, path: Path) -> dict[str, Any]:
    from teal.plan import SparsityPlan
    from teal.sparse_model import default_level

    plan = SparsityPlan.load(path)
    level = default_level(plan) if arguments.level is None else arguments.level
    settings, expected = plan.settings(level), plan.expected_sparsity(level)
    common.say(arguments, f"plan         {plan.method}, levels {plan.levels[0]:g} to {plan.levels[-1]:g}")
    _identity(arguments, plan.identity)
    names = list(dict.fromkeys(name for block in settings for name in block))
    rows = []
    for index, block in enumerate(settings):
        rows.append([str(index), *(_cell(block[name]) if name in block else "" for name in names)])
    common.say(
        arguments, f"\nsparsity and threshold at level {level:g} (expected: {expected:.4f} of the block weights)"
    )
    common.print_table(arguments, ["block", *(name.rpartition(".")[2] for name in names)], rows)
    return {
        "kind": "plan", "method": plan.method, "levels": list(plan.levels), "level": level,
        "expected_sparsity": expected, "details": plan.details,
        "blocks": [{name: _setting(setting) for name, setting in block.items()} for block in settings],
    }  # fmt: skip


def _setting(setting: "Setting") -> dict[str, Any]:
    threshold = setting.threshold if isinstance(setting.threshold, float) else "per channel"
    return {"sparsity": setting.sparsity, "threshold": threshold}


def _cell(setting: "Setting") -> str:
    if not isinstance(setting.threshold, float):
        return f"{setting.sparsity:.2f} per channel"
    return "dense" if setting.threshold < 0 else f"{setting.sparsity:.2f} {setting.threshold:.4g}"


def _statistics(arguments: argparse.Namespace, path: Path) -> dict[str, Any]:
    from teal.statistics import ActivationStatistics

    statistics, level = ActivationStatistics.load(path), 0.5 if arguments.level is None else arguments.level
    common.say(arguments, f"statistics   first {statistics.dense_tokens} tokens of each block of text not counted")
    _identity(arguments, statistics.identity)
    common.say(arguments, f"text         {json.dumps(statistics.details)}")
    rows, blocks = [], []
    for index, block in enumerate(statistics.blocks):
        thresholds = {name: entry.threshold(level) for name, entry in block.items()}
        tokens = next(iter(block.values())).tokens
        rows.append([str(index), str(tokens), *(f"{value:.4g}" for value in thresholds.values())])
        blocks.append({"tokens": tokens, "threshold": thresholds})
    columns = ["block", "tokens", *statistics.blocks[0]]
    common.say(arguments, f"\nthreshold for a sparsity of {level:g}")
    common.print_table(arguments, columns, rows)
    return {"kind": "statistics", "level": level, "details": statistics.details, "blocks": blocks}


def _rounded_bytes(structure: "ModelStructure", quantization: str) -> int:
    """Bytes of the block weights when --weights rounds them, scales included."""
    sizes = [(p.out_features, p.in_features) for _, p in structure.projections()]
    if quantization == "int8":
        return sum(n * k + 4 * n for n, k in sizes)
    return sum(n * k // 2 + 2 * n * -(-k // 128) for n, k in sizes)


ROUNDED_ROWS = 256  # outputs of each projection whose rounding error is looked at: enough to tell, quick to read


def _rounding_errors(checkpoint: "Checkpoint", structure: "ModelStructure") -> dict[str, dict[str, float | None]]:
    """For each projection of block 0 what rounding changes, relative to the weights; None where these are not finite.
    Empty if only transformers can map the names of the weights."""
    from teal.ops.quantize import rounding_error
    from teal.ops.sparse_gemv import QUANTIZATIONS

    path, found = checkpoint.block_path(structure), {}
    for projection in structure.blocks[0] if path is not None else ():
        weight = checkpoint.rows(f"{path}.0.{projection.name}.weight", ROUNDED_ROWS)
        errors = {name: rounding_error(weight, name) for name in QUANTIZATIONS}
        found[projection.name] = {name: error if math.isfinite(error) else None for name, error in errors.items()}
    return found


def _model(arguments: argparse.Namespace) -> dict[str, Any]:
    from teal.checkpoint import Checkpoint, context_length, load_config, resolve_model, structure_from_config
    from teal.ops.sparse_gemv import QUANTIZATIONS
    from teal.structure import ModelIdentity

    directory = resolve_model(arguments.path)
    checkpoint, config = Checkpoint(directory), load_config(directory)
    structure = structure_from_config(directory)
    identity = ModelIdentity.of(structure, checkpoint.fingerprint(structure))
    common.say(arguments, f"checkpoint   {directory} ({checkpoint.bytes() / 2**20:.1f} MiB)")
    _identity(arguments, identity)
    common.say(arguments, f"context      {context_length(config)} tokens")
    total = sum(p.size for block in structure.blocks for p in block)
    errors = _rounding_errors(checkpoint, structure)
    rows = [
        [
            p.name,
            p.input,
            str(p.out_features),
            str(p.in_features),
            f"{100 * len(structure.blocks) * p.size / total:.1f}",
            *("?" if error is None else f"{100 * error:.2f}" for error in errors.get(p.name, {}).values()),
        ]
        for p in structure.blocks[0]
    ]
    columns = ["projection", "input", "outputs N", "inputs K", "% of block weights"]
    if errors:
        columns += [f"{name} error %" for name in QUANTIZATIONS]
    common.say(arguments, f"\nblock 0 of {len(structure.blocks)}")
    common.print_table(arguments, columns, rows)
    sizes = {name: _rounded_bytes(structure, name) for name in QUANTIZATIONS}
    common.say(
        arguments, *(f"--weights {name}: {size / 2**20:.1f} MiB of block weights" for name, size in sizes.items())
    )
    return {
        "kind": "model",
        "directory": str(directory),
        "bytes": checkpoint.bytes(),
        "rounded_bytes": sizes,
        "rounding_error": errors,
        "model": identity.to_json(),
    }
