"""The package installs, carries the embedded model, and asks for nothing it should not."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The wheel of this tree, installed beside nothing else."""
    pytest.importorskip("scikit_build_core", reason="building the wheel needs the build backend")
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    wheel = ["wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", str(folder), str(ROOT)]
    subprocess.run([*pip, *wheel], check=True, capture_output=True)
    (file,) = folder.glob("*.whl")
    subprocess.run(
        [*pip, "install", "--no-deps", "--no-index", "--target", str(folder / "site"), str(file)],
        check=True,
        capture_output=True,
    )
    return file, folder / "site"


def test_the_wheel_holds_the_embedded_model_and_its_card(installed):
    names = zipfile.ZipFile(installed[0]).namelist()
    wanted = ("model/model.safetensors", "model/tokenizer.json", "calibration.txt", "evaluation.txt", "README.md")
    assert {f"teal/embedded/{name}" for name in wanted} <= set(names)
    assert not [name for name in names if name.startswith(("tests", "docs", "examples"))]


def test_torch_is_no_build_requirement(installed):
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert "torch" not in text.partition("[project]")[0]


def test_the_installed_command_runs(installed, tmp_path):
    # Without `site`, whose hooks would find an editable installation of this repository first.
    path = os.pathsep.join([str(installed[1]), *(folder for folder in sys.path if "site-packages" in folder)])
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, "-S", "-m", "teal", "inspect"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "8 blocks" in done.stdout
    assert str(installed[1]) in done.stdout
