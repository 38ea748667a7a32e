"""Evaluation: what it reports equals what a few plain lines compute under the same token rule."""

import json
import math
from contextlib import ExitStack
from itertools import pairwise
from typing import Any

import pytest
import torch
from helpers import BEGIN, LEVELS, random_plan, random_tokens, tiny_model, tiny_plan
from torch import Tensor, nn

from teal.data import TokenBlocks
from teal.errors import TealError, UsageError
from teal.evaluation import (
    Evaluation,
    evaluate,
    mean_and_error,
    position_ranges,
    texts_from_json,
    texts_to_json,
)
from teal.linear import sparse_layers
from teal.ops.reference import drop_small, keep_mask
from teal.plan import SparsityPlan
from teal.sparse_model import set_sparsity, sparsify
from teal.structure import ModelStructure, identify

TOKENS = random_tokens(3, 20, seed=5)
DENSE_TOKENS = 4


def run(model: nn.Module, plan: SparsityPlan, levels: tuple[float, ...] = (0.5,), **options: Any) -> Evaluation:
    return evaluate(model, TOKENS, plan, levels, **{"dense_tokens": DENSE_TOKENS, **options})


def masked_logits(
    model: nn.Module, plan: SparsityPlan, level: float, row: Tensor, kept: dict[str, list[int]]
) -> Tensor:
    """Logits [L - 1, V] of a sequence without its last token, inputs dropped by plain hooks from DENSE_TOKENS on.

    Adds to `kept` how many inputs of each projection were kept and seen.
    """
    structure = ModelStructure.of(model)
    settings = plan.settings(level)
    with ExitStack() as stack, torch.no_grad():
        for index, projection in structure.projections():
            threshold = torch.as_tensor(settings[index][projection.name].threshold)
            counts = kept.setdefault(f"{index}.{projection.name}", [0, 0])

            def hook(
                _: nn.Module, inputs: tuple[Tensor], threshold: Tensor = threshold, counts: list[int] = counts
            ) -> Tensor:
                dense, sparse = inputs[0][:, :DENSE_TOKENS], inputs[0][:, DENSE_TOKENS:]
                counts[0] += int(keep_mask(sparse, threshold).sum())
                counts[1] += sparse.numel()
                return torch.cat([dense, drop_small(sparse, threshold)], dim=1)

            module = model.get_submodule(structure.module_name(index, projection))
            stack.callback(module.register_forward_pre_hook(hook).remove)
        return model(input_ids=row[None, :-1], use_cache=False).logits[0].double()


def mean_loss(logits: Tensor, row: Tensor) -> float:
    """Of the predictions made at positions DENSE_TOKENS to L - 2."""
    positions = range(DENSE_TOKENS, len(row) - 1)
    return sum(-logits[at].log_softmax(-1)[row[at + 1]].item() for at in positions) / len(positions)


