"""The public names: few, documented, and free until used."""

import subprocess
import sys

import pytest

import teal


@pytest.mark.parametrize("name", teal.__all__)
def test_a_public_name_is_there_and_documented(name):
    assert len(getattr(teal, name).__doc__.strip()) > 40


def test_public_names_are_at_most_ten_and_listed():
    assert len(teal.__all__) <= 10
    assert set(teal.__all__) <= set(dir(teal))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        teal.nothing  # noqa: B018


def test_importing_teal_loads_neither_torch_nor_transformers():
    code = "import sys, teal, teal.cli; assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
