import os
from pathlib import Path

import pytest
from emulation import EmulatedDevice


@pytest.fixture(scope="session")
def library_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where compiled kernels are kept; parallel workers share them."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "emulated-kernels"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture
def device(library_folder: Path, monkeypatch: pytest.MonkeyPatch) -> EmulatedDevice:
    """An emulated GPU that compute capability 9 and clusters are patched in for."""
    device = EmulatedDevice(library_folder)
    device.install(monkeypatch)
    return device
