"""Adapters to other libraries; each loads only when its library does."""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_REGISTRY = "transformers.quantizers.auto"  # the module that knows which quantization methods exist
_ADAPTER = "teal.integrations.transformers"  # importing it registers ours there


class _OnImport(MetaPathFinder):
    """Imports `_ADAPTER` right after whoever needs it has imported `_REGISTRY`.

    transformers has no entry points for quantization methods, and importing it here would make `import teal`
    take seconds. So this finder lets the others find the registry and adds one step to its execution.
    """

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _REGISTRY:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next(filter(None, (finder.find_spec(fullname, path, target) for finder in others)), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                if self in sys.meta_path:
                    sys.meta_path.remove(self)
                import_module(_ADAPTER)

            spec.loader.exec_module = execute_and_register
        return spec


def register_with_transformers() -> None:
    """Make transformers know the method "teal": now if its registry is loaded, else once it is."""
    if _REGISTRY in sys.modules:
        import_module(_ADAPTER)
    else:
        sys.meta_path.insert(0, _OnImport())
