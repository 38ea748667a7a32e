"""Generate: prefill, decode one token, decode tokens, generate text, each built on the one before."""

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from teal.engine.cache import KVCache, check_holds, whole_extents
from teal.engine.capture import CapturedToken
from teal.engine.model import DecoderModel
from teal.engine.sampling import Sampler, SamplingConfig
from teal.engine.text import Detokenizer, StopStrings
from teal.errors import TealError, UsageError
from teal.ops import cuda_greedy

_INVALID = -1  # what the host reads for a token whose logits are not finite


@dataclass(eq=False)
class DecodeState:
    """The static buffers of a decode: KV cache, the next `token` [B] and its `position` [B], both int64.

    `captured` holds what runs as a graph over them, where device and model allow it. One generation at a time may
    use a state; the next one overwrites it.
    """

    cache: KVCache
    token: Tensor
    position: Tensor
    captured: dict[str, CapturedToken] = field(default_factory=dict, init=False)
    in_use: bool = field(default=False, init=False)

    @classmethod
    def of(cls, engine: DecoderModel, batch: int = 1, context: int | None = None) -> "DecodeState":
        """Buffers for `batch` sequences of up to `context` positions (the engine's, if None)."""
        token, position = (torch.zeros(batch, dtype=torch.int64, device=engine.device) for _ in range(2))
        return cls(engine.new_cache(batch, context), token, position)


@dataclass(frozen=True)
class GenerationResult:
    """A finished generation.

    `token_ids` includes the end-of-text token, `text` excludes it and the stop string. `finish_reason` is
    "stop" (end of text or a stop string) or "length". `prefill_seconds` lasts until the first token is read,
    `decode_seconds` from there to the last.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    prompt_tokens: int
    prefill_seconds: float
    decode_seconds: float

    @property
    def decode_tokens(self) -> int:
        """Tokens that decode steps gave: all but the first, which prefill gives."""
        return len(self.token_ids) - 1

    @property
    def decode_tokens_per_second(self) -> float:
        """0 if there was nothing to decode."""
        return self.decode_tokens / self.decode_seconds if self.decode_tokens else 0.0


def prefill(engine: DecoderModel, state: DecodeState, sampler: Sampler, prompt: Tensor) -> Tensor:
    """Run prompt [B, T] densely and choose the first new token; returns what the host may read [B]."""
    logits = engine.prefill(prompt, state.cache)
    state.position.fill_(prompt.shape[1])
    return _choose(logits, state, sampler)


def decode_one_token(engine: DecoderModel, state: DecodeState, sampler: Sampler, cache: KVCache) -> Tensor:
    """Run the state's token and choose the next; returns what the host may read [B].

    `cache` is the state's or views of its first positions. All on the device and on static buffers, so that it runs
    as one graph where it can: whole if the choice is greedy, up to the logits if the sampler has a state of its own.
    """
    if not CapturedToken.serves(engine, state.token.shape[0]):
        return _choose(_decode(engine, state, cache), state, sampler)
    if sampler.is_greedy:
        return _captured(engine, state, "token", lambda: _choose(_decode(engine, state, state.cache), state, sampler))
    return _choose(_captured(engine, state, "logits", lambda: _decode(engine, state, state.cache)), state, sampler)


def _decode(engine: DecoderModel, state: DecodeState, cache: KVCache) -> Tensor:
    logits = engine.decode(state.token, state.position, cache)
    state.position.add_(1)
    return logits


def _captured(engine: DecoderModel, state: DecodeState, name: str, run: Callable[[], Tensor]) -> Tensor:
    if name not in state.captured:
        state.captured[name] = CapturedToken(engine, state.cache, (state.token, state.position), run)
    return state.captured[name]()


def _choose(logits: Tensor, state: DecodeState, sampler: Sampler) -> Tensor:
    if sampler.is_greedy and cuda_greedy.serves(logits):
        return cuda_greedy.choose(logits, state.token, _INVALID)
    state.token.copy_(sampler(logits))
    return torch.where(logits.sum(dim=-1, dtype=torch.float32).isfinite(), state.token, _INVALID)


def decode_tokens(
    engine: DecoderModel,
    prompt_ids: Sequence[int],
    max_new_tokens: int,
    sampling: SamplingConfig | None = None,
    *,
    ignore_eos: bool = False,
    state: DecodeState | None = None,
) -> Generator[int, None, None]:
    """The tokens that follow a prompt, the end-of-text token included, at most `max_new_tokens`.

    On an accelerator the step of token t + 1 runs while the host reads token t. `state` None allocates
    buffers for this request alone; a state kept between calls saves that.
    Raises, before anything is computed, UsageError for an empty prompt or ids outside the vocabulary and
    TealError if prompt and new tokens do not fit into the context; TealError if logits are not finite.
    """
    _check_request(engine, prompt_ids, max_new_tokens)
    if state is None:
        check_holds(engine.context, len(prompt_ids), max_new_tokens)
        extent = whole_extents(len(prompt_ids) + max_new_tokens)
        state = DecodeState.of(engine, context=min(engine.context, extent))
    check_holds(state.cache.context, len(prompt_ids), max_new_tokens)
    prompt = torch.tensor([list(prompt_ids)], device=engine.device)
    sampler = Sampler(sampling or SamplingConfig(), prompt, engine.config.vocab_size)
    ends = () if ignore_eos else engine.config.eos_token_ids
    return _read_tokens(_launch_tokens(engine, state, sampler, prompt, max_new_tokens), state, ends)


def _check_request(engine: DecoderModel, prompt_ids: Sequence[int], max_new_tokens: int) -> None:
    if not prompt_ids:
        raise UsageError("the prompt is empty; give at least one token")
    if max_new_tokens < 1:
        raise UsageError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if min(prompt_ids) < 0 or max(prompt_ids) >= engine.config.vocab_size:
        wrong = next(token for token in prompt_ids if not 0 <= token < engine.config.vocab_size)
        raise UsageError(f"token id {wrong} is outside the model's vocabulary of {engine.config.vocab_size}")


class _HostToken:
    """The token of one sequence on its way from the device to the host."""

    def __init__(self, token: Tensor) -> None:
        self._token = token.to("cpu", non_blocking=True)  # into pinned memory
        self._arrived = torch.cuda.Event() if token.is_cuda else None
        if self._arrived is not None:
            self._arrived.record(torch.cuda.current_stream(token.device))

    def read(self) -> int:
        """Waits for the copy, not for what was launched after it."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return int(self._token)


