"""evaluate: what sparsity costs, against the dense model, on the same tokens and under a stated token rule."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from teal.artifacts import check_header, check_keys
from teal.blockwalk import check_evaluation_mode
from teal.calibration import DENSE_TOKENS
from teal.data import TokenBlocks, check_tokens, describe, token_ids
from teal.errors import TealError, UsageError
from teal.linear import SparseLinear, sparse_from
from teal.ops.quantize import round_to_nearest
from teal.plan import SparsityPlan
from teal.progress import track
from teal.sparse_model import apply_plan, check_plan, plan_of, set_sparsity, sparsify
from teal.sparsity_meter import SparsityMeter
from teal.structure import ModelIdentity, ModelStructure, identify

FORMAT = "teal.evaluation"
TEXTS_FORMAT = "teal.evaluations"  # of several texts, one evaluation each
VERSION = 1
RULE = ("dense_tokens", "sparse", "counted", "sequences", "sequence_length", "tokens_counted", "dtype")
LOGIT_ROWS = 256  # positions whose log-probabilities are held at once


@dataclass(frozen=True)
class PositionLoss:
    """Mean losses (nats) of the predictions made at positions `first` to `last` of the sequences, both included.

    `increase` is that of the perplexity over dense in per cent, with the standard error of the paired difference.
    """

    first: int
    last: int
    dense: float
    sparse: float
    increase: float
    increase_error: float


@dataclass(frozen=True)
class Measurement:
    """One plan at one level, over the counted positions.

    `perplexity` with its standard error over sequences; `increase` over dense in per cent, with the standard
    error of the paired difference; `kl` (nats) of the sparse from the dense distribution and
    `top1_agreement` with standard errors; `sparsity` realised: share of block-weight bytes not read on the
    sparse tokens, `projections` the same by "block.projection"; `nll` per sequence, for paired comparisons;
    `positions`: the loss by position, in ranges that end before powers of two.
    """

    plan: str
    level: float
    expected_sparsity: float
    sparsity: float
    perplexity: float
    perplexity_error: float
    increase: float
    increase_error: float
    kl: float
    kl_error: float
    top1_agreement: float
    top1_error: float
    projections: dict[str, float]
    nll: list[float]
    positions: list[PositionLoss] = field(default_factory=list)


@dataclass(frozen=True)
class Evaluation:
    """`dense` and `measurements` on the same tokens. `rule` states which tokens were sparse and which counted."""

    dense_perplexity: float
    dense_perplexity_error: float
    dense_nll: list[float]
    measurements: list[Measurement]
    rule: dict[str, Any]
    identity: ModelIdentity
    details: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {
            "format": FORMAT, "version": VERSION, "model": self.identity.to_json(), "rule": self.rule,
            "details": self.details,
            "dense": {
                "perplexity": self.dense_perplexity, "perplexity_error": self.dense_perplexity_error,
                "nll": self.dense_nll,
            },
            "measurements": [asdict(measurement) for measurement in self.measurements],
        }  # fmt: skip

    @classmethod
    def from_json(cls, payload: dict[str, Any], where: object) -> "Evaluation":
        """Read what `to_json` gave. Raises TealError naming `where` for anything that does not belong."""
        check_header(payload, FORMAT, VERSION, where)
        keys = ("format", "version", "model", "rule", "details", "dense", "measurements")
        check_keys(payload, keys, where, keys)
        try:
            dense = payload["dense"]
            check_keys(payload["rule"], RULE, f"{where}, its rule", RULE)
            return cls(
                dense["perplexity"],
                dense["perplexity_error"],
                dense["nll"],
                [_read_measurement(**measurement) for measurement in payload["measurements"]],
                payload["rule"],
                ModelIdentity.from_json(payload["model"], where),
                payload["details"],
            )
        except (KeyError, TypeError) as error:
            raise TealError(f"{where} is damaged ({error}); evaluate again") from error


def texts_to_json(results: Mapping[str, Evaluation]) -> dict[str, Any]:
    """The evaluations of several texts, by their names."""
    texts = {text: result.to_json() for text, result in results.items()}
    return {"format": TEXTS_FORMAT, "version": VERSION, "texts": texts}


def texts_from_json(payload: dict[str, Any], where: object) -> dict[str, Evaluation]:
    """Read what `texts_to_json` gave. Raises TealError naming `where` for anything that does not belong."""
    check_header(payload, TEXTS_FORMAT, VERSION, where)
    keys = ("format", "version", "texts")
    check_keys(payload, keys, where, keys)
    return {text: Evaluation.from_json(result, f"{where}, {text}") for text, result in payload["texts"].items()}


def _read_measurement(positions: Sequence[Mapping[str, Any]] = (), **others: Any) -> Measurement:
    return Measurement(**others, positions=[PositionLoss(**position) for position in positions])


def evaluate(
    model: nn.Module,
    tokens: Tensor | TokenBlocks,
    plans: SparsityPlan | Mapping[str, SparsityPlan],
    levels: Sequence[float] = (0.25, 0.4, 0.5, 0.65),
    *,
    dense_tokens: int = DENSE_TOKENS,
    batch: int = 1,
    quantization: str | None = None,
    simulate_bits: int | None = None,
    strict: bool = False,
    show_progress: bool = False,
) -> Evaluation:
    """Measure each plan at each level on tokens [B, L], `batch` sequences at a time, dense and sparse in turn.

    The rule: in each sequence the first `dense_tokens` positions are dense, all others are computed as if
    decoded, with thresholds applied; the predictions made at those sparse positions count, and only those.
    `model` is a transformers model; it is made sparse in place and left at its former level, or dense.
    `quantization` "int8" or "int4" rounds its projections first, so that dense, too, means rounded;
    `simulate_bits` 8, 4, 3 or 2 does so in the model's dtype and on any device, to measure what rounding costs.
    Raises TealError for plans that do not fit, UsageError for a token rule that leaves nothing to count.
    """
    check_evaluation_mode(model)
    ids = token_ids(tokens)
    plans = {plans.method: plans} if isinstance(plans, SparsityPlan) else dict(plans)
    check_tokens(ids, model)
    if batch < 1:
        raise UsageError(f"at least 1 sequence must be evaluated at a time, got {batch}")
    _check_request(ids, plans, levels, dense_tokens)
    if simulate_bits is not None:
        if quantization is not None:
            raise UsageError("the weights are rounded once: give quantization or simulate_bits, not both")
        simulate_rounding(model, simulate_bits)
    identity = make_sparse(model, list(plans.values()), quantization, strict)
    ranges = position_ranges(dense_tokens, ids.shape[1] - 2)
    runs = [
        _Run(name, plan, level, _Scores(ranges), SparsityMeter(model))
        for name, plan in plans.items()
        for level in dict.fromkeys(levels)
    ]
    dense = _Scores(ranges)
    with torch.no_grad(), sparse_from(model, dense_tokens), restoring(model):
        batches = ids.split(batch)
        for rows in track(batches, "evaluating sequences", len(batches), show_progress):
            _score(model, rows.to(next(model.parameters()).device), dense_tokens, dense, runs)
    perplexity, error = dense.perplexity()
    measurements = [_measure(run, dense) for run in runs]
    details = describe(tokens)
    if quantization is not None:
        details["weights"] = quantization
    if simulate_bits is not None:
        details["weights"] = f"int{simulate_bits} (simulated)"
    return Evaluation(perplexity, error, dense.nll, measurements, _rule(model, ids, dense_tokens), identity, details)


def _check_request(ids: Tensor, plans: Mapping[str, SparsityPlan], levels: Sequence[float], dense_tokens: int) -> None:
    if not 0 <= dense_tokens <= ids.shape[1] - 2:
        raise UsageError(
            f"dense_tokens must be between 0 and {ids.shape[1] - 2} for sequences of {ids.shape[1]} tokens"
        )
    check_levels(plans, levels)


def check_levels(plans: Mapping[str, SparsityPlan], levels: Sequence[float]) -> None:
    """Raise UsageError if there is no plan, TealError for a level outside of one: now, not in the middle."""
    if not plans:
        raise UsageError("there is no plan to evaluate")
    for plan in plans.values():
        for level in levels:
            plan.settings(level)


def simulate_rounding(model: nn.Module, bits: int) -> None:
    """Round the projections of a dense `model` to `bits` (see `ops.quantize`), in place, once, kept in their dtype.

    Raises UsageError for a model that is sparse already, and for other widths than 8, 4, 3 and 2.
    """
    if getattr(model, "simulated_bits", None) == bits:
        return
    structure = ModelStructure.of(model)
    projections = [model.get_submodule(structure.module_name(*place)) for place in structure.projections()]
    if any(isinstance(projection, SparseLinear) for projection in projections):
        raise UsageError("the model is sparse already; round its weights before, or load it anew")
    object.__setattr__(model, "stored_fingerprint", identify(model, structure).weights)  # before they are rounded
    for projection in projections:
        weight: Any = projection.weight
        weight.data = round_to_nearest(weight.data, bits)
    object.__setattr__(model, "simulated_bits", bits)


def make_sparse(
    model: nn.Module, plans: Sequence[SparsityPlan], quantization: str | None, strict: bool
) -> ModelIdentity:
    """Make a dense model sparse and check every plan against it; returns the model's identity."""
    unchecked = list(plans)
    if not any(isinstance(module, SparseLinear) for module in model.modules()):
        sparsify(model, unchecked.pop(0), 0.0, quantization=quantization, strict=strict)
    identity: Any = model.sparsity_identity
    for plan in unchecked:
        check_plan(plan, identity, strict)
    return identity


