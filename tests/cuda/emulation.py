"""CUDA kernels compiled for the CPU (see emulator.h), with the interface of `teal.ops.nvrtc`."""

import ctypes
import hashlib
import os
import shutil
import subprocess
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from teal.ops import nvrtc
from teal.ops.cuda_projection import MOST_SHARED_BYTES

HERE = Path(__file__).parent
MULTIPROCESSORS = 4
COMPILER = [
    "g++", "-std=c++17", "-O1", "-w", "-U_FORTIFY_SOURCE", "-fvisibility=hidden", "-shared", "-fPIC", f"-I{HERE}",
]  # fmt: skip
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="CUDA kernels run on a CPU only with g++")


class EmulatedKernel:
    """Stands for `nvrtc.Kernel`."""

    def __init__(self, library: ctypes.CDLL, shared_bytes: int, threads: int) -> None:
        self.library, self.shared_bytes, self.threads = library, shared_bytes, threads
        library.run_kernel.restype = ctypes.c_char_p
        library.shared_size.restype = library.arguments_size.restype = ctypes.c_long

    def prepared(
        self, grid: int, threads: int, arguments: ctypes.Structure, *, cluster: int = 1, dependent: bool = False
    ) -> "EmulatedLaunch":
        assert threads == self.threads, "the kernel was compiled for another number of threads"
        assert ctypes.sizeof(arguments) == self.library.arguments_size()
        assert self.library.shared_size() <= self.shared_bytes
        return EmulatedLaunch(self, grid, cluster, arguments)


class EmulatedLaunch:
    """Stands for `nvrtc.Launch`; the number of the stream is the order in which threads get their turn."""

    def __init__(self, kernel: EmulatedKernel, grid: int, cluster: int, arguments: ctypes.Structure) -> None:
        self.kernel, self.grid, self.cluster, self.arguments = kernel, grid, cluster, arguments

    def start(self, stream: int = 0) -> None:
        shared_bytes = ctypes.c_long(self.kernel.shared_bytes)
        failure = self.kernel.library.run_kernel(
            ctypes.byref(self.arguments), self.grid, self.cluster, shared_bytes, stream
        )
        assert not failure, failure.decode()


def compiled(folder: Path, source: str, kernel: str, macros: Mapping[str, Any]) -> ctypes.CDLL:
    """The library of a kernel; `folder` keeps it."""
    declaration = "extern __shared__ uint4 dynamic_shared[];"
    if declaration not in source:
        macros = {**macros, "NOTHING_SHARED": 1}
    source = source.replace(declaration, "uint4* dynamic_shared = emulator::shared_memory();")
    options = [f"-D{name}={int(value)}" for name, value in macros.items()] + [f"-DKERNEL={kernel}"]
    name = hashlib.sha256(repr((source, options)).encode()).hexdigest()[:16]
    library = folder / f"{name}.so"
    if not library.exists():
        with_source = folder / f"{name}-{os.getpid()}"
        with_source.mkdir()
        (with_source / "kernel.inc").write_text(source)
        output = with_source / "kernel.so"
        command = [*COMPILER, f"-I{with_source}", *options, str(HERE / "launch.cpp"), "-o", str(output)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        output.replace(library)
    return ctypes.CDLL(str(library))


class EmulatedDevice:
    """Kernels of `teal.ops.nvrtc` for a device with `MULTIPROCESSORS`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.kernels: list[EmulatedKernel] = []

    def compile_kernel(self, name: str, entry: str, macros: Mapping[str, Any], shared_bytes: int) -> EmulatedKernel:
        library = compiled(self.folder, nvrtc.source(name), entry, macros)
        self.kernels.append(EmulatedKernel(library, shared_bytes, macros["THREADS"]))
        return self.kernels[-1]

    def install(self, monkeypatch: pytest.MonkeyPatch, clusters: bool = True) -> None:
        properties = types.SimpleNamespace(
            multi_processor_count=MULTIPROCESSORS, shared_memory_per_multiprocessor=0, L2_cache_size=1 << 20
        )
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None: properties)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: types.SimpleNamespace(cuda_stream=0))
        monkeypatch.setattr(nvrtc, "has_clusters", lambda: clusters)
        monkeypatch.setattr(nvrtc, "most_shared_bytes", lambda: MOST_SHARED_BYTES)
        monkeypatch.setattr(nvrtc, "compile_kernel", self.compile_kernel)
