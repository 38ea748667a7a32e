"""What tasks ask of a model: how likely a continuation is after a context, and what it writes itself."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from teal.checkpoint import context_length
from teal.data import check_tokens, opening_tokens
from teal.errors import TealError

Counting = Callable[[Tensor], AbstractContextManager[None]]  # of a mask [B, T]: within, those tokens are counted


@dataclass(frozen=True)
class TokenRequest:
    """Score the last `scored` of the tokens `ids`, each after all tokens before it; 0: `ids` are a prompt."""

    ids: tuple[int, ...]
    scored: int


@dataclass(frozen=True)
class Score:
    """Log-likelihood (nats) of the scored tokens, and whether each of them is the model's first choice."""

    log_likelihood: float
    is_greedy: bool


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of `text` behind the opening tokens."""
    return opening_tokens(tokenizer) + tokenizer(text, add_special_tokens=False, verbose=False).input_ids


def encode_request(tokenizer: Any, context: str, continuation: str) -> TokenRequest:
    """The request for `continuation` after `context`, tokenized as one text.

    White space at the end of the context is the continuation's, as tokenizers put it before words.
    Raises TealError if nothing is left to score, or if nothing stands before it.
    """
    whole, before = encode(tokenizer, context + continuation), encode(tokenizer, context.rstrip())
    if len(whole) <= len(before):
        raise TealError(f"the continuation {continuation!r} adds no token to its context")
    if not before:
        raise TealError("the context is empty, and this model has no begin-of-text token to start from")
    return TokenRequest(tuple(whole), len(whole) - len(before))


def shorten(request: TokenRequest, room: int, opening: Sequence[int]) -> TokenRequest:
    """Cut the oldest tokens, but for the opening ones, so that at most `room` are left.

    Raises TealError if not even one token before the scored ones is left.
    """
    if len(request.ids) <= room:
        return request
    if room < request.scored + len(opening) + 1:
        raise TealError(
            f"the model's context has room for {room} tokens of a text, too little for {request.scored} to score and "
            "one before them"
        )
    return TokenRequest((*opening, *request.ids[len(request.ids) - room + len(opening) :]), request.scored)


def batches(lengths: Sequence[int], size: int) -> Iterator[list[int]]:
    """Indices of `size` requests at a time, the longest first, so that rows of like length share a batch."""
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    for start in range(0, len(order), size):
        yield order[start : start + size]


@torch.no_grad()
def score(
    model: nn.Module,
    requests: Sequence[TokenRequest],
    dense_tokens: int = 0,
    counting: Counting | None = None,
) -> list[Score]:
    """Score a batch of requests, in one call of a transformers `model`.

    Which tokens are sparse the caller says (`linear.sparse_from`); the tokens from `dense_tokens` on whose
    predictions are scored are given to `counting`. Raises TealError for logits that are NaN or infinite.
    """
    device = next(model.parameters()).device
    length = max(len(request.ids) for request in requests)
    ids = torch.zeros(len(requests), length, dtype=torch.int64)  # what pads the end no scored token sees
    scored = torch.zeros(len(requests), length, dtype=torch.bool)
    for row, request in enumerate(requests):
        ids[row, : len(request.ids)] = torch.tensor(request.ids)
        scored[row, len(request.ids) - request.scored : len(request.ids)] = True
    check_tokens(ids, model)
    ids, scored = ids.to(device), scored[:, 1:].to(device)  # [B, L - 1]: position t predicts token t + 1
    counted = scored.clone()
    counted[:, :dense_tokens] = False
    kept = int(scored.any(dim=0).nonzero()[0])
    with counting(counted) if counting is not None else nullcontext():
        logits = model(input_ids=ids[:, :-1], use_cache=False, logits_to_keep=length - 1 - kept).logits
    predictions = logits[scored[:, kept:]].float()
    if not torch.isfinite(predictions).all():
        raise TealError("the model's logits are NaN or infinite; load it in bfloat16 or float32, or check the weights")
    targets = ids[:, 1:][scored]
    found = predictions.log_softmax(-1).gather(1, targets[:, None])[:, 0].double()
    counts = [request.scored for request in requests]
    greedy = (predictions.argmax(-1) == targets).split(counts)
    return [
        Score(float(part.sum()), bool(first_choices.all()))
        for part, first_choices in zip(found.split(counts), greedy, strict=True)
    ]


@torch.no_grad()
def continue_greedily(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    stop: Sequence[str],
    max_new_tokens: int,
    counting: Counting | None = None,
) -> list[str]:
    """What the model writes after each of a batch of prompts, up to the first stop string, by real decode.

    Prompts are dense and decoded tokens sparse, as at run time; rows that have not ended are given to `counting`.
    Raises TealError for a prompt that leaves no room for `max_new_tokens` in the model's context.
    """
    from transformers import StoppingCriteriaList

    device = next(model.parameters()).device
    length = max(map(len, prompts))
    context = context_of(model)
    if length + max_new_tokens > context:
        raise TealError(f"a prompt of {length} tokens leaves no room for {max_new_tokens} in a context of {context}")
    ids = torch.zeros(len(prompts), length, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, length - len(prompt) :] = torch.tensor(prompt)
        mask[row, length - len(prompt) :] = 1
    check_tokens(ids, model)
    ends = _Ends(model, tokenizer, length, stop, torch.ones(len(prompts), 1, dtype=torch.bool, device=device))
    with counting(ends.unfinished) if counting is not None else nullcontext():
        model.generate(
            ids.to(device),
            attention_mask=mask.to(device),
            do_sample=False,
            num_beams=1,
            max_new_tokens=max_new_tokens,
            pad_token_id=0,
            stopping_criteria=StoppingCriteriaList([ends]),
        )
    return ends.texts


def context_of(model: Any) -> int:
    """Tokens that the model's positions reach."""
    return context_length(model.config)


class _Ends:
    """A transformers stopping criterion that keeps each row's text up to its end and says which rows go on."""

    def __init__(self, model: Any, tokenizer: Any, prompt: int, stop: Sequence[str], unfinished: Tensor) -> None:
        ends = model.generation_config.eos_token_id
        self._ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
        self._tokenizer, self._prompt, self._stop = tokenizer, prompt, stop
        self.unfinished = unfinished  # [B, 1], changed in place
        self.texts = [""] * len(unfinished)

    def __call__(self, ids: Tensor, scores: object, **_: object) -> Tensor:
        for row in self.unfinished[:, 0].nonzero()[:, 0].tolist():
            written = ids[row, self._prompt :]
            text = self._tokenizer.decode(written, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            found = [at for stop in self._stop if (at := text.find(stop)) >= 0]
            self.texts[row] = text[: min(found)] if found else text
            if found or int(written[-1]) in self._ends:
                self.unfinished[row] = False
        return ~self.unfinished[:, 0]