def _rule(model: nn.Module, ids: Tensor, dense_tokens: int) -> dict[str, Any]:
    """Which tokens were sparse and which predictions counted."""
    return {
        "dense_tokens": dense_tokens,
        "sparse": f"every position from {dense_tokens} on, as if decoded; earlier positions dense",
        "counted": f"predictions made at positions {dense_tokens} to {ids.shape[1] - 2} of each sequence",
        "sequences": ids.shape[0],
        "sequence_length": ids.shape[1],
        "tokens_counted": ids.shape[0] * (ids.shape[1] - 1 - dense_tokens),
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
    }


def _logits(model: nn.Module, rows: Tensor, dense_tokens: int) -> Tensor:
    """Logits [B, L - 1 - dense_tokens, V] of the counted positions of sequences [B, L]."""
    logits = model(input_ids=rows[:, :-1], use_cache=False).logits[:, dense_tokens:]
    if not torch.isfinite(logits).all():
        raise TealError("the model's logits are NaN or infinite; load it in bfloat16 or float32, or check the weights")
    return logits


def position_ranges(first: int, last: int) -> list[range]:
    """Positions `first` to `last`, both included, cut at the powers of two."""
    ranges = []
    while first <= last:
        end = min(last + 1, 1 << first.bit_length())
        ranges.append(range(first, end))
        first = end
    return ranges


