"""ActivationStatistics: the exact distribution of |x| at every distinct input of every block."""

import math
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from teal.artifacts import check_header, check_keys, read_tensors, write_tensors
from teal.errors import TealError
from teal.ops.reference import KEEP_ALL
from teal.structure import INPUTS, ModelIdentity

FORMAT = "teal.statistics"
VERSION = 1
BINS = 1 << 15  # one for each bf16 magnitude
FIRST_NON_FINITE = 0x7F80


@dataclass
class InputStatistics:
    """One input of one block. `counts` [BINS] int64: how often each bf16 magnitude occurred.

    `sum` and `sum_of_squares` [K] float64: per channel, of the signed values. `tokens`: rows counted.
    """

    counts: Tensor
    sum: Tensor
    sum_of_squares: Tensor
    tokens: int = 0

    @classmethod
    def empty(cls, channels: int) -> "InputStatistics":
        zeros = torch.zeros(channels, dtype=torch.float64, device="cpu")
        return cls(torch.zeros(BINS, dtype=torch.int64, device="cpu"), zeros, zeros.clone())

    def add(self, x: Tensor) -> None:
        """Count activations x [..., K]. Values that are no bf16 round to one first.

        Raises TealError if x holds NaN or infinity; nothing is counted then.
        """
        x = x.detach().reshape(-1, x.shape[-1])
        magnitudes = x.to(torch.bfloat16).contiguous().view(torch.int16).to(torch.int32) & (BINS - 1)
        counts = torch.bincount(magnitudes.flatten(), minlength=BINS).cpu()
        if bad := int(counts[FIRST_NON_FINITE:].sum()):
            raise TealError(f"{bad} of {x.numel()} activations are NaN or infinite")
        self.counts += counts
        wide = x.double()
        self.sum += wide.sum(0).cpu()
        self.sum_of_squares += wide.square().sum(0).cpu()
        self.tokens += x.shape[0]

    def threshold(self, sparsity: float) -> float:
        """The upper edge of the smallest bin whose cumulative share reaches `sparsity`; KEEP_ALL at 0.

        Dropping |x| <= threshold drops at least that share of the counted values, and the fewest that do.
        Raises TealError if nothing was counted.
        """
        if sparsity <= 0:
            return KEEP_ALL
        cumulative = self.counts.cumsum(0)
        total = int(cumulative[-1])
        if total == 0:
            raise TealError("no activations were counted; calibrate on more text")
        wanted = max(1, math.ceil(sparsity * total - 1e-6))
        return upper_edge(int(torch.searchsorted(cumulative, wanted)))

    def sparsity(self, threshold: float) -> float:
        """Share of the counted values with |x| <= threshold, whole bins."""
        edges = torch.arange(FIRST_NON_FINITE, dtype=torch.int32).bitwise_left_shift(16).view(torch.float32)
        below = int((edges <= threshold).sum())
        return float(self.counts[:below].sum()) / max(1, int(self.counts.sum()))


def upper_edge(bin_index: int) -> float:
    """The largest float32 that rounds into the bin: half a bf16 step above its value; ties round to even bins."""
    half_step = 0x7FFF if bin_index & 1 else 0x8000
    return struct.unpack("<f", struct.pack("<I", bin_index << 16 | half_step))[0]


