"""One side of a comparison in a process of its own: started with its task as JSON, obeys JSON lines on standard input.

Two OpenMP pools in one process would spin against each other. This folder, not the one above, is on the import
path, where benchmarks/llama_cpp.py would hide the package of that name.
"""

import ctypes
import importlib
import json
import math
import os
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

READ_BYTES = 1 << 29  # several times any last-level cache
READS = 3  # the fastest counts: the first one also wakes the threads


class Side(ABC):
    """A model with a prompt in its cache; decodes given tokens after it, always from the same position."""

    details: dict[str, Any]

    @abstractmethod
    def decode(self, tokens: Sequence[int]) -> float:
        """Seconds for all but the first token, which warms up; each step also chooses the likeliest next token."""

    @abstractmethod
    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        """Dense logits after each token, float32 [tokens, vocabulary]."""

    def select(self, level: float, sparse_head: bool) -> None:  # noqa: B027
        """Turn to a level; a side that is always dense has nothing to do."""

    def count(self, tokens: Sequence[int]) -> dict[str, Any]:
        """What decoding `tokens` at the chosen level reads, as far as this side knows."""
        return {}

    def bandwidth(self) -> float:
        """Bytes per second of a plain read by all threads."""
        raise NotImplementedError


class LlamaSide(Side):
    """llama.cpp through its C interface. The weights are read into memory of its own, not mapped."""

    def __init__(self, task: dict[str, Any]) -> None:
        self._api = api = importlib.import_module("llama_cpp")
        self._quiet = api.llama_log_callback(lambda *_: None)
        api.llama_log_set(self._quiet, None)
        api.llama_backend_init()
        model_settings = api.llama_model_default_params()
        model_settings.load_mode = api.LLAMA_LOAD_MODE_NONE
        model_settings.n_gpu_layers = 0
        self._model = api.llama_model_load_from_file(task["gguf"].encode(), model_settings)
        settings = api.llama_context_default_params()
        self._prompt: list[int] = task["prompt"]
        settings.n_ctx = task["context"]
        settings.n_batch = len(self._prompt)
        settings.n_threads = settings.n_threads_batch = task["threads"]
        self._context = self._model and api.llama_init_from_model(self._model, settings)
        if not self._context:
            raise RuntimeError(f"llama.cpp cannot load {task['gguf']}")
        self._memory = api.llama_get_memory(self._context)
        self._vocabulary = api.llama_vocab_n_tokens(api.llama_model_get_vocab(self._model))
        self._step(self._prompt)
        self.details = {
            "version": api.__version__,
            "build": api.llama_print_system_info().decode().strip(),
            "context": api.llama_n_ctx(self._context),
            "cache": "F16",
        }

    def decode(self, tokens: Sequence[int]) -> float:
        self._rewind()
        self._step(tokens[:1]).argmax()
        started = time.perf_counter()
        for token in tokens[1:]:
            self._step([token]).argmax()
        return time.perf_counter() - started

    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        self._rewind()
        return np.stack([self._step([token]).copy() for token in tokens])

    def _rewind(self) -> None:
        self._api.llama_memory_seq_rm(self._memory, 0, len(self._prompt), -1)

    def _step(self, tokens: Sequence[int]) -> np.ndarray:
        """Run tokens at the next positions; the logits of the last, as a view that the next step overwrites."""
        array = (self._api.llama_token * len(tokens))(*tokens)
        if self._api.llama_decode(self._context, self._api.llama_batch_get_one(array, len(tokens))):
            raise RuntimeError("llama_decode failed")
        pointer = self._api.llama_get_logits_ith(self._context, -1)
        return np.ctypeslib.as_array(ctypes.cast(pointer, ctypes.POINTER(ctypes.c_float)), (self._vocabulary,))


