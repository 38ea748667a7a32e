"""How much the model's output suffers when inputs of projections are dropped, to second order in the error.

The Kullback-Leibler divergence between a model and itself with input x_i of a projection changed by e is
E[g_i^2 e^2] / 2 nats, to second order and with the errors of different inputs taken as uncorrelated, where g_i is the
gradient of log p(y) with respect to x_i for tokens y drawn from the model's own prediction (the diagonal of the Fisher
information). One backward pass gives g for all inputs of all projections. Here it is gathered by the magnitude of
x_i, so that the cost of every possible threshold of every channel can be read off.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from teal.blockwalk import BlockSource, replace_forward
from teal.errors import TealError
from teal.ops.reference import keep_mask
from teal.progress import track
from teal.statistics import ActivationStatistics

BINS = 96  # of |x| in each channel, relative to the channel's root mean square
BINS_PER_OCTAVE = 8
LOWEST_OCTAVE = -9
ALL = torch.finfo(torch.float32).max  # a threshold that drops everything


@dataclass(frozen=True)
class Dropping:
    """What a projection does to its sparse inputs: |x| <= `threshold` [K] becomes zero, then `shift` [K] is added.

    A shift before the weight W is the compensation W @ shift after it.
    """

    threshold: Tensor
    shift: Tensor

    def error(self, x: Tensor, dense_tokens: int) -> Tensor:
        """What is added to inputs x [..., T, K], zero at the first `dense_tokens` positions."""
        error = torch.where(keep_mask(x, self.threshold), 0, -x) + self.shift.to(x.dtype)
        error[..., :dense_tokens, :] = 0
        return error


@dataclass
class Sensitivity:
    """Of one projection, by channel and bin of |x|; sums over `tokens`.

    `count` [K, BINS], `pull` [K, BINS] of g^2 x, `energy` [K, BINS] of g^2 x^2, all float32; `curvature` [K] of g^2.
    `scale` [K] is what the bins are relative to.
    """

    scale: Tensor
    count: Tensor
    pull: Tensor
    energy: Tensor
    curvature: Tensor
    tokens: int = 0

    @classmethod
    def empty(cls, scale: Tensor) -> "Sensitivity":
        bins = scale.new_zeros(len(scale), BINS)
        return cls(scale, bins, bins.clone(), bins.clone(), torch.zeros_like(scale))

    def add(self, x: Tensor, gradient: Tensor) -> None:
        """x and gradient [T, K]."""
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

    def thresholds(self) -> Tensor:
        """[K, BINS]: what drops a bin and all below it."""
        octaves = torch.arange(1, BINS + 1, device=self.scale.device) / BINS_PER_OCTAVE + LOWEST_OCTAVE
        edges = self.scale[:, None] * octaves.exp2()
        edges[:, -1] = ALL
        return edges

    def mix(self, other: "Sensitivity", share: float) -> "Sensitivity":
        """Means per token, (1 - share) of these and `share` of the others."""
        mine, theirs = (1 - share) / self.tokens, share / other.tokens
        sums = ("count", "pull", "energy", "curvature")
        return Sensitivity(
            self.scale, *(getattr(self, name) * mine + getattr(other, name) * theirs for name in sums), tokens=1
        )

    def cost(self, compensate: bool) -> Tensor:
        """[K, BINS]: nats per token that dropping a bin and all below it costs, if compensated the best way."""
        cost = self.energy.cumsum(1)
        if compensate:
            cost = cost - self.pull.cumsum(1).square() / self.curvature[:, None].clamp_min(1e-30)
        return cost.clamp_min(0) / (2 * self.tokens)

    def dropped(self) -> Tensor:
        """[K, BINS]: share of tokens whose input is in a bin or below it."""
        return self.count.cumsum(1) / self.tokens

    def shift(self) -> Tensor:
        """[K, BINS]: the constant that stands best for what was dropped."""
        return self.pull.cumsum(1) / self.curvature[:, None].clamp_min(1e-30)


Sensitivities = list[dict[str, Sensitivity]]
Droppings = Sequence[dict[str, Dropping]]


def measure_sensitivity(
    source: BlockSource,
    tokens: Tensor,
    statistics: ActivationStatistics,
    droppings: Droppings | None = None,
    *,
    batch: int = 1,
    seed: int = 0,
    show_progress: bool = False,
) -> Sensitivities:
    """One forward and one backward pass over tokens [B, L], block by block: [block][projection].

    With `droppings` [block][projection] the model is measured where they take it, with what their errors do to one
    another; a dropped input still passes the gradient on, as what changes it may bring it above its threshold again.
    Raises TealError for NaN or infinite gradients.
    """
    walk = _Walk(source, statistics.dense_tokens, droppings, batch)
    generator = torch.Generator(device=walk.hidden(tokens).device).manual_seed(seed)
    gradient = walk.head_gradient(tokens, generator)
    found: Sensitivities = []
    count = len(source.structure.blocks)
    for index in track(range(count - 1, -1, -1), "measuring sensitivities", count, show_progress):
        entry = statistics.blocks[index]
        found.append({})
        for projection in source.structure.blocks[index]:
            rms = (entry[projection.input].sum_of_squares / max(1, entry[projection.input].tokens)).sqrt()
            scale = rms.to(gradient.device, torch.float32).clamp_min(1e-30)
            found[-1][projection.name] = Sensitivity.empty(scale)
        gradient = walk.backward(index, gradient, found[-1])
        if not gradient.isfinite().all():
            raise TealError(f"NaN or infinite gradients at block {index}; load the model in bfloat16 or float32")
    return found[::-1]


class _Walk:
    """Sequences on their way through the model and back; hidden states between blocks are kept."""

    def __init__(self, source: BlockSource, dense_tokens: int, droppings: Droppings | None, batch: int) -> None:
        self.source, self.dense_tokens, self.droppings, self.batch = source, dense_tokens, droppings, batch
        self.states: list[Tensor] = []
        self.arguments: list[dict[str, Any]] = []

    def hidden(self, tokens: Tensor) -> Tensor:
        """Hidden states [B, L, d] after the last block."""
        hidden, self.arguments = self.source.first_inputs(tokens)
        for index in range(len(self.source.structure.blocks)):
            self.states.append(hidden)
            with self._tapped_block(index) as (block, _), torch.no_grad():
                hidden = torch.cat([_output(block, rows, self.arguments[index]) for rows in hidden.split(self.batch)])
        self.states.append(hidden)
        return hidden

    def head_gradient(self, tokens: Tensor, generator: torch.Generator) -> Tensor:
        """[B, L, d]: of the summed log-probabilities of tokens drawn from the sparse positions' predictions."""
        gradients = []
        for rows, hidden in zip(tokens.split(1), self.states[-1].split(1), strict=True):
            hidden = hidden.detach().requires_grad_()
            with torch.enable_grad():
                logits = head(self.source, rows, hidden)[0, self.dense_tokens :].float()
                drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
                (gradient,) = torch.autograd.grad(-F.cross_entropy(logits, drawn, reduction="sum"), hidden)
            gradients.append(gradient)
        return torch.cat(gradients)

    def backward(self, index: int, gradient: Tensor, found: dict[str, Sensitivity]) -> Tensor:
        """From the gradient [B, L, d] at the output of a block to the one at its input; gathers what is `found`."""
        gradients = []
        with self._tapped_block(index) as (block, taps), torch.enable_grad():
            for rows, outer in zip(self.states[index].split(self.batch), gradient.split(self.batch), strict=True):
                taps.clear()
                rows = rows.detach().requires_grad_()
                output = _output(block, rows, self.arguments[index])
                entering = [tap.entering for tap in taps]
                inner, *inputs = torch.autograd.grad(output, [rows, *entering], outer)
                for tap, at_input in zip(taps, inputs, strict=True):
                    for x, g in zip(tap.x, at_input, strict=True):
                        found[tap.name].add(x[self.dense_tokens :], g[self.dense_tokens :])
                gradients.append(inner)
        self.states[index + 1] = gradient.new_empty(0)
        return torch.cat(gradients)

    @contextmanager
    def _tapped_block(self, index: int) -> Iterator[tuple[nn.Module, list["_Tap"]]]:
        taps: list[_Tap] = []
        with self.source.block(index) as block, ExitStack() as replaced:
            for projection in self.source.structure.blocks[index]:
                module = block.get_submodule(projection.name)
                dropping = self.droppings[index][projection.name] if self.droppings else None
                replaced.enter_context(replace_forward(module, self._tapped(module, projection.name, dropping, taps)))
            yield block, taps

    def _tapped(self, module: nn.Module, name: str, dropping: Dropping | None, taps: list["_Tap"]) -> Any:
        product = module.forward

        def forward(x: Tensor) -> Tensor:
            entering = x.view_as(x)
            if dropping is not None:
                entering = entering + dropping.error(x.detach(), self.dense_tokens)
            if torch.is_grad_enabled():
                taps.append(_Tap(name, x.detach(), entering))
            return product(entering)

        return forward


@dataclass(frozen=True)
class _Tap:
    """x [B, T, K] reached projection `name`, `entering` [B, T, K] of the graph went into its product."""

    name: str
    x: Tensor
    entering: Tensor


def _output(block: nn.Module, hidden: Tensor, arguments: dict[str, Any]) -> Tensor:
    out = block(hidden, **arguments)
    return out[0] if isinstance(out, tuple) else out


def head(source: BlockSource, tokens: Tensor, hidden: Tensor) -> Tensor:
    """Logits [B, L, V] of tokens [B, L] whose hidden states after the last block are `hidden` [B, L, d]."""
    blocks = source.structure.block_modules(source.model)
    with ExitStack() as replaced:
        for block in blocks:
            replaced.enter_context(replace_forward(block, lambda *_, **__: hidden))
        return source.model(input_ids=tokens.to(hidden.device), use_cache=False).logits
