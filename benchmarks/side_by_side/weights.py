"""The weights that both sides get: random, and scaled so that rounding them changes a model's output only a little."""

from typing import Any

import torch
from torch import Tensor

from teal.shapes import RandomWeights

# With one deviation for all matrices each block drowns what came before, and a network of such blocks amplifies any
# rounding: int4 logits of two right implementations correlated by 0.49. As in a trained model, blocks now add to
# what is there. Powers of two are exact.
SCALES = {"embed_tokens": 2.0**5, "o_proj": 2.0**-3, "down_proj": 2.0**-3}


class SharedWeights:
    """`RandomWeights` of a transformers config in bfloat16, scaled by `SCALES`; `shapes` by name."""

    def __init__(self, config: Any, seed: int) -> None:
        self._weights = RandomWeights(config, torch.bfloat16, seed)
        self.shapes = self._weights.shapes

    def __getitem__(self, name: str) -> Tensor:
        weight = self._weights[name]
        scale = SCALES.get(name.split(".")[-2], 1.0) if weight.ndim > 1 else 1.0
        return weight.mul_(scale)
