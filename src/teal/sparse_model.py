"""Turn a loaded model into a sparse one, turn its level, save and load what makes it sparse."""

import warnings
from pathlib import Path

from torch import nn

from teal.artifacts import check_header, check_keys, read_json, write_json
from teal.errors import TealError
from teal.linear import SparseLinear, sparse_layers
from teal.ops.sparse_gemv import pack
from teal.plan import SparsityPlan
from teal.structure import ModelIdentity, ModelStructure, identify

FORMAT = "teal.sparse_model"
VERSION = 1
PLAN_FILE = "plan.json"
SETTINGS_FILE = "teal.json"


def check_plan(plan: SparsityPlan, identity: ModelIdentity, strict: bool = False) -> None:
    """Refuse a plan of other shapes; warn, or refuse if `strict`, where the weights are not known to be the same."""
    plan.identity.check_fits(identity, "the plan")
    check_weights(plan.identity, identity, "the plan", strict)


def check_weights(made_for: ModelIdentity, model: ModelIdentity, what: str, strict: bool) -> None:
    """Warn, or raise TealError if `strict`, unless `what` was made for the very weights of the model."""
    if difference := made_for.weights_differ(model):
        if strict:
            raise TealError(f"{what} may not belong to this model: {difference}")
        warnings.warn(f"{what} may not belong to this model: {difference}", stacklevel=4)


def sparsify(
    model: nn.Module,
    plan: SparsityPlan,
    level: float | None = None,
    *,
    quantization: str | None = None,
    strict: bool = False,
) -> nn.Module:
    """Replace the block projections of `model` by SparseLinear, in place, and set `level`.

    Decode (one new token per sequence) is sparse from then on, prefill stays dense. `level` defaults to the
    plan's middle, 0.5, or its highest level if that is lower. `quantization` "int8" or "int4" rounds the weights
    of the projections that are replaced. Returns the model.
    Raises TealError if the plan does not fit; warns (error with `strict`) if the weights differ.
    """
    structure = ModelStructure.of(model)
    identity = identify(model, structure)
    level = default_level(plan) if level is None else level
    plan.settings(level)  # a level outside the plan fails before the model changes
    check_plan(plan, identity, strict)
    names = [structure.module_name(index, projection) for index, projection in structure.projections()]
    for name in names:
        kind = type(model.get_submodule(name))
        if kind not in (nn.Linear, SparseLinear):
            raise TealError(f"{name} is a {kind.__name__}; only plain nn.Linear projections can be made sparse")
    for name in names:  # one at a time: a packed weight replaces the weight it was made of
        module = model.get_submodule(name)
        if isinstance(module, nn.Linear):
            model.set_submodule(name, SparseLinear(pack(module.weight.detach(), quantization), module.bias))
    if quantization is not None:
        object.__setattr__(model, "stored_fingerprint", identity.weights)  # of the weights before they were rounded
    object.__setattr__(model, "sparsity_plan", plan)
    object.__setattr__(model, "sparsity_identity", identity)
    set_sparsity(model, level)
    return model


def default_level(plan: SparsityPlan) -> float:
    return min(0.5, plan.levels[-1])


def plan_of(model: nn.Module) -> SparsityPlan:
    """The plan a model was made sparse with. Raises TealError for a dense model."""
    plan = getattr(model, "sparsity_plan", None)
    if plan is None:
        raise TealError("the model has no sparsity plan; call teal.sparsify(model, plan) first")
    return plan


def set_sparsity(model: nn.Module, level: float) -> None:
    """Turn a sparse model to another level of its plan; 0 is dense. Works between tokens.

    Raises TealError for a dense model or a level outside the plan's grid.
    """
    apply_plan(model, plan_of(model), level)
    object.__setattr__(model, "sparsity_level", float(level))


def apply_plan(model: nn.Module, plan: SparsityPlan, level: float) -> None:
    """Set every SparseLinear of `model` to what `plan` says at `level`."""
    layers = sparse_layers(model)
    structure = ModelStructure.of(model)
    settings = plan.settings(level)
    for index, projection in structure.projections():
        setting = settings[index][projection.name]
        layers[structure.module_name(index, projection)].set_threshold(setting.threshold, setting.compensation)


def save(model: nn.Module, directory: str | Path) -> None:
    """Write what makes `model` sparse (its plan and level, no weights) into `directory`, made if missing."""
    save_settings(plan_of(model), model.sparsity_level, directory)  # pyright: ignore[reportArgumentType]


def save_settings(plan: SparsityPlan, level: float, directory: str | Path) -> None:
    """What `save` writes, for a plan and a level without a model."""
    directory = Path(directory)
    plan.save(directory / PLAN_FILE)
    settings = {"format": FORMAT, "version": VERSION, "plan": PLAN_FILE, "level": level}
    write_json(directory / SETTINGS_FILE, settings)


def load(model: nn.Module, directory: str | Path, *, strict: bool = False) -> nn.Module:
    """Make a freshly loaded dense `model` sparse as `save` left it. Returns the model."""
    plan, level = load_settings(directory)
    return sparsify(model, plan, level, strict=strict)


def load_settings(directory: str | Path) -> tuple[SparsityPlan, float]:
    """The plan and the level that `save` wrote into `directory`."""
    file = Path(directory) / SETTINGS_FILE
    settings = read_json(file)
    check_header(settings, FORMAT, VERSION, file)
    keys = ("format", "version", "plan", "level")
    check_keys(settings, keys, file, keys)
    return SparsityPlan.load(file.parent / str(settings["plan"])), settings["level"]
