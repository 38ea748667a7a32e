"""How much of its inputs a few consecutive tokens of real text keep together, where each has a mask of its own.

    python benchmarks/mask_overlap.py MODEL --plan plan.json --level 0.5 [--text TEXT]

Kernels for several tokens read the union of the kept channels. Independent masks of 4 tokens at 50 % keep 0.9375.
"""

import argparse
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from teal.blockwalk import open_blocks, watch_inputs
from teal.checkpoint import load_tokenizer, resolve_model
from teal.data import EVALUATION_TEXT, token_blocks
from teal.ops.reference import keep_mask
from teal.plan import SparsityPlan
from teal.structure import Projection

DENSE_TOKENS = 16
SIZES = (1, 2, 4, 8)  # tokens together


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="model directory (default: the embedded model)")
    parser.add_argument("--plan", type=Path, required=True)
    parser.add_argument("--level", type=float, default=0.5)
    parser.add_argument("--text", default=str(EVALUATION_TEXT), help="(default: the embedded evaluation text)")
    arguments = parser.parse_args()
    directory = resolve_model(arguments.model)
    source = open_blocks(directory, torch.float32)
    tokens = token_blocks([arguments.text], load_tokenizer(directory), length=512, count=4)
    settings = SparsityPlan.load(arguments.plan).settings(arguments.level)
    kept: dict[tuple[str, int], list[list[float]]] = defaultdict(lambda: [[] for _ in source.structure.blocks])

    def watching(block: int, projection: Projection, _: nn.Module) -> Callable[[Tensor], None]:
        threshold = settings[block][projection.name].threshold

        def count(x: Tensor) -> None:
            keep = keep_mask(x[0, DENSE_TOKENS:], torch.as_tensor(threshold))
            for size in SIZES:
                groups = keep[: len(keep) // size * size].unflatten(0, (-1, size))
                name = projection.name.rpartition(".")[2]
                kept[name, size][block].append(float(groups.any(1).float().mean()))

        return count

    watch_inputs(source, tokens.ids, watching, "counting", True)
    print("| projection | " + " | ".join(f"{size} tokens" for size in SIZES) + " |")
    print("|---|" + "---|" * len(SIZES))
    for name in dict.fromkeys(name for name, _ in kept):
        cells = []
        for size in SIZES:
            blocks = [sum(found) / len(found) for found in kept[name, size]]
            cells.append(f"{sum(blocks) / len(blocks):.3f} ({min(blocks):.3f} to {max(blocks):.3f})")
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
