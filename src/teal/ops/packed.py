"""The packed weight of one projection: the only place that knows how a weight is stored.

A layout is a subclass: it packs a weight [N, K], multiplies a few rows sparsely (decode) and many rows
densely (prefill). Kernels arrive as further layouts; nothing outside a layout indexes its storage.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from teal.ops.reference import drop_small, keep_mask

# A layout's sparse product serves up to this many rows; more rows are masked and go through the dense product.
MAX_SPARSE_ROWS = 8


class PackedWeight(ABC):
    """One weight [N, K] in a layout of its own.

    Attributes: `storage`, the tensors that hold it (they move with the module that owns them);
    `out_features` N; `in_features` K; `layout`, the name that custom ops pass along with the storage.
    """

    layout: ClassVar[str]
    fixed_dtypes: ClassVar[Mapping[int, torch.dtype]] = {}  # of those in `storage` that casts must leave alone

    def __init__(self, storage: Sequence[Tensor]) -> None:
        self.storage = tuple(storage)

    @classmethod
    def refusal(cls, weight: Tensor) -> str | None:
        """Why a weight [N, K] cannot have this layout where it is, or None."""
        return None

    @classmethod
    @abstractmethod
    def pack(cls, weight: Tensor) -> "PackedWeight":
        """Store weight [N, K]. The result may share its memory."""

    @abstractmethod
    def unpack(self) -> Tensor:
        """The weight as [N, K], exactly what the products multiply with."""

    def rows(self, count: int) -> Tensor:
        """The first `count` rows of `unpack()`."""
        return self.unpack()[:count]

    def after_cast(self) -> "PackedWeight":
        """For storage whose dtypes a module's cast has changed: the weight as this layout packs it."""
        return self

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """(N, K)."""

    @abstractmethod
    def sparse_gemv(self, x: Tensor, threshold: Tensor, bias: Tensor | None) -> Tensor:
        """`ops.reference.sparse_gemv` for x [R, K], 0 <= R <= MAX_SPARSE_ROWS, contiguous or not -> [R, N]."""

    @abstractmethod
    def dense_gemm(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x [..., K] -> x W^T + bias [..., N]."""

    @property
    @abstractmethod
    def skips_channels(self) -> bool:
        """Whether a dropped channel's bytes are really not read, here and now."""

    @property
    def out_features(self) -> int:
        return self.shape[0]

    @property
    def in_features(self) -> int:
        return self.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of inputs and outputs."""
        return self.storage[0].dtype

    def bytes_read(self, kept: float = 1.0) -> float:
        """Bytes that a product needs where this share of the input channels is kept, scales included."""
        return kept * sum(tensor.numel() * tensor.element_size() for tensor in self.storage)


class RowMajorWeight(PackedWeight):
    """[N, K], as checkpoints store it. Shares the checkpoint's memory and skips no bytes: inputs are zeroed
    and the framework's dense product does the rest. It serves every device and dtype."""

    layout = "row_major"

    @classmethod
    def pack(cls, weight: Tensor) -> "RowMajorWeight":
        return cls((weight,))

    def unpack(self) -> Tensor:
        return self.storage[0]

    @property
    def skips_channels(self) -> bool:
        return False

    @property
    def shape(self) -> tuple[int, int]:
        n, k = self.storage[0].shape
        return n, k

    def sparse_gemv(self, x: Tensor, threshold: Tensor, bias: Tensor | None) -> Tensor:
        return self.dense_gemm(drop_small(x, threshold), bias)

    def dense_gemm(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, self.storage[0], bias)


class ChannelMajorWeight(PackedWeight):
    """[K, N]: the weights of one input channel are contiguous, so a dropped channel is really not read."""

    layout = "channel_major"

    @classmethod
    def pack(cls, weight: Tensor) -> "ChannelMajorWeight":
        return cls((weight.t().contiguous(),))

    def unpack(self) -> Tensor:
        return self.storage[0].t()

    @property
    def skips_channels(self) -> bool:
        return True

    @property
    def shape(self) -> tuple[int, int]:
        k, n = self.storage[0].shape
        return n, k

    def sparse_gemv(self, x: Tensor, threshold: Tensor, bias: Tensor | None) -> Tensor:
        channels = keep_mask(x, threshold).any(dim=0).nonzero().squeeze(1)  # the union over the rows
        kept = drop_small(x, threshold).index_select(1, channels)
        return F.linear(kept, self.storage[0].index_select(0, channels).t(), bias)

    def dense_gemm(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, self.storage[0].t(), bias)
