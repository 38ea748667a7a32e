"""Make a plan of the artifacts that the original TEAL repository publishes (github.com/FasterDecoding/TEAL, MIT).

DIR/histograms/layer-{i}/{self_attn,mlp}/histograms.pt    activations, with sign, in bins
DIR/lookup/layer-{i}/results.csv                          sparsities along the greedy search, optional
"""

import csv
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from teal.checkpoint import structure_from_config
from teal.errors import TealError, reason_of
from teal.ops.reference import KEEP_ALL
from teal.plan import ProjectionPlan, SparsityPlan, check_level, level_grid
from teal.structure import INPUTS, ModelIdentity, ModelStructure, Projection

SOURCE = "artifacts of https://github.com/FasterDecoding/TEAL (MIT license)"
HIGHEST = 0.999  # published greedy searches step past 100 %; a plan stays below
EXACT = 1 << 24  # counts are float32, which cannot count further one by one

_FILE_AND_KEY = {
    "attention_input": ("self_attn", "h1"),
    "attention_output": ("self_attn", "h2"),
    "mlp_input": ("mlp", "h1"),
    "mlp_intermediate": ("mlp", "h2"),
}


@dataclass(frozen=True)
class Histogram:
    """One input of one block: `counts` [bins] and bin `centers` [bins], float64; the outer bins hold the tails."""

    counts: Tensor
    centers: Tensor

    def quantiles(self, shares: Tensor) -> Tensor:
        """The values below which `shares` of the counts lie, by the published rule.

        A share that falls into bin i lies linearly between the centers of bins i - 1 and i; beyond either end
        it is the outer center.
        """
        cumulative = self.counts.cumsum(0)
        wanted = shares.double() * cumulative[-1]
        index = torch.searchsorted(cumulative, wanted)
        inner = index.clamp(1, len(self.centers) - 1)
        lower, upper = cumulative[inner - 1], cumulative[inner]
        fraction = (wanted - lower) / (upper - lower)
        values = self.centers[inner - 1].lerp(self.centers[inner], fraction)
        values = torch.where(index == 0, self.centers[0], values)
        return torch.where(index == len(self.centers), self.centers[-1], values)

    def share_within(self, thresholds: Tensor) -> Tensor:
        """Share of the counts with |x| <= threshold, bins by their centers."""
        magnitudes, order = self.centers.abs().sort()
        cumulative = torch.cat([torch.zeros(1), self.counts[order].cumsum(0)])
        return cumulative[torch.searchsorted(magnitudes, thresholds.double(), right=True)] / cumulative[-1]


def import_published(
    directory: str | Path,
    model: ModelStructure | str | Path,
    levels: Sequence[float] = level_grid(),
    *,
    uniform: bool = False,
) -> tuple[SparsityPlan, dict[float, float]]:
    """A plan of published histograms and lookups, and the sparsity its thresholds imply at each level.

    `model` is a structure, or a model directory or config.json. The threshold for sparsity s is the quantile
    0.5 + s / 2 of the signed histogram, as if it were symmetric; with a lookup directory each block takes the
    row whose effective sparsity is nearest the level; without one, or if `uniform`, s is the level everywhere.
    The plan holds these nominal sparsities; implied is the share of the histograms with |x| <= threshold,
    weighed by weight bytes.
    Raises TealError for files that are missing or damaged and for histograms that cannot be the model's.
    """
    directory = Path(directory)
    structure = model if isinstance(model, ModelStructure) else structure_from_config(model)
    levels = tuple(sorted({0.0, *map(check_level, levels)}))
    histograms = read_histograms(directory, structure)
    greedy = not uniform and (directory / "lookup").is_dir()
    blocks, dropped = [], torch.zeros(len(levels), dtype=torch.float64)
    for index, projections in enumerate(structure.blocks):
        rows = read_lookup(directory, index, levels) if greedy else None
        plans = {}
        for projection in projections:
            histogram = histograms[index][projection.input]
            plan, implied = _project(projection, histogram, levels, rows)
            plans[projection.name] = plan
            dropped += projection.size * implied
        blocks.append(plans)
    total = sum(projection.size for _, projection in structure.projections())
    implied = dict(zip(levels, (dropped / total).tolist(), strict=True))
    method = "published" if greedy else "published-uniform"
    details = {"source": SOURCE, "implied_sparsity": [[level, share] for level, share in implied.items()]}
    return SparsityPlan(ModelIdentity.of(structure), method, levels, tuple(blocks), details), implied


def _project(
    projection: Projection, histogram: Histogram, levels: Sequence[float], rows: list[dict[str, float]] | None
) -> tuple[ProjectionPlan, Tensor]:
    """The plan of one projection and the share of its input that the thresholds drop, at each level."""
    name = projection.name.rpartition(".")[2].removesuffix("_proj")
    if rows is not None and name not in rows[0]:
        raise TealError(f"the published lookups have no column for {projection.name}")
    nominal = torch.tensor([*levels] if rows is None else [row[name] for row in rows], dtype=torch.float64)
    thresholds = torch.where(nominal > 0, histogram.quantiles(0.5 + nominal / 2), KEEP_ALL)
    plan = ProjectionPlan(tuple(nominal.clamp(max=HIGHEST).tolist()), tuple(thresholds.tolist()))
    return plan, histogram.share_within(thresholds)