class _Scores:
    """Per-sequence means of the loss, also by ranges of positions, of the KL divergence and of top-1 agreement."""

    def __init__(self, ranges: Sequence[range]) -> None:
        self.ranges = ranges
        self.nll_by_range: list[list[float]] = []  # of each sequence
        self.nll: list[float] = []
        self.kl: list[float] = []
        self.top1: list[float] = []

    def add(self, sparse: Tensor, dense: Tensor, targets: Tensor) -> None:
        """Logits [B, T, V] of both models and the tokens [B, T] that followed."""
        found = []
        pieces = (x.flatten(0, 1).split(LOGIT_ROWS) for x in (sparse, dense, targets))
        for sparse_rows, dense_rows, target_rows in zip(*pieces, strict=True):
            log_p, log_q = sparse_rows.float().log_softmax(-1), dense_rows.float().log_softmax(-1)
            nll = F.nll_loss(log_p, target_rows, reduction="none")
            kl = F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1)
            found.append(torch.stack([nll, kl, (log_p.argmax(-1) == log_q.argmax(-1)).float()]))
        values = torch.cat(found, dim=1).view(3, *targets.shape).double()
        for scores, means in zip((self.nll, self.kl, self.top1), values.mean(-1).tolist(), strict=True):
            scores.extend(means)
        by_range = [part.mean(-1) for part in values[0].split([len(positions) for positions in self.ranges], dim=-1)]
        self.nll_by_range.extend(torch.stack(by_range, dim=-1).tolist())

    def perplexity(self) -> tuple[float, float]:
        mean, error = mean_and_error(self.nll)
        return _exp(mean), _exp(mean) * error


