"""tune: the plan and level that read the fewest bytes within a loss that the user sets, by measurement."""

import math
import re
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import Any

from torch import Tensor, nn

from teal.artifacts import check_header, check_keys
from teal.benchmark import Benchmark
from teal.calibration import DENSE_TOKENS
from teal.data import TokenBlocks, hash_tokens
from teal.errors import TealError, UsageError
from teal.evaluation import Evaluation, Measurement, evaluate, make_sparse, mean_and_error
from teal.linear import sparse_layers
from teal.plan import SparsityPlan
from teal.progress import track

FORMAT = "teal.tuning"
VERSION = 1
CONFIDENCE = 0.95  # one-sided, of the bound that is claimed
RESOLUTION = 0.01  # levels that are tried are multiples of it
LEAST_SEQUENCES = 8  # in either part; fewer say nothing about their spread
DECIDED = 0.999  # a probe ends early when the loss is on one side of the budget with this confidence
STEPS = (0.5, 0.85, 0.93, 0.97, 1.0)  # of the level that the search found: the candidates that are confirmed


def _perplexity_loss(result: Evaluation, measured: Measurement) -> tuple[float, float]:
    return mean_and_error([sparse - dense for sparse, dense in zip(measured.nll, result.dense_nll, strict=True)])


def _kl_loss(_: Evaluation, measured: Measurement) -> tuple[float, float]:
    return measured.kl, measured.kl_error


# What a token costs more than in the dense model, in nats, with its standard error over the sequences.
METRICS: dict[str, Callable[[Evaluation, Measurement], tuple[float, float]]] = {
    "perplexity": _perplexity_loss,
    "kl": _kl_loss,
}


@dataclass(frozen=True)
class LossBudget:
    """How much a model may lose: at most `limit` nats per token of `metric`, spoken of as `text` says it.

    "perplexity": the increase of the mean loss, log(1 + p / 100) where the text is "p%".
    "kl": the divergence of the sparse from the dense model's distribution.
    """

    metric: str
    text: str
    limit: float

    @classmethod
    def parse(cls, text: str, metric: str = "perplexity") -> "LossBudget":
        """ "2%" of perplexity, or "0.02nats" of either metric. Raises UsageError for anything else."""
        if metric not in METRICS:
            raise UsageError(f"unknown metric {metric!r}; choose from {', '.join(METRICS)}")
        found = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*(%|nats)\s*", text)
        if found is None:
            raise UsageError(f"a loss is a number with its unit, such as 2% or 0.02nats, got {text!r}")
        value, unit = float(found[1]), found[2]
        if value <= 0:
            raise UsageError(f"the loss allowed must be above 0, got {text}; without any loss, dense is the answer")
        if unit == "%" and metric != "perplexity":
            raise UsageError(f"KL divergence is in nats, not in per cent; say {value / 100:g}nats")
        limit = math.log1p(value / 100) if unit == "%" else value
        return cls(metric, f"{value:g}%" if unit == "%" else f"{value:g}nats", limit)

    def loss(self, result: Evaluation, measured: Measurement) -> "PairedLoss":
        """What `measured`, one of the result's measurements, lost."""
        return PairedLoss(*METRICS[self.metric](result, measured), len(result.dense_nll))

    @property
    def unit(self) -> str:
        return "%" if self.text.endswith("%") else "nats"

    def value(self, nats: float) -> float:
        """A loss in the budget's unit."""
        return 100 * math.expm1(min(nats, 600.0)) if self.unit == "%" else nats

    def show(self, nats: float) -> str:
        """A loss in the budget's unit, for people."""
        return f"{self.value(nats):+.2f} %" if self.unit == "%" else f"{nats:.4f} nats"

    @property
    def name(self) -> str:
        """What is bounded, for people."""
        if self.metric == "kl":
            return "KL divergence from dense"
        return "perplexity over dense" if self.unit == "%" else "loss over dense"


@dataclass(frozen=True)
class PairedLoss:
    """Nats per token lost to sparsity: `mean` and standard `error` over `sequences` of equal length."""

    mean: float
    error: float
    sequences: int

    def __add__(self, other: "PairedLoss") -> "PairedLoss":
        """Of both texts together, exactly: mean and error hold the sums over sequences and over their squares."""
        count = self.sequences + other.sequences
        mean = (self.mean * self.sequences + other.mean * other.sequences) / count
        squares = sum(
            part.error**2 * part.sequences * (part.sequences - 1) + part.sequences * (part.mean - mean) ** 2
            for part in (self, other)
        )
        return PairedLoss(mean, math.sqrt(squares / (count * (count - 1))), count)

    def bound(self, confidence: float) -> float:
        """Largest loss that the sequences leave possible, one-sided (Student's t; below 0.5: the smallest)."""
        return self.mean + student_quantile(confidence, self.sequences - 1) * self.error

    def sequences_needed(self, limit: float) -> int | None:
        """Sequences of such spread that would bring the bound below `limit`; None if the mean is not below it."""
        if self.mean >= limit:
            return None
        deviation = self.error * math.sqrt(self.sequences)
        return math.ceil((NormalDist().inv_cdf(CONFIDENCE) * deviation / (limit - self.mean)) ** 2) + 1


