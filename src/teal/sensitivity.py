"""What dropping inputs of projections does to a model's output, to second order in the error.

The Kullback-Leibler divergence between a model and itself with input x_i of a projection changed by e is
E[g_i^2 e^2] / 2 nats, to second order, where g_i is the gradient of log p(y) with respect to x_i for tokens y drawn
from the model's own prediction (the diagonal of the Fisher information). One backward pass gives g for all inputs of
all projections. Here g^2 is gathered by channel and magnitude of x_i, so that the cost of every possible threshold of
every channel can be read off.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from teal.blockwalk import BlockSource, block_output, replace_forward, run_block
from teal.errors import TealError
from teal.ops.reference import keep_mask
from teal.plan import DROP_ALL
from teal.progress import track
from teal.statistics import ActivationStatistics

BINS = 96  # of |x| in each channel, relative to the channel's root mean square
BINS_PER_OCTAVE = 8
LOWEST_OCTAVE = -9
PRICE_STEPS = 28  # halvings of the range in which the logarithm of a price is sought
COHERENCE_RANGE = (0.2, 5.0)


@dataclass(frozen=True)
class Dropping:
    """What a projection does to its sparse inputs: |x| <= `threshold` [K] becomes zero, then `shift` [K] is added.

    A shift before the weight W is the compensation W @ shift after it.
    """

    threshold: Tensor
    shift: Tensor

    def error(self, x: Tensor, dense_tokens: int) -> Tensor:
        """What is added to inputs x [..., T, K]; zero at the first `dense_tokens` positions."""
        error = torch.where(keep_mask(x, self.threshold), 0, -x) + self.shift.to(x.dtype)
        error[..., :dense_tokens, :] = 0
        return error


@dataclass
class Sensitivity:
    """Of the inputs of one projection, by channel and bin of |x|; sums over `tokens`.

    `count` [K, BINS], `pull` [K, BINS] of g^2 x, `energy` [K, BINS] of g^2 x^2 and `curvature` [K] of g^2, in float32.
    Bins are relative to `scale` [K]. `coherence`: how often the divergence that this projection's error adds is what
    errors without correlation would add.
    """

    scale: Tensor
    count: Tensor
    pull: Tensor
    energy: Tensor
    curvature: Tensor
    tokens: int = 0
    coherence: float = 1.0

    @classmethod
    def empty(cls, scale: Tensor) -> "Sensitivity":
        bins = scale.new_zeros(len(scale), BINS)
        return cls(scale, bins, bins.clone(), bins.clone(), torch.zeros_like(scale))

    def add(self, x: Tensor, gradient: Tensor) -> None:
        """x and gradient [..., K]."""
        x, gradient = x.flatten(0, -2), gradient.flatten(0, -2)
        x, weight = x.float(), gradient.float().square()
        octaves = (x.abs() / self.scale).log2() - LOWEST_OCTAVE
        bins = (octaves * BINS_PER_OCTAVE).floor().clamp(0, BINS - 1).long()
        cells = (bins + torch.arange(len(self.scale), device=x.device) * BINS).flatten()
        weighted = weight * x
        self.count.view(-1).index_add_(0, cells, torch.ones_like(weighted).flatten())
        self.pull.view(-1).index_add_(0, cells, weighted.flatten())
        self.energy.view(-1).index_add_(0, cells, (weighted * x).flatten())
        self.curvature += weight.sum(0)
        self.tokens += len(x)

    def mix(self, other: "Sensitivity", share: float) -> "Sensitivity":
        """Means per token, (1 - share) of these and `share` of the others."""
        mine, theirs = (1 - share) / self.tokens, share / other.tokens
        sums = ("count", "pull", "energy", "curvature")
        return Sensitivity(
            self.scale,
            *(getattr(self, name) * mine + getattr(other, name) * theirs for name in sums),
            tokens=1,
            coherence=self.coherence ** (1 - share) * other.coherence**share,
        )

    def thresholds(self) -> Tensor:
        """[K, BINS]: what drops a bin and all below it."""
        octaves = torch.arange(1, BINS + 1, device=self.scale.device) / BINS_PER_OCTAVE + LOWEST_OCTAVE
        edges = self.scale[:, None] * octaves.exp2()
        edges[:, -1] = DROP_ALL
        return edges

    def bins_below(self, threshold: float | Tensor) -> Tensor:
        """[K]: the last bin that a threshold ([] or [K]) drops as a whole, -1 for none."""
        threshold = torch.as_tensor(threshold, dtype=torch.float32, device=self.scale.device)
        octaves = (threshold.clamp_min(0) / self.scale).log2() - LOWEST_OCTAVE
        return ((octaves * BINS_PER_OCTAVE + 1e-3).floor() - 1).clamp(-1, BINS - 1).long()

    def cost(self, compensate: bool) -> Tensor:
        """[K, BINS]: nats per token that dropping a bin and all below it costs, compensated by `shift` or not."""
        cost = self.energy.cumsum(1)
        if compensate:
            cost = cost - self.pull.cumsum(1).square() / self.curvature[:, None].clamp_min(1e-30)
        return cost.clamp_min(0) * (self.coherence / (2 * self.tokens))

    def dropped(self) -> Tensor:
        """[K, BINS]: share of tokens whose input is in a bin or below it."""
        return self.count.cumsum(1) / self.tokens

    def shift(self) -> Tensor:
        """[K, BINS]: the constant that stands for what was dropped at the least cost, E[g^2 x dropped] / E[g^2]."""
        return self.pull.cumsum(1) / self.curvature[:, None].clamp_min(1e-30)


Sensitivities = list[dict[str, Sensitivity]]  # [block][projection]
Droppings = Sequence[dict[str, Dropping]]  # [block][projection]


class SensitivityMeter:
    """Measures the sensitivities of a model on tokens [B, L], `batch` sequences at a time.

    One measurement is a forward and a backward pass, block by block. Hidden states between blocks stay in memory,
    (blocks + 1) x B x L x d values.
    """

    def __init__(
        self, source: BlockSource, tokens: Tensor, statistics: ActivationStatistics, batch: int = 1, seed: int = 0
    ) -> None:
        self.source, self.tokens, self.statistics = source, tokens, statistics
        self.batch, self.seed = batch, seed
        self.dense_tokens = statistics.dense_tokens
        self.dense_output: Tensor | None = None  # hidden states [B, L, d] after the last block

    def measure(
        self, droppings: Droppings | None = None, title: str = "measuring sensitivities", show: bool = False
    ) -> Sensitivities:
        """The sensitivities of the dense model, or where `droppings` take it.

        There they hold what errors do to one another, and each projection's coherence. A dropped input passes the
        gradient on, as what changes it may bring it above its threshold again.
        Raises TealError for NaN or infinite gradients.
        """
        states, arguments = self._forward(droppings)
        output = states.pop()
        if droppings is None:
            self.dense_output = output
        gradients = self._output_gradients(output, coherent=droppings is not None)
        found: Sensitivities = []
        count = len(self.source.structure.blocks)
        for index in track(range(count - 1, -1, -1), title, count, show):
            walk = _BlockBackward(self, index, droppings[index] if droppings else None)
            gradients = walk.run(states.pop(), arguments[index], gradients)
            if not gradients[0].isfinite().all():
                raise TealError(f"NaN or infinite gradients at block {index}; load the model in bfloat16 or float32")
            found.append(walk.found)
        return found[::-1]

    def _forward(self, droppings: Droppings | None) -> tuple[list[Tensor], list[dict[str, Any]]]:
        """Hidden states before each block and after the last, and the blocks' other arguments."""
        hidden, arguments = self.source.first_inputs(self.tokens)
        states = [hidden]
        for index, others in enumerate(arguments):
            with tapped_block(self, index, droppings[index] if droppings else None) as (block, _):
                states.append(torch.cat([run_block(block, rows, others) for rows in states[-1].split(self.batch)]))
        return states, arguments

    def _output_gradients(self, output: Tensor, coherent: bool) -> list[Tensor]:
        """At the hidden states [B, L, d] after the last block: of the summed log-probabilities of tokens drawn from
        the predictions at sparse positions and, if `coherent`, of the summed divergence from the dense model.
        """
        generator = torch.Generator(device=output.device).manual_seed(self.seed)
        drawn_gradients, divergence_gradients = [], []
        for index, row in enumerate(self.tokens.split(1)):
            hidden = output[index : index + 1].detach().requires_grad_()
            with torch.enable_grad():
                predicted = self._predictions(row, hidden)
                drawn = torch.multinomial(predicted.detach().exp(), 1, generator=generator)
                drawn_gradients += torch.autograd.grad(predicted.gather(1, drawn).sum(), hidden, retain_graph=coherent)
                if coherent:
                    assert self.dense_output is not None, "the dense model is measured first"
                    with torch.no_grad():
                        dense = self._predictions(row, self.dense_output[index : index + 1])
                    divergence = F.kl_div(predicted, dense, reduction="sum", log_target=True)
                    divergence_gradients += torch.autograd.grad(divergence, hidden)
        gradients = [drawn_gradients, divergence_gradients] if coherent else [drawn_gradients]
        return [torch.cat(gradient) for gradient in gradients]

    def _predictions(self, row: Tensor, hidden: Tensor) -> Tensor:
        """Log-probabilities [T, V] at the sparse positions of one sequence [1, L] with hidden states [1, L, d]."""
        blocks = self.source.structure.block_modules(self.source.model)
        with ExitStack() as replaced:
            for block in blocks:
                replaced.enter_context(replace_forward(block, lambda *_, **__: hidden))
            logits = self.source.model(input_ids=row.to(hidden.device), use_cache=False).logits
        return logits[0, self.dense_tokens :].float().log_softmax(-1)