def read_histograms(directory: Path, structure: ModelStructure) -> list[dict[str, Histogram]]:
    """The histograms of every block by input. Raises TealError if they cannot belong to `structure`."""
    root = directory / "histograms"
    found = len(list(root.glob("layer-*")))
    if found == 0:
        raise TealError(f"{directory} has no histograms/layer-0; name a directory like TEAL/models/Llama-2-7B")
    if found != len(structure.blocks):
        raise TealError(f"{root} is of a model with {found} blocks, this one has {len(structure.blocks)}")
    histograms = []
    for index in range(found):
        files = {part: _load(root / f"layer-{index}" / part / "histograms.pt") for part in ("self_attn", "mlp")}
        block = {}
        for name, (part, key) in _FILE_AND_KEY.items():
            where = f"{root}/layer-{index}/{part}/histograms.pt"
            block[name] = _histogram(files[part], key, where)
        histograms.append(block)
    _check_counts(histograms, structure, root)
    return histograms


def _load(path: Path) -> Any:
    if not path.is_file():
        raise TealError(f"{path} does not exist; copy the directory again")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler raises many kinds; the user needs the one line
        reason = reason_of(error)
        raise TealError(f"{path} is truncated, corrupt or holds more than tensors ({reason})") from error


def _histogram(content: Any, key: str, where: str) -> Histogram:
    entries = content if isinstance(content, dict) else {}
    counts, centers = entries.get(key), entries.get(f"{key}_centers")
    if not (isinstance(counts, Tensor) and isinstance(centers, Tensor) and counts.ndim == centers.ndim == 1):
        raise TealError(f"{where} holds no histogram {key} with its {key}_centers")
    counts, centers = counts.double(), centers.double()
    if len(counts) != len(centers) or len(counts) < 2:
        raise TealError(f"{where}: {key} has {len(counts)} counts for {len(centers)} bins")
    sound = counts.isfinite().all() and (counts >= 0).all() and counts.sum() > 0 and centers.isfinite().all()
    if not sound or not (centers.diff() > 0).all():
        raise TealError(f"{where}: {key} is no histogram: counts must be >= 0 and bin centers must rise")
    return Histogram(counts, centers)


def _check_counts(histograms: list[dict[str, Histogram]], structure: ModelStructure, root: Path) -> None:
    """Every token adds one count per channel, so counts are tokens x width, with the same tokens everywhere."""
    totals = [{name: float(block[name].counts.sum()) for name in INPUTS} for block in histograms]
    widths = [structure.input_features(index) for index in range(len(totals))]
    votes = Counter(t[name] / w[name] for t, w in zip(totals, widths, strict=True) for name in INPUTS)
    tokens = votes.most_common(1)[0][0]
    for index, block in enumerate(histograms):
        for name, histogram in block.items():
            total, width = totals[index][name], widths[index][name]
            slack = 0.0 if histogram.counts.max() < EXACT else 1e-3 * total  # see EXACT
            if abs(total - tokens * width) > slack or not tokens.is_integer():
                raise TealError(
                    f"{root} is of another model: layer-{index} {name} has {total:.0f} counts, which is "
                    f"{total / width:.6g} tokens of this model's {width} channels, where other inputs have "
                    f"{tokens:.6g} tokens; its model has {total / tokens:.6g} channels there"
                )


def read_lookup(directory: Path, block: int, levels: Sequence[float]) -> list[dict[str, float]]:
    """At each level the sparsities of the block's projections ("q", "k", ..., "down").

    They are those of the row whose effective sparsity is nearest, and none at level 0.
    Raises TealError if the file is missing or damaged or ends below a level.
    """
    path = directory / "lookup" / f"layer-{block}" / "results.csv"
    columns = ["q", "k", "v", "o", "gate", "up", "down"]
    try:
        with open(path, newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            rows = [(float(r["Effective Sparsity"]), {name: float(r[name]) for name in columns}) for r in reader]
    except OSError as error:
        raise TealError(f"cannot read {path}: {error.strerror}") from error
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        raise TealError(f"{path} is no lookup of the greedy search ({error!r})") from error
    if not rows or any(not (math.isfinite(v) and v >= 0) for sparsity, row in rows for v in (sparsity, *row.values())):
        raise TealError(f"{path} is no lookup of the greedy search: sparsities must be numbers from 0 on")
    step = max((after[0] - before[0] for before, after in pairwise(rows)), default=0.0)
    if max(levels) > rows[-1][0] + step:
        raise TealError(f"{path} ends at sparsity {rows[-1][0]:.4g}; import levels up to that, not {max(levels)}")
    dense = dict.fromkeys(columns, 0.0)
    return [min(rows, key=lambda row: abs(row[0] - level))[1] if level else dense for level in levels]
