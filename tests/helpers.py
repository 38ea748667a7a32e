"""Tiny models, plans and tokenizers for tests; nothing here reads a file."""

import json
import os
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from teal.blockwalk import BlockSource
from teal.ops.reference import KEEP_ALL, drop_small
from teal.plan import ProjectionPlan, SparsityPlan
from teal.shapes import shape_config
from teal.structure import ModelIdentity, ModelStructure, Projection, identify

BEGIN, END = 0, 1  # ids of <s> and </s>; byte values follow from 2 on
VOCABULARY = 2 + 256
LEVELS = (0.0, 0.25, 0.5, 0.75)

SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,  # wide enough for greedy tokens to vary
    "bos_token_id": BEGIN,
    "eos_token_id": END,
    "pad_token_id": END,
}
VISION = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "image_size": 28, "patch_size": 14,
}  # fmt: skip
FAMILIES: dict[str, tuple[type, dict[str, Any]]] = {
    "llama": (LlamaConfig, {}),
    "mistral": (MistralConfig, {"sliding_window": 16}),
    "qwen2": (Qwen2Config, {}),
    "qwen3": (Qwen3Config, {}),
    "gemma2": (Gemma2Config, {"query_pre_attn_scalar": 8, "sliding_window": 16}),
    "gemma3_text": (Gemma3TextConfig, {"query_pre_attn_scalar": 8, "sliding_window": 16}),
    "gemma3": (Gemma3Config, {}),
    "phi3": (Phi3Config, {}),
}


def tiny_config(family: str = "llama", **changes: Any) -> Any:
    """The transformers config of a tiny model of `family`; `changes` override its text sizes."""
    kind, extra = FAMILIES[family]
    if family == "gemma3":
        text = {**SIZES, "query_pre_attn_scalar": 8, "sliding_window": 16, **changes}
        tokens = {"boi_token_index": 2, "eoi_token_index": 3, "image_token_index": 4}
        return Gemma3Config(text_config=text, vision_config=dict(VISION), mm_tokens_per_image=1, **tokens)
    return kind(**{**SIZES, **extra, **changes})


