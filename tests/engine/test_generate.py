from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from helpers import BEGIN, END, VOCABULARY, random_tokens

from teal.engine import DecodeState, SamplingConfig, decode_tokens, generate, load_engine
from teal.engine.cache import KVCache
from teal.engine.generate import _one_ahead
from teal.errors import TealError, UsageError

PROMPT = random_tokens(length=9)[0].tolist()


class ScriptedEngine:
    """Says the tokens of a script whatever it is told; None makes the logits NaN. Counts decode steps."""

    context = 200
    device = torch.device("cpu")
    config = SimpleNamespace(vocab_size=VOCABULARY, eos_token_ids=(END,))

    def __init__(self, script):
        self.script = iter([*script, *[END] * 50])
        self.steps = 0

    def new_cache(self, batch, context):
        return KVCache((), context)

    decode_step = None  # none that could be captured

    def prefill(self, tokens, cache):
        return self.logits()

    def decode(self, token, position, cache):
        self.steps += 1
        return self.logits()

    def logits(self):
        token = next(self.script)
        logits = torch.zeros(1, VOCABULARY)
        logits[0, token or 0] = float("nan") if token is None else 1.0
        return logits


@pytest.fixture
def say(tokenizer):
    """Stream a text whose every byte is one token; options are those of `stream`."""

    def run(text, limit=100, **options):
        script = tokenizer(text, add_special_tokens=False).input_ids
        return generate(ScriptedEngine(script), tokenizer, [BEGIN], limit, **options)

    return run


def test_pieces_hold_whole_characters(say):
    generation = say("aé漢🙂")
    assert list(generation) == ["a", "é", "漢", "🙂"]
    result = generation.result
    assert (result.text, result.finish_reason, result.prompt_tokens) == ("aé漢🙂", "stop", 1)
    assert (result.decode_tokens, len(result.token_ids), result.token_ids[-1]) == (10, 11, END)
    assert result.prefill_seconds > 0
    assert result.decode_tokens_per_second > 0


@pytest.mark.parametrize("limit", [1, 2, 3], ids=lambda limit: f"{limit}-of-4-bytes")
def test_half_a_character_at_the_end_is_left_out(limit, say):
    result = say("🙂", limit).result
    assert (result.text, result.finish_reason, len(result.token_ids)) == ("", "length", limit)


@pytest.mark.parametrize(
    ("stop", "text"),
    [
        (["\nUser:"], "I see.\n\nUse"),
        (["U", "\nUser:"], "I see.\n\n"),
        (["absent"], "I see.\n\nUse\nUser: é"),
        (["é"], "I see.\n\nUse\nUser: "),
        ([" é"], "I see.\n\nUse\nUser:"),
        (["I"], ""),
    ],
    ids=["across-tokens", "first-of-two", "absent", "split-character", "last", "at-once"],
)
def test_stop_strings_end_the_text_and_never_show(stop, text, say):
    generation = say("I see.\n\nUse\nUser: é", stop=stop)
    pieces = list(generation)
    assert "".join(pieces) == generation.result.text == text
    assert generation.result.finish_reason == "stop"
    assert not any("\nUser:" in "".join(pieces[:count]) for count in range(len(pieces)) if "\nUser:" in stop)


def test_the_beginning_of_a_stop_string_appears_once_the_text_ends(say):
    generation = say("good\nUse", stop=["\nUser:"])
    assert list(generation) == ["g", "o", "o", "d", "\nUse"]


def test_nothing_is_computed_after_the_end(tokenizer):
    engine = ScriptedEngine([40, 41, END])
    assert generate(engine, tokenizer, [BEGIN], 50).result.token_ids == (40, 41, END)
    assert engine.steps == 2
    engine = ScriptedEngine([40, 41, 42])
    assert generate(engine, tokenizer, [BEGIN], 3).result.finish_reason == "length"
    assert engine.steps == 2


