"""The choice of the most likely token on an NVIDIA GPU: ops/cuda/greedy.cu."""

import ctypes
from functools import cache

import torch
from torch import Tensor

from teal.ops import nvrtc

THREADS = 1024
CLUSTER = 8  # blocks


class _Arguments(ctypes.Structure):
    """`Arguments` of greedy.cu."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("logits", "token", "checked")),
        ("invalid", ctypes.c_longlong),
        ("count", ctypes.c_int),
    ]


def serves(logits: Tensor) -> bool:
    """Whether `choose` takes these logits."""
    return (
        logits.is_cuda
        and logits.shape[0] == 1
        and logits.dtype in (torch.bfloat16, torch.float16)
        and _runs_on(logits.device)
    )


@cache
def _runs_on(device: torch.device) -> bool:
    with torch.accelerator.device_index(device.index):
        return nvrtc.unavailable() is None


def choose(logits: Tensor, token: Tensor, invalid: int) -> Tensor:
    """Sets token [1] int64 to the place of the largest of logits [1, V], the first of equals.

    Returns it [1], or `invalid` if a logit is infinite or NaN.
    """
    logits, checked = logits.contiguous(), torch.empty_like(token)
    arguments = _Arguments(logits.data_ptr(), token.data_ptr(), checked.data_ptr(), invalid, logits.shape[1])
    with torch.accelerator.device_index(logits.device.index):
        cluster = CLUSTER if nvrtc.has_clusters() else 1
        macros = nvrtc.common_macros(logits.dtype, THREADS, cluster=cluster)
        kernel = nvrtc.compile_kernel("greedy.cu", "greedy", macros, 8 * (THREADS // 32 + 1 + cluster))
        launch = kernel.prepared(cluster, THREADS, arguments, cluster=cluster, dependent=True)
        launch.start(torch.cuda.current_stream().cuda_stream)
    return checked
