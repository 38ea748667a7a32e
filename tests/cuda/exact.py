"""Inputs whose sums are exact in float32 in any order, and thresholds among them."""

import torch
from torch import Tensor

HALF, BRAIN = torch.float16, torch.bfloat16
INFINITY = float("inf")


def integers(*size: int, most: int = 9, parts: int = 1, dtype: torch.dtype) -> Tensor:
    return (torch.randint(-most, most + 1, size) / parts).to(dtype)


def threshold_of(name: str, x: Tensor, index: int) -> Tensor:
    magnitudes = x.abs().float()
    if name == "mixed":
        name = ("tie", "each", "zero")[index]
    if name == "each":
        threshold = magnitudes.clone()  # ties
        threshold[1::5] = -1.0
        threshold[2::5] = 0.0
        threshold[3::5] -= 0.125
        threshold[4::5] = INFINITY
        return threshold.roll(index)
    some = magnitudes[magnitudes > 0]
    tie = float(some.quantile(0.6, interpolation="nearest")) if len(some) else 0.0
    of_name = {
        "all": -1.0, "zero": 0.0, "tie": tie, "below-a-tie": tie * (1 - 2**-20),
        "none": float(magnitudes.max()), "infinite": INFINITY,
    }  # fmt: skip
    return torch.tensor(of_name[name])
