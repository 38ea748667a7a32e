"""What sparsity costs on pieces that the dense model saw, too, and how large the cost may really be."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import TypeVar

CONFIDENCE = 0.95  # one-sided, of the bound that is claimed
LEAST = 8  # pieces; fewer say nothing about their spread

Loss = TypeVar("Loss", bound="PairedLoss")


@dataclass(frozen=True)
class PairedLoss:
    """What is lost to sparsity: `mean` and standard `error` over `count` sequences of equal length."""

    mean: float
    error: float
    count: int

    def __add__(self: Loss, other: "PairedLoss") -> Loss:
        """Of both together, exactly: mean and error hold the sums over sequences and over their squares."""
        count = self.count + other.count
        mean = (self.mean * self.count + other.mean * other.count) / count
        squares = sum(
            part.error**2 * part.count * (part.count - 1) + part.count * (part.mean - mean) ** 2
            for part in (self, other)
        )
        return type(self)(mean, math.sqrt(squares / (count * (count - 1))), count)

    def bound(self, confidence: float) -> float:
        """Largest loss that the sequences leave possible, one-sided (Student's t; below 0.5: the smallest)."""
        return self.mean + student_quantile(confidence, self.count - 1) * self.error

    def count_needed(self, limit: float) -> int | None:
        """Sequences of such spread that would bring the bound below `limit`; None if the mean is not below it."""
        if self.mean >= limit:
            return None
        deviation = self.error * math.sqrt(self.count)
        return math.ceil((NormalDist().inv_cdf(CONFIDENCE) * deviation / (limit - self.mean)) ** 2) + 1


@dataclass(frozen=True)
class ItemLoss(PairedLoss):
    """The same over items, each of which loses 1 (right only when dense), -1 (right only when sparse) or 0.

    A few items of which none changed have no spread and yet prove little: bounds hold for the two shares, too.
    """

    @property
    def changed(self) -> tuple[int, int]:
        """Items that were lost and items that were gained; mean and error hold both."""
        total = round(self.error**2 * self.count * (self.count - 1) + self.count * self.mean**2)
        difference = round(self.mean * self.count)
        return (total + difference) // 2, (total - difference) // 2

    def bound(self, confidence: float) -> float:
        """The wider of Student's and that of the exact bounds of both shares, their distances added as squares.

        The latter (Zou and Donner, 2008) is right where few items changed, the former where many did.
        """
        lost, gained = self.changed
        from_lost = share_bound(lost, self.count, confidence) - lost / self.count
        from_gained = share_bound(gained, self.count, 1 - confidence) - gained / self.count
        by_shares = math.copysign(math.hypot(from_lost, from_gained), confidence - 0.5)
        return self.mean + max(by_shares, super().bound(confidence) - self.mean, key=abs)

    def count_needed(self, limit: float) -> int | None:
        """Items of which as many change that would bring the bound below `limit`, about."""
        gap = limit - self.mean
        if gap <= 0:
            return None
        spread = NormalDist().inv_cdf(CONFIDENCE) * math.sqrt(sum(self.changed) / self.count)
        unseen = -math.log(1 - CONFIDENCE)  # what may be lost although no item was
        return math.ceil(((spread + math.sqrt(spread**2 + 4 * unseen * gap)) / (2 * gap)) ** 2)


def student_quantile(confidence: float, degrees: int) -> float:
    """The quantile of Student's t (Cornish-Fisher; Abramowitz and Stegun 26.7.5), good to 1 % from 7 degrees on."""
    z = NormalDist().inv_cdf(confidence)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return z + sum(term / degrees**power for power, term in enumerate(terms, start=1))


def share_bound(count: int, total: int, confidence: float) -> float:
    """The largest share that `count` of `total` leave possible (Clopper-Pearson, one-sided; below 0.5: the least)."""
    most = count if confidence >= 0.5 else count - 1
    if most in (-1, total):
        return 0.0 if most < 0 else 1.0
    ways = [math.lgamma(total + 1) - math.lgamma(k + 1) - math.lgamma(total - k + 1) for k in range(most + 1)]
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if _at_most(ways, total, middle) > 1 - confidence else (low, middle)
    return high


def _at_most(ways: Sequence[float], total: int, share: float) -> float:
    """The probability of fewer than `len(ways)` of `total`; `ways` are logarithms of binomial coefficients."""
    yes, no = math.log(share), math.log1p(-share)
    return sum(math.exp(way + k * yes + (total - k) * no) for k, way in enumerate(ways))
