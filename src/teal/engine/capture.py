"""One decoded token as a CUDA graph: it starts with a single launch, and the host is free meanwhile."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from teal.engine.cache import KVCache
from teal.engine.decode_step import WholeTokenStep
from teal.engine.model import DecoderModel


class CapturedToken:
    """`run`, which decodes one token of `engine` over static buffers and a `cache`, as a graph.

    Positions may grow and thresholds may change in place without another capture; where tensors were replaced
    (thresholds of another shape, another cache) or the head's sparsity changed, the next call captures anew. Before a
    capture `run` is called once to warm up; `buffers` are what it changes, and get their values back.
    """

    def __init__(
        self, engine: DecoderModel, cache: KVCache, buffers: Sequence[Tensor], run: Callable[[], Tensor]
    ) -> None:
        self._engine, self._cache, self._buffers, self._run = engine, cache, buffers, run
        self._graph: torch.cuda.CUDAGraph | None = None
        self._result: Tensor | None = None
        self._captured: tuple[int, float] | None = None  # revision of the step's launches, sparsity of the head

    @staticmethod
    def serves(engine: DecoderModel, batch: int) -> bool:
        """Whether the model's decode step can be captured."""
        return batch == 1 and engine.device.type == "cuda" and isinstance(engine.decode_step, WholeTokenStep)

    @torch.inference_mode()
    def __call__(self) -> Tensor:
        """Run the token; the next call overwrites what `run` returned. Nothing waits for the host."""
        step = self._engine.decode_step
        assert isinstance(step, WholeTokenStep)
        now = step.refresh(self._engine.blocks, self._cache), self._engine.lm_head.sparsity
        if step.observed:
            return self._run()
        with torch.accelerator.device_index(self._engine.device.index):
            if now != self._captured:
                self._capture()
                self._captured = now
            assert self._graph is not None
            assert self._result is not None
            self._graph.replay()
            return self._result

    def _capture(self) -> None:
        before = [buffer.clone() for buffer in self._buffers]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # libraries allocate what they need before the capture
            self._run()
        torch.cuda.current_stream().wait_stream(stream)
        for buffer, value in zip(self._buffers, before, strict=True):
            buffer.copy_(value)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):  # torch's own is of the first device that captured
            result = self._run()
        self._graph, self._result = graph, result
