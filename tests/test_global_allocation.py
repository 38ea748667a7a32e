"""Sensitivities against plain autograd, the global allocation against exhaustive choice, scores and compensation."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import FAMILIES, Interrupted, random_tokens, tiny_model
from torch import Tensor, nn

from teal.allocation import allocate
from teal.blockwalk import open_blocks
from teal.calibration import calibrate
from teal.errors import UsageError
from teal.ops.reference import keep_mask
from teal.plan import DROP_ALL, SparsityPlan
from teal.scores import norm_thresholds, sensitivity_thresholds
from teal.sensitivity import BINS, Dropping, Sensitivity, SensitivityMeter, find_price
from teal.statistics import ActivationStatistics
from teal.structure import ModelStructure

TOKENS = random_tokens(3, 24)
LEVELS = (0.0, 0.25, 0.4, 0.6)
DENSE_TOKENS = 3


def statistics_of(model: nn.Module) -> ActivationStatistics:
    return calibrate(model, TOKENS, dense_tokens=DENSE_TOKENS)


def meter_of(model: nn.Module, batch: int = 1) -> SensitivityMeter:
    return SensitivityMeter(open_blocks(model), TOKENS, statistics_of(model), batch)


def inputs_of(model: nn.Module) -> dict[str, Tensor]:
    """[T, K] of the sparse tokens at every projection, by module name."""
    structure, found = ModelStructure.of(model), {}
    hooks = []
    for index, projection in structure.projections():
        name = structure.module_name(index, projection)

        def keep(_: object, inputs: tuple[Tensor, ...], name: str = name) -> None:
            found[name] = inputs[0][:, DENSE_TOKENS:].flatten(0, 1)

        hooks.append(model.get_submodule(name).register_forward_pre_hook(keep))
    with torch.no_grad():
        model(input_ids=TOKENS, use_cache=False)
    for hook in hooks:
        hook.remove()
    return found


def random_sensitivity(channels: int, seed: int) -> Sensitivity:
    generator = torch.Generator().manual_seed(seed)
    entry = Sensitivity.empty(torch.rand(channels, generator=generator) + 0.5)
    for _ in range(4):
        entry.add(torch.randn(50, channels, generator=generator), torch.randn(50, channels, generator=generator))
    return entry


class TestSensitivity:
    def test_bins_hold_what_their_thresholds_drop(self) -> None:
        entry = Sensitivity.empty(torch.tensor([0.5, 2.0, 1.0]))
        x, gradient = torch.randn(400, 3) * 3, torch.randn(400, 3)
        x[0], x[1] = 0.0, 1e6
        entry.add(x, gradient)
        thresholds = entry.thresholds()
        assert thresholds[:, -1].tolist() == [DROP_ALL] * 3
        for bins in (0, 40, 70, BINS - 1):
            dropped = ~keep_mask(x, thresholds[:, bins])
            torch.testing.assert_close(entry.dropped()[:, bins], dropped.float().mean(0))
            weight = gradient.square()
            energy = (weight * x * x * dropped).sum(0)
            pull, curvature = (weight * x * dropped).sum(0), weight.sum(0)
            torch.testing.assert_close(entry.cost(False)[:, bins], energy / 800, rtol=1e-4, atol=1e-9)
            torch.testing.assert_close(entry.shift()[:, bins], pull / curvature, rtol=1e-4, atol=1e-6)
            shifted = (weight * (entry.shift()[:, bins] - x * dropped).square()).sum(0)
            torch.testing.assert_close(entry.cost(True)[:, bins], shifted / 800, rtol=1e-3, atol=1e-3)

    def test_bins_below_a_threshold(self) -> None:
        entry = random_sensitivity(5, 0)
        for bins in (0, 30, BINS - 1):
            assert entry.bins_below(entry.thresholds()[:, bins]).tolist() == [bins] * 5
        for bins in (0, 30, BINS - 2):
            assert entry.bins_below(entry.thresholds()[:, bins] * 0.99).tolist() == [bins - 1] * 5
        assert entry.bins_below(-1.0).tolist() == [-1] * 5

    def test_mixing_with_itself_changes_no_curve(self) -> None:
        entry = random_sensitivity(4, 1)
        mixed = entry.mix(entry, 0.3)
        torch.testing.assert_close(mixed.cost(True), entry.cost(True))
        torch.testing.assert_close(mixed.dropped(), entry.dropped())

    @pytest.mark.parametrize("family", FAMILIES)
    @pytest.mark.parametrize("batch", [1, 2])
    def test_gradients_are_those_of_the_whole_model(self, family: str, batch: int) -> None:
        """The curvature of every channel, with the tokens that the meter drew, by plain autograd through the model."""
        model = tiny_model(family)
        meter = meter_of(model, batch)
        found = meter.measure()
        structure, expected = ModelStructure.of(model), {}
        generator = torch.Generator().manual_seed(meter.seed)
        for row in TOKENS.split(1):
            entering: dict[str, Tensor] = {}
            hooks = []
            for index, projection in structure.projections():
                name = structure.module_name(index, projection)

                def alias(
                    _: object, inputs: tuple[Tensor, ...], name: str = name, entering: dict[str, Tensor] = entering
                ) -> Tensor:
                    x = inputs[0] if inputs[0].requires_grad else inputs[0].detach().requires_grad_()
                    entering[name] = x.view_as(x)
                    return entering[name]

                hooks.append(model.get_submodule(name).register_forward_pre_hook(alias))
            log_p = model(input_ids=row, use_cache=False).logits[0, DENSE_TOKENS:].float().log_softmax(-1)
            for hook in hooks:
                hook.remove()
            drawn = torch.multinomial(log_p.detach().exp(), 1, generator=generator)
            gradients = torch.autograd.grad(log_p.gather(1, drawn).sum(), list(entering.values()))
            for name, gradient in zip(entering, gradients, strict=True):
                squares = gradient[0, DENSE_TOKENS:].square().sum(0)
                expected[name] = expected.get(name, 0) + squares
        for index, projection in structure.projections():
            entry = found[index][projection.name]
            assert entry.tokens == 3 * (24 - DENSE_TOKENS)
            wanted = expected[structure.module_name(index, projection)]
            torch.testing.assert_close(entry.curvature, wanted, rtol=2e-3, atol=1e-8)

    def test_second_order_predicts_the_divergence_of_small_errors(self) -> None:
        """One projection drops little: what is measured there is near what the curves promised."""
        model = tiny_model()
        source = open_blocks(model)
        tokens = random_tokens(24, 32)
        statistics = calibrate(model, tokens, dense_tokens=DENSE_TOKENS)
        found = SensitivityMeter(source, tokens, statistics).measure()
        index, projection = 0, source.structure.blocks[0][-1]
        entry = found[index][projection.name]
        bins = entry.bins_below(statistics.blocks[0][projection.input].threshold(0.3))
        predicted = float(entry.cost(False).gather(1, bins.clamp_min(0)[:, None])[bins >= 0].sum())
        threshold = entry.thresholds().gather(1, bins.clamp_min(0)[:, None])[:, 0].where(bins >= 0, -1.0)
        dropping = Dropping(threshold, torch.zeros_like(threshold))
        with torch.no_grad():
            dense = model(input_ids=tokens, use_cache=False).logits[:, DENSE_TOKENS:].log_softmax(-1)
            module = model.get_submodule(source.structure.module_name(index, projection))
            hook = module.register_forward_pre_hook(lambda _, x: x[0] + dropping.error(x[0], DENSE_TOKENS))
            sparse = model(input_ids=tokens, use_cache=False).logits[:, DENSE_TOKENS:].log_softmax(-1)
            hook.remove()
        measured = float((dense.exp() * (dense - sparse)).sum(-1).mean())
        assert measured == pytest.approx(predicted, rel=0.5)

    def test_the_model_is_left_as_it_was(self) -> None:
        model = tiny_model()
        before = inputs_of(model)
        meter_of(model).measure()
        assert all("forward" not in vars(module) for module in model.modules())
        for name, value in inputs_of(model).items():
            assert torch.equal(value, before[name])


def globally(made_for: nn.Module, **options: Any) -> SparsityPlan:
    options = {"levels": LEVELS, "tokens": TOKENS, "model": made_for, **options}
    return allocate(statistics_of(made_for), "global", **options)


class TestGlobal:
    @pytest.mark.parametrize("family", FAMILIES)
    def test_levels_are_met_and_model_and_plan_fit(self, family: str) -> None:
        plan = globally(tiny_model(family))
        assert plan.method == "global"
        assert plan.has_vectors
        assert (plan.details["score"], plan.details["compensated"]) == ("sensitivity", True)
        assert [plan.expected_sparsity(level) for level in LEVELS] == pytest.approx(LEVELS, abs=0.02)

    @pytest.mark.parametrize("score", ["magnitude", "l2", "l1"])
    def test_scores_that_say_what_goes_first(self, score: str) -> None:
        plan = globally(tiny_model(), score=score, compensate=False)
        assert [plan.expected_sparsity(level) for level in LEVELS] == pytest.approx(LEVELS, abs=0.03)
        assert all(entry.compensation is None for block in plan.blocks for entry in block.values())

    def test_realised_is_near_expected_on_the_same_tokens(self) -> None:
        model = tiny_model()
        plan = globally(model, levels=(0.5,), compensate=False, stride=1.0)
        settings, structure = plan.settings(0.5), ModelStructure.of(model)
        inputs = inputs_of(model)
        for index, projection in structure.projections():
            setting = settings[index][projection.name]
            dropped = ~keep_mask(inputs[structure.module_name(index, projection)], torch.as_tensor(setting.threshold))
            assert float(dropped.float().mean()) == pytest.approx(setting.sparsity, abs=0.12)

    def test_of_two_choices_the_cheaper_is_taken(self) -> None:
        """Against trying out every price: no other split of the same size costs less."""
        first, second = random_sensitivity(6, 2), random_sensitivity(6, 3)
        second.energy *= 9
        second.pull *= 0
        thresholds = sensitivity_thresholds([{"p": first}], compensate=False)
        chosen = thresholds(0, "p", 0.5)
        bins = first.bins_below(chosen)
        cost = float(first.cost(False).gather(1, bins.clamp_min(0)[:, None])[bins >= 0].sum())
        share = float(first.dropped().gather(1, bins.clamp_min(0)[:, None])[:, 0].where(bins >= 0, 0.0).sum()) / 6
        assert share >= 0.5
        for level in range(0, BINS, 4):  # the same bin everywhere
            if float(first.dropped()[:, level].mean()) >= share:
                assert float(first.cost(False)[:, level].sum()) >= cost - 1e-6
        for one, other in itertools.product(range(0, BINS, 6), repeat=2):  # two groups of channels
            bins = torch.tensor([one] * 3 + [other] * 3)[:, None]
            if float(first.dropped().gather(1, bins).mean()) >= share:
                assert float(first.cost(False).gather(1, bins).sum()) >= cost - 1e-6

    def test_the_price_saves_what_is_asked(self) -> None:
        price = find_price(lambda price: min(1.0, price / 7), 0.5)
        assert price == pytest.approx(3.5, rel=1e-6)

    def test_streamed_and_in_memory_agree(self, tmp_path: Path) -> None:
        model = tiny_model()
        model.save_pretrained(tmp_path)
        in_memory, streamed = globally(model), globally(model, model=tmp_path)
        for mine, theirs in zip(in_memory.settings(0.5), streamed.settings(0.5), strict=True):
            for name, setting in mine.items():
                torch.testing.assert_close(theirs[name].compensation, setting.compensation)

    def test_continues_after_an_interruption(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        model = tiny_model()
        expected = globally(model)
        calls, measure = [], SensitivityMeter.measure

        def failing(*given: Any) -> Any:
            calls.append(1)
            if len(calls) == 3:
                raise Interrupted
            return measure(*given)

        monkeypatch.setattr(SensitivityMeter, "measure", failing)
        with pytest.raises(Interrupted):
            globally(model, spool=tmp_path / "spool")
        found = globally(model, spool=tmp_path / "spool")
        assert len(calls) == 3 + 3  # at 0.3, 0.45 and 0.6; dense and 0.15 were kept
        for mine, theirs in zip(expected.settings(0.6), found.settings(0.6), strict=True):
            for name, setting in mine.items():
                torch.testing.assert_close(vars(theirs[name]), vars(setting), rtol=0, atol=0)

    @pytest.mark.parametrize("stride", [0.0, 1.5])
    def test_stride(self, stride: float) -> None:
        with pytest.raises(UsageError, match=f"stride must be at least 0.01 and at most 1, got {stride}"):
            globally(tiny_model(), stride=stride)

    def test_unknown_score(self) -> None:
        with pytest.raises(UsageError, match="unknown score 'l3'; choose from magnitude, l2, l1, sensitivity"):
            globally(tiny_model(), score="l3")


class TestScores:
    @pytest.mark.parametrize("order", [1, 2])
    def test_norms(self, order: int) -> None:
        model = tiny_model()
        source = open_blocks(model)
        thresholds = norm_thresholds(source, TOKENS, DENSE_TOKENS, order)
        inputs = inputs_of(model)
        for index, projection in source.structure.projections():
            name = source.structure.module_name(index, projection)
            norm = torch.linalg.vector_norm(model.get_submodule(name).weight.detach(), order, dim=0)
            threshold = thresholds(index, projection.name, 0.4)
            dropped = ~keep_mask(inputs[name], threshold)
            assert float(dropped.float().mean()) == pytest.approx(0.4, abs=0.01)
            scores = inputs[name].abs() * norm
            assert float(scores[dropped].max()) <= float(scores[~dropped].min()) * 1.01

    def test_nothing_is_dropped_at_0(self) -> None:
        model = tiny_model()
        source = open_blocks(model)
        entries = SensitivityMeter(source, TOKENS, statistics_of(model)).measure()
        norm = norm_thresholds(source, TOKENS, DENSE_TOKENS, 2)
        for thresholds in (norm, sensitivity_thresholds(entries, True)):
            assert (thresholds(0, "mlp.down_proj", 0.0) == -1).all()

    @pytest.mark.parametrize("score", ["l2", "l1", "sensitivity"])
    @pytest.mark.parametrize("method", ["uniform", "blockwise"])
    def test_with_every_method(self, method: str, score: str) -> None:
        model = tiny_model()
        plan = allocate(statistics_of(model), method, score=score, levels=LEVELS, model=model, tokens=TOKENS)
        assert [plan.expected_sparsity(level) for level in LEVELS] == pytest.approx(LEVELS, abs=0.01)
        settings, inputs, structure = plan.settings(0.4), inputs_of(model), ModelStructure.of(model)
        for index, projection in structure.projections():
            setting = settings[index][projection.name]
            dropped = ~keep_mask(inputs[structure.module_name(index, projection)], setting.threshold)
            assert float(dropped.float().mean()) == pytest.approx(setting.sparsity, abs=0.15)


class TestCompensation:
    @pytest.mark.parametrize("family", ["llama", "phi3"])
    def test_is_the_mean_of_what_is_dropped(self, family: str) -> None:
        model = tiny_model(family)
        plan = allocate(statistics_of(model), "uniform", compensate=True, levels=LEVELS, model=model, tokens=TOKENS)
        settings, inputs, structure = plan.settings(0.4), inputs_of(model), ModelStructure.of(model)
        for index, projection in structure.projections():
            setting, x = settings[index][projection.name], inputs[structure.module_name(index, projection)]
            dropped = torch.where(keep_mask(x, torch.as_tensor(setting.threshold)), 0, x)
            weight = model.get_submodule(structure.module_name(index, projection)).weight.detach()
            torch.testing.assert_close(setting.compensation, weight @ dropped.mean(0), rtol=1e-4, atol=1e-6)
        assert all((entry.compensation == 0).all() for entry in plan.settings(0.0)[0].values())
