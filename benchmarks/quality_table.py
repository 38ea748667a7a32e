"""Print evaluations as Markdown, with every plan compared to the first one in pairs, sequence by sequence.

teal evaluate MODEL --plan uniform.json blockwise.json --json evaluation.json
python benchmarks/quality_table.py evaluation.json
"""

import argparse
import math
from pathlib import Path

from teal.artifacts import read_json
from teal.evaluation import Evaluation, mean_and_error
from teal.report import Table, evaluation_rule, evaluation_table, markdown_table


def paired_table(result: Evaluation) -> Table:
    """`evaluation_table` with a column: perplexity relative to the first plan's at the same level, in per cent."""
    columns, rows = evaluation_table(result)
    first = result.measurements[0].plan
    baseline = {m.level: m.nll for m in result.measurements if m.plan == first}
    compared = [""]
    for m in result.measurements:
        difference, error = mean_and_error([a - b for a, b in zip(m.nll, baseline[m.level], strict=True)])
        compared.append("" if m.plan == first else f"{100 * math.expm1(difference):+.2f} ± {100 * error:.2f}")
    return [*columns, f"to {first} %"], [[*row, cell] for row, cell in zip(rows, compared, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("evaluations", type=Path, nargs="+", metavar="FILE")
    for path in parser.parse_args().evaluations:
        result = Evaluation.from_json(read_json(path), path)
        print(markdown_table(*paired_table(result)))
        print(f"\n{evaluation_rule(result)}.\n")


if __name__ == "__main__":
    main()
