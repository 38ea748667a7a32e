"""The static KV cache: allocated once, written in place, read up to where it is filled."""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from teal.engine.config import EngineConfig
from teal.errors import TealError

# Decode attends to a multiple of this many positions, so that views, masks and captured graphs change rarely.
EXTENT = 256


class BlockCache(NamedTuple):
    """Keys and values of one block, each [B, kv_heads, S, head_dim] in the model's dtype."""

    keys: torch.Tensor
    values: torch.Tensor


@dataclass(frozen=True, eq=False)
class KVCache:
    """The caches of all blocks for `context` positions of each of B sequences."""

    blocks: tuple[BlockCache, ...]
    context: int

    @classmethod
    def allocate(
        cls, config: EngineConfig, batch: int, context: int, dtype: torch.dtype, device: torch.device
    ) -> "KVCache":
        """A cache of zeros. Raises TealError if there is no memory for it."""
        shape = (batch, config.kv_heads, context, config.head_dim)
        try:
            blocks = tuple(
                BlockCache(*(torch.zeros(shape, dtype=dtype, device=device) for _ in range(2)))
                for _ in range(config.blocks)
            )
        except RuntimeError as error:  # torch's out-of-memory error is one, on every device
            gigabytes = 2 * config.blocks * torch.Size(shape).numel() * dtype.itemsize / 1e9
            raise TealError(
                f"no memory on {device} for a KV cache of {context} positions ({gigabytes:.1f} GB); "
                "ask for a shorter context"
            ) from error
        return cls(blocks, context)

    def up_to(self, length: int) -> "KVCache":
        """The first `length` positions, rounded up to a multiple of EXTENT, as views of this cache."""
        extent = min(self.context, whole_extents(length))
        blocks = (BlockCache(*(tensor[:, :, :extent] for tensor in block)) for block in self.blocks)
        return KVCache(tuple(blocks), extent)

    def clear(self) -> None:
        """Zero everything: masked positions count 0 times their value, which a NaN would survive."""
        for block in self.blocks:
            block.keys.zero_()
            block.values.zero_()


def whole_extents(length: int) -> int:
    """`length` rounded up to a multiple of EXTENT."""
    return -(-length // EXTENT) * EXTENT


def check_holds(context: int, prompt_tokens: int, new_tokens: int) -> None:
    """Raise TealError if prompt and continuation do not fit into `context` positions."""
    if prompt_tokens + new_tokens > context:
        raise TealError(
            f"{prompt_tokens} prompt and {new_tokens} new tokens do not fit into a context of {context}; "
            "ask for fewer, or load the model with a larger context"
        )
