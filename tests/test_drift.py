"""The sparsity that is logged is what decoding realised, and drift is told from chance."""

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import byte_tokenizer, random_plan, random_tokens, save_tiny, tiny_model, tiny_plan

from teal.allocation import allocate
from teal.calibration import calibrate
from teal.checkpoint import EMBEDDED_MODEL, load_model, load_tokenizer
from teal.data import CALIBRATION_TEXT, EVALUATION_TEXT, token_blocks
from teal.drift import LEAST_TOKENS, TOLERANCE, SparsityLog, _drift, log_sparsity
from teal.engine.generate import generate
from teal.engine.load import load_engine
from teal.errors import UsageError
from teal.linear import sparse_layers
from teal.plan import SparsityPlan
from teal.sparse_model import set_sparsity, sparsify
from teal.sparsity_meter import SparsityMeter
from teal.structure import identify

LEVEL, PROMPT, NEW = 0.5, 8, 48


@pytest.fixture(scope="module")
def plan() -> SparsityPlan:
    return tiny_plan(tiny_model())


@pytest.fixture
def engine(plan: SparsityPlan, tmp_path: Path) -> Any:
    return load_engine(save_tiny(tmp_path / "model"), torch.float32, plan=plan, level=LEVEL)


def prompt() -> list[int]:
    return random_tokens(1, PROMPT).flatten().tolist()


def decoded(engine: Any) -> Sequence[int]:
    return generate(engine, byte_tokenizer(), prompt(), NEW, ignore_eos=True).result.token_ids


def test_of_the_engine(engine: Any) -> None:
    meter = SparsityMeter(engine)
    with meter.measuring():  # counts while decoding
        tokens = decoded(engine)
    log = log_sparsity(engine, prompt(), tokens)
    assert len(log.tokens) == NEW - 1
    assert log.sparsity == pytest.approx(meter.sparsity(), abs=1e-4)
    assert log.sparsity == pytest.approx(sum(log.tokens) / (NEW - 1))
    assert log.expected == pytest.approx(LEVEL)
    assert all(layer.observer is None and layer.dense_tokens == -1 for layer in sparse_layers(engine).values())
    assert decoded(engine) == tokens, "the engine is as it was"


def test_of_thresholds_per_channel(tmp_path: Path) -> None:
    plan = random_plan(identify(tiny_model()), vectors=True)
    engine = load_engine(save_tiny(tmp_path / "model"), torch.float32, plan=plan, level=LEVEL)
    meter = SparsityMeter(engine)
    with meter.measuring():
        tokens = decoded(engine)
    assert log_sparsity(engine, prompt(), tokens).sparsity == pytest.approx(meter.sparsity(), abs=1e-3)


def test_each_token_by_itself(engine: Any) -> None:
    tokens = decoded(engine)
    log, cache = log_sparsity(engine, prompt(), tokens), engine.new_cache()
    engine.prefill(torch.tensor([prompt()]), cache)
    for position, (token, logged) in enumerate(zip(tokens[:-1], log.tokens, strict=True), start=PROMPT):
        meter = SparsityMeter(engine)
        with meter.measuring():
            engine.decode(torch.tensor([token]), torch.tensor([position]), cache)
        assert logged == pytest.approx(meter.sparsity(), abs=1e-4)


def test_of_a_transformers_model(engine: Any, plan: SparsityPlan) -> None:
    model, tokens = tiny_model(), decoded(engine)
    sparsify(model, plan, LEVEL)
    assert log_sparsity(model, prompt(), tokens).tokens == pytest.approx(
        log_sparsity(engine, prompt(), tokens).tokens, abs=1e-4
    )


def test_nothing_to_log(engine: Any) -> None:
    with pytest.raises(UsageError, match="no sparse token to log"):
        log_sparsity(engine, prompt(), [3])
    set_sparsity(engine, 0.0)
    with pytest.raises(UsageError, match="no sparse token to log"):
        log_sparsity(engine, prompt(), [3, 4, 5])


@pytest.fixture
def shares() -> torch.Tensor:
    """Of 200 projections over 64 tokens of the expected text: 0.5 and chance, neighbours alike."""
    noise = torch.randn(200, 16, generator=torch.Generator().manual_seed(0)).repeat_interleave(4, dim=1)
    return 0.5 + 0.04 * noise


EXPECTED, EQUAL = torch.full((200,), 0.5), torch.full((200,), 1 / 200)


def test_chance_is_no_drift(shares: torch.Tensor) -> None:
    assert float((shares.mean(1) - EXPECTED).abs().mean()) > 0.007
    assert abs(_drift(shares, EXPECTED, EQUAL)) < 0.002


def test_drift_is_measured(shares: torch.Tensor) -> None:
    beyond_chance = 0.05 - 0.04 / 4 * math.sqrt(2 / math.pi)
    assert _drift(shares + 0.05, EXPECTED, EQUAL) == pytest.approx(beyond_chance, abs=0.002)
    opposite = torch.cat([shares[:100] + 0.05, shares[100:] - 0.05])
    assert float(opposite.mean()) == pytest.approx(0.5, abs=0.002)
    assert _drift(opposite, EXPECTED, EQUAL) == pytest.approx(beyond_chance, abs=0.002)
    mostly_the_first_half = torch.cat([EQUAL[:100] * 1.9, EQUAL[100:] * 0.1])
    half = torch.cat([shares[:100] + 0.05, shares[100:]])
    assert _drift(half, EXPECTED, mostly_the_first_half) > 0.9 * beyond_chance


def test_few_tokens_say_nothing(engine: Any) -> None:
    tokens = decoded(engine)
    assert not math.isnan(log_sparsity(engine, prompt(), tokens[: LEAST_TOKENS + 1]).drift)
    few = log_sparsity(engine, prompt(), tokens[:LEAST_TOKENS])
    assert math.isnan(few.drift)
    assert few.warning() is None
    assert few.to_json()["drift"] is None


def test_the_warning_says_how_much_and_what_to_do() -> None:
    log = SparsityLog((0.4,) * 40, 0.4, 0.5, TOLERANCE + 0.001)
    warning = log.warning()
    assert warning is not None
    assert "unlike the calibration text" in warning
    assert "over 40 tokens" in warning
    assert "0.400 realised where 0.500 was expected" in warning
    assert "calibrate on text like this" in warning
    assert log.warning(0.5) is None
    assert replace(log, drift=TOLERANCE).warning() is None


def test_on_the_embedded_model() -> None:
    """Text like the calibration text is not flagged, what is no language is."""
    model, tokenizer = load_model(EMBEDDED_MODEL, torch.float32), load_tokenizer(EMBEDDED_MODEL)
    calibration = token_blocks([CALIBRATION_TEXT], tokenizer, length=256, count=12, seed=0)
    sparsify(model, allocate(calibrate(model, calibration)), 0.5)
    symbols = "".join(random.Random(0).choices("#$%^&*()_+{}|:<>?~`-=[];/.,! @", k=400))
    english = token_blocks([EVALUATION_TEXT], tokenizer, length=137, count=3, seed=0).ids.tolist()
    opening, *unlike = tokenizer(symbols).input_ids
    for ids, flagged in [*((ids, False) for ids in english), ([opening, *unlike[:136]], True)]:
        log = log_sparsity(model, ids[:8], ids[8:])
        assert len(log.tokens) == 128
        assert (log.warning() is not None) == flagged, log.drift
