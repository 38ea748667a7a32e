"""Random models of every family the engine has, in the variants that differ in arithmetic."""

from typing import Any

import torch
from helpers import tiny_model

ROPE = {"rope_theta": 10000.0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 160}

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-llama3-biases-untied": (
        "llama",
        {
            "rope_parameters": LLAMA3 | ROPE,
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": False,
        },
    ),
    "llama-yarn-tied": ("llama", {"rope_parameters": YARN | ROPE, "tie_word_embeddings": True}),
    "llama-linear": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0} | ROPE}),
    "mistral-window": ("mistral", {"sliding_window": 5}),
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2-window-in-some-blocks": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    ),
    "qwen3-wide-heads": ("qwen3", {"head_dim": 24}),
}


def random_model(name: str) -> Any:
    """A model of a variant in float32 with every parameter random, biases and norms too."""
    family, changes = VARIANTS[name]
    model = tiny_model(family, max_position_embeddings=640, **changes)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in parameter_name else 0.0, 0.25)
    return model
