"""Real model shapes with random weights, for measurements that need sizes and no quality."""

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from teal.blockwalk import compute_buffers
from teal.checkpoint import check_memory
from teal.errors import UsageError
from teal.structure import ModelStructure

if TYPE_CHECKING:
    from teal.engine.model import DecoderModel

_LLAMA3_ROPE = {"rope_type": "default", "rope_theta": 500000.0}

# From the models' published config.json files: transformers model type and what differs from its defaults.
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-3.2-1b": ("llama", dict(
        vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
        num_key_value_heads=8, head_dim=64, tie_word_embeddings=True, rope_parameters=_LLAMA3_ROPE)),
    "llama-3.2-3b": ("llama", dict(
        vocab_size=128256, hidden_size=3072, intermediate_size=8192, num_hidden_layers=28, num_attention_heads=24,
        num_key_value_heads=8, head_dim=128, tie_word_embeddings=True, rope_parameters=_LLAMA3_ROPE)),
    "llama-2-7b": ("llama", dict(
        vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=32)),
    "llama-2-13b": ("llama", dict(
        vocab_size=32000, hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40,
        num_key_value_heads=40)),
    "llama-2-70b": ("llama", dict(
        vocab_size=32000, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
        num_key_value_heads=8)),
    "llama-3-8b": ("llama", dict(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, rope_parameters=_LLAMA3_ROPE)),
    "llama-3-70b": ("llama", dict(
        vocab_size=128256, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
        num_key_value_heads=8, rope_parameters=_LLAMA3_ROPE)),
    "mistral-7b": ("mistral", dict(
        vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, sliding_window=None)),
    "qwen2-7b": ("qwen2", dict(
        vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
        num_key_value_heads=4)),
    "qwen3-8b": ("qwen3", dict(
        vocab_size=151936, hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128)),
}  # fmt: skip

_PERIOD = 16_777_213  # a prime: no two rows or columns of a weight repeat


def shape_config(name: str) -> Any:
    """The transformers config of a named shape. Raises UsageError for an unknown name."""
    from transformers import AutoConfig

    if name not in SHAPES:
        raise UsageError(f"unknown shape {name!r}; choose from {', '.join(SHAPES)}")
    model_type, fields = SHAPES[name]
    return AutoConfig.for_model(model_type, max_position_embeddings=8192, **fields)


def shape_structure(name: str) -> ModelStructure:
    """The structure of a named shape, without weights."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return ModelStructure.of(AutoModelForCausalLM.from_config(shape_config(name)))


class RandomWeights:
    """Random weights of `config` by name: standard deviation 0.02, norms and biases of 1; a tied head is not listed.

    Tensors are made when asked for, so a model need not fit into memory twice. `shapes` has their names.
    """

    def __init__(
        self, config: Any, dtype: torch.dtype = torch.bfloat16, seed: int = 0, device: str | torch.device = "cpu"
    ) -> None:
        from transformers import AutoModelForCausalLM

        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(config)
        self.shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        values = torch.randn(_PERIOD, generator=torch.Generator().manual_seed(seed)).mul_(0.02)
        self._values = values.to(device, dtype)
        self._offsets, offset = {}, 0
        for name, shape in self.shapes.items():
            self._offsets[name] = offset
            if len(shape) > 1:
                offset = (offset + math.prod(shape)) % _PERIOD

    def __getitem__(self, name: str) -> torch.Tensor:
        weight = torch.ones(self.shapes[name], dtype=self._values.dtype, device=self._values.device)
        if weight.ndim > 1:
            _tile(weight.view(-1), self._values, self._offsets[name])
        return weight


def random_engine(
    name: str,
    context: int,
    dtype: torch.dtype = torch.bfloat16,
    device: str | torch.device = "cpu",
    *,
    quantization: str | None = None,
    head_quantization: str | None = None,
) -> "DecoderModel":
    """The engine on `RandomWeights` of a named shape, one tensor in memory at a time beside what is packed."""
    from teal.engine.config import EngineConfig
    from teal.engine.model import DecoderModel

    config = shape_config(name)
    check_memory(EngineConfig.of(config).weights * dtype.itemsize, device)
    weights = RandomWeights(config, dtype, device=device)

    def take(tensor: str, shape: tuple[int, ...]) -> torch.Tensor:
        return weights[tensor if tensor.startswith("lm_head.") else f"model.{tensor}"]

    chosen = replace(EngineConfig.of(config), quantization=quantization, head_quantization=head_quantization)
    return DecoderModel(chosen, take, context).eval()


def random_model(config: Any, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Any:
    """A transformers model of `config` with `RandomWeights`."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
    compute_buffers(model)
    weights = RandomWeights(config, dtype, seed)
    for name in weights.shapes:
        module, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(module), attribute, torch.nn.Parameter(weights[name], requires_grad=False))
    model.tie_weights()
    return model.eval()


def _tile(flat: torch.Tensor, values: torch.Tensor, offset: int) -> None:
    position = 0
    while position < len(flat):
        count = min(len(values) - offset, len(flat) - position)
        flat[position : position + count] = values[offset : offset + count]
        position, offset = position + count, 0
