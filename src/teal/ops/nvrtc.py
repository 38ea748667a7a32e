"""Compile CUDA C++ at run time with NVRTC, which comes with CUDA builds of torch, and launch it on torch's streams.

Needs no compiler on the user's machine: `cuda-bindings`, which CUDA builds of torch bring, finds driver and NVRTC.
"""

import ctypes
from collections.abc import Mapping
from functools import cache
from importlib import import_module
from importlib.resources import files
from typing import Any

import torch

from teal.artifacts import cached
from teal.errors import TealError


class Kernel:
    """One compiled kernel on the current device."""

    def __init__(self, function: Any, shared_bytes: int) -> None:
        self._function, self._shared_bytes = function, shared_bytes

    def prepared(
        self, grid: int, threads: int, arguments: ctypes.Structure, *, cluster: int = 1, dependent: bool = False
    ) -> "Launch":
        """A launch of `grid` blocks of `threads`, `cluster` neighbours sharing their memory, with one argument.

        `dependent`: it may be set up while the kernel before it, one of ours too, still runs; it then awaits that
        one's results itself, and what it reads before must be older (programmatic dependent launch).
        """
        driver = _bindings("driver")
        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = grid, 1, 1
        config.blockDimX, config.blockDimY, config.blockDimZ = threads, 1, 1
        config.sharedMemBytes = self._shared_bytes
        attributes = []
        if cluster > 1:
            attribute = driver.CUlaunchAttribute()
            attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
            attribute.value.clusterDim.x, attribute.value.clusterDim.y, attribute.value.clusterDim.z = cluster, 1, 1
            attributes.append(attribute)
        if dependent and has_clusters():
            attribute = driver.CUlaunchAttribute()
            attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            attribute.value.programmaticStreamSerializationAllowed = 1
            attributes.append(attribute)
        config.attrs, config.numAttrs = attributes, len(attributes)
        return Launch(config, self._function, arguments)


class Launch:
    """A kernel with its arguments, ready to start."""

    def __init__(self, config: Any, function: Any, arguments: ctypes.Structure) -> None:
        self._config, self._function, self._arguments = config, function, arguments
        self._pointers = (ctypes.c_void_p * 1)(ctypes.addressof(arguments))

    def start(self, stream: int) -> None:
        """On a CUDA stream (`torch.cuda.current_stream().cuda_stream`); it may be capturing a graph."""
        self._config.hStream = stream
        _check(_bindings("driver").cuLaunchKernelEx(self._config, self._function, ctypes.addressof(self._pointers), 0))


@cache
def _bindings(name: str) -> Any:
    """cuda.bindings.driver or cuda.bindings.nvrtc; only CUDA builds of torch bring them."""
    return import_module(f"cuda.bindings.{name}")


def has_clusters() -> bool:
    """Whether the current device has clusters and dependent launch (compute capability 9.0 and later)."""
    return torch.cuda.get_device_capability() >= (9, 0)


def most_shared_bytes() -> int:
    """Shared memory that a block may use on the current device."""
    driver = _bindings("driver")
    attribute = driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
    device = _check(driver.cuDeviceGet(torch.cuda.current_device()))
    return int(_check(driver.cuDeviceGetAttribute(attribute, device)))


def common_macros(dtype: torch.dtype, threads: int, depth: int = 1, cluster: int = 1) -> dict[str, object]:
    """Those of common.cuh."""
    return {"BF16": dtype == torch.bfloat16, "THREADS": threads, "DEPTH": depth, "CLUSTER": cluster}


def unavailable() -> str | None:
    """Why CUDA C++ kernels cannot run on the current device, or None if they can."""
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    major, minor = torch.cuda.get_device_capability()
    if (major, minor) < (8, 0):
        return f"the GPU has compute capability {major}.{minor}; 8.0 is the least"
    return _nvrtc_unavailable()


@cache
def _nvrtc_unavailable() -> str | None:
    try:
        _bindings("driver").cuInit(0)
        _bindings("nvrtc").nvrtcVersion()
    except Exception as error:  # a missing package, library or symbol; each has its own error
        return f"NVRTC cannot be used ({error}); pip install cuda-bindings in the CUDA version of torch"
    return None


def source(name: str) -> str:
    """common.cuh followed by a source file of ops/cuda."""
    folder = files("teal.ops") / "cuda"
    return (folder / "common.cuh").read_text() + (folder / name).read_text()


@cache
def _compiled(name: str, macros: tuple[tuple[str, str], ...], device: int, entry: str, shared_bytes: int) -> Kernel:
    driver = _bindings("driver")
    major, minor = torch.cuda.get_device_capability(device)
    options = [f"--gpu-architecture=sm_{major}{minor}", "--std=c++17", "-lineinfo"]
    options += [f"-D{macro}={value}" for macro, value in macros]
    cubin = _cubin(source(name), options)
    torch.cuda.current_stream(device)  # makes torch's context current
    module = _check(driver.cuModuleLoadData(cubin))
    function = _check(driver.cuModuleGetFunction(module, entry.encode()))
    attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    _check(driver.cuFuncSetAttribute(function, attribute, shared_bytes))
    return Kernel(function, shared_bytes)


def compile_kernel(name: str, entry: str, macros: Mapping[str, object], shared_bytes: int) -> Kernel:
    """The kernel `entry` of ops/cuda/`name`, with macros defined, for the current device.

    Machine code is kept in TEAL_CACHE (default ~/.cache/teal). Raises TealError with the compiler's log.
    """
    pairs = tuple((key, str(int(value) if isinstance(value, bool) else value)) for key, value in macros.items())
    return _compiled(name, pairs, torch.cuda.current_device(), entry, shared_bytes)


def _cubin(text: str, options: list[str]) -> bytes:
    nvrtc = _bindings("nvrtc")
    version = _check(nvrtc.nvrtcVersion())

    def compiled() -> bytes:
        program = _check(nvrtc.nvrtcCreateProgram(text.encode(), b"teal.cu", 0, [], []))
        try:
            encoded = [option.encode() for option in options]
            (status,) = nvrtc.nvrtcCompileProgram(program, len(encoded), encoded)
            if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
                log = b" " * _check(nvrtc.nvrtcGetProgramLogSize(program))
                _check(nvrtc.nvrtcGetProgramLog(program, log))
                raise TealError(f"a CUDA kernel does not compile here:\n{log.decode(errors='replace')}")
            cubin = b" " * _check(nvrtc.nvrtcGetCUBINSize(program))
            _check(nvrtc.nvrtcGetCUBIN(program, cubin))
            return cubin
        finally:
            nvrtc.nvrtcDestroyProgram(program)

    return cached("cubin", (text, options, version), compiled)


def _check(result: tuple[Any, ...]) -> Any:
    status, *values = result
    if int(status) != 0:
        raise TealError(f"CUDA driver error {status.name}")
    return values[0] if len(values) == 1 else tuple(values) if values else None
