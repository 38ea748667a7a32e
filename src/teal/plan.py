"""SparsityPlan: how sparse each projection is at each level, and the threshold that makes it so."""

import bisect
from collections.abc import Sequence
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from teal.artifacts import check_header, check_keys, read_json, read_tensors, write_json, write_tensors
from teal.errors import TealError
from teal.ops.reference import KEEP_ALL
from teal.structure import ModelIdentity

FORMAT = "teal.plan"
VERSION = 1
DROP_ALL = torch.finfo(torch.float32).max  # a threshold that drops everything; finite, so that plans can interpolate
SAME_LEVEL = 1e-9  # levels no further apart are one


def level_grid(maximum: float = 0.9, step: float = 0.05) -> tuple[float, ...]:
    """0, step, 2 step, ... up to `maximum`."""
    return tuple(round(index * step, 6) for index in range(round(maximum / step) + 1))


def check_level(level: float) -> float:
    """A sparsity in [0, 1). Raises TealError otherwise."""
    if not (isinstance(level, Real) and 0 <= level < 1):
        raise TealError(f"sparsity must be at least 0 and below 1, got {level}; 0.5 means half")
    return float(level)


def drops_all(threshold: Tensor) -> Tensor:
    """Where a threshold is DROP_ALL, or lies between it and another at a level that is interpolated."""
    return threshold >= SAME_LEVEL * DROP_ALL


@dataclass(frozen=True)
class ProjectionPlan:
    """One projection at every level of the plan's grid.

    `sparsity[l]` is the share of its inputs expected to be dropped, `threshold[l]` the largest |x| dropped: a number
    for each level, or [levels, K] in float32 where channels have thresholds of their own; KEEP_ALL keeps everything,
    DROP_ALL nothing. `compensation` [levels, N] (added on sparse tokens) is float32 or None.
    """

    sparsity: tuple[float, ...]
    threshold: tuple[float, ...] | Tensor
    compensation: Tensor | None = None


@dataclass(frozen=True)
class Setting:
    """One projection at one level: what `SparseLinear.set_threshold` takes, and the expected sparsity."""

    sparsity: float
    threshold: float | Tensor
    compensation: Tensor | None = None