def tiny_model(family: str = "llama", *, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A random model of `family` in evaluation mode."""
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(tiny_config(family, **changes), dtype=dtype).eval()


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte of UTF-8, each text opened by <s>."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {
        "<s>": BEGIN,
        "</s>": END,
        **{symbol: index for index, symbol in enumerate(alphabet, start=2)},
    }
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BEGIN)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>")


def save_tiny(directory: Path, family: str = "llama", **options: Any) -> Path:
    """Write a tiny model (see `tiny_model`) and the byte tokenizer as a Hugging Face directory."""
    tiny_model(family, **options).save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return directory


def random_tokens(rows: int = 1, length: int = 16, seed: int = 0) -> Tensor:
    """Token ids [rows, length], opened by <s>."""
    ids = torch.randint(2, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))
    ids[:, 0] = BEGIN
    return ids


def projection_inputs(model: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    """|x| that enters each block projection of a dense `model` on `ids`, flat, by module name."""
    inputs: dict[str, Tensor] = {}

    def record(name: str) -> Any:
        def hook(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            inputs[name] = arguments[0].detach().abs().float().flatten()

        return hook

    with ExitStack() as stack, torch.no_grad():
        for name, module, _, _ in _projection_modules(model):
            stack.callback(module.register_forward_pre_hook(record(name)).remove)
        model(input_ids=ids, use_cache=False)
    return inputs


def tiny_plan(model: nn.Module, levels: tuple[float, ...] = LEVELS, seed: int = 7) -> SparsityPlan:
    """A uniform plan of a dense `model`: the thresholds are quantiles of |x| on a few random tokens."""
    structure = ModelStructure.of(model)
    inputs = projection_inputs(model, random_tokens(4, 32, seed))
    blocks: list[dict[str, ProjectionPlan]] = [{} for _ in structure.blocks]
    for index, projection in structure.projections():
        values = inputs[structure.module_name(index, projection)]
        thresholds = tuple(float(values.quantile(level)) if level else KEEP_ALL for level in levels)
        blocks[index][projection.name] = ProjectionPlan(levels, thresholds)
    return SparsityPlan(identify(model, structure), "uniform", levels, tuple(blocks))


def random_plan(
    identity: ModelIdentity, levels: tuple[float, ...] = LEVELS, *, vectors: bool = False, seed: int = 0
) -> SparsityPlan:
    """A plan with rising random thresholds for any shapes; with `vectors` one per channel, and compensations."""
    generator = torch.Generator().manual_seed(seed)

    def plan(n: int, k: int) -> ProjectionPlan:
        rising = torch.rand(len(levels), generator=generator).cumsum(0).tolist()
        thresholds = tuple(value if level else KEEP_ALL for level, value in zip(levels, rising, strict=True))
        if not vectors:
            return ProjectionPlan(levels, thresholds)
        channels = torch.tensor(thresholds)[:, None] / (torch.rand(k, generator=generator) + 0.5)
        return ProjectionPlan(levels, channels, torch.randn(len(levels), n, generator=generator))

    blocks = tuple({name: plan(n, k) for name, (n, k) in block.items()} for block in identity.shapes)
    return SparsityPlan(identity, "weighted" if vectors else "uniform", levels, blocks)


class MaskedByHand:
    """Within the context a dense `model` drops small projection inputs as `plan` at `level` says.

    The hooks know nothing of SparseLinear: one token is masked by `ops.reference`, several are left alone.
    """

    def __init__(self, model: nn.Module, plan: SparsityPlan, level: float) -> None:
        self.model, self.settings = model, plan.settings(level)
        self._hooks: list[Any] = []

    def __enter__(self) -> None:
        for _, module, index, projection in _projection_modules(self.model):
            threshold = torch.as_tensor(self.settings[index][projection.name].threshold)
            self._hooks.append(module.register_forward_pre_hook(_mask(threshold)))

    def __exit__(self, *exception: object) -> None:
        for hook in self._hooks:
            hook.remove()


def _mask(threshold: Tensor) -> Any:
    def hook(module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor]:
        (x,) = arguments
        return (drop_small(x, threshold) if x.shape[-2] == 1 else x,)

    return hook


def _projection_modules(model: nn.Module) -> Iterable[tuple[str, nn.Module, int, Projection]]:
    structure = ModelStructure.of(model)
    for index, projection in structure.projections():
        name = structure.module_name(index, projection)
        yield name, model.get_submodule(name), index, projection


@torch.no_grad()
def decode_logits(model: nn.Module, ids: Tensor, prompt: int = 5) -> Tensor:
    """Logits [rows, length - prompt, V] of decoding `ids` one by one after a prompt of `prompt` tokens."""
    output = model(input_ids=ids[:, :prompt], use_cache=True)
    steps = []
    for position in range(prompt, ids.shape[1]):
        output = model(
            input_ids=ids[:, position : position + 1], past_key_values=output.past_key_values, use_cache=True
        )
        steps.append(output.logits[:, -1].float())
    return torch.stack(steps, dim=1)


def generate(model: Any, ids: Tensor, tokens: int = 12, **options: Any) -> Tensor:
    """Greedy continuation [rows, tokens] of unpadded `ids`; end-of-text does not stop it."""
    options = {"do_sample": False, "min_new_tokens": tokens, "max_new_tokens": tokens, **options}
    with torch.no_grad():
        output = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    return output[:, ids.shape[1] :]


def shared_data(*parts: str) -> Path:
    """A path in the optional test data, the directory $TEAL_TEST_DATA. Skips the test if it is absent."""
    directory = os.environ.get("TEAL_TEST_DATA")
    path = Path(directory or "").joinpath(*parts)
    if directory is None or not path.exists():
        pytest.skip(f"test data {'/'.join(parts)} is absent; set TEAL_TEST_DATA to its directory")
    return path


class Interrupted(KeyboardInterrupt):
    """Of a test."""


def interrupted_after(source: BlockSource, blocks: int, monkeypatch: pytest.MonkeyPatch) -> BlockSource:
    """`source`, which fails when block number `blocks` is asked for."""
    block = source.block

    def failing(index: int) -> Any:
        if index == blocks:
            raise Interrupted
        return block(index)

    monkeypatch.setattr(source, "block", failing)
    return source


def random_checkpoint(directory: Path, name: str) -> int:
    """Write a sharded checkpoint of a real shape, tensor by tensor, with the byte tokenizer. Returns its bytes."""
    config = shape_config(name)
    config.dtype = torch.bfloat16
    config.save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    names = [name for name in model.state_dict() if name != "lm_head.weight"]  # tied
    generator = torch.Generator().manual_seed(0)
    index: dict[str, str] = {}
    for number, name in enumerate(names):
        shape = model.get_parameter(name).shape
        tensor = torch.ones(shape, dtype=torch.bfloat16)
        if tensor.ndim > 1:
            tensor = torch.randn(shape, dtype=torch.bfloat16, generator=generator) * 0.02
        index[name] = f"model-{number:05}.safetensors"
        save_file({name: tensor}, directory / index[name], metadata={"format": "pt"})
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return sum(file.stat().st_size for file in directory.glob("*.safetensors"))
