"""The layouts that there are, by the name that custom ops pass along."""

from collections.abc import Sequence
from importlib.util import find_spec

from torch import Tensor

from teal.ops.cpu import CpuInt4Weight, CpuInt8Weight, CpuWeight
from teal.ops.cuda_weight import CudaWeight
from teal.ops.packed import ChannelMajorWeight, PackedWeight, RowMajorWeight

LAYOUTS: dict[str, type[PackedWeight]] = {
    layout.layout: layout
    for layout in (RowMajorWeight, ChannelMajorWeight, CpuWeight, CpuInt8Weight, CpuInt4Weight, CudaWeight)
}

if find_spec("triton") is not None:
    from teal.ops.triton_gemv import TritonWeight

    LAYOUTS[TritonWeight.layout] = TritonWeight


def triton_serves(weight: Tensor) -> bool:
    """Whether the portable kernels run on the GPU that holds this weight."""
    if weight.device.type not in ("cuda", "xpu") or "triton" not in LAYOUTS:
        return False
    from teal.ops.triton_gemv import serves

    return serves(weight.device, weight.dtype)


def restore(storage: Sequence[Tensor], layout: str) -> PackedWeight:
    """The packed weight behind the tensors and the layout name that a custom op received."""
    return LAYOUTS[layout](storage)
