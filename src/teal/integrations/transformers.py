"""TealConfig: load a sparse model in one call of transformers' `from_pretrained`, save it with its plan.

    model = AutoModelForCausalLM.from_pretrained(directory, quantization_config=TealConfig(plan="plan.json"))

The weights load and are saved as those of the dense model; after loading `teal.sparsify` does its work.
"""

from contextlib import suppress
from pathlib import Path
from typing import Any

from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from teal.artifacts import check_keys
from teal.checkpoint import Checkpoint
from teal.errors import TealError
from teal.plan import SparsityPlan
from teal.sparse_model import default_level, sparsify

METHOD = "teal"


class TealConfig(QuantizationConfigMixin):
    """The plan and the level of a sparse model, as `quantization_config` of `from_pretrained`.

    `plan` is a SparsityPlan, the path of a plan file, or the JSON object that a saved config.json holds.
    `level` defaults to the plan's middle, see `teal.sparsify`; `teal.set_sparsity` turns it later.
    Raises TealError for a plan that is damaged and for a level outside the plan's grid.
    """

    def __init__(
        self,
        plan: SparsityPlan | str | Path | dict[str, Any],
        level: float | None = None,
        quant_method: str = METHOD,
    ) -> None:
        self.quant_method = quant_method  # pyright: ignore[reportAttributeAccessIssue]
        self.plan = _read_plan(plan)
        self.level = default_level(self.plan) if level is None else level
        self.plan.settings(self.level)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Read what `to_dict` wrote. Raises TealError for unknown keys."""
        keys = ("quant_method", "plan", "level")
        check_keys(config_dict, keys, "the quantization config", keys)
        config = cls(**config_dict)
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        """As JSON. A plan with vectors does not fit and is left out; saving a model with one is refused."""
        plan = None if self.plan.has_vectors else self.plan.to_json()
        return {"quant_method": self.quant_method, "plan": plan, "level": self.level}


class TealQuantizer(HfQuantizer):
    """Lets transformers load and save plain weights and makes the projections sparse after loading."""

    quantization_config: TealConfig  # pyright: ignore[reportIncompatibleVariableOverride]

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        self.checkpoint_files = kwargs.get("checkpoint_files")
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if any(parameter.is_meta for parameter in model.parameters()):
            raise TealError("parts of the model are offloaded; load it without offloading to make it sparse")
        if self.checkpoint_files:
            with suppress(TealError):  # weights that we do not read are known by what is in memory
                Checkpoint(Path(self.checkpoint_files[0]).parent).note_identity(model)
        model.is_quantized = False  # the weights are not, so .half() and .float() are safe
        return sparsify(model, self.quantization_config.plan, self.quantization_config.level)

    def get_state_dict_and_metadata(self, model: Any) -> tuple[None, dict[str, str]]:
        """Called before the config is saved: refuses a plan that does not fit in, notes the level."""
        self.quantization_config.plan.to_json()
        self.quantization_config.level = model.sparsity_level
        return None, {}

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True


def _read_plan(plan: SparsityPlan | str | Path | dict[str, Any]) -> SparsityPlan:
    if isinstance(plan, SparsityPlan):
        return plan
    if isinstance(plan, dict):
        return SparsityPlan.from_json(plan, "the plan in the quantization config")
    if isinstance(plan, (str, Path)):
        return SparsityPlan.load(plan)
    raise TealError(f"TealConfig needs a SparsityPlan, a plan file or its JSON object, got {plan!r}")


register_quantization_config(METHOD)(TealConfig)  # as a call: the decorators lose the class's type
register_quantizer(METHOD)(TealQuantizer)
