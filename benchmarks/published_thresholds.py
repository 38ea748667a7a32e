"""Thresholds of imported published artifacts beside the published rule, computed from the raw files.

    python benchmarks/published_thresholds.py TEAL/models/Llama-2-7B --model config.json

Prints Markdown: thresholds of a few blocks, uniform and greedy, with the share of the published histogram that
they drop; the sparsity of the whole model; and the largest difference over all blocks. The rule is restated
here in float32, one value at a time, as the published code computes it, and shares nothing with the import.
"""

import argparse
import csv
from pathlib import Path

import numpy as np
import torch

from teal.plan import SparsityPlan
from teal.published import import_published

INPUTS = {
    "attention input": ("self_attn", "h1", "self_attn.q_proj"),
    "attention output": ("self_attn", "h2", "self_attn.o_proj"),
    "MLP input": ("mlp", "h1", "mlp.gate_proj"),
    "MLP intermediate": ("mlp", "h2", "mlp.down_proj"),
}
COLUMNS = {
    "q": ("self_attn", "h1"), "k": ("self_attn", "h1"), "v": ("self_attn", "h1"), "o": ("self_attn", "h2"),
    "gate": ("mlp", "h1"), "up": ("mlp", "h1"), "down": ("mlp", "h2"),
}  # fmt: skip


class RawHistogram:
    """Counts and centers of one input, straight from the file."""

    def __init__(self, directory: Path, block: int, part: str, key: str) -> None:
        path = directory / "histograms" / f"layer-{block}" / part / "histograms.pt"
        content = torch.load(path, weights_only=True)
        self.counts, self.centers = content[key].numpy(), content[f"{key}_centers"].numpy()
        self.cumulative = self.counts.astype(np.float64).cumsum().astype(np.float32)

    def threshold(self, sparsity: float) -> float:
        """The published `icdf(0.5 + sparsity / 2)`."""
        wanted = np.float32(0.5 + sparsity / 2) * self.cumulative[-1]
        index = int(np.searchsorted(self.cumulative, wanted))
        if index in (0, len(self.centers)):
            return float(self.centers[min(index, len(self.centers) - 1)])
        before, after = self.cumulative[index - 1], self.cumulative[index]
        step = (wanted - before) / (after - before) * (self.centers[index] - self.centers[index - 1])
        return float(self.centers[index - 1] + step)

    def dropped(self, threshold: float) -> float:
        """Share of the values with |x| <= threshold, bins by their centers."""
        return float(
            self.counts[np.abs(self.centers) <= threshold].sum(dtype=np.float64) / self.counts.sum(dtype=np.float64)
        )


def greedy_row(directory: Path, block: int, level: float) -> dict[str, float]:
    """The row of the greedy search whose effective sparsity is closest to `level`."""
    with open(directory / "lookup" / f"layer-{block}" / "results.csv", newline="") as file:
        rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
    return min(rows, key=lambda row: abs(row["Effective Sparsity"] - level))


def uniform_table(directory: Path, plan: SparsityPlan, blocks: list[int], levels: list[float]) -> float:
    """Print the thresholds of the four inputs; returns the largest difference over all blocks.

    Also prints where the implied sparsity is furthest from the level.
    """
    print("| block | input | level | imported | published rule | implied sparsity |\n|---|---|---|---|---|---|")
    largest, gaps = 0.0, []
    for block in range(len(plan.blocks)):
        for name, (part, key, projection) in INPUTS.items():
            raw = RawHistogram(directory, block, part, key)
            for level in levels:
                ours, rule = plan.settings(level)[block][projection].threshold, raw.threshold(level)
                dropped = raw.dropped(rule)
                largest = max(largest, abs(ours / rule - 1))
                gaps.append((abs(dropped - level), dropped, level, block, name))
                if block in blocks:
                    print(f"| {block} | {name} | {level:.0%} | {ours:.6g} | {rule:.6g} | {dropped:.4f} |")
    _, dropped, level, block, name = max(gaps)
    print(f"\nFurthest from its level: {name} of block {block}, {dropped:.4f} at {level:.0%}.")
    return float(largest)


def greedy_table(directory: Path, plan: SparsityPlan, blocks: list[int], levels: list[float]) -> float:
    """Print the thresholds of every projection; returns the largest difference over all blocks."""
    header = "| block | projection | level | greedy sparsity | imported | published rule | implied sparsity |"
    print(f"{header}\n|---|---|---|---|---|---|---|")
    largest = 0.0
    for block in range(len(plan.blocks)):
        rows = {level: greedy_row(directory, block, level) for level in levels}
        for name, (part, key) in COLUMNS.items():
            raw = RawHistogram(directory, block, part, key)
            for level, row in rows.items():
                if row[name] == 0:
                    continue
                ours = plan.settings(level)[block][f"{part}.{name}_proj"].threshold
                rule = raw.threshold(row[name])
                largest = max(largest, abs(ours / rule - 1))
                if block in blocks:
                    print(
                        f"| {block} | {name} | {level:.0%} | {row[name]:.4f} | {ours:.6g} | {rule:.6g} "
                        f"| {raw.dropped(rule):.4f} |"
                    )
    return float(largest)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="holds histograms/ and lookup/")
    parser.add_argument("--model", type=Path, required=True, help="the model's directory or its config.json")
    parser.add_argument("--blocks", type=int, nargs="+", default=[0, 15, 31])
    parser.add_argument("--levels", type=float, nargs="+", default=[0.4, 0.5])
    arguments = parser.parse_args()
    summary = [0.25, 0.4, 0.5, 0.65]
    levels = sorted({*arguments.levels, *summary})
    uniform, implied_uniform = import_published(arguments.directory, arguments.model, levels, uniform=True)
    greedy, implied_greedy = import_published(arguments.directory, arguments.model, levels)

    print("### Uniform\n")
    largest = uniform_table(arguments.directory, uniform, arguments.blocks, arguments.levels)
    print(f"\nLargest relative difference over all {len(uniform.blocks)} blocks: {largest:.1e}.\n\n### Greedy\n")
    largest = greedy_table(arguments.directory, greedy, arguments.blocks, arguments.levels)
    print(f"\nLargest relative difference over all {len(greedy.blocks)} blocks: {largest:.1e}.\n\n### Whole model\n")
    print("| level | uniform: nominal | implied | greedy: nominal | implied |\n|---|---|---|---|---|")
    for level in summary:
        shares = (
            uniform.expected_sparsity(level), implied_uniform[level],
            greedy.expected_sparsity(level), implied_greedy[level],
        )  # fmt: skip
        print(f"| {level:.0%} | " + " | ".join(f"{share:.4f}" for share in shares) + " |")


if __name__ == "__main__":
    main()