def _launch_tokens(
    engine: DecoderModel, state: DecodeState, sampler: Sampler, prompt: Tensor, count: int
) -> Iterator[_HostToken]:
    first = prompt.shape[1]
    yield _HostToken(prefill(engine, state, sampler, prompt))
    cache = state.cache.up_to(first + 1)
    for position in range(first, first + count - 1):
        if position >= cache.context:
            cache = state.cache.up_to(position + 1)
        yield _HostToken(decode_one_token(engine, state, sampler, cache))


def _read_tokens(launched: Iterator[_HostToken], state: DecodeState, ends: Sequence[int]) -> Generator[int, None, None]:
    if state.in_use:
        raise TealError("another generation is using this state; give each its own DecodeState.of(engine)")
    state.in_use = True
    try:
        for arriving in _one_ahead(launched) if state.token.is_cuda else launched:
            token = arriving.read()
            if token == _INVALID:
                state.cache.clear()
                raise TealError(
                    "the logits are NaN or infinite; if the weights are sound, activations overflow: "
                    "try bfloat16 or float32"
                )
            yield token
            if token in ends:
                return
    finally:
        state.in_use = False


def _one_ahead(launched: Iterator[_HostToken]) -> Iterator[_HostToken]:
    """The same tokens, each after the next one's step is launched: the device never waits for the host."""
    arriving = next(launched)
    for following in launched:
        yield arriving
        arriving = following
    yield arriving


class Generation(Iterator[str]):
    """A generation under way: iterate over its pieces of text, then read `result`."""

    def __init__(self, pieces: Generator[str, None, GenerationResult]) -> None:
        self._pieces = pieces
        self._result: GenerationResult | None = None

    def __next__(self) -> str:
        try:
            return next(self._pieces)
        except StopIteration as end:
            self._result = self._result or end.value
            raise

    @property
    def result(self) -> GenerationResult:
        """The whole, once what is left of it has run. Raises TealError if it ended in an error."""
        for _ in self:
            pass
        if self._result is None:
            raise TealError("the generation ended in an error and has no result")
        return self._result


def generate(
    engine: DecoderModel,
    tokenizer: Any,
    prompt_ids: Sequence[int],
    max_new_tokens: int,
    sampling: SamplingConfig | None = None,
    stop: Sequence[str] = (),
    *,
    ignore_eos: bool = False,
    state: DecodeState | None = None,
) -> Generation:
    """Generate text: at once, `generate(...).result`, or piece by piece, `for piece in (generation := generate(...))`.

    Ends at the model's end of text, before the first of the `stop` strings, or after `max_new_tokens`. Pieces
    hold whole characters and no part of a stop string. Raises as `decode_tokens` does.
    """
    tokens = decode_tokens(engine, prompt_ids, max_new_tokens, sampling, ignore_eos=ignore_eos, state=state)
    ends = () if ignore_eos else engine.config.eos_token_ids
    detokenizer, stops = Detokenizer(tokenizer, prompt_ids), StopStrings(stop)
    return Generation(_pieces(tokens, len(prompt_ids), ends, detokenizer, stops))


def _pieces(
    tokens: Generator[int, None, None],
    prompt_tokens: int,
    ends: Sequence[int],
    detokenizer: Detokenizer,
    stops: StopStrings,
) -> Generator[str, None, GenerationResult]:
    times = [time.perf_counter()]  # of the start, then of every token
    ids: list[int] = []
    given: list[str] = []
    stopped = False
    with closing(tokens):
        for token in tokens:
            times.append(time.perf_counter())
            ids.append(token)
            if token in ends:
                break
            text, stopped = stops.feed(detokenizer.feed(token))
            if text:
                given.append(text)
                yield text
            if stopped:
                break
    if not stopped:
        text, stopped = stops.feed(detokenizer.flush())
        text += "" if stopped else stops.flush()
        if text:
            given.append(text)
            yield text
    return GenerationResult(
        text="".join(given),
        token_ids=tuple(ids),
        finish_reason="stop" if stopped or ids[-1] in ends else "length",
        prompt_tokens=prompt_tokens,
        prefill_seconds=times[1] - times[0],
        decode_seconds=times[-1] - times[1],
    )