@dataclass(frozen=True)
class SparsityPlan:
    """The sparsity of every projection of a model at a grid of levels; between grid points it interpolates.

    `blocks[b][name]` is the plan of projection `name` of block b. A level is the share of the block weights'
    bytes expected not to be read on the calibration text; realised sparsity is measured, not promised.
    `method` names how it was allocated, `details` what went into it (for people, not read back).
    """

    identity: ModelIdentity
    method: str
    levels: tuple[float, ...]
    blocks: tuple[dict[str, ProjectionPlan], ...]
    details: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._check()

    def settings(self, level: float) -> list[dict[str, Setting]]:
        """The setting of every projection of every block at `level`, interpolated between grid points.

        Level 0 is dense in every plan. Raises TealError for other levels outside the grid.
        """
        lowest, highest = self.levels[0], self.levels[-1]
        if check_level(level) == 0:
            return [{name: _dense(plan) for name, plan in block.items()} for block in self.blocks]
        if not lowest - SAME_LEVEL <= level <= highest + SAME_LEVEL:
            raise TealError(f"the plan covers sparsity {lowest} to {highest}, got {level}; allocate with other levels")
        above = min(bisect.bisect_left(self.levels, level - SAME_LEVEL), len(self.levels) - 1)
        below = above if level >= self.levels[above] - SAME_LEVEL else above - 1
        span = self.levels[above] - self.levels[below]
        weight = (level - self.levels[below]) / span if span else 0.0
        return [
            {name: _interpolate(plan, below, above, weight) for name, plan in block.items()} for block in self.blocks
        ]

    def expected_sparsity(self, level: float) -> float:
        """Share of all block weights not read at `level` if the text is like the calibration text."""
        dropped = total = 0.0
        for shapes, settings in zip(self.identity.shapes, self.settings(level), strict=True):
            for name, (n, k) in shapes.items():
                dropped += n * k * settings[name].sparsity
                total += n * k
        return dropped / total

    @property
    def has_vectors(self) -> bool:
        """Whether any projection has thresholds per channel or a compensation."""
        return bool(self._vectors())

    def to_json(self) -> dict[str, Any]:
        """The plan as one JSON object. Raises TealError for a plan with vectors, which need a file beside it."""
        if self.has_vectors:
            raise TealError("this plan holds vectors and does not fit into a config; use teal.save")
        return self._payload()

    @classmethod
    def from_json(
        cls, payload: dict[str, Any], where: object, vectors: dict[str, Tensor] | None = None
    ) -> "SparsityPlan":
        """Read `to_json`'s object, or that of a plan file and its vectors by "block.projection.kind".

        Raises TealError naming `where` for anything that does not belong.
        """
        check_header(payload, FORMAT, VERSION, where)
        required = ("format", "version", "model", "method", "details", "levels", "blocks")
        check_keys(payload, (*required, "vectors"), where, required)
        if "vectors" in payload and vectors is None:
            raise TealError(f"{where} has its vectors in a file beside it; give the path of the plan file")
        vectors = dict(vectors or {})
        try:
            levels = tuple(float(level) for level in payload["levels"])
            blocks = []
            for index, block in enumerate(payload["blocks"]):
                plans = {}
                for name, entry in block.items():
                    per_channel = vectors.pop(f"{index}.{name}.threshold", None)
                    keys = ("sparsity",) if per_channel is not None else ("sparsity", "threshold")
                    check_keys(entry, keys, f"{where}, block {index} {name}", keys)
                    plans[name] = ProjectionPlan(
                        tuple(float(value) for value in entry["sparsity"]),
                        tuple(map(float, entry["threshold"])) if per_channel is None else per_channel,
                        vectors.pop(f"{index}.{name}.compensation", None),
                    )
                blocks.append(plans)
            if vectors:
                raise ValueError(f"vectors {', '.join(sorted(vectors))} belong to no projection")
            identity = ModelIdentity.from_json(payload["model"], where)
            details = dict(payload["details"])
        except (TypeError, ValueError, AttributeError) as error:
            raise TealError(f"{where} is damaged ({error}); make it anew with teal allocate") from error
        try:
            return cls(identity, str(payload["method"]), levels, tuple(blocks), details)
        except TealError as error:
            raise TealError(f"{where}: {error}") from None

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON, atomically; vectors, where the method has any, beside it as safetensors."""
        path = Path(path)
        payload, vectors = self._payload(), self._vectors()
        if vectors:
            beside = path.with_suffix(".vectors.safetensors")
            payload["vectors"] = beside.name
            write_tensors(beside, vectors, {"format": FORMAT + ".vectors", "version": VERSION})
        write_json(path, payload)

    @classmethod
    def load(cls, path: str | Path) -> "SparsityPlan":
        """Read a plan. Raises TealError for a file that is not one, is damaged or from a newer version."""
        path = Path(path)
        payload, vectors = read_json(path), None
        if "vectors" in payload:
            name = payload["vectors"]
            if not isinstance(name, str) or not name or name != Path(name).name:
                raise TealError(f"{path} is damaged: its vectors are not in a file beside it; allocate anew")
            beside = path.parent / name
            vectors, header = read_tensors(beside)
            check_header(header, FORMAT + ".vectors", VERSION, beside)
        return cls.from_json(payload, path, vectors)

    def _payload(self) -> dict[str, Any]:
        blocks = [{name: _entry(plan) for name, plan in block.items()} for block in self.blocks]
        return {
            "format": FORMAT, "version": VERSION, "model": self.identity.to_json(), "method": self.method,
            "details": self.details, "levels": list(self.levels), "blocks": blocks,
        }  # fmt: skip

    def _vectors(self) -> dict[str, Tensor]:
        return {
            f"{index}.{name}.{kind}": vector
            for index, block in enumerate(self.blocks)
            for name, plan in block.items()
            for kind in ("threshold", "compensation")
            if isinstance(vector := getattr(plan, kind), Tensor)
        }

    def _check(self) -> None:
        if list(self.levels) != sorted(set(self.levels)) or not self.levels:
            raise TealError("levels must rise strictly")
        for level in self.levels:
            check_level(level)
        if len(self.blocks) != len(self.identity.shapes):
            raise TealError(f"it has {len(self.blocks)} blocks, its model {len(self.identity.shapes)}")
        for index, (block, shapes) in enumerate(zip(self.blocks, self.identity.shapes, strict=True)):
            if missing := sorted(set(shapes) - set(block)):
                raise TealError(f"thresholds are missing for block {index} {', '.join(missing)}")
            if unknown := sorted(set(block) - set(shapes)):
                raise TealError(f"block {index} has no projection {', '.join(unknown)}")
            for name, plan in block.items():
                self._check_projection(f"block {index} {name}", plan, shapes[name])

    def _check_projection(self, where: str, plan: ProjectionPlan, shape: tuple[int, int]) -> None:
        if len(plan.sparsity) != len(self.levels) or len(plan.threshold) != len(self.levels):
            raise TealError(f"{where} needs {len(self.levels)} sparsities and thresholds")
        for sparsity in plan.sparsity:
            if sparsity != 1:  # of a projection, unlike a level, it may be all
                check_level(sparsity)
        if not torch.as_tensor(plan.threshold).isfinite().all():
            raise TealError(f"{where} has a threshold that is NaN or infinite")
        n, k = shape
        for kind, channels in {"threshold": k, "compensation": n}.items():
            vector, wanted = getattr(plan, kind), (len(self.levels), channels)
            if isinstance(vector, Tensor) and (tuple(vector.shape) != wanted or not vector.isfinite().all()):
                raise TealError(f"{where} has a {kind} of shape {tuple(vector.shape)}, expected {wanted}, all finite")


def _entry(plan: ProjectionPlan) -> dict[str, Any]:
    """A projection in the plan's JSON; thresholds per channel are in the vectors beside it."""
    entry = {"sparsity": list(plan.sparsity)}
    return entry if isinstance(plan.threshold, Tensor) else {**entry, "threshold": list(plan.threshold)}


def _interpolate(plan: ProjectionPlan, below: int, above: int, weight: float) -> Setting:
    def between(values: Sequence[float] | Tensor) -> Any:
        return values[below] if weight == 0 else values[below] * (1 - weight) + values[above] * weight

    threshold: float | Tensor = between(plan.threshold)
    if weight:  # a threshold rises from 0, which drops nothing but exact zeros
        low, high = plan.threshold[below], plan.threshold[above]
        if isinstance(high, Tensor):
            threshold = torch.where((low < 0) & (high >= 0), high * weight, threshold)
        elif low < 0 <= high:
            threshold = high * weight
    compensation = None if plan.compensation is None else between(plan.compensation)
    return Setting(between(plan.sparsity), threshold, compensation)


def _dense(plan: ProjectionPlan) -> Setting:
    """Of the shapes that other levels have, so that captured graphs hold."""
    compensation = None if plan.compensation is None else torch.zeros_like(plan.compensation[0])
    threshold = torch.full_like(plan.threshold[0], KEEP_ALL) if isinstance(plan.threshold, Tensor) else KEEP_ALL
    return Setting(0.0, threshold, compensation)
