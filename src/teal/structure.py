"""Find the decoder blocks and their projections in a model, by structure and never by its name."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from teal.artifacts import check_keys
from teal.errors import TealError

MOST_BLOCKS = 100_000  # that a file may claim of its model
INPUTS = ("attention_input", "attention_output", "mlp_input", "mlp_intermediate")

# The field's names of the projections; a fused projection has one input and so one threshold.
INPUT_OF_PROJECTION = {
    "q_proj": "attention_input",
    "k_proj": "attention_input",
    "v_proj": "attention_input",
    "qkv_proj": "attention_input",
    "o_proj": "attention_output",
    "gate_proj": "mlp_input",
    "up_proj": "mlp_input",
    "gate_up_proj": "mlp_input",
    "down_proj": "mlp_intermediate",
}


@dataclass(frozen=True)
class Projection:
    """One linear layer of a block: `name` inside the block, which `input` it reads, its weight [N, K]."""

    name: str
    input: str
    out_features: int
    in_features: int

    @property
    def size(self) -> int:
        return self.out_features * self.in_features


@dataclass(frozen=True)
class ModelStructure:
    """Where the blocks of a model are (`path`) and which projections each block has, in execution order."""

    model_type: str
    path: str
    blocks: tuple[tuple[Projection, ...], ...]

    @classmethod
    def of(cls, model: nn.Module) -> "ModelStructure":
        """Read the structure off a model (its weights may be on the meta device).

        Raises TealError if no list of modules has attention and gated-MLP projections, and no matrices beside
        them, in each element.
        """
        found = {}
        for path, module in model.named_modules():
            if isinstance(module, nn.ModuleList) and len(module):
                blocks = tuple(_block_projections(block) for block in module)
                if all(_is_dense_block(*pair) for pair in zip(module, blocks, strict=True)):
                    found[path] = blocks
        model_type = str(getattr(getattr(model, "config", None), "model_type", type(model).__name__))
        if len(found) != 1:
            problem = "no decoder blocks" if not found else f"several lists of decoder blocks ({', '.join(found)})"
            raise TealError(
                f"unknown architecture {model_type!r}: {problem} with attention (q/k/v or fused qkv, o) "
                f"and gated MLP (gate, up or fused gate_up, down) projections; dense Llama-like models are supported"
            )
        ((path, blocks),) = found.items()
        return cls(model_type, path, blocks)

    def block_modules(self, model: nn.Module) -> list[nn.Module]:
        return list(model.get_submodule(self.path).children())

    def projections(self) -> Iterator[tuple[int, Projection]]:
        for index, block in enumerate(self.blocks):
            for projection in block:
                yield index, projection

    def module_name(self, block: int, projection: Projection) -> str:
        return f"{self.path}.{block}.{projection.name}"

    def input_features(self, block: int) -> dict[str, int]:
        """Width K of each distinct input of a block."""
        return {projection.input: projection.in_features for projection in self.blocks[block]}

    def shapes(self) -> list[dict[str, list[int]]]:
        """Weight shapes [N, K] of every projection of every block, as JSON."""
        return [{p.name: [p.out_features, p.in_features] for p in block} for block in self.blocks]


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def _input_of(name: str) -> str:
    return INPUT_OF_PROJECTION[_leaf(name)]


def _block_projections(block: nn.Module) -> tuple[Projection, ...]:
    projections = []
    for name, module in block.named_modules():
        if _leaf(name) in INPUT_OF_PROJECTION and hasattr(module, "in_features"):
            linear: Any = module
            projections.append(Projection(name, _input_of(name), linear.out_features, linear.in_features))
    return tuple(sorted(projections, key=lambda p: list(INPUT_OF_PROJECTION).index(_leaf(p.name))))


def _is_dense_block(block: nn.Module, projections: tuple[Projection, ...]) -> bool:
    """Every input is read, no projection occurs twice and no matrix is left over (routers, experts)."""
    leaves = [_leaf(projection.name) for projection in projections]
    prefixes = tuple(f"{projection.name}." for projection in projections)
    matrices = [name for name, parameter in block.named_parameters() if parameter.ndim > 1]
    return (
        {projection.input for projection in projections} == set(INPUTS)
        and len(leaves) == len(set(leaves))
        and all(name.startswith(prefixes) for name in matrices)
    )


@dataclass(frozen=True)
class ModelIdentity:
    """What an artifact says of the model it was made for.

    `shapes` must fit a model exactly; `weights` is a fingerprint (see `fingerprint`) and may differ, with a
    warning, as fine-tunes share thresholds. Empty when unknown.
    """

    model_type: str
    shapes: tuple[dict[str, tuple[int, int]], ...]
    weights: str = ""

    @classmethod
    def of(cls, structure: ModelStructure, weights: str = "") -> "ModelIdentity":
        shapes = tuple({name: (n, k) for name, (n, k) in block.items()} for block in structure.shapes())
        return cls(structure.model_type, shapes, weights)

    def input_features(self, block: int) -> dict[str, int]:
        """Width K of each distinct input of a block."""
        return {_input_of(name): k for name, (_, k) in self.shapes[block].items()}

    def to_json(self) -> dict[str, Any]:
        """Runs of equal blocks are written once, with their count."""
        runs: list[dict[str, Any]] = []
        for block in self.shapes:
            shapes = {name: list(shape) for name, shape in block.items()}
            if runs and runs[-1]["projections"] == shapes:
                runs[-1]["blocks"] += 1
            else:
                runs.append({"blocks": 1, "projections": shapes})
        return {"model_type": self.model_type, "shapes": runs, "weights": self.weights}

    @classmethod
    def from_json(cls, payload: Any, where: object) -> "ModelIdentity":
        what = f"{where}, its model"
        try:
            if not isinstance(payload, dict):
                raise TypeError("no object")
            check_keys(payload, ("model_type", "shapes", "weights"), what)
            for run in payload["shapes"]:
                check_keys(run, ("blocks", "projections"), what)
                if not 1 <= int(run["blocks"]) <= MOST_BLOCKS:
                    raise ValueError(f"{run['blocks']} blocks")
            shapes = tuple(
                {str(name): (int(n), int(k)) for name, (n, k) in run["projections"].items()}
                for run in payload["shapes"]
                for _ in range(int(run["blocks"]))
            )
            if not shapes or not all({_input_of(name) for name in block} == set(INPUTS) for block in shapes):
                raise ValueError("blocks without all projections")
            return cls(str(payload["model_type"]), shapes, str(payload["weights"]))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise TealError(f"{where} does not describe its model properly ({error!r}); make it anew") from error

    def check_fits(self, other: "ModelIdentity", what: str) -> None:
        """Raise TealError, naming both shapes, unless `self` (of `what`) has the shapes of the model `other`."""
        if len(self.shapes) != len(other.shapes):
            counts = f"made for {len(self.shapes)} blocks, the model has {len(other.shapes)}"
            raise TealError(f"{what} cannot be of this model: {counts}")
        for index, (mine, theirs) in enumerate(zip(self.shapes, other.shapes, strict=True)):
            if mine != theirs:
                name = next(n for n in sorted(set(mine) | set(theirs)) if mine.get(n) != theirs.get(n))
                raise TealError(
                    f"{what} cannot be of this model: block {index} {name} has weight "
                    f"{_shape(mine.get(name))} in {what} and {_shape(theirs.get(name))} in the model"
                )

    def weights_differ(self, other: "ModelIdentity") -> str | None:
        """One line on why the stored weights are not known to be the same, or None if they are."""
        if not self.weights or not other.weights:
            return "the weights it was made for are not known"
        if self.weights != other.weights:
            return f"it was made for other weights (hash {self.weights[:12]}, the model's is {other.weights[:12]})"
        return None


def _shape(shape: tuple[int, int] | None) -> str:
    return f"{shape[0]} x {shape[1]}" if shape else "no such projection"


FINGERPRINT_ROWS = 8


def fingerprint(structure: ModelStructure, rows: Any) -> str:
    """SHA-256 over the first rows of every block projection, as float32, in order.

    `rows(name)` gives the first FINGERPRINT_ROWS rows of the weight called `name`. Float32, so that a
    model loaded in a wider dtype than it is stored in keeps its fingerprint. Empty if a weight is on meta.
    """
    digest = hashlib.sha256()
    for index, projection in structure.projections():
        name = f"{structure.module_name(index, projection)}.weight"
        first: torch.Tensor = rows(name)
        if first.is_meta:
            return ""
        digest.update(f"{projection.name} {projection.out_features} {projection.in_features}".encode())
        digest.update(first.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()


def identify(model: nn.Module, structure: ModelStructure | None = None) -> ModelIdentity:
    """The identity of a model: its weights as a loader of ours found them stored (see `Checkpoint.note_identity`),
    as a load may narrow them, else as they are in memory.
    """
    structure = structure or ModelStructure.of(model)
    if stored := getattr(model, "stored_fingerprint", ""):
        return ModelIdentity.of(structure, stored)

    def rows(name: str) -> torch.Tensor:
        module: Any = model.get_submodule(name.rpartition(".")[0])
        if hasattr(module, "rows"):
            return module.rows(FINGERPRINT_ROWS)  # without unpacking the rest
        return module.weight[:FINGERPRINT_ROWS]

    return ModelIdentity.of(structure, fingerprint(structure, rows))
