"""The native CPU library: where it is, which instruction set it uses, and its C interface (csrc/teal.h) in ctypes."""

import ctypes
import math
import mmap
import os
import sys
from contextlib import suppress
from ctypes import c_char_p, c_float, c_int, c_int32, c_int64, c_uint64, c_void_p
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import torch  # first: its OpenMP runtime must be loaded when the library asks for one
from torch import Tensor

from teal.errors import TealError

INTERFACE = 2
PHASES = 16
HUGE_PAGE = 2 << 20  # bytes
LINE_BYTES = 64  # a tile's run of one channel is a multiple of this
ACTIVATIONS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
INT8, INT4 = 3, 4
NAMES = ("libteal_cpu.so", "libteal_cpu.dylib", "teal_cpu.dll")
ENVIRONMENT = "TEAL_CPU"  # an instruction set to force, or "none" to do without the library
# pip would install the wheel that it has built before
REINSTALL = "reinstall: pip install --no-cache-dir --force-reinstall --no-deps teal-llm"


class Weight(ctypes.Structure):
    _fields_ = [
        ("tiles", c_void_p), ("scales", c_void_p),
        ("outputs", c_int64), ("inputs", c_int64), ("tile_outputs", c_int64), ("format", c_int32),
    ]  # fmt: skip


class Projection(ctypes.Structure):
    _fields_ = [
        ("weight", Weight), ("threshold", c_void_p), ("threshold_stride", c_int64),
        ("bias", c_void_p), ("sparse_bias", c_void_p),
    ]  # fmt: skip


class Block(ctypes.Structure):
    _fields_ = [
        *((name, Projection) for name in ("query", "key", "value", "output", "gate", "up", "down")),
        *((name, c_void_p) for name in ("input_norm", "mlp_norm", "query_norm", "key_norm")),
        *((name, c_int64) for name in ("hidden", "intermediate", "heads", "kv_heads", "head_dim", "window")),
        ("epsilon", c_float), ("format", c_int32),
    ]  # fmt: skip


class Step(ctypes.Structure):
    _fields_ = [
        ("rows", c_int64), ("hidden", c_void_p), ("out", c_void_p), ("keys", c_void_p), ("values", c_void_p),
        ("sequence_stride", c_int64), ("head_stride", c_int64), ("position_stride", c_int64),
        ("positions", c_void_p), ("cos", c_void_p), ("sin", c_void_p), ("phase_seconds", c_void_p),
    ]  # fmt: skip


_SIGNATURES = {
    "teal_interface": (c_int, []),
    "teal_instruction_sets": (c_char_p, []),
    "teal_chosen_instruction_set": (c_char_p, []),
    "teal_choose_instruction_set": (c_int, [c_char_p]),
    "teal_threads": (c_int, []),
    "teal_sparse_gemv": (c_int, [c_void_p, c_int32, c_void_p, c_int64, c_int64, c_void_p]),
    "teal_decode_blocks": (c_int, [c_void_p, c_int64, c_void_p]),
    "teal_phase_name": (c_char_p, [c_int]),
    "teal_read": (c_uint64, [c_void_p, c_int64]),
}


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL | None:
    """The library with the instruction set that TEAL_CPU asks for, or None if there is none or TEAL_CPU=none.

    Raises TealError for a library of another version, and for an instruction set that the library or the processor
    does not have.
    """
    asked = os.environ.get(ENVIRONMENT)
    path = None if asked == "none" else find()
    if path is None:
        return None
    loaded = ctypes.CDLL(str(path))
    interface = loaded.teal_interface() if hasattr(loaded, "teal_interface") else None
    if interface != INTERFACE:  # before any other function, which may not be there
        raise TealError(f"{path} has interface {interface}, this version needs {INTERFACE}; {REINSTALL}")
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(loaded, name)
        function.restype, function.argtypes = result, arguments
    if asked and loaded.teal_choose_instruction_set(asked.encode()):
        has = loaded.teal_instruction_sets().decode().replace(" ", ", ")
        raise TealError(f"{ENVIRONMENT}={asked!r} does not run here; choose from {has}, none")
    return loaded


def find() -> Path | None:
    """The library beside this file or among the files of the installed distribution."""
    beside = Path(__file__).parent
    installed = []
    with suppress(PackageNotFoundError):
        installed = [file.locate() for file in distribution("teal-llm").files or () if file.name in NAMES]
    candidates = [*(beside / name for name in NAMES), *map(Path, installed)]
    return next((path for path in candidates if path.is_file()), None)


def available() -> bool:
    return library() is not None


def describe() -> str:
    """One line on the library: where it is and what it uses, or why there is none and how to get it."""
    native, path = library(), find()
    if native is None and path is not None:
        return f"switched off by {ENVIRONMENT}=none"
    if native is None:
        return (
            "not built, PyTorch serves: decoding is not faster; install a C++17 compiler (gcc or clang), "
            f"then {REINSTALL}"
        )
    chosen, all_sets = native.teal_chosen_instruction_set().decode(), native.teal_instruction_sets().decode()
    threads, expected = native.teal_threads(), torch.get_num_threads()
    shared = "shared with torch" if threads == expected else f"NOT those of torch, which has {expected}"
    threading = f"{threads} threads, {shared}" if threads else "one thread (built without OpenMP)"
    return f"{path}: {chosen} of {all_sets.replace(' ', ', ')}; {threading}"


def check(status: int) -> None:
    """Raise TealError for what a call of the library returned, unless it is success."""
    if status:
        reason = {1: "an argument it does not accept", 2: "no memory"}.get(status, f"status {status}")
        raise TealError(f"the native CPU library reports {reason}")


def projection(weight: Weight, threshold: Tensor, bias: Tensor | None, sparse_bias: Tensor | None = None) -> Projection:
    """A projection of these tensors, which the caller keeps alive. Raises TealError unless they are contiguous."""
    if threshold.dtype != torch.float32:
        raise TealError(f"threshold must be float32, got {threshold.dtype}")
    if not all(tensor is None or tensor.is_contiguous() for tensor in (threshold, bias, sparse_bias)):
        raise TealError("threshold and biases must be contiguous")
    return Projection(
        weight,
        threshold.data_ptr(),
        threshold.ndim,  # [K] is read with stride 1, [] with 0
        None if bias is None else bias.data_ptr(),
        None if sparse_bias is None else sparse_bias.data_ptr(),
    )


def new_tensor(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """An uninitialized CPU tensor; on Linux, if it is large, from the start of a huge page on, in huge pages if the
    system gives them: runs of weights then end within pages, and skipping channels misses no address translation."""
    count = math.prod(shape)
    whole = count * dtype.itemsize // HUGE_PAGE * HUGE_PAGE
    if whole == 0 or sys.platform != "linux":
        return torch.empty(shape, dtype=dtype)
    memory = mmap.mmap(-1, count * dtype.itemsize + HUGE_PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    start = -torch.frombuffer(memory, dtype=torch.uint8).data_ptr() % HUGE_PAGE
    with suppress(OSError):  # a kernel without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE, start, whole)  # the rest would fill a page that is mostly empty
    return torch.frombuffer(memory, dtype=dtype, count=count, offset=start).view(shape)