def test_end_of_text_can_be_ignored(tokenizer):
    engine = ScriptedEngine([40, END, 41])
    result = generate(engine, tokenizer, [BEGIN], 3, ignore_eos=True).result
    assert (result.token_ids, result.finish_reason) == ((40, END, 41), "length")


def test_each_token_is_read_after_the_next_step_is_launched():
    launched = []
    tokens = _one_ahead(launched.append(index) or index for index in range(3))
    seen = [(token, list(launched)) for token in tokens]
    assert seen == [(0, [0, 1]), (1, [0, 1, 2]), (2, [0, 1, 2])]


def test_logits_that_are_not_finite_are_an_error_and_leave_the_state_usable(checkpoint):
    engine = load_engine(checkpoint("llama-linear"))
    state = DecodeState.of(engine, context=32)
    expected = list(decode_tokens(engine, PROMPT, 8, ignore_eos=True))
    weight = engine.norm.weight.clone()
    tokens = decode_tokens(engine, PROMPT, 20, ignore_eos=True, state=state)
    next(tokens)
    for block in state.cache.blocks:
        block.values[:, :, len(PROMPT) :] = float("nan")
    engine.norm.weight.fill_(float("nan"))
    with pytest.raises(TealError, match="NaN or infinite"):
        list(tokens)
    engine.norm.weight.copy_(weight)
    assert list(decode_tokens(engine, PROMPT, 8, ignore_eos=True, state=state)) == expected


def test_a_state_serves_one_generation_at_a_time(checkpoint):
    engine = load_engine(checkpoint("llama-linear"))
    state = DecodeState.of(engine)
    first = decode_tokens(engine, PROMPT, 8, ignore_eos=True, state=state)
    expected = [next(first)]
    with pytest.raises(TealError, match="another generation"):
        next(decode_tokens(engine, PROMPT, 8, state=state))
    expected += list(first)
    assert list(decode_tokens(engine, PROMPT, 8, ignore_eos=True, state=state)) == expected
    pair = [decode_tokens(engine, PROMPT, 8, ignore_eos=True) for _ in range(2)]
    assert list(zip(*pair, strict=True)) == [(token, token) for token in expected]


def test_the_same_seed_gives_the_same_text(checkpoint, tokenizer):
    engine = load_engine(checkpoint("llama-linear"))
    sampling = SamplingConfig(temperature=1.0, top_p=0.95, seed=11)
    texts = {generate(engine, tokenizer, PROMPT, 20, sampling, ignore_eos=True).result.text for _ in range(2)}
    other = generate(engine, tokenizer, PROMPT, 20, replace(sampling, seed=12), ignore_eos=True).result.text
    assert len(texts | {other}) == 2


@pytest.mark.parametrize(
    ("prompt", "limit", "error", "message"),
    [
        ([], 5, UsageError, "prompt is empty"),
        ([3], 0, UsageError, "max_new_tokens must be at least 1, got 0"),
        ([3, VOCABULARY], 5, UsageError, f"token id {VOCABULARY} is outside"),
        ([-1], 5, UsageError, "token id -1 is outside"),
        ([3] * 190, 11, TealError, "190 prompt and 11 new tokens do not fit into a context of 200"),
    ],
    ids=["empty", "no-tokens", "unknown-token", "negative-token", "too-long"],
)
def test_impossible_requests_are_refused_before_computing(prompt, limit, error, message):
    with pytest.raises(error, match=message):
        decode_tokens(ScriptedEngine([]), prompt, limit)  # pyright: ignore[reportArgumentType]


def test_a_state_too_short_for_the_request_is_refused(checkpoint):
    engine = load_engine(checkpoint("llama-linear"))
    with pytest.raises(TealError, match="context of 16"):
        decode_tokens(engine, PROMPT, 8, state=DecodeState.of(engine, context=16))
    with pytest.raises(TealError, match="context of 16"):
        engine.prefill(random_tokens(length=17), engine.new_cache(context=16))
    with pytest.raises(TealError, match="engine's 640, got 641"):
        DecodeState.of(engine, context=641)