@dataclass
class ActivationStatistics:
    """Statistics of every distinct input of every block of one model.

    `blocks[b][input]` is the InputStatistics of input ("attention_input", "attention_output", "mlp_input",
    "mlp_intermediate") of block b. The first `dense_tokens` positions of each block of text are not counted.
    `details` says what text went in (for people, not read back).
    """

    identity: ModelIdentity
    dense_tokens: int
    blocks: list[dict[str, InputStatistics]]
    details: dict[str, Any] = field(default_factory=dict)

    def check_merges(self, identity: ModelIdentity, dense_tokens: int) -> None:
        """Raise TealError unless statistics of `identity` and `dense_tokens` can be added to these."""
        identity.check_fits(self.identity, "the other statistics")
        if self.identity.weights != identity.weights:
            raise TealError("the statistics are of different weights and cannot be added")
        if self.dense_tokens != dense_tokens:
            raise TealError(
                f"the statistics skip {self.dense_tokens} and {dense_tokens} dense tokens and cannot be added"
            )

    def merge(self, other: "ActivationStatistics") -> "ActivationStatistics":
        """The statistics of both texts together. Raises TealError if they are not of one model and token rule."""
        self.check_merges(other.identity, other.dense_tokens)
        blocks = [
            {
                name: InputStatistics(
                    mine.counts + theirs[name].counts,
                    mine.sum + theirs[name].sum,
                    mine.sum_of_squares + theirs[name].sum_of_squares,
                    mine.tokens + theirs[name].tokens,
                )
                for name, mine in block.items()
            }
            for block, theirs in zip(self.blocks, other.blocks, strict=True)
        ]
        parts = [*self.details.get("merged", [self.details]), *other.details.get("merged", [other.details])]
        return ActivationStatistics(self.identity, self.dense_tokens, blocks, {"merged": parts})

    def save(self, path: str | Path) -> None:
        """Write as safetensors, atomically."""
        tensors = {}
        for index, block in enumerate(self.blocks):
            tensors.update(block_tensors(index, block))
        header = {
            "format": FORMAT, "version": VERSION, "model": self.identity.to_json(),
            "dense_tokens": self.dense_tokens, "details": self.details,
        }  # fmt: skip
        write_tensors(Path(path), tensors, header)

    @classmethod
    def load(cls, path: str | Path) -> "ActivationStatistics":
        """Read statistics. Raises TealError for a file that is not one, is damaged or from a newer version."""
        tensors, header = read_tensors(Path(path))
        check_header(header, FORMAT, VERSION, path)
        keys = ("format", "version", "model", "dense_tokens", "details")
        check_keys(header, keys, path, keys)
        identity = ModelIdentity.from_json(header["model"], path)
        try:
            blocks = [
                {name: from_tensors(tensors, index, name) for name in INPUTS} for index in range(len(identity.shapes))
            ]
            statistics = cls(identity, int(header["dense_tokens"]), blocks, dict(header["details"]))
        except KeyError as error:
            raise TealError(f"{path} lacks tensor {error}; it is damaged, calibrate again") from None
        except (TypeError, ValueError, RuntimeError) as error:
            raise TealError(f"{path} is damaged ({error}); calibrate again") from None
        if unknown := sorted(
            set(tensors) - {name for i, block in enumerate(blocks) for name in block_tensors(i, block)}
        ):
            raise TealError(f"{path} has unknown tensors, e.g. {unknown[0]}; was it written by a newer teal?")
        for index, block in enumerate(blocks):
            for name, channels in identity.input_features(index).items():
                _check(block[name], channels, f"{path}, block {index} {name}")
        return statistics


def _check(entry: InputStatistics, channels: int, where: str) -> None:
    sums = (entry.sum, entry.sum_of_squares)
    if not all(values.isfinite().all() for values in sums):
        raise TealError(f"{where} holds NaN or infinity; it is damaged, calibrate again")
    if any(values.shape != (channels,) for values in sums):
        raise TealError(
            f"{where} has {entry.sum.numel()} channels, its model {channels}; it is damaged, calibrate again"
        )
    if entry.counts.shape != (BINS,) or entry.counts.dtype != torch.int64 or (entry.counts < 0).any():
        raise TealError(f"{where} holds no histogram; it is damaged, calibrate again")


def block_tensors(index: int, block: dict[str, InputStatistics]) -> dict[str, Tensor]:
    """The statistics of one block as named tensors, the way files hold them."""
    tensors = {}
    for name, entry in block.items():
        prefix = f"{index}.{name}"
        tensors[f"{prefix}.counts"] = entry.counts
        tensors[f"{prefix}.sum"] = entry.sum
        tensors[f"{prefix}.sum_of_squares"] = entry.sum_of_squares
        tensors[f"{prefix}.tokens"] = torch.tensor(entry.tokens)
    return tensors


def from_tensors(tensors: dict[str, Tensor], index: int, name: str) -> InputStatistics:
    """One input's statistics out of the tensors of a file. Raises KeyError for a missing one."""
    prefix = f"{index}.{name}"
    return InputStatistics(
        tensors[f"{prefix}.counts"],
        tensors[f"{prefix}.sum"],
        tensors[f"{prefix}.sum_of_squares"],
        int(tensors[f"{prefix}.tokens"]),
    )