class _BlockBackward:
    """The backward pass through one block, gathering what reaches its projections."""

    def __init__(self, meter: SensitivityMeter, index: int, droppings: dict[str, Dropping] | None) -> None:
        self.meter, self.index, self.droppings = meter, index, droppings
        self.found: dict[str, Sensitivity] = {}
        self._added: dict[str, float] = {}  # divergence that the projection's error adds
        self._uncorrelated: dict[str, float] = {}  # what it would add without correlation

    def run(self, hidden: Tensor, arguments: dict[str, Any], outer: list[Tensor]) -> list[Tensor]:
        """From gradients [B, L, d] at the block's output to those at its input `hidden` [B, L, d]."""
        batch, inner = self.meter.batch, [[] for _ in outer]
        for projection in self.meter.source.structure.blocks[self.index]:
            entry = self.meter.statistics.blocks[self.index][projection.input]
            rms = (entry.sum_of_squares / max(1, entry.tokens)).sqrt()
            scale = rms.to(hidden.device, torch.float32).clamp_min(1e-30)
            self.found[projection.name] = Sensitivity.empty(scale)
        with tapped_block(self.meter, self.index, self.droppings) as (block, taps), torch.enable_grad():
            for start in range(0, len(hidden), batch):
                rows = hidden[start : start + batch].detach().requires_grad_()
                taps.clear()
                output = block_output(block, rows, arguments)
                wanted = [rows, *(tap.entering for tap in taps)]
                at_inputs = []
                for position, gradient in enumerate(outer):
                    last = position == len(outer) - 1
                    through = gradient[start : start + batch]
                    at_hidden, *at_taps = torch.autograd.grad(output, wanted, through, retain_graph=not last)
                    inner[position].append(at_hidden)
                    at_inputs.append(at_taps)
                for tap, *gradients in zip(taps, *at_inputs, strict=True):
                    self._gather(tap, gradients)
        for name, added in self._added.items():
            ratio = added / max(self._uncorrelated[name], 1e-30)
            self.found[name].coherence = min(max(ratio, COHERENCE_RANGE[0]), COHERENCE_RANGE[1])
        return [torch.cat(gradients) for gradients in inner]

    def _gather(self, tap: "Tap", gradients: list[Tensor]) -> None:
        dense_tokens = self.meter.dense_tokens
        self.found[tap.name].add(tap.x[:, dense_tokens:], gradients[0][:, dense_tokens:])
        if self.droppings is not None:
            error = self.droppings[tap.name].error(tap.x, dense_tokens).float()
            added = float((gradients[1].float() * error).sum())
            uncorrelated = float((gradients[0].float() * error).square().sum())
            self._added[tap.name] = self._added.get(tap.name, 0.0) + added
            self._uncorrelated[tap.name] = self._uncorrelated.get(tap.name, 0.0) + uncorrelated


