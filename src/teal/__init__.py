"""Training-free activation sparsity for language model decoding (TEAL, arXiv 2408.14690).

Importing this package is cheap: torch and transformers load with the first name that needs them.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from teal.integrations import register_with_transformers

if TYPE_CHECKING:
    from teal.allocation import allocate
    from teal.calibration import calibrate
    from teal.evaluation import evaluate
    from teal.integrations.transformers import TealConfig
    from teal.plan import SparsityPlan
    from teal.rotation import rotate
    from teal.sparse_model import load, save, set_sparsity, sparsify
    from teal.statistics import ActivationStatistics
    from teal.tuning import tune

__all__ = [
    "ActivationStatistics",
    "SparsityPlan",
    "TealConfig",
    "allocate",
    "calibrate",
    "evaluate",
    "load",
    "rotate",
    "save",
    "set_sparsity",
    "sparsify",
    "tune",
]

_HOME = {
    "ActivationStatistics": "teal.statistics",
    "SparsityPlan": "teal.plan",
    "TealConfig": "teal.integrations.transformers",
    "allocate": "teal.allocation",
    "calibrate": "teal.calibration",
    "evaluate": "teal.evaluation",
    "load": "teal.sparse_model",
    "rotate": "teal.rotation",
    "save": "teal.sparse_model",
    "set_sparsity": "teal.sparse_model",
    "sparsify": "teal.sparse_model",
    "tune": "teal.tuning",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


register_with_transformers()
