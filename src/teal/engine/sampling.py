"""Choose the next token from the logits, on the device; settings mean what they mean in transformers."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from teal.errors import UsageError


@dataclass(frozen=True)
class SamplingConfig:
    """How to choose: `temperature` 0 takes the most likely token, and the filters then change nothing.

    `top_k` 0, `top_p` 1, `min_p` 0 and `repetition_penalty` 1 are off. `seed` None draws a fresh one.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        _require(
            math.isfinite(self.temperature) and self.temperature >= 0,
            "temperature",
            "at least 0",
            self.temperature,
        )
        _require(self.top_k >= 0, "top_k", "at least 0 (0 is off)", self.top_k)
        _require(0 < self.top_p <= 1, "top_p", "above 0 and at most 1 (1 is off)", self.top_p)
        _require(0 <= self.min_p <= 1, "min_p", "between 0 (off) and 1", self.min_p)
        penalty = self.repetition_penalty
        _require(math.isfinite(penalty) and penalty > 0, "repetition_penalty", "above 0 (1 is off)", penalty)
        _require(self.seed is None or 0 <= self.seed < 2**63, "seed", "between 0 and 2**63 - 1", self.seed)


def _require(holds: bool, name: str, wanted: str, value: object) -> None:
    if not holds:
        raise UsageError(f"{name} must be {wanted}, got {value}")


class Sampler:
    """Draws the tokens of one request; the same seed draws the same tokens from the same logits.

    prompt [B, T] int64 counts as said for the repetition penalty.
    """

    def __init__(self, config: SamplingConfig, prompt: Tensor, vocabulary: int) -> None:
        self.config = config
        self._generator = torch.Generator(prompt.device)
        if config.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(config.seed)
        self._said: Tensor | None = None  # [B, vocabulary]
        if config.repetition_penalty != 1:
            said = torch.zeros((prompt.shape[0], vocabulary), dtype=torch.bool, device=prompt.device)
            self._said = said.scatter_(1, prompt, True)

    @property
    def is_greedy(self) -> bool:
        """Whether the choice depends on the logits alone."""
        return self.config.temperature == 0 and self._said is None

    def __call__(self, logits: Tensor) -> Tensor:
        """logits [B, vocabulary] -> tokens [B] int64. Nothing waits for the host."""
        scores = logits.float()
        if self._said is not None:
            scores = penalize(scores, self._said, self.config.repetition_penalty)
        if self.config.temperature > 0:
            probabilities = filter_scores(scores, self.config).softmax(dim=-1)
            # Argmax of p / Exp(1) draws from p, as torch.multinomial does, without its check on the host.
            scores = probabilities / torch.empty_like(probabilities).exponential_(generator=self._generator)
        tokens = scores.argmax(dim=-1)
        if self._said is not None:
            self._said.scatter_(1, tokens[:, None], True)
        return tokens


def filter_scores(scores: Tensor, config: SamplingConfig) -> Tensor:
    """scores [B, vocabulary] float32 by temperature, top-k, top-p and min-p, in this order; -inf is out."""
    # Relative to the best score, so that a tiny temperature cannot overflow; none is so tiny that it is zero.
    temperature = max(config.temperature, torch.finfo(torch.float32).tiny)
    scores = (scores - scores.amax(dim=-1, keepdim=True)) / temperature
    if config.top_k:
        scores = keep_top_k(scores, config.top_k)
    if config.top_p < 1:
        scores = keep_top_p(scores, config.top_p)
    if config.min_p:
        scores = keep_min_p(scores, config.min_p)
    return scores


def penalize(scores: Tensor, said: Tensor, penalty: float) -> Tensor:
    """Scores of what was `said`, if positive divided by `penalty`, else times it (CTRL, arXiv 1909.05858)."""
    return torch.where(said, torch.where(scores < 0, scores * penalty, scores / penalty), scores)


def keep_top_k(scores: Tensor, count: int) -> Tensor:
    """Only the `count` best; all that tie with the last of them stay."""
    last = scores.topk(min(count, scores.shape[-1])).values[:, -1:]
    return scores.masked_fill(scores < last, -math.inf)


def keep_top_p(scores: Tensor, mass: float) -> Tensor:
    """The fewest best tokens that together have at least probability `mass`."""
    ascending, order = scores.sort(dim=-1)
    drop = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1 - mass
    drop[:, -1] = False
    return scores.masked_fill(drop.scatter(1, order, drop), -math.inf)


def keep_min_p(scores: Tensor, share: float) -> Tensor:
    """Only tokens with at least `share` of the best token's probability."""
    probabilities = scores.softmax(dim=-1)
    return scores.masked_fill(probabilities < share * probabilities.amax(dim=-1, keepdim=True), -math.inf)