@dataclass(frozen=True)
class Tap:
    """x [B, T, K] reached projection `name`; `entering` [B, T, K], in the graph, went into its product."""

    name: str
    x: Tensor
    entering: Tensor


@contextmanager
def tapped_block(
    meter: SensitivityMeter, index: int, droppings: dict[str, Dropping] | None
) -> Iterator[tuple[nn.Module, list[Tap]]]:
    """One block that drops as `droppings` say and notes, while gradients are enabled, what enters its projections."""
    taps: list[Tap] = []

    def tapped(module: nn.Module, name: str) -> Any:
        product = module.forward

        def forward(x: Tensor) -> Tensor:
            entering = x.view_as(x)  # q, k and v share an input; each has a gradient of its own
            if droppings is not None:
                entering = entering + droppings[name].error(x.detach(), meter.dense_tokens)
            if torch.is_grad_enabled():
                taps.append(Tap(name, x.detach(), entering))
            return product(entering)

        return forward

    with meter.source.block(index) as block, ExitStack() as replaced:
        for projection in meter.source.structure.blocks[index]:
            module = block.get_submodule(projection.name)
            replaced.enter_context(replace_forward(module, tapped(module, projection.name)))
        yield block, taps


def cheapest_bins(cost: Tensor, dropped: Tensor, price: float) -> Tensor:
    """[C]: the bin up to which to drop, -1 for none, where each share dropped earns `price`; both curves [C, BINS]."""
    value, bins = torch.add(cost, dropped, alpha=-price).min(1)
    return torch.where(value < 0, bins, -1)


def at_bins(values: Tensor, bins: Tensor, otherwise: float) -> Tensor:
    """values [C, BINS] at bins [C]; `otherwise` where the bin is -1."""
    return torch.where(bins < 0, otherwise, values.gather(1, bins.clamp_min(0)[:, None])[:, 0])


def find_price(saved: Callable[[float], float], share: float) -> float:
    """The lowest price at which at least `share` is saved."""
    low, high = -80.0, 40.0  # of its logarithm
    for _ in range(PRICE_STEPS):
        middle = (low + high) / 2
        low, high = (low, middle) if saved(math.exp(middle)) >= share else (middle, high)
    return math.exp(high)