def student_quantile(confidence: float, degrees: int) -> float:
    """The quantile of Student's t (Cornish-Fisher; Abramowitz and Stegun 26.7.5), good to 1 % from 7 degrees on."""
    z = NormalDist().inv_cdf(confidence)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return z + sum(term / degrees**power for power, term in enumerate(terms, start=1))


@dataclass(frozen=True)
class Trial:
    """One plan at one level, measured on the search part, or on as much of it as was needed to decide.

    `loss` and `loss_error` in nats per token, `sparsity` realised, `fits`: whether it is within the budget.
    """

    plan: str
    level: float
    sparsity: float
    loss: float
    loss_error: float
    sequences: int
    fits: bool


@dataclass(frozen=True)
class Tuning:
    """What `tune` found. Level 0: dense is the answer; `notes` say why, and what else a user should know.

    `sparsity` is realised on the confirmation part, `loss` measured there in nats per token with its standard
    error; `bound` is what is claimed: with `confidence`, the loss on text like this is at most that.
    `dense_bytes` and `sparse_bytes` are the weights that one token reads, LM head included.
    `trials` are those of the search, `confirmation` holds the candidates on the other part, None if there was none.
    """

    budget: LossBudget
    plan: str
    level: float
    sparsity: float
    loss: float
    loss_error: float
    bound: float
    dense_bytes: int
    sparse_bytes: int
    notes: list[str]
    trials: list[Trial]
    confirmation: Evaluation | None
    tokens_evaluated: int
    seconds: float
    details: dict[str, Any] = field(default_factory=dict)
    speed: Benchmark | None = None
    confidence: float = CONFIDENCE

    def to_json(self) -> dict[str, Any]:
        return {
            "format": FORMAT, "version": VERSION, **vars(self), "budget": vars(self.budget),
            "trials": [vars(trial) for trial in self.trials],
            "confirmation": self.confirmation and self.confirmation.to_json(),
            "speed": self.speed and self.speed.to_json(),
        }  # fmt: skip

    @classmethod
    def from_json(cls, payload: dict[str, Any], where: object) -> "Tuning":
        """Read what `to_json` gave. Raises TealError naming `where` for anything that does not belong."""
        check_header(payload, FORMAT, VERSION, where)
        keys = ("format", "version", *cls.__dataclass_fields__)
        check_keys(payload, keys, where, keys)
        values = {key: value for key, value in payload.items() if key not in ("format", "version")}
        confirmation, speed = values["confirmation"], values["speed"]
        try:
            return cls(
                **values
                | {
                    "budget": LossBudget(**values["budget"]),
                    "trials": [Trial(**trial) for trial in values["trials"]],
                    "confirmation": confirmation and Evaluation.from_json(confirmation, f"{where}, its confirmation"),
                    "speed": speed and Benchmark.from_json(speed, f"{where}, its speed"),
                }
            )
        except (TypeError, AttributeError) as error:
            raise TealError(f"{where} is damaged ({error}); tune again") from error


