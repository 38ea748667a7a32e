"""What the package promises its users: few names, documented, cheap to import."""

import importlib
import inspect
import subprocess
import sys
from types import ModuleType

import pytest

import teal


def test_a_dozen_names_at_most() -> None:
    assert len(teal.__all__) <= 12
    assert list(teal.__all__) == sorted(teal.__all__)


@pytest.mark.parametrize("name", teal.__all__)
def test_names_are_importable_and_documented(name: str) -> None:
    value = getattr(teal, name)
    assert not isinstance(value, ModuleType)
    assert value.__module__.startswith("teal.")
    assert len(inspect.getdoc(value) or "") > 40
    assert name in dir(teal)


def test_a_name_that_there_is_not() -> None:
    with pytest.raises(AttributeError, match="module 'teal' has no attribute 'nothing'"):
        teal.nothing  # noqa: B018


@pytest.mark.parametrize("name", ["sparse_model", "evaluation", "calibration", "allocation"])
def test_importing_a_module_does_not_hide_a_function(name: str) -> None:
    module = importlib.import_module(f"teal.{name}")
    assert isinstance(module, ModuleType)
    assert callable(teal.sparsify)
    assert callable(teal.calibrate)


def test_importing_is_cheap() -> None:
    """Neither the package nor the command line's help loads torch or transformers."""
    code = """
import sys
import teal
from teal.cli import main
assert main(["--help"]) == 0
assert main(["calibrate", "--help"]) == 0
heavy = {"torch", "transformers", "numpy", "rich", "datasets"} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
