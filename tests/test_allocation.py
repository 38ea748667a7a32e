"""Allocation: uniform, and block-wise greedy against a plain exhaustive one on tiny models."""

import functools
import itertools
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import FAMILIES, interrupted_after, random_tokens, tiny_model
from torch import Tensor, nn

from teal.allocation import allocate
from teal.blockwalk import BlockSource, open_blocks
from teal.blockwise_allocation import BlockError, GreedyConfig, greedy_trajectory
from teal.calibration import calibrate
from teal.data import TokenBlocks, hash_tokens
from teal.errors import TealError, UsageError
from teal.ops.reference import KEEP_ALL, drop_small
from teal.plan import level_grid
from teal.scores import magnitude_thresholds
from teal.statistics import ActivationStatistics, InputStatistics
from teal.structure import INPUT_OF_PROJECTION, ModelStructure, Projection
from teal.tuning import calibration_texts

TOKENS = random_tokens(2, 24)
LEVELS = (0.0, 0.25, 0.4, 0.6)
DENSE_TOKENS = 3
COARSE = GreedyConfig(step=0.05)


def statistics_of(model: nn.Module, tokens: Tensor = TOKENS) -> ActivationStatistics:
    return calibrate(model, tokens, dense_tokens=DENSE_TOKENS)


def blockwise(model: nn.Module, **options: Any) -> Any:
    options = {"levels": LEVELS, "greedy": COARSE, "tokens": TOKENS, **options}
    return allocate(statistics_of(model), "blockwise", model=model, **options)


def thresholds_of(model: nn.Module) -> Callable[[str, float], float | Tensor]:
    """Of the first block."""
    return functools.partial(magnitude_thresholds(statistics_of(model)), 0)


def leaf(name: str) -> str:
    return name.rpartition(".")[2]


@pytest.mark.parametrize("tokens", [TOKENS, TokenBlocks(TOKENS, ("text",), 0)])
def test_the_text_a_plan_is_made_on_can_be_told(tokens: Tensor | TokenBlocks) -> None:
    plan = blockwise(tiny_model(), tokens=tokens)
    assert hash_tokens(TOKENS) in {text["tokens_sha256"] for text in calibration_texts(plan)}
    assert plan.details["text"]["tokens_sha256"] == hash_tokens(TOKENS)


class TestUniform:
    def test_every_projection_has_the_level_and_its_threshold(self) -> None:
        statistics = statistics_of(tiny_model())
        plan = allocate(statistics, levels=LEVELS)
        assert plan.method == "uniform"
        assert plan.identity == statistics.identity
        assert plan.levels == LEVELS
        for block, entry in zip(plan.blocks, statistics.blocks, strict=True):
            for name, projection in block.items():
                inputs = entry[INPUT_OF_PROJECTION[leaf(name)]]
                assert projection.sparsity == LEVELS
                assert projection.threshold == (KEEP_ALL, *(inputs.threshold(level) for level in LEVELS[1:]))
        assert [plan.expected_sparsity(level) for level in LEVELS] == pytest.approx(LEVELS)

    def test_the_default_grid(self) -> None:
        assert allocate(statistics_of(tiny_model())).levels == level_grid()

    def test_what_is_recorded(self) -> None:
        statistics = statistics_of(tiny_model())
        details = allocate(statistics).details
        assert details == {
            "score": "magnitude", "compensated": False, "statistics": statistics.details, "dense_tokens": DENSE_TOKENS,
        }  # fmt: skip