def tune(
    model: nn.Module,
    tokens: Tensor | TokenBlocks,
    plans: SparsityPlan | Mapping[str, SparsityPlan],
    max_loss: str | LossBudget,
    *,
    metric: str = "perplexity",
    dense_tokens: int = DENSE_TOKENS,
    batch: int = 1,
    quantization: str | None = None,
    strict: bool = False,
    show_progress: bool = False,
) -> Tuning:
    """Find the plan and level that read the fewest bytes and lose at most `max_loss` ("2%", "0.02nats").

    `tokens` [B, L] are held-out text. On its first half each plan's level is searched by bisection, in pairs with
    the dense model, sequence by sequence. On the other half a few levels up to the best one are measured; rising
    through them, the last whose upper confidence bound is within the budget is the answer. (Tests in an order fixed
    before need no correction for their number.) Text that served here is spent: a test of the result needs another.
    The rule of sparse tokens, `model` and the other options are those of `evaluate`.
    Raises UsageError for a budget that is none or too little text, TealError for text that a plan was made on.
    """
    started = time.monotonic()
    budget = max_loss if isinstance(max_loss, LossBudget) else LossBudget.parse(max_loss, metric)
    plans = {plans.method: plans} if isinstance(plans, SparsityPlan) else dict(plans)
    ids = tokens.ids if isinstance(tokens, TokenBlocks) else tokens
    if not plans:
        raise UsageError("there is no plan to tune")
    if ids.ndim != 2 or len(ids) < 2 * LEAST_SEQUENCES:
        raise UsageError(
            f"{len(ids)} sequences are too few to search on one half and confirm on the other; "
            f"give text for at least {2 * LEAST_SEQUENCES}, or shorter sequences"
        )
    for plan in plans.values():
        check_held_out(plan, ids)
    options = {"dense_tokens": dense_tokens, "batch": batch, "quantization": quantization, "strict": strict}
    half = len(ids) // 2
    make_sparse(model, list(plans.values()), quantization, strict)  # checks every plan, and warns of it, once
    search = _Search(model, ids[:half], budget, options, show_progress)
    for name, plan in plans.items():
        search.bisect(name, plan)
    name, level, confirmed, chosen = next(iter(plans)), 0.0, None, None
    evaluated = sum(trial.sequences for trial in search.trials) * 2
    if search.best is not None:
        name = search.best.plan
        levels = _candidates(plans[name], search.best.level)
        confirmed = _evaluate(model, ids[half:], name, plans[name], levels, options, show_progress)
        evaluated += (len(ids) - half) * (1 + len(levels))
        chosen = _highest_confirmed(confirmed, budget)
        level = 0.0 if chosen is None else chosen.level
    loss, sparsity = PairedLoss(0.0, 0.0, LEAST_SEQUENCES), 0.0
    if confirmed is not None and chosen is not None:
        loss, sparsity = budget.loss(confirmed, chosen), chosen.sparsity
    dense_bytes, sparse_bytes = _weight_bytes(model, sparsity)
    details = tokens.describe() if isinstance(tokens, TokenBlocks) else {"tokens_sha256": hash_tokens(ids)}
    details |= {"search_sequences": half, "confirmation_sequences": len(ids) - half, "sequence_length": ids.shape[1]}
    if quantization is not None:
        details["weights"] = quantization
    return Tuning(
        budget, name, level, sparsity, loss.mean, loss.error, loss.bound(CONFIDENCE), dense_bytes, sparse_bytes,
        _notes(search, confirmed, level, ids.shape[1]), search.trials, confirmed,
        evaluated * ids.shape[1], time.monotonic() - started, details,
    )  # fmt: skip


def calibration_texts(plan: SparsityPlan) -> list[dict[str, Any]]:
    """What a plan says of the texts it was made on: `TokenBlocks.describe` of each, as far as it is known."""
    return [found for found in _dictionaries(plan.details) if "tokens_sha256" in found]


def check_held_out(plan: SparsityPlan, ids: Tensor) -> None:
    """Raise TealError if `ids` are the very tokens that `plan` was made on."""
    if hash_tokens(ids) in {text["tokens_sha256"] for text in calibration_texts(plan)}:
        raise TealError("the plan was made on this very text; tune on text that was held out")


