"""Make a plan of the artifacts that the TEAL repository publishes: histograms and greedy lookups.

examples:
  teal import-published TEAL/models/Llama-2-7B --model ./Llama-2-7b-hf
  teal import-published TEAL/models/Llama-2-7B --model config.json --output plan.json

Prints, for each level, the sparsity that the published thresholds imply on the published histograms.
"""

import argparse
from pathlib import Path

from teal.commands import common

OPERANDS = "DIR --model CONFIG "


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", type=Path, metavar="DIR", help="holds histograms/ and, for greedy, lookup/")
    parser.add_argument("--model", required=True, metavar="CONFIG", help="the model's directory or its config.json")
    common.add_output(parser, common.PLAN)
    common.add_json(parser)


def run(arguments: argparse.Namespace) -> None:
    from teal.checkpoint import structure_from_config
    from teal.published import import_published

    path = Path(arguments.model)
    arguments.model = str(path.parent.resolve() if path.suffix == ".json" else path)
    output = common.output_path(arguments, common.PLAN)
    plan, implied = import_published(arguments.directory, structure_from_config(path))
    plan.save(output)
    rows = [[f"{level:g}", f"{plan.expected_sparsity(level):.4f}", f"{implied[level]:.4f}"] for level in plan.levels]
    common.print_table(arguments, ["level", "nominal", "implied by the thresholds"], rows)
    common.say(arguments, f"{plan.method} plan for {len(plan.blocks)} blocks -> {output}")
    common.write_result(
        arguments,
        {
            "output": str(output),
            "method": plan.method,
            "implied": {f"{level:g}": implied[level] for level in plan.levels},
        },
    )
