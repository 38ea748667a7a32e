import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from teal.engine.sampling import Sampler, SamplingConfig, filter_scores, penalize
from teal.errors import UsageError

VOCABULARY = 50


@pytest.fixture
def logits():
    return 4 * torch.randn(3, VOCABULARY, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def prompt():
    return torch.randint(0, VOCABULARY, (3, 9), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "config",
    [
        SamplingConfig(temperature=0.7),
        SamplingConfig(temperature=1.0, top_k=5),
        SamplingConfig(temperature=1.0, top_k=1000),
        SamplingConfig(temperature=1.3, top_p=0.9),
        SamplingConfig(temperature=1.0, top_p=0.01),
        SamplingConfig(temperature=2.0, min_p=0.1),
        SamplingConfig(temperature=1.0, min_p=1.0),
        SamplingConfig(temperature=1.0, repetition_penalty=1.5),
        SamplingConfig(temperature=0.8, top_k=20, top_p=0.8, min_p=0.05, repetition_penalty=0.7),
    ],
    ids=["temperature", "k", "k-of-all", "p", "tiny-p", "min-p", "min-p-1", "penalty", "all"],
)
def test_probabilities_equal_those_of_transformers(config, logits, prompt):
    processors = LogitsProcessorList(
        [
            RepetitionPenaltyLogitsProcessor(config.repetition_penalty),
            TemperatureLogitsWarper(config.temperature),
        ]
    )
    if config.top_k:
        processors.append(TopKLogitsWarper(config.top_k))
    processors.extend([TopPLogitsWarper(config.top_p), MinPLogitsWarper(config.min_p)])
    expected = processors(prompt, logits.clone()).softmax(dim=-1)
    said = torch.zeros(3, VOCABULARY, dtype=torch.bool).scatter(1, prompt, True)
    scores = filter_scores(penalize(logits, said, config.repetition_penalty), config)
    torch.testing.assert_close(scores.softmax(dim=-1), expected)
    assert torch.equal(scores.isinf(), expected == 0)


def test_tied_tokens_stay_in_top_k():
    scores = filter_scores(torch.tensor([[1.0, 2.0, 2.0, 2.0]]), SamplingConfig(temperature=1.0, top_k=2))
    assert scores.isfinite().tolist() == [[False, True, True, True]]


def test_greedy_takes_the_best_and_remembers_what_was_said(prompt):
    logits = torch.full((3, VOCABULARY), -1.0)
    logits[:, 7], logits[:, 8] = 3.0, 2.0
    assert Sampler(SamplingConfig(), prompt, VOCABULARY)(logits).tolist() == [7, 7, 7]
    sampler = Sampler(SamplingConfig(repetition_penalty=2.0), torch.zeros(3, 1, dtype=torch.int64), VOCABULARY)
    assert [sampler(logits)[0].item() for _ in range(3)] == [7, 8, 7]  # 3 and 2; 1.5 and 2; 1.5 and 1


def test_a_seed_reproduces_and_no_seed_does_not(logits, prompt):
    def draw(seed):
        sampler = Sampler(SamplingConfig(temperature=1.5, seed=seed), prompt, VOCABULARY)
        return [sampler(logits).tolist() for _ in range(20)]

    assert draw(3) == draw(3)
    assert draw(3) != draw(4)
    assert draw(None) != draw(None)


def test_draws_follow_the_probabilities(prompt):
    logits = torch.tensor([0.5, 0.3, 0.2, 1e-9]).log().expand(5000, 4)
    sampler = Sampler(SamplingConfig(temperature=1.0, seed=0), torch.zeros(5000, 1, dtype=torch.int64), 4)
    shares = sampler(logits).bincount(minlength=4) / 5000
    torch.testing.assert_close(shares, torch.tensor([0.5, 0.3, 0.2, 0.0]), atol=0.03, rtol=0)


@pytest.mark.parametrize("temperature", [1e-30, 1e-300])
def test_a_tiny_temperature_is_greedy(temperature, logits, prompt):
    sampler = Sampler(SamplingConfig(temperature=temperature, seed=0), prompt, VOCABULARY)
    assert torch.equal(sampler(logits), logits.argmax(dim=-1))


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -0.1}, {"temperature": float("nan")}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.1},
        {"min_p": -0.1}, {"min_p": 2.0}, {"repetition_penalty": 0.0}, {"seed": -1},
    ],
    ids=str,
)  # fmt: skip
def test_settings_out_of_range_are_refused(wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(UsageError, match=f"{name} must be .*got {value}"):
        SamplingConfig(**wrong)
