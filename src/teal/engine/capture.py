"""One decode step as a CUDA graph: it starts with a single launch, and the host is free meanwhile."""

import torch
from torch import Tensor

from teal.engine.cache import KVCache
from teal.engine.cuda_step import CudaDecodeStep
from teal.engine.model import DecoderModel


class CapturedDecode:
    """`DecoderModel.decode` over static buffers: token [1] and position [1] (int64) -> logits [1, vocabulary].

    Positions may grow and thresholds may change in place without another capture; where tensors were replaced
    (thresholds of another shape, another cache), the next call captures anew.
    """

    def __init__(self, engine: DecoderModel, token: Tensor, position: Tensor, cache: KVCache) -> None:
        self._engine, self._token, self._position, self._cache = engine, token, position, cache
        self._graph: torch.cuda.CUDAGraph | None = None
        self._logits = token  # until the first capture

    @classmethod
    def of(cls, engine: DecoderModel, token: Tensor, position: Tensor, cache: KVCache) -> "CapturedDecode | None":
        """None where the model's decode step cannot be captured or the batch is not one sequence."""
        if token.shape[0] == 1 and isinstance(engine.decode_step, CudaDecodeStep):
            return cls(engine, token, position, cache)
        return None

    @torch.inference_mode()
    def __call__(self) -> Tensor:
        """Run the token; the logits are overwritten by the next call. Nothing waits for the host."""
        step = self._engine.decode_step
        assert isinstance(step, CudaDecodeStep)
        changed = step.refresh(self._engine.blocks, self._cache)
        if step.observed:
            return self._decode()
        if changed or self._graph is None:
            self._capture()
        assert self._graph is not None
        self._graph.replay()
        return self._logits

    def _decode(self) -> Tensor:
        return self._engine.decode(self._token, self._position, self._cache)

    def _capture(self) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # libraries allocate what they need before the capture
            self._decode()
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._logits = self._decode()
