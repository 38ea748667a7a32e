"""What each choice of `teal allocate` is worth: perplexity at equal realised sparsity, over calibration samples.

    python benchmarks/quality_ablation.py MODEL --calibration c4.jsonl --validation wiki.valid.tokens \
        --test wiki.test.tokens --wikitext --output DIR

For every seed: statistics, plans and, for `rotated`, axes from samples of the calibration text; nominal levels at which
a plan realises the wanted sparsity on the validation text; perplexity there on the test text, against the dense model
before rotation. Test text chooses nothing. Each result is kept in DIR, so that an interrupted run, repeated, continues.
`cats` masks the gate's output (CATS, arXiv 2404.08763).
"""

import argparse
import functools
import json
import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from teal import allocate, calibrate, evaluate, rotate
from teal.artifacts import write_json
from teal.blockwalk import BlockSource, replace_forward
from teal.checkpoint import load_model, load_tokenizer, resolve_model
from teal.data import TokenBlocks, token_blocks
from teal.errors import TealError
from teal.evaluation import mean_and_error
from teal.plan import SparsityPlan
from teal.statistics import ActivationStatistics, InputStatistics

LEVELS = (0.25, 0.4, 0.5, 0.65)
GRID = (0.0, 0.1, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7)
VARIANTS: dict[str, dict[str, Any]] = {
    "uniform": {"method": "uniform"},
    "blockwise": {"method": "blockwise"},
    "global, sensitivity, compensated": {"method": "global"},
    "global, sensitivity": {"method": "global", "compensate": False},
    "global, magnitude": {"method": "global", "score": "magnitude", "compensate": False},
    "global, magnitude, compensated": {"method": "global", "score": "magnitude", "compensate": True},
    "global, l2, compensated": {"method": "global", "score": "l2", "compensate": True},
    "rotated, uniform": {"rotated": True, "method": "uniform"},
    "rotated, blockwise": {"rotated": True, "method": "blockwise"},
    "rotated, global, magnitude": {
        "rotated": True,
        "method": "global",
        "score": "magnitude",
        "compensate": False,
    },
    "rotated, global, sensitivity": {"rotated": True, "method": "global", "compensate": False},
    "rotated, global, sensitivity, compensated": {"rotated": True, "method": "global"},
    "uniform, l2": {"method": "uniform", "score": "l2"},
    "uniform, l1": {"method": "uniform", "score": "l1"},
    "uniform, sensitivity": {"method": "uniform", "score": "sensitivity"},
    "uniform, compensated": {"method": "uniform", "compensate": True},
    "uniform, sensitivity, compensated": {"method": "uniform", "score": "sensitivity", "compensate": True},
    "blockwise, l2": {"method": "blockwise", "score": "l2"},
    "blockwise, compensated": {"method": "blockwise", "compensate": True},
    "cats": {},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="model directory (default: the embedded model)")
    for text in ("calibration", "validation", "test"):
        parser.add_argument(f"--{text}", type=Path, required=True, help=f"the {text} text")
    parser.add_argument("--wikitext", action="store_true", help="undo WikiText's tokenization of the last two")
    parser.add_argument("--output", type=Path, required=True, help="directory of the results")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS, metavar="NAME")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--sequences", type=int, help="of 512 tokens of the test text (default: all)")
    parser.add_argument("--tokens", type=int, default=16384, help="to measure sensitivities on (default: 16384)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=1, help="sequences at a time")
    arguments = parser.parse_args()
    for seed in arguments.seeds:
        study = Study(arguments, seed)
        for variant in arguments.variants:
            path = arguments.output / f"{variant.replace(', ', '-')}-{seed}.json"
            if not path.exists():
                write_json(path, study.measure(variant))
                print(f"seed {seed}, {variant}: {path}", flush=True)
    show(arguments)


class Study:
    """One calibration sample of one model, as it is and rotated."""

    def __init__(self, arguments: argparse.Namespace, seed: int) -> None:
        self.directory, self.arguments, self.seed = resolve_model(arguments.model), arguments, seed
        self.calibration = self._blocks("calibration", 20, seed, 1024)
        self.validation = self._blocks("validation", 24, 0)
        self.test = self._blocks("test", arguments.sequences, None)

    def _blocks(self, text: str, count: int | None, seed: int | None, length: int = 512) -> TokenBlocks:
        tokenizer = load_tokenizer(self.directory)
        wikitext = self.arguments.wikitext and text != "calibration"
        path = getattr(self.arguments, text)
        return token_blocks([path], tokenizer, length=length, count=count, seed=seed, wikitext=wikitext)

    @functools.cached_property
    def plain(self) -> "Calibrated":
        return Calibrated(self.directory, self.calibration, self.arguments.device)

    @functools.cached_property
    def rotated(self) -> "Calibrated":
        directory = self.arguments.output / f"rotated-{self.seed}"
        if not directory.exists():
            rotate(self.directory, self.calibration, directory, device=self.arguments.device)
        return Calibrated(directory, self.calibration, self.arguments.device)

    @functools.cached_property
    def dense(self) -> list[float]:
        """Losses per sequence of the test text, before rotation."""
        plan = allocate(self.plain.statistics, "uniform")
        return evaluate(self.plain.measured, self.test, {"": plan}, (0.0,), batch=self.arguments.batch).dense_nll

    def measure(self, variant: str) -> dict[str, Any]:
        """Realised sparsity, nominal level and losses per sequence, for each wanted sparsity."""
        if variant == "cats":
            return self._measure_cats()
        options = dict(VARIANTS[variant])
        model = self.rotated if options.pop("rotated", False) else self.plain
        count = 4 if options["method"] == "blockwise" else self.arguments.tokens // 512
        plan = allocate(
            model.statistics, **options, levels=GRID, model=model.load(), batch=self.arguments.batch,
            tokens=self._blocks("calibration", count, self.seed),
        )  # fmt: skip
        nominal = self._nominal(model, plan)
        found = evaluate(model.measured, self.test, {variant: plan}, nominal, batch=self.arguments.batch)
        dense = found.dense_nll if model is self.plain else self.dense
        return {
            "variant": variant, "seed": self.seed, "rule": found.rule, "dense": dense,
            "dense_as_run": found.dense_nll,
            "measurements": {
                str(level): {"nominal": at, "sparsity": m.sparsity, "kl": m.kl, "nll": m.nll}
                for level, at, m in zip(LEVELS, nominal, found.measurements, strict=True)
            },
        }  # fmt: skip

    def _nominal(self, model: "Calibrated", plan: SparsityPlan) -> list[float]:
        """The levels at which the plan realises LEVELS on the validation text."""
        nominal = list(LEVELS)
        for _ in range(2):
            found = evaluate(model.measured, self.validation, {"plan": plan}, nominal, batch=self.arguments.batch)
            errors = [m.sparsity - level for m, level in zip(found.measurements, LEVELS, strict=True)]
            nominal = [min(max(at - error, 0.01), max(GRID)) for at, error in zip(nominal, errors, strict=True)]
        return nominal

    def _measure_cats(self) -> dict[str, Any]:
        model = self.plain.load()
        source, dense_tokens = BlockSource(model), self.plain.statistics.dense_tokens
        share = _gated_share(source)
        counts = _gate_statistics(source, self._blocks("calibration", 16, self.seed), dense_tokens)
        uniform = allocate(self.plain.statistics, "uniform")
        dense: list[float] = []
        measurements = {}
        for level in (0.0, *LEVELS):
            if level / share > 0.98:
                continue  # the gate's output cannot save as much
            thresholds = [entry.threshold(level / share) for entry in counts]
            dropped: list[Tensor] = []
            with _masked_gates(source, thresholds, dense_tokens, dropped):
                found = evaluate(model, self.test, uniform, (0.0,), batch=self.arguments.batch)
            if level == 0:
                dense = found.dense_nll
            else:
                realised = share * float(torch.stack(dropped).mean())
                measurements[str(level)] = {"nominal": level, "sparsity": realised, "nll": found.dense_nll}
        return {
            "variant": "cats",
            "seed": self.seed,
            "dense": dense,
            "dense_as_run": dense,
            "measurements": measurements,
        }


class Calibrated:
    """A model directory with its statistics."""

    def __init__(self, directory: Path, calibration: TokenBlocks, device: str) -> None:
        self.directory, self.calibration, self.device = directory, calibration, device

    def load(self) -> Any:
        return load_model(self.directory).to(self.device)

    @functools.cached_property
    def statistics(self) -> ActivationStatistics:
        return calibrate(self.load(), self.calibration)

    @functools.cached_property
    def measured(self) -> Any:
        """The model that `evaluate` makes sparse and turns from plan to plan."""
        return self.load()


def _gated_share(source: BlockSource) -> float:
    """Share of the block weights that a masked gate output makes unnecessary: up's rows and down's columns."""
    sizes = [(p.name.rpartition(".")[2], p.size) for _, p in source.structure.projections()]
    if any(name == "gate_up_proj" for name, _ in sizes):
        raise TealError("cats is not made for fused gate and up projections")
    return sum(size for name, size in sizes if name in ("up_proj", "down_proj")) / sum(size for _, size in sizes)


def _activations(source: BlockSource) -> list[nn.Module]:
    """Each block's activation function, a module of its own behind the gate."""
    blocks: list[Any] = source.structure.block_modules(source.model)
    return [block.mlp.act_fn for block in blocks]


@torch.no_grad()
def _gate_statistics(source: BlockSource, blocks: TokenBlocks, dense_tokens: int) -> list[InputStatistics]:
    model: Any = source.model
    counts = [InputStatistics.empty(block.mlp.up_proj.out_features) for block in source.structure.block_modules(model)]  # pyright: ignore
    with ExitStack() as hooks:
        for activation, entry in zip(_activations(source), counts, strict=True):

            def add(_: object, __: object, out: Tensor, entry: InputStatistics = entry) -> None:
                entry.add(out[:, dense_tokens:])

            hooks.callback(activation.register_forward_hook(add).remove)
        for row in blocks.ids:
            model(input_ids=row[None].to(model.device), use_cache=False)
    return counts


@contextmanager
def _masked_gates(
    source: BlockSource, thresholds: list[float], dense_tokens: int, dropped: list[Tensor]
) -> Iterator[None]:
    """Within the context small outputs of the gate's activation are zero from position `dense_tokens` on."""

    def masked(activation: nn.Module, threshold: float) -> Any:
        compute = activation.forward

        def forward(x: Tensor) -> Tensor:
            out = compute(x)
            small = out.abs().float() <= threshold
            small[:, :dense_tokens] = False
            dropped.append(small[:, dense_tokens:].float().mean())
            return out.masked_fill(small, 0)

        return forward

    with ExitStack() as replaced:
        for activation, threshold in zip(_activations(source), thresholds, strict=True):
            replaced.enter_context(replace_forward(activation, masked(activation, threshold)))
        yield


def show(arguments: argparse.Namespace) -> None:
    """Means over samples with their standard errors; in brackets the largest error over sequences."""
    results: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(arguments.output.glob("*.json")):
        payload = json.loads(path.read_text())
        results.setdefault(payload["variant"], []).append(payload)
    dense = next(iter(results.values()))[0]["dense"]
    print(f"dense perplexity {math.exp(sum(dense) / len(dense)):.3f}, {len(dense)} sequences of 512 tokens")
    rotated = [
        _increase(r["dense_as_run"], r["dense"])[0] for name in results if "rotated" in name for r in results[name]
    ]
    if rotated:
        print(f"rotated and dense: {min(rotated):+.2f} to {max(rotated):+.2f} %")
    for title, cell in (("increase of perplexity, %", _perplexity), ("divergence from dense, nats", _divergence)):
        print(f"\n{title} (realised sparsity)\n")
        print("| variant | samples | " + " | ".join(f"{level:.0%}" for level in LEVELS) + " |")
        print("|---|---|" + "---|" * len(LEVELS))
        for variant in (name for name in VARIANTS if name in results):
            found = [[r for r in results[variant] if str(level) in r["measurements"]] for level in LEVELS]
            cells = [
                cell(of_level, str(level)) if of_level else "-" for of_level, level in zip(found, LEVELS, strict=True)
            ]
            print(f"| {variant} | {len(results[variant])} | {' | '.join(cells)} |")


def _increase(sparse: list[float], dense: list[float]) -> tuple[float, float]:
    """Of the perplexity in per cent, with the paired standard error, from losses per sequence."""
    mean, error = mean_and_error([a - b for a, b in zip(sparse, dense, strict=True)])
    return 100 * math.expm1(mean), 100 * math.exp(mean) * error


def _perplexity(results: list[dict[str, Any]], level: str) -> str:
    pairs = [_increase(result["measurements"][level]["nll"], result["dense"]) for result in results]
    mean, spread = mean_and_error([increase for increase, _ in pairs])
    realised = sum(result["measurements"][level]["sparsity"] for result in results) / len(results)
    shown = f" ± {spread:.2f}" if len(results) > 1 else ""
    return f"{mean:+.2f}{shown} [{max(error for _, error in pairs):.2f}] ({realised:.3f})"


def _divergence(results: list[dict[str, Any]], level: str) -> str:
    found = [result["measurements"][level].get("kl") for result in results]
    if None in found:
        return "-"
    mean, spread = mean_and_error(found)
    return f"{mean:.4f} ± {spread:.4f}" if len(found) > 1 else f"{mean:.4f}"


if __name__ == "__main__":
    main()
