"""The decode engine: Hugging Face checkpoints, dense prefill, sparse decode over a static KV cache."""

from teal.engine.generate import DecodeState, Generation, GenerationResult, decode_tokens, generate
from teal.engine.load import load_engine
from teal.engine.sampling import SamplingConfig
from teal.engine.text import encode_chat, encode_prompt

__all__ = [
    "DecodeState",
    "Generation",
    "GenerationResult",
    "SamplingConfig",
    "decode_tokens",
    "encode_chat",
    "encode_prompt",
    "generate",
    "load_engine",
]