class TealSide(Side):
    """The teal engine on the same random weights; thresholds are quantiles of its activations on other tokens."""

    def __init__(self, task: dict[str, Any]) -> None:
        import torch
        from weights import SharedWeights

        from teal.benchmark import check_products
        from teal.engine.config import EngineConfig
        from teal.engine.generate import DecodeState
        from teal.engine.model import DecoderModel
        from teal.engine.sampling import Sampler, SamplingConfig
        from teal.linear import sparse_layers
        from teal.ops.native import new_tensor
        from teal.shapes import shape_config

        torch.set_num_threads(task["threads"])
        config = shape_config(task["shape"])
        weights = SharedWeights(config, task["seed"])

        def take(name: str, shape: tuple[int, ...]) -> torch.Tensor:
            return weights[name if name.startswith("lm_head.") else f"model.{name}"]

        quantization, head = (None if task[part] == "bf16" else task[part] for part in ("weights", "head"))
        chosen = replace(EngineConfig.of(config), quantization=quantization, head_quantization=head)
        self._engine = DecoderModel(chosen, take, task["context"]).eval()
        prompt = torch.tensor([task["prompt"]])
        self._start = prompt.shape[1]
        self._state = DecodeState.of(self._engine)
        self._cache = self._state.cache
        self._sampler = Sampler(SamplingConfig(), prompt, config.vocab_size)
        self._engine.prefill(prompt, self._state.cache)
        self._layers = sparse_layers(self._engine)
        self._inputs = self._observe(task["calibration"])
        self.select(max(task["levels"]), False)
        error = check_products(self._engine)
        self._buffer = new_tensor((READ_BYTES // 4,), torch.float32).fill_(1)
        self.details = {
            "version": torch.__version__,
            "layout": next(iter(self._layers.values())).packed.layout,
            "context": self._cache.context,
            "cache": _name(self._engine.dtype),
            "head": task["head"],
            "largest_relative_error": error,
        }

    def decode(self, tokens: Sequence[int]) -> float:
        self._state.position.fill_(self._start)
        self._choose(tokens[0])
        started = time.perf_counter()
        for token in tokens[1:]:
            self._choose(token)
        return time.perf_counter() - started

    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        self.select(0.0, False)
        self._state.position.fill_(self._start)
        rows = []
        for token in tokens:
            self._state.token.fill_(token)
            rows.append(self._engine.decode(self._state.token, self._state.position, self._cache)[0].float().numpy())
            self._state.position.add_(1)
        return np.stack(rows)

    def select(self, level: float, sparse_head: bool) -> None:
        """Set every projection's threshold to the level's quantile; a sparse head drops the same share."""
        self._engine.lm_head.set_sparsity(level if sparse_head else 0.0)
        for name, layer in self._layers.items():
            layer.set_threshold(_quantile(self._inputs[name], level))

    def count(self, tokens: Sequence[int]) -> dict[str, Any]:
        """The sparsity realised on `tokens`, and the bytes that one of them reads; not timed."""
        from teal.benchmark import bytes_per_token
        from teal.sparsity_meter import SparsityMeter

        meter = SparsityMeter(self._engine)
        with meter.measuring():
            self.decode(tokens)
        middle = self._start + len(tokens) // 2
        return {"sparsity": meter.sparsity(), "bytes": bytes_per_token(self._engine, meter.sparsity(), middle)[1]}

    def bandwidth(self) -> float:
        from teal.benchmark import read_bandwidth

        return max(read_bandwidth(self._buffer) for _ in range(READS))

    def _choose(self, token: int) -> int:
        from teal.engine.generate import decode_one_token

        self._state.token.fill_(token)
        return int(decode_one_token(self._engine, self._state, self._sampler, self._cache))

    def _observe(self, tokens: Sequence[int]) -> dict[str, Any]:
        """Sorted magnitudes of every projection's input over the decoded tokens."""
        seen: dict[str, list[Any]] = {name: [] for name in self._layers}
        for name, layer in self._layers.items():
            layer.observer = lambda x, rows=seen[name]: rows.append(x.float().abs().flatten())
        try:
            self.decode(tokens)
        finally:
            for layer in self._layers.values():
                layer.observer = None
        return {name: np.sort(np.concatenate([row.numpy() for row in rows])) for name, rows in seen.items()}


def _quantile(ordered: np.ndarray, level: float) -> float:
    """The threshold that drops `level` of the sorted magnitudes; level 0 drops nothing, not even zeros."""
    return float(ordered[math.ceil(level * len(ordered)) - 1]) if level > 0 else -1.0


def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


SIDES: dict[str, Callable[[dict[str, Any]], Side]] = {"llama.cpp": LlamaSide, "teal": TealSide}


def obey(side: Side, request: dict[str, Any]) -> dict[str, Any]:
    """One request: `decode` or `count` tokens at a level, save the `logits` after them, or measure the `bandwidth`."""
    if request["do"] == "logits":
        np.save(request["path"], side.logits(request["tokens"]))
        return {}
    if request["do"] == "bandwidth":
        return {"bandwidth": side.bandwidth()}
    side.select(request["level"], request["sparse_head"])
    if request["do"] == "count":
        return side.count(request["tokens"])
    before = time.process_time()
    seconds = side.decode(request["tokens"])
    return {"seconds": seconds, "processor_seconds": time.process_time() - before}


def main() -> None:
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints must not mix with the replies
    task = json.loads(sys.argv[1])

    def reply(**content: Any) -> None:
        print(json.dumps(content), file=replies, flush=True)

    try:
        side = SIDES[task["side"]](task)
        reply(**side.details)
        for line in sys.stdin:
            reply(**obey(side, json.loads(line)))
    except Exception as error:
        reply(error=f"{type(error).__name__}: {error}")
        raise SystemExit(1) from error


if __name__ == "__main__":
    main()
