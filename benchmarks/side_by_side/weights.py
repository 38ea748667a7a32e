"""The weights that both sides get: random, and scaled so that rounding them changes a model's output only a little."""

import math
from typing import Any

import torch
from torch import Tensor

from teal.shapes import RandomWeights

# With one deviation for all matrices each block drowns what came before, and a network of such blocks amplifies any
# rounding: int4 logits of two right implementations correlated by 0.49. As in a trained model, blocks now add to
# what is there. Powers of two are exact.
EMBEDDING_SCALE = 2.0**5


class SharedWeights:
    """`RandomWeights` of a transformers config in bfloat16, embedding and outputs of a block's two halves scaled;
    `shapes` by name."""

    def __init__(self, config: Any, seed: int) -> None:
        self._weights = RandomWeights(config, torch.bfloat16, seed)
        self.shapes = self._weights.shapes
        scale = output_scale(config.hidden_size, config.intermediate_size, config.num_hidden_layers)
        self._scales = {"embed_tokens": EMBEDDING_SCALE, "o_proj": scale, "down_proj": scale}

    def __getitem__(self, name: str) -> Tensor:
        weight = self._weights[name]
        scale = self._scales.get(name.split(".")[-2], 1.0) if weight.ndim > 1 else 1.0
        return weight.mul_(scale)


def output_scale(hidden: int, intermediate: int, blocks: int) -> float:
    """Llama-3.2-1B's 1/8, less for shapes whose blocks would add more: what an MLP adds grows with the width of its
    input and the root of its own, what all blocks add with the root of their number."""
    growth = hidden / 2048 * math.sqrt(intermediate / 8192 * blocks / 16)
    return 2.0 ** (-3 - max(0, round(math.log2(growth))))
