"""Print whether the losses from rounding weights and from sparsity add: log-perplexities, in pairs by sequence.

for bits in 8 4 3 2; do teal evaluate MODEL --plan plan.json --simulate-bits $bits --json $bits.json; done
teal evaluate MODEL --plan plan.json --json exact.json
python benchmarks/rounding_table.py exact.json 8.json 4.json 3.json 2.json

The first file is of the weights as they are. `both` is the increase of the log-perplexity (nats) over those, dense,
when weights are rounded and inputs dropped; `excess` what it has beyond the sum of either alone.
"""

import argparse
from pathlib import Path

from teal.artifacts import read_json
from teal.evaluation import Evaluation, mean_and_error
from teal.report import Table, markdown_table

COLUMNS = ["weights", "nominal", "realised", "perplexity", "rounded alone", "sparse alone", "both", "excess"]


def rounding_table(exact: Evaluation, rounded: list[Evaluation]) -> Table:
    """One row for each rounding and level; ± is one standard error over sequences, of paired differences."""
    rows = [["as they are", "0", "0", f"{exact.dense_perplexity:.3f}", "", "", "", ""]]
    for m in exact.measurements:
        alone = _increase(m.nll, exact.dense_nll)
        rows.append(["", f"{m.level:g}", f"{m.sparsity:.3f}", f"{m.perplexity:.3f}", "", alone, alone, ""])
    for result in rounded:
        alone = _increase(result.dense_nll, exact.dense_nll)
        rows.append([result.details["weights"], "0", "0", f"{result.dense_perplexity:.3f}", alone, "", alone, ""])
        for m, reference in zip(result.measurements, exact.measurements, strict=True):
            sums = [a + b for a, b in zip(m.nll, exact.dense_nll, strict=True)]
            parts = [a + b for a, b in zip(result.dense_nll, reference.nll, strict=True)]
            rows.append([
                "", f"{m.level:g}", f"{m.sparsity:.3f}", f"{m.perplexity:.3f}", alone,
                _increase(reference.nll, exact.dense_nll), _increase(m.nll, exact.dense_nll), _increase(sums, parts),
            ])  # fmt: skip
    return COLUMNS, rows


def _increase(losses: list[float], others: list[float]) -> str:
    mean, error = mean_and_error([a - b for a, b in zip(losses, others, strict=True)])
    return f"{mean:+.4f} ± {error:.4f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("exact", type=Path, metavar="EXACT")
    parser.add_argument("rounded", type=Path, nargs="+", metavar="ROUNDED")
    given = parser.parse_args()
    exact, *rounded = (Evaluation.from_json(read_json(path), path) for path in (given.exact, *given.rounded))
    print(markdown_table(*rounding_table(exact, rounded)))


if __name__ == "__main__":
    main()