class TestBlockwise:
    @pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "phi3"])
    def test_each_level_is_met_exactly_in_every_block(self, family: str) -> None:
        plan = blockwise(tiny_model(family))
        assert plan.method == "blockwise"
        for block, shapes in zip(plan.blocks, plan.identity.shapes, strict=True):
            total = sum(n * k for n, k in shapes.values())
            for index, level in enumerate(LEVELS):
                dropped = sum(block[name].sparsity[index] * n * k for name, (n, k) in shapes.items())
                assert dropped / total == pytest.approx(level, abs=1e-9)

    def test_thresholds_are_those_of_the_statistics(self) -> None:
        model = tiny_model()
        statistics, plan = statistics_of(model), blockwise(model)
        for block, entry in zip(plan.blocks, statistics.blocks, strict=True):
            for name, projection in block.items():
                inputs = entry[INPUT_OF_PROJECTION[leaf(name)]]
                assert projection.threshold == tuple(inputs.threshold(value) for value in projection.sparsity)

    def test_sparsities_rise_and_never_pass_the_maximum(self) -> None:
        plan = blockwise(tiny_model(), levels=(0.0, 0.3, 0.6, 0.78), greedy=GreedyConfig(step=0.05, maximum=0.8))
        for block in plan.blocks:
            for projection in block.values():
                assert list(projection.sparsity) == sorted(projection.sparsity)
                assert projection.sparsity[-1] <= 0.8 + 1e-12
        assert any(p.sparsity[-1] > 0.8 - 1e-9 for block in plan.blocks for p in block.values())

    def test_it_does_no_worse_than_uniform(self) -> None:
        errors = blockwise(tiny_model()).details["block_error"]
        assert len(errors) == 2
        for block in errors:
            assert block["greedy"][0] == block["uniform"][0] == 0
            assert all(greedy <= uniform for greedy, uniform in zip(block["greedy"], block["uniform"], strict=True))

    def test_streamed_gives_the_same_plan(self, tmp_path: Path) -> None:
        model = tiny_model()
        model.save_pretrained(tmp_path, max_shard_size="40KB")
        statistics = statistics_of(model)
        plans = [
            allocate(statistics, "blockwise", model=source, tokens=TOKENS, levels=LEVELS, greedy=COARSE)
            for source in (model, tmp_path, open_blocks(tmp_path))
        ]
        assert plans[0] == plans[1] == plans[2]

    def test_the_model_in_memory_is_left_as_it_was(self) -> None:
        model = tiny_model()
        before = model(input_ids=TOKENS).logits
        blockwise(model)
        assert torch.equal(model(input_ids=TOKENS).logits, before)
        assert all("forward" not in vars(module) for module in model.modules())

    @pytest.mark.parametrize("finished", [0, 1])
    def test_an_interrupted_run_ends_with_the_same_plan(
        self, finished: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model = tiny_model()
        whole, source = blockwise(model), interrupted_after(BlockSource(model), finished, monkeypatch)
        options: Any = {"tokens": TOKENS, "levels": LEVELS, "greedy": COARSE, "spool": tmp_path}
        with pytest.raises(KeyboardInterrupt):
            allocate(statistics_of(model), "blockwise", model=source, **options)
        assert blockwise(model, spool=tmp_path) == whole

    @pytest.mark.parametrize(
        ("change", "differing"),
        [
            ({"levels": (0.0, 0.5)}, "levels"),
            ({"greedy": GreedyConfig(step=0.1)}, "step"),
            ({"greedy": GreedyConfig(step=0.05, maximum=0.9)}, "maximum"),
            ({"tokens": random_tokens(2, 24, seed=3)}, "tokens"),
        ],
        ids=["levels", "step", "maximum", "tokens"],
    )
    def test_a_spool_of_other_settings_is_refused(self, change: dict[str, Any], differing: str, tmp_path: Path) -> None:
        model = tiny_model()
        blockwise(model, spool=tmp_path)
        with pytest.raises(TealError, match=rf"other settings \(different: {differing}\)"):
            blockwise(model, spool=tmp_path, **change)

    def test_what_is_recorded(self) -> None:
        tokens = TokenBlocks(TOKENS, ("some.txt",), 1)
        details = blockwise(tiny_model(), tokens=tokens).details
        assert details["greedy"] == {"step": 0.05, "maximum": 0.95}
        assert details["text"] == tokens.describe()


class TestRefused:
    def test_method(self) -> None:
        with pytest.raises(UsageError, match="unknown method 'best'; choose from uniform, blockwise"):
            allocate(statistics_of(tiny_model()), "best")

    @pytest.mark.parametrize("given", [(), ("model",), ("tokens",)], ids=["nothing", "model", "tokens"])
    def test_blockwise_without_model_or_tokens(self, given: tuple[str, ...]) -> None:
        available: dict[str, Any] = {"model": tiny_model(), "tokens": TOKENS}
        with pytest.raises(UsageError, match="runs the model: give it a model and tokens"):
            allocate(statistics_of(tiny_model()), "blockwise", **{name: available[name] for name in given})

    def test_statistics_of_other_shapes(self) -> None:
        statistics = statistics_of(tiny_model(intermediate_size=48))
        with pytest.raises(TealError, match="32 x 48 in the statistics and 32 x 56 in the model"):
            allocate(statistics, "blockwise", model=tiny_model(), tokens=TOKENS)

    @pytest.mark.parametrize("levels", [(), (0.5, 0.25), (0.25, 0.25)], ids=["none", "falling", "twice"])
    @pytest.mark.parametrize("method", ["uniform", "blockwise"])
    def test_levels_that_do_not_rise(self, method: str, levels: tuple[float, ...]) -> None:
        model = tiny_model()
        with pytest.raises(UsageError, match="levels must rise strictly"):
            allocate(statistics_of(model), method, levels=levels, model=model, tokens=TOKENS)

    @pytest.mark.parametrize("level", [-0.1, 1.0, float("nan")])
    def test_levels_out_of_range(self, level: float) -> None:
        with pytest.raises(TealError, match="sparsity must be at least 0 and below 1"):
            allocate(statistics_of(tiny_model()), levels=(0.0, level))

    def test_a_level_above_the_maximum(self) -> None:
        with pytest.raises(TealError, match=r"no projection can pass 0\.5; level 0\.6 cannot be reached"):
            blockwise(tiny_model(), greedy=GreedyConfig(step=0.1, maximum=0.5))

    @pytest.mark.parametrize("step", [0.0, -0.1, 0.2, float("nan")])
    def test_step(self, step: float) -> None:
        with pytest.raises(UsageError, match=r"the greedy step must be above 0 and at most 0\.1"):
            GreedyConfig(step=step)

    def test_maximum(self) -> None:
        with pytest.raises(TealError, match="sparsity must be at least 0 and below 1, got 1"):
            GreedyConfig(maximum=1.0)

    def test_weights_that_are_nan(self) -> None:
        model = tiny_model()
        statistics = statistics_of(model)
        model.model.layers[1].mlp.down_proj.weight.data[0, 0] = float("nan")
        with pytest.raises(TealError, match=r"NaN or infinite values after block 1 mlp\.down_proj"):
            allocate(statistics, "blockwise", model=model, tokens=TOKENS, greedy=COARSE)


def first_block(model: nn.Module) -> tuple[nn.Module, tuple[Projection, ...], Tensor, dict[str, Any]]:
    """The first block with its projections, and what it receives."""
    source = BlockSource(model)
    hidden, arguments = source.first_inputs(TOKENS)
    return source.structure.block_modules(model)[0], source.structure.blocks[0], hidden, arguments[0]


def masked_error(
    block: nn.Module,
    projections: tuple[Projection, ...],
    statistics: dict[str, InputStatistics],
    sparsity: dict[str, float],
    hidden: Tensor,
    arguments: dict[str, Any],
) -> float:
    """The block's squared error by plain hooks, everything computed anew."""

    def masking(projection: Projection) -> Callable[..., Tensor]:
        threshold = torch.tensor(statistics[projection.input].threshold(sparsity[projection.name]))

        def hook(_: nn.Module, inputs: tuple[Tensor]) -> Tensor:
            (x,) = inputs
            return torch.cat([x[:, :DENSE_TOKENS], drop_small(x[:, DENSE_TOKENS:], threshold)], dim=1)

        return hook

    def output() -> Tensor:
        out = block(hidden, **arguments)
        return out[0] if isinstance(out, tuple) else out

    with torch.no_grad(), ExitStack() as stack:
        dense = output()
        for projection in projections:
            hook = block.get_submodule(projection.name).register_forward_pre_hook(masking(projection))
            stack.callback(hook.remove)
        return (output() - dense)[:, DENSE_TOKENS:].double().square().sum().item()


class TestBlockError:
    @pytest.mark.parametrize("family", [family for family in FAMILIES if family != "gemma3"])
    def test_equals_a_plain_masked_forward(self, family: str) -> None:
        """In an order that meets and misses what is remembered."""
        model = tiny_model(family)
        statistics, thresholds = statistics_of(model).blocks[0], thresholds_of(model)
        block, projections, hidden, arguments = first_block(model)
        sparsity = {projection.name: 0.0 for projection in projections}
        order = [p.name for p in (*projections, *reversed(projections))]
        with BlockError(block, projections, thresholds, DENSE_TOKENS, hidden, arguments) as error, torch.no_grad():
            found = [error(dict(sparsity))]
            states = [dict(sparsity)]
            for name, value in itertools.product(order, (0.3, 0.6, 0.3)):
                sparsity[name] = value
                states.append(dict(sparsity))
                found.append(error(states[-1]))
        expected = [masked_error(block, projections, statistics, state, hidden, arguments) for state in states]
        assert found[0] == 0
        assert found == pytest.approx(expected, rel=1e-5)

    def test_what_has_not_changed_is_not_computed_again(self) -> None:
        model = tiny_model()
        thresholds = thresholds_of(model)
        block, projections, hidden, arguments = first_block(model)
        calls: list[str] = []
        for projection in projections:
            module, name = block.get_submodule(projection.name), leaf(projection.name)
            module.forward = lambda x, name=name, product=module.forward: calls.append(name) or product(x)
        sparsity = {projection.name: 0.0 for projection in projections}
        with BlockError(block, projections, thresholds, DENSE_TOKENS, hidden, arguments) as error, torch.no_grad():
            error(sparsity)
            calls.clear()
            for changed, computed in {
                "mlp.down_proj": ["down_proj"],
                "mlp.up_proj": ["up_proj", "down_proj"],
                "self_attn.o_proj": ["o_proj", "gate_proj", "up_proj", "down_proj"],
                "self_attn.k_proj": ["k_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
            }.items():
                error({**sparsity, changed: 0.5})
                assert calls == computed
                calls.clear()
            error({**sparsity, "mlp.up_proj": 0.5})  # seen before
            assert calls == []

    def test_the_block_is_restored_after_an_error(self) -> None:
        model = tiny_model()
        block, projections, hidden, arguments = first_block(model)
        with (
            pytest.raises(KeyboardInterrupt),
            BlockError(block, projections, thresholds_of(model), 0, hidden, arguments),
        ):
            raise KeyboardInterrupt
        assert all("forward" not in vars(module) for module in model.modules())


def exhaustive_trajectory(
    projections: tuple[Projection, ...],
    error: Callable[[dict[str, float]], float],
    levels: tuple[float, ...],
    config: GreedyConfig,
) -> list[dict[str, float]]:
    """Algorithm 1 as the paper has it: every projection is tried at every step."""
    total = sum(p.size for p in projections)
    current = {p.name: 0.0 for p in projections}
    path = [(0.0, current)]
    while path[-1][0] < levels[-1] - 1e-9:
        tries = []
        for projection in projections:
            if current[projection.name] < config.maximum - 1e-9:
                value = min(config.maximum, current[projection.name] + config.step * total / projection.size)
                tries.append({**current, projection.name: value})
        current = min(tries, key=error)
        path.append((sum(p.size / total * current[p.name] for p in projections), current))
    found = []
    for level in levels:
        after = next(index for index, (dropped, _) in enumerate(path) if dropped >= level - 1e-9)
        (low, before), (high, behind) = path[max(0, after - 1)], path[after]
        weight = (level - low) / (high - low) if high > low else 1.0
        found.append({name: before[name] + weight * (behind[name] - before[name]) for name in current})
    return found


class TestGreedyTrajectory:
    @pytest.mark.parametrize("seed", range(6))
    def test_lazy_equals_exhaustive_where_increases_grow(self, seed: int) -> None:
        """A quadratic error whose terms all couple positively, so that each step makes every later one dearer."""
        projections = ModelStructure.of(tiny_model()).blocks[0]
        coupling = torch.rand(7, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))

        def error(sparsity: dict[str, float]) -> float:
            values = torch.tensor([sparsity[p.name] for p in projections], dtype=torch.float64)
            return float(values @ (coupling + 3 * torch.diag(coupling.diag())) @ values)

        for step in (0.005, 0.03):
            config = GreedyConfig(step=step)
            lazy = greedy_trajectory(projections, error, LEVELS, config)
            exhaustive = exhaustive_trajectory(projections, error, LEVELS, config)
            for found, expected in zip(lazy, exhaustive, strict=True):
                assert found == pytest.approx(expected)

    @pytest.mark.parametrize("seed", range(3))
    def test_lazy_does_as_well_as_exhaustive_on_a_tiny_model(self, seed: int) -> None:
        """With random weights and few tokens some increases shrink along the path, and the two may part."""
        model = tiny_model(seed=seed)
        thresholds = thresholds_of(model)
        block, projections, hidden, arguments = first_block(model)
        config = GreedyConfig(step=0.02)
        with BlockError(block, projections, thresholds, DENSE_TOKENS, hidden, arguments) as error, torch.no_grad():
            lazy = greedy_trajectory(projections, error, LEVELS, config)
            exhaustive = exhaustive_trajectory(projections, error, LEVELS, config)
            assert lazy[1] == pytest.approx(exhaustive[1])
            for found, expected in zip(lazy, exhaustive, strict=True):
                assert error(found) <= 1.1 * error(expected)

    def test_it_evaluates_less_often_than_exhaustive(self) -> None:
        calls = {"lazy": 0, "exhaustive": 0}

        def counting(kind: str) -> Callable[[dict[str, float]], float]:
            def error(sparsity: dict[str, float]) -> float:
                calls[kind] += 1
                return sum(cost * sparsity[p.name] ** 2 for cost, p in zip(costs, projections, strict=True))

            return error

        projections = ModelStructure.of(tiny_model()).blocks[0]
        costs = [1.0, 4.0, 2.0, 3.0, 8.0, 5.0, 7.0]
        config = GreedyConfig(step=0.01)
        lazy = greedy_trajectory(projections, counting("lazy"), (0.5,), config)
        exhaustive = exhaustive_trajectory(projections, counting("exhaustive"), (0.5,), config)
        assert lazy[0] == pytest.approx(exhaustive[0])
        assert calls["lazy"] < calls["exhaustive"] / 3

    def test_steps_are_shares_of_the_real_block_weights(self) -> None:
        """With grouped-query attention k and v are small, so one step raises them further."""
        projections = ModelStructure.of(tiny_model()).blocks[0]
        total = sum(p.size for p in projections)
        assert {leaf(p.name): p.size for p in projections}["k_proj"] == 16 * 32

        def only(name: str) -> Callable[[dict[str, float]], float]:
            return lambda sparsity: sum(value for key, value in sparsity.items() if leaf(key) != name)

        for projection in projections:
            (at_level,) = greedy_trajectory(projections, only(leaf(projection.name)), (0.03,), GreedyConfig(step=0.01))
            expected = {p.name: 0.0 for p in projections} | {projection.name: 0.03 * total / projection.size}
            assert at_level == pytest.approx(expected)

    def test_a_projection_stops_at_the_maximum(self) -> None:
        projections = ModelStructure.of(tiny_model()).blocks[0]

        def error(sparsity: dict[str, float]) -> float:
            return sum(value for name, value in sparsity.items() if leaf(name) != "k_proj")

        config = GreedyConfig(step=0.05, maximum=0.8)
        for level, at_level in zip(LEVELS, greedy_trajectory(projections, error, LEVELS, config), strict=True):
            assert max(at_level.values()) <= 0.8
            dropped = sum(p.size * at_level[p.name] for p in projections) / sum(p.size for p in projections)
            assert dropped == pytest.approx(level)
        assert at_level["self_attn.k_proj"] == 0.8
