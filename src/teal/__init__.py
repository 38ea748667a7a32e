"""Training-free activation sparsity for language model decoding (TEAL, arXiv 2408.14690).

Importing this package is cheap: torch and transformers load with the first name that needs them.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from teal.integrations import register_with_transformers

if TYPE_CHECKING:
    from teal.allocation import allocate
    from teal.calibration import calibrate
    from teal.evaluation import evaluate
    from teal.integrations.transformers import TealConfig
    from teal.plan import SparsityPlan
    from teal.sparsify import load, save, set_sparsity, sparsify
    from teal.statistics import ActivationStatistics

__all__ = [
    "ActivationStatistics",
    "SparsityPlan",
    "TealConfig",
    "allocate",
    "calibrate",
    "evaluate",
    "load",
    "save",
    "set_sparsity",
    "sparsify",
]

_HOME = {
    "ActivationStatistics": "teal.statistics",
    "SparsityPlan": "teal.plan",
    "TealConfig": "teal.integrations.transformers",
    "allocate": "teal.allocation",
    "calibrate": "teal.calibration",
    "evaluate": "teal.evaluation",
    "load": "teal.sparsify",
    "save": "teal.sparsify",
    "set_sparsity": "teal.sparsify",
    "sparsify": "teal.sparsify",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """Importing the module teal.sparsify binds that name here to the module; the public function keeps it."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _HOME and isinstance(value, ModuleType):
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
register_with_transformers()
