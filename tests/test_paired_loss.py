"""Bounds hold as often as they claim, and sums are what adding the pieces gives."""

import math
import random

import pytest
import torch

from teal.evaluation import mean_and_error
from teal.paired_loss import CONFIDENCE, ItemLoss, PairedLoss, share_bound, student_quantile


def of_items(lost: int, gained: int, count: int) -> ItemLoss:
    return ItemLoss(*mean_and_error([1] * lost + [-1] * gained + [0] * (count - lost - gained)), count)


@pytest.mark.parametrize(
    ("confidence", "degrees", "value"),  # tables of Student's t
    [(0.95, 7, 1.8946), (0.95, 30, 1.6973), (0.999, 7, 4.7853), (0.999, 30, 3.3852), (0.001, 30, -3.3852)],
)
def test_student_quantile(confidence: float, degrees: int, value: float) -> None:
    assert student_quantile(confidence, degrees) == pytest.approx(value, rel=0.01)


@pytest.mark.parametrize(
    ("count", "confidence", "value"),  # tables of Clopper and Pearson, of 100
    [(0, 0.95, 0.02951), (5, 0.95, 0.10225), (5, 0.05, 0.01991), (0, 0.05, 0), (100, 0.05, 0.97049), (100, 0.95, 1)],
)
def test_share_bound(count: int, confidence: float, value: float) -> None:
    assert share_bound(count, 100, confidence) == pytest.approx(value, abs=1e-5)


def test_losses_add_up() -> None:
    values = torch.randn(13, generator=torch.Generator().manual_seed(0), dtype=torch.float64).tolist()
    together = PairedLoss(*mean_and_error(values), 13)
    pieces = [PairedLoss(*mean_and_error(part), len(part)) for part in (values[:8], values[8:12], values[12:])]
    assert vars(pieces[0] + pieces[1] + pieces[2]) == pytest.approx(vars(together))


def test_items_add_up() -> None:
    together = of_items(1, 0, 8) + of_items(3, 2, 50) + of_items(0, 7, 1000)
    assert isinstance(together, ItemLoss)
    assert together.changed == (4, 9)
    assert together.count == 1058


def test_count_needed_would_suffice() -> None:
    loss = PairedLoss(0.018, 0.004, 16)
    assert loss.bound(CONFIDENCE) > 0.02
    needed = loss.count_needed(0.02)
    assert needed is not None
    error = loss.error * math.sqrt(16 / needed)
    assert PairedLoss(0.018, error, needed).bound(CONFIDENCE) == pytest.approx(0.02, rel=0.02)
    assert PairedLoss(0.021, 0.004, 16).count_needed(0.02) is None


@pytest.mark.parametrize(("lost", "gained"), [(0, 0), (2, 1), (10, 8), (30, 25)])
def test_items_needed_would_suffice(lost: int, gained: int) -> None:
    limit = 0.04
    needed = of_items(lost, gained, 200).count_needed(limit)
    assert needed is not None
    scale = needed / 200
    assert of_items(round(lost * scale), round(gained * scale), needed).bound(CONFIDENCE) < 1.05 * limit
    assert of_items(9, 0, 200).count_needed(limit) is None


def test_no_change_among_few_items_is_no_proof() -> None:
    assert of_items(0, 0, 8).bound(CONFIDENCE) == pytest.approx(1 - 0.05 ** (1 / 8))
    assert of_items(0, 0, 299).bound(CONFIDENCE) < 0.01 < of_items(0, 0, 298).bound(CONFIDENCE)
    assert of_items(0, 0, 100).bound(1 - CONFIDENCE) == pytest.approx(-of_items(0, 0, 100).bound(CONFIDENCE))


@pytest.mark.parametrize(("lost", "gained"), [(0.01, 0.0), (0.02, 0.01), (0.1, 0.05), (0.3, 0.25)])
def test_bounds_of_items_hold_as_often_as_they_claim(lost: float, gained: float) -> None:
    """Student's alone fails in more than a third of the cases where one item in a hundred is lost."""
    draw, missed = random.Random(0), 0
    for _ in range(300):
        found = draw.choices((1, -1, 0), (lost, gained, 1 - lost - gained), k=100)
        missed += of_items(found.count(1), found.count(-1), 100).bound(CONFIDENCE) < lost - gained
    assert missed <= 0.09 * 300  # 5 % and three standard errors