@dataclass(frozen=True)
class _Run:
    """One plan at one level, while the sequences go through."""

    name: str
    plan: SparsityPlan
    level: float
    scores: _Scores
    meter: SparsityMeter


def _score(model: nn.Module, rows: Tensor, dense_tokens: int, dense: _Scores, runs: Sequence[_Run]) -> None:
    """Sequences [B, L], dense and then at every run's level, each scored against the dense logits."""
    targets = rows[:, dense_tokens + 1 :]
    apply_plan(model, plan_of(model), 0.0)
    expected = _logits(model, rows, dense_tokens)
    dense.add(expected, expected, targets)
    for run in runs:
        apply_plan(model, run.plan, run.level)
        with run.meter.measuring():
            found = _logits(model, rows, dense_tokens)
        run.scores.add(found, expected, targets)


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error; the error of a single value is NaN-free zero."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, 0.0
    return mean, math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))


def _exp(value: float) -> float:
    """e to the `value`; what a broken model makes too large for a float stays finite."""
    return math.exp(min(value, 600.0))


def _measure(run: _Run, dense: _Scores) -> Measurement:
    scores = run.scores
    perplexity, perplexity_error = scores.perplexity()
    change, change_error = increase(scores.nll, dense.nll)
    kl, kl_error = mean_and_error(scores.kl)
    top1, top1_error = mean_and_error(scores.top1)
    return Measurement(
        plan=run.name,
        level=run.level,
        expected_sparsity=run.plan.expected_sparsity(run.level),
        sparsity=run.meter.sparsity(),
        perplexity=perplexity,
        perplexity_error=perplexity_error,
        increase=change,
        increase_error=change_error,
        kl=kl,
        kl_error=kl_error,
        top1_agreement=top1,
        top1_error=top1_error,
        projections=run.meter.projections(),
        nll=scores.nll,
        positions=_by_position(scores, dense),
    )


def increase(sparse: Sequence[float], dense: Sequence[float]) -> tuple[float, float]:
    """Of the perplexity, in per cent, by losses per sequence, with the standard error of the paired difference."""
    difference, error = mean_and_error([a - b for a, b in zip(sparse, dense, strict=True)])
    return 100 * math.expm1(min(difference, 600.0)), 100 * _exp(difference) * error


def _by_position(scores: _Scores, dense: _Scores) -> list[PositionLoss]:
    columns = (zip(*losses.nll_by_range, strict=True) for losses in (dense, scores))
    return [
        PositionLoss(r[0], r[-1], mean_and_error(base)[0], mean_and_error(sparse)[0], *increase(sparse, base))
        for r, base, sparse in zip(scores.ranges, *columns, strict=True)
    ]


@contextmanager
def restoring(model: nn.Module) -> Iterator[None]:
    """Bring the model's own plan and level back at the end."""
    try:
        yield
    finally:
        set_sparsity(model, model.sparsity_level)  # pyright: ignore[reportArgumentType]
