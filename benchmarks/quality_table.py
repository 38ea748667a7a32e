"""Print evaluations as a Markdown table, with every plan compared to the first one in pairs, sequence by sequence.

    teal evaluate MODEL --plan uniform.json blockwise.json --json evaluation.json
    python benchmarks/quality_table.py evaluation.json
"""

import argparse
import math
from pathlib import Path
from typing import Any

from teal.artifacts import check_header, read_json
from teal.evaluation import FORMAT, VERSION, mean_and_error
from teal.report import markdown_table

COLUMNS = ["plan", "nominal", "realised", "perplexity", "increase %", "KL (nats)", "top-1 %", "to the first plan %"]


def rows(evaluation: dict[str, Any]) -> list[list[str]]:
    dense = evaluation["dense"]
    table = [["dense", "0", "0", f"{dense['perplexity']:.3f} ± {dense['perplexity_error']:.3f}", "", "", "", ""]]
    first = evaluation["measurements"][0]["plan"]
    baseline = {m["level"]: m["nll"] for m in evaluation["measurements"] if m["plan"] == first}
    for m in evaluation["measurements"]:
        difference, error = mean_and_error([a - b for a, b in zip(m["nll"], baseline[m["level"]], strict=True)])
        paired = f"{100 * math.expm1(difference):+.2f} ± {100 * error:.2f}" if m["plan"] != first else ""
        table.append(
            [
                m["plan"],
                f"{m['level']:g}",
                f"{m['sparsity']:.4f}",
                f"{m['perplexity']:.3f} ± {m['perplexity_error']:.3f}",
                f"{m['increase']:+.2f} ± {m['increase_error']:.2f}",
                f"{m['kl']:.4f} ± {m['kl_error']:.4f}",
                f"{100 * m['top1_agreement']:.2f} ± {100 * m['top1_error']:.2f}",
                paired,
            ]
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("evaluations", type=Path, nargs="+", metavar="FILE")
    for path in parser.parse_args().evaluations:
        evaluation = read_json(path)
        check_header(evaluation, FORMAT, VERSION, path)
        print(markdown_table(COLUMNS, rows(evaluation)))
        rule = evaluation["rule"]
        print(f"\nRule: {rule['sparse']}; counted: {rule['counted']},", end=" ")
        print(f"{rule['tokens_counted']} in all; {rule['dtype']}.\n")


if __name__ == "__main__":
    main()
