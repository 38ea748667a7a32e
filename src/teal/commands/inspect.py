"""Show what an artifact or a model holds: plans, statistics, evaluations, sparse side directories, checkpoints.

examples:
  teal inspect                                     the embedded model
  teal inspect teal-embedded/plan.json --level 0.5
  teal inspect teal-embedded/statistics.safetensors
  teal inspect ./Llama-3.2-1B
"""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from teal.commands import common

if TYPE_CHECKING:
    from teal.plan import Setting
    from teal.structure import ModelIdentity


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", nargs="?", metavar="PATH", help="an artifact, a model directory or hub name")
    parser.add_argument("--level", type=common.level, default=0.5, help="the sparsity to show (default: 0.5)")
    common.add_json(parser)


def run(arguments: argparse.Namespace) -> None:
    path = Path(arguments.path or "")
    if path.is_file():
        shown = (_statistics if path.suffix == ".safetensors" else _json_artifact)(arguments, path)
    elif (path / "teal.json").is_file():
        shown = _plan(arguments, path / "plan.json")
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
    from teal.artifacts import read_json

    payload = read_json(path)
    if payload.get("format") == "teal.evaluation":
        return _evaluation(arguments, payload)
    return _plan(arguments, path)


def _plan(arguments: argparse.Namespace, path: Path) -> dict[str, Any]:
    from teal.plan import SparsityPlan

    plan = SparsityPlan.load(path)
    level = min(arguments.level, plan.levels[-1])
    common.say(arguments, f"plan         {plan.method}, levels {plan.levels[0]:g} to {plan.levels[-1]:g}")
    _identity(arguments, plan.identity)
    names = list(plan.blocks[0])
    rows = []
    for index, block in enumerate(plan.settings(level)):
        rows.append([str(index), *(_cell(block[name]) if name in block else "" for name in names)])
    expected = plan.expected_sparsity(level)
    title = f"\nsparsity and threshold at level {level:g} (expected: {expected:.4f} of the block weights)"
    common.print_table(arguments, title, ["block", *(name.rpartition(".")[2] for name in names)], rows)
    return {
        "kind": "plan", "method": plan.method, "levels": list(plan.levels), "level": level,
        "expected_sparsity": plan.expected_sparsity(level), "details": plan.details,
        "blocks": [{n: {"sparsity": s.sparsity, "threshold": s.threshold if isinstance(s.threshold, float) else "vector"}
                    for n, s in block.items()} for block in plan.settings(level)],
    }  # fmt: skip


def _cell(setting: "Setting") -> str:
    if not isinstance(setting.threshold, float):
        return f"{setting.sparsity:.2f} per channel"
    return "dense" if setting.threshold < 0 else f"{setting.sparsity:.2f} {setting.threshold:.4g}"


def _statistics(arguments: argparse.Namespace, path: Path) -> dict[str, Any]:
    from teal.statistics import ActivationStatistics

    statistics = ActivationStatistics.load(path)
    common.say(arguments, f"statistics   first {statistics.dense_tokens} tokens of each block of text not counted")
    _identity(arguments, statistics.identity)
    common.say(arguments, f"text         {json.dumps(statistics.details)}")
    rows, blocks = [], []
    for index, block in enumerate(statistics.blocks):
        thresholds = {name: entry.threshold(arguments.level) for name, entry in block.items()}
        tokens = next(iter(block.values())).tokens
        rows.append([str(index), str(tokens), *(f"{value:.4g}" for value in thresholds.values())])
        blocks.append({"tokens": tokens, "threshold": thresholds})
    columns = ["block", "tokens", *statistics.blocks[0]]
    common.print_table(arguments, f"\nthreshold for a sparsity of {arguments.level:g}", columns, rows)
    return {"kind": "statistics", "level": arguments.level, "details": statistics.details, "blocks": blocks}


def _evaluation(arguments: argparse.Namespace, payload: dict[str, Any]) -> dict[str, Any]:
    from teal.artifacts import check_header
    from teal.evaluation import FORMAT, VERSION

    check_header(payload, FORMAT, VERSION, arguments.path)
    rows = [["dense", "0", "0", f"{payload['dense']['perplexity']:.3f}", "", ""]]
    for m in payload["measurements"]:
        figures = [f"{m['perplexity']:.3f}", f"{m['increase']:+.2f}", f"{m['kl']:.4f}"]
        rows.append([m["plan"], f"{m['level']:g}", f"{m['sparsity']:.4f}", *figures])
    common.print_table(arguments, "", ["plan", "level", "realised", "perplexity", "increase %", "KL"], rows)
    common.say(arguments, f"sparse: {payload['rule']['sparse']}; counted: {payload['rule']['counted']}")
    return payload


def _model(arguments: argparse.Namespace) -> dict[str, Any]:
    from teal.checkpoint import Checkpoint, load_config, resolve_model, structure_from_config
    from teal.structure import FINGERPRINT_ROWS, ModelIdentity, fingerprint

    directory = resolve_model(arguments.path)
    checkpoint, config = Checkpoint(directory), load_config(directory)
    structure = structure_from_config(directory)
    first, projection = next(structure.projections())
    known = f"{structure.module_name(first, projection)}.weight" in checkpoint
    weights = fingerprint(structure, lambda name: checkpoint.rows(name, FINGERPRINT_ROWS)) if known else ""
    identity = ModelIdentity.of(structure, weights)
    common.say(arguments, f"checkpoint   {directory} ({checkpoint.bytes() / 2**20:.1f} MiB)")
    _identity(arguments, identity)
    common.say(arguments, f"context      {common.context_length(config)} tokens")
    total = sum(p.size for block in structure.blocks for p in block)
    rows = [
        [
            p.name,
            p.input,
            str(p.out_features),
            str(p.in_features),
            f"{100 * len(structure.blocks) * p.size / total:.1f}",
        ]
        for p in structure.blocks[0]
    ]
    columns = ["projection", "input", "outputs N", "inputs K", "% of block weights"]
    common.print_table(arguments, f"\nblock 0 of {len(structure.blocks)}", columns, rows)
    return {
        "kind": "model",
        "directory": str(directory),
        "bytes": checkpoint.bytes(),
        "model": identity.to_json(),
    }