class TestAgainstPlainCode:
    @pytest.mark.parametrize("level", [0.25, 0.6])
    @pytest.mark.parametrize("family", ["llama", "gemma2", "phi3"])
    def test_every_figure(self, family: str, level: float) -> None:
        model = tiny_model(family)
        plan = tiny_plan(model)
        losses: dict[str, list[float]] = {"dense": [], "sparse": []}
        divergences, agreements, kept = [], [], {}
        for row in TOKENS:
            dense = model(input_ids=row[None, :-1], use_cache=False).logits[0].detach().double()
            sparse = masked_logits(model, plan, level, row, kept)
            losses["dense"].append(mean_loss(dense, row))
            losses["sparse"].append(mean_loss(sparse, row))
            log_p, log_q = dense[DENSE_TOKENS:].log_softmax(-1), sparse[DENSE_TOKENS:].log_softmax(-1)
            divergences.append((log_p.exp() * (log_p - log_q)).sum(-1).mean().item())
            agreements.append((log_p.argmax(-1) == log_q.argmax(-1)).double().mean().item())

        result = run(tiny_model(family), plan, (level,))
        (measured,) = result.measurements
        mean = {kind: sum(values) / len(values) for kind, values in losses.items()}
        assert result.dense_perplexity == pytest.approx(math.exp(mean["dense"]), rel=1e-5)
        assert result.dense_nll == pytest.approx(losses["dense"], rel=1e-5)
        assert measured.perplexity == pytest.approx(math.exp(mean["sparse"]), rel=1e-4)
        assert measured.nll == pytest.approx(losses["sparse"], rel=1e-4)
        assert measured.increase == pytest.approx(100 * (math.exp(mean["sparse"] - mean["dense"]) - 1), rel=1e-2)
        assert measured.kl == pytest.approx(sum(divergences) / 3, rel=1e-3)
        assert measured.top1_agreement == pytest.approx(sum(agreements) / 3)
        dropped = {name: 1 - count / seen for name, (count, seen) in kept.items()}
        assert measured.projections == pytest.approx(dropped, abs=2e-3)  # a mask may flip at a rounded input
        sizes = {f"{index}.{name}": n * k for index, block in enumerate(plan.identity.shapes)
                 for name, (n, k) in block.items()}  # fmt: skip
        weighted = sum(size * dropped[name] for name, size in sizes.items()) / sum(sizes.values())
        assert measured.sparsity == pytest.approx(weighted, abs=2e-3)
        assert measured.expected_sparsity == pytest.approx(level)

    def test_standard_errors(self) -> None:
        assert mean_and_error([2.0]) == (2.0, 0.0)
        mean, error = mean_and_error([1.0, 2.0, 4.0])
        assert mean == pytest.approx(7 / 3)
        assert error == pytest.approx(torch.tensor([1.0, 2.0, 4.0]).std().item() / math.sqrt(3))
        model = tiny_model()
        result = run(model, tiny_plan(model))
        (measured,) = result.measurements
        differences = [sparse - dense for sparse, dense in zip(measured.nll, result.dense_nll, strict=True)]
        difference, error = mean_and_error(differences)
        assert measured.increase_error == pytest.approx(100 * math.exp(difference) * error)
        assert measured.perplexity_error == pytest.approx(measured.perplexity * mean_and_error(measured.nll)[1])

    @pytest.mark.parametrize("rows", [1, 3, 256])
    def test_how_many_positions_are_scored_at_once_changes_nothing(
        self, rows: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model = tiny_model()
        plan, expected = tiny_plan(model), run(tiny_model(), tiny_plan(model)).measurements[0]
        monkeypatch.setattr("teal.evaluation.LOGIT_ROWS", rows)
        found = run(model, plan).measurements[0]
        assert (found.perplexity, found.kl) == pytest.approx((expected.perplexity, expected.kl))

    @pytest.mark.parametrize("batch", [2, 3, 100])
    def test_how_many_sequences_are_evaluated_at_once_changes_nothing(self, batch: int) -> None:
        model = tiny_model()
        plan = random_plan(identify(model), vectors=True)
        alone, together = run(model, plan), run(tiny_model(), plan, batch=batch)
        for one, other in zip(alone.measurements, together.measurements, strict=True):
            assert one.nll == pytest.approx(other.nll, abs=1e-6)
            assert one.kl == pytest.approx(other.kl, abs=1e-6)
            assert one.projections == other.projections
        assert together.rule == alone.rule


class TestByPosition:
    def test_ranges_end_before_powers_of_two(self) -> None:
        assert position_ranges(8, 510) == [range(8, 16), range(16, 32), range(32, 64), range(64, 128), range(128, 256),
                                           range(256, 511)]  # fmt: skip
        assert position_ranges(0, 2) == [range(0, 1), range(1, 2), range(2, 3)]
        assert position_ranges(5, 5) == [range(5, 6)]

    def test_against_the_losses_of_single_positions(self) -> None:
        model = tiny_model()
        plan = tiny_plan(model)
        (measured,) = run(tiny_model(), plan).measurements
        assert [(found.first, found.last) for found in measured.positions] == [(4, 7), (8, 15), (16, 18)]
        for found in measured.positions:
            differences = []
            for row in TOKENS:
                dense = model(input_ids=row[None, :-1], use_cache=False).logits[0].detach().double()
                sparse = masked_logits(model, plan, 0.5, row, {})
                at = torch.arange(found.first, found.last + 1)
                losses = [nn.functional.cross_entropy(x[at], row[at + 1]).item() for x in (dense, sparse)]
                differences.append(losses[1] - losses[0])
            mean, error = mean_and_error(differences)
            assert found.sparse - found.dense == pytest.approx(mean, rel=1e-3)
            assert found.increase == pytest.approx(100 * math.expm1(mean), rel=1e-2)
            assert found.increase_error == pytest.approx(100 * math.exp(mean) * error, rel=1e-2)

    def test_the_ranges_make_up_the_whole(self) -> None:
        model = tiny_model()
        (measured,) = run(model, tiny_plan(model)).measurements
        total = sum((found.last - found.first + 1) * found.sparse for found in measured.positions)
        assert total / 15 == pytest.approx(sum(measured.nll) / 3)


class TestSimulatedRounding:
    @pytest.mark.parametrize("bits", [8, 4])
    def test_it_measures_what_the_real_format_computes(self, bits: int) -> None:
        """In float32, where a product with the rounded weight and the format's own differ by rounding only."""
        model = tiny_model()
        plan = tiny_plan(model)
        real = run(tiny_model(), plan, quantization=f"int{bits}")
        simulated = run(tiny_model(), plan, simulate_bits=bits)
        assert simulated.dense_nll == pytest.approx(real.dense_nll, rel=1e-4)
        assert simulated.measurements[0].nll == pytest.approx(real.measurements[0].nll, rel=1e-3)
        assert simulated.details["weights"] == f"int{bits} (simulated)"
        assert simulated.identity == real.identity == identify(tiny_model())

    def test_again_on_the_same_model(self) -> None:
        model = tiny_model()
        plan = tiny_plan(model)
        first = run(model, plan, simulate_bits=3)
        assert run(model, plan, simulate_bits=3).measurements == first.measurements
        with pytest.raises(UsageError, match="the model is sparse already; round its weights before"):
            run(model, plan, simulate_bits=2)

    def test_once_is_enough(self) -> None:
        model = tiny_model()
        with pytest.raises(UsageError, match="give quantization or simulate_bits, not both"):
            run(model, tiny_plan(model), simulate_bits=8, quantization="int8")


class TestDense:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_level_0_is_dense(self, dtype: torch.dtype) -> None:
        model = tiny_model(dtype=dtype)
        result = run(model, tiny_plan(model), (0.0,))
        (measured,) = result.measurements
        assert measured.perplexity == pytest.approx(result.dense_perplexity, rel=1e-6)
        assert measured.increase == pytest.approx(0, abs=1e-4)
        assert measured.kl == pytest.approx(0, abs=1e-6)
        assert (measured.top1_agreement, measured.sparsity, measured.expected_sparsity) == (1.0, 0.0, 0.0)

    def test_quality_falls_with_the_level(self) -> None:
        model = tiny_model()
        measured = run(model, tiny_plan(model), LEVELS).measurements
        assert [m.level for m in measured] == list(LEVELS)
        for lower, higher in pairwise(measured):
            assert lower.kl < higher.kl
            assert lower.sparsity < higher.sparsity
            assert lower.top1_agreement > higher.top1_agreement


class TestPlansAndLevels:
    def test_several_plans(self) -> None:
        model = tiny_model()
        plans = {"one": tiny_plan(model), "other": tiny_plan(model, seed=8)}
        result = evaluate(model, TOKENS, plans, (0.25, 0.5), dense_tokens=DENSE_TOKENS)
        assert [(m.plan, m.level) for m in result.measurements] == [
            ("one", 0.25), ("one", 0.5), ("other", 0.25), ("other", 0.5),
        ]  # fmt: skip
        for name, plan in plans.items():
            alone = run(tiny_model(), plan, (0.25, 0.5))
            together = [m for m in result.measurements if m.plan == name]
            assert [m.nll for m in together] == [m.nll for m in alone.measurements]
            assert [m.projections for m in together] == [m.projections for m in alone.measurements]

    def test_one_plan_has_the_name_of_its_method(self) -> None:
        model = tiny_model()
        assert run(model, tiny_plan(model)).measurements[0].plan == "uniform"

    def test_a_level_given_twice_is_measured_once(self) -> None:
        model = tiny_model()
        assert [m.level for m in run(model, tiny_plan(model), (0.5, 0.25, 0.5)).measurements] == [0.5, 0.25]

    def test_a_plan_with_vectors(self) -> None:
        model = tiny_model()
        plan = random_plan(identify(model), vectors=True)
        (measured,) = run(model, plan).measurements
        assert 0 < measured.sparsity < 1

    def test_a_dense_model_ends_dense(self) -> None:
        model = tiny_model()
        before = model(input_ids=TOKENS[:, :1]).logits
        run(model, tiny_plan(model))
        torch.testing.assert_close(model(input_ids=TOKENS[:, :1]).logits, before)
        assert all(layer.dense_tokens == -1 for layer in sparse_layers(model).values())

    @pytest.mark.parametrize("fails", [False, True])
    def test_a_sparse_model_keeps_its_plan_and_level(self, fails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        model = tiny_model()
        sparsify(model, tiny_plan(model), 0.6)
        step, other = random_tokens(1, 1), tiny_plan(tiny_model(), seed=9)
        before = model(input_ids=step).logits
        if fails:
            monkeypatch.setattr("teal.evaluation._logits", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                run(model, other, (0.25,))
        else:
            run(model, other, (0.25,))
        assert torch.equal(model(input_ids=step).logits, before)
        assert model.sparsity_level == 0.6
        set_sparsity(model, 0.6)
        assert torch.equal(model(input_ids=step).logits, before)


class TestRefused:
    @pytest.mark.parametrize("dense_tokens", [-1, 19, 40])
    def test_dense_tokens(self, dense_tokens: int) -> None:
        model = tiny_model()
        with pytest.raises(UsageError, match="dense_tokens must be between 0 and 18 for sequences of 20 tokens"):
            run(model, tiny_plan(model), dense_tokens=dense_tokens)

    def test_no_sequence_at_a_time(self) -> None:
        model = tiny_model()
        with pytest.raises(UsageError, match="at least 1 sequence must be evaluated at a time, got 0"):
            run(model, tiny_plan(model), batch=0)

    def test_no_plan(self) -> None:
        with pytest.raises(UsageError, match="there is no plan to evaluate"):
            evaluate(tiny_model(), TOKENS, {})

    def test_unknown_tokens(self) -> None:
        model = tiny_model()
        with pytest.raises(TealError, match="token id 300 is outside the model's vocabulary"):
            evaluate(model, torch.tensor([[BEGIN, 300, 5, 5]]), tiny_plan(model), dense_tokens=0)

    def test_nan_logits(self) -> None:
        model = tiny_model()
        plan = tiny_plan(model)
        model.lm_head.weight.data[3, 3] = float("nan")
        with pytest.raises(TealError, match="the model's logits are NaN or infinite"):
            run(model, plan)

    def test_a_level_outside_the_plan_changes_nothing(self) -> None:
        model = tiny_model()
        with pytest.raises(TealError, match=r"the plan covers sparsity 0\.0 to 0\.75, got 0\.8"):
            run(model, tiny_plan(model), (0.25, 0.8))
        with pytest.raises(TealError, match="no sparse projections"):
            sparse_layers(model)

    def test_a_plan_of_other_shapes(self) -> None:
        plans = {"one": tiny_plan(tiny_model()), "other": tiny_plan(tiny_model(intermediate_size=48))}
        with pytest.raises(TealError, match="48 in the plan and 32 x 56 in the model"):
            evaluate(tiny_model(), TOKENS, plans, (0.5,))

    def test_a_plan_of_other_weights(self) -> None:
        plan = tiny_plan(tiny_model(seed=1))
        with pytest.warns(UserWarning, match="may not belong to this model: it was made for other weights") as warned:
            run(tiny_model(), plan)
        assert len(warned) == 1
        with pytest.raises(TealError, match="may not belong to this model"):
            run(tiny_model(), plan, strict=True)

    def test_losses_beyond_the_range_of_a_float(self) -> None:
        model = tiny_model()
        plan = tiny_plan(model)
        model.lm_head.weight.data *= 1e5
        result = run(model, plan)
        assert math.isfinite(result.dense_perplexity)
        json.dumps(result.to_json(), allow_nan=False)


class TestResult:
    def test_the_rule_is_stated(self) -> None:
        model = tiny_model()
        blocks = TokenBlocks(TOKENS, ("some.txt",), None)
        result = evaluate(model, blocks, tiny_plan(model), (0.5,), dense_tokens=DENSE_TOKENS)
        assert result.rule == {
            "dense_tokens": 4,
            "sparse": "every position from 4 on, as if decoded; earlier positions dense",
            "counted": "predictions made at positions 4 to 18 of each sequence",
            "sequences": 3,
            "sequence_length": 20,
            "tokens_counted": 45,
            "dtype": "float32",
        }
        assert result.details == blocks.describe()
        assert result.identity == identify(tiny_model())

    def test_round_trip(self) -> None:
        model = tiny_model()
        result = run(model, tiny_plan(model), (0.25, 0.5))
        assert Evaluation.from_json(json.loads(json.dumps(result.to_json())), "here") == result
        several = {"one": result, "other": run(model, tiny_plan(model), (0.5,))}
        assert texts_from_json(json.loads(json.dumps(texts_to_json(several))), "here") == several

    def test_results_without_positions_are_read(self) -> None:
        """As they were written before."""
        model = tiny_model()
        payload = json.loads(json.dumps(run(model, tiny_plan(model)).to_json()))
        del payload["measurements"][0]["positions"]
        assert Evaluation.from_json(payload, "here").measurements[0].positions == []

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"version": 99}, "here has version 99, this teal reads up to 1"),
            ({"format": "teal.plan"}, "here has format 'teal.plan', expected 'teal.evaluation'"),
            ({"extra": 1}, r"here has unknown keys \['extra'\]"),
            ({"measurements": [{"plan": "x"}]}, "here is damaged"),
            ({"measurements": 3}, "here is damaged"),
            ({"dense": {}}, "here is damaged"),
            ({"rule": {"sequences": 3}}, r"here, its rule lacks \['counted'"),
            ({"rule": None}, "here is damaged"),
        ],
    )
    def test_damaged(self, change: dict[str, Any], message: str) -> None:
        model = tiny_model()
        payload = run(model, tiny_plan(model)).to_json() | change
        with pytest.raises(TealError, match=message):
            Evaluation.from_json(payload, "here")