def _dictionaries(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        yield value
    if isinstance(value, (dict, list)):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _dictionaries(inner)


class _Search:
    """Looks for each plan's highest level within the budget on the search part; `best` is the one so far."""

    def __init__(
        self, model: nn.Module, ids: Tensor, budget: LossBudget, options: dict[str, Any], show_progress: bool
    ) -> None:
        self.model, self.ids, self.budget, self.options = model, ids, budget, options
        self.show_progress = show_progress
        self.trials: list[Trial] = []
        self.best: Trial | None = None

    def bisect(self, name: str, plan: SparsityPlan) -> None:
        """Try levels of one plan, halving what is left; a plan that loses too much at the best level is left there."""
        levels = _grid(plan)
        low, high = -1, len(levels)  # the highest index that fits, the lowest that does not
        while high - low > 1:
            middle = (low + high) // 2
            if low < 0 and high == len(levels) and self.best is not None:
                middle = min(len(levels) - 1, max(0, _index(levels, self.best.level)))
            trial = self._try(name, plan, levels[middle])
            if trial.fits:
                low = middle
                if self.best is None or trial.sparsity > self.best.sparsity:
                    self.best = trial
            elif self.best is not None and self.best.plan != name and trial.sparsity <= self.best.sparsity:
                return
            else:
                high = middle

    def _try(self, name: str, plan: SparsityPlan, level: float) -> Trial:
        limit = self.budget.limit
        loss, sparsity, fits = None, 0.0, False
        pieces = self.ids.split(max(LEAST_SEQUENCES, self.options["batch"]))
        for rows in track(pieces, f"{name} at {level:g}", len(pieces), self.show_progress):
            result = _evaluate(self.model, rows, name, plan, [level], self.options)
            (measured,) = result.measurements
            found = self.budget.loss(result, measured)
            loss = found if loss is None else loss + found
            sparsity += measured.sparsity * len(rows)
            fits = loss.bound(CONFIDENCE) <= limit
            if loss.bound(DECIDED) <= limit or loss.bound(1 - DECIDED) > limit:
                break
        assert loss is not None
        trial = Trial(name, level, sparsity / loss.sequences, loss.mean, loss.error, loss.sequences, fits)
        self.trials.append(trial)
        return trial


def _evaluate(
    model: nn.Module,
    ids: Tensor,
    name: str,
    plan: SparsityPlan,
    levels: Sequence[float],
    options: dict[str, Any],
    show_progress: bool = False,
) -> Evaluation:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the plan may not belong to this model")
        return evaluate(model, ids, {name: plan}, levels, **options, show_progress=show_progress)


def _grid(plan: SparsityPlan) -> list[float]:
    """The levels of a plan that are tried, rising: multiples of RESOLUTION, and its highest."""
    lowest, highest = plan.levels[0], plan.levels[-1]
    if highest == 0:
        raise UsageError("the plan has no level above 0; allocate with others")
    steps = (round(index * RESOLUTION, 6) for index in range(1, math.floor(highest / RESOLUTION) + 1))
    return sorted({*(level for level in steps if lowest <= level < highest), highest})


def _index(levels: Sequence[float], level: float) -> int:
    """Of the highest of `levels` that is not above `level`; -1 if all are."""
    return sum(value <= level + 1e-9 for value in levels) - 1


def _candidates(plan: SparsityPlan, level: float) -> list[float]:
    levels = _grid(plan)
    return sorted({levels[max(0, _index(levels, step * level))] for step in STEPS})


def _highest_confirmed(result: Evaluation, budget: LossBudget) -> Measurement | None:
    """The last of the rising levels that is within the budget, as all below it are."""
    chosen = None
    for measured in result.measurements:
        if budget.loss(result, measured).bound(CONFIDENCE) > budget.limit:
            break
        chosen = measured
    return chosen


def _notes(search: _Search, confirmed: Evaluation | None, level: float, length: int) -> list[str]:
    """What a user should know beside the answer: why it is lower than it looked, or dense, and what would tell more."""
    budget, notes = search.budget, []
    refused: tuple[float, PairedLoss] | None = None  # the lowest level that is not within the budget
    if confirmed is None:
        lowest = min(search.trials, key=lambda trial: trial.level)
        refused = lowest.level, PairedLoss(lowest.loss, lowest.loss_error, lowest.sequences)
    else:
        losses = [(m.level, budget.loss(confirmed, m)) for m in confirmed.measurements]
        refused = next(((at, loss) for at, loss in losses if at > level), None)
        if refused is not None:
            found = losses[-1][0]
            down = f"stepped down to {level:g}" if level else "it is the lowest that was tried there"
            notes.append(
                f"level {found:g}, which the search found, is not confirmed: at {refused[0]:g} the loss on the other "
                f"part is {_range(refused[1], budget)}; {down}"
            )
    if level == 0 and refused is not None:
        notes.append(f"dense is the answer: even level {refused[0]:g} costs {_range(refused[1], budget)}")
    if refused is not None and (needed := refused[1].sequences_needed(budget.limit)) is not None:
        notes.append(
            f"the loss measured at {refused[0]:g} is within the budget, its bound is not: too little text to tell; "
            f"about {2 * max(needed, LEAST_SEQUENCES) * length:,} tokens would be needed"
        )
    return notes


def _range(loss: PairedLoss, budget: LossBudget) -> str:
    return f"{budget.show(loss.mean)}, at most {budget.show(loss.bound(CONFIDENCE))}"


def _weight_bytes(model: nn.Module, sparsity: float) -> tuple[int, int]:
    """Bytes of block weights and LM head that one token reads, dense and at a realised sparsity."""
    blocks = sum(layer.packed.channel_bytes * layer.in_features for layer in sparse_layers(model).values())
    output: Any = model.get_output_embeddings()  # pyright: ignore[reportCallIssue]
    head = output.weight.numel() * output.weight.element_size()
    return blocks + head, round(blocks * (1 - sparsity)) + head
