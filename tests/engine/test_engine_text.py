import random

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from teal.engine.text import Detokenizer, StopStrings, encode_chat, encode_prompt
from teal.errors import UsageError

TEXT = "Zoë says: “naïve” — 漢字 🙂👍🏽, and so on."


@pytest.fixture(scope="module")
def sentencepiece_like():
    """Words that open with a space symbol, and bytes for everything else, as in Llama-2 and Mistral."""
    pieces = ["<s>", "</s>", "▁Hello", "▁world", "▁", ",", *(f"<0x{byte:02X}>" for byte in range(256))]
    backend = Tokenizer(models.BPE({piece: index for index, piece in enumerate(pieces)}, [], byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


def test_pieces_join_to_the_text(tokenizer):
    detokenizer = Detokenizer(tokenizer, tokenizer("before").input_ids)
    pieces = [detokenizer.feed(token) for token in tokenizer(TEXT, add_special_tokens=False).input_ids]
    assert "".join(pieces) == TEXT
    assert detokenizer.flush() == ""


def test_a_word_keeps_the_space_before_it(sentencepiece_like):
    hello, world = sentencepiece_like.convert_tokens_to_ids(["▁Hello", "▁world"])
    detokenizer = Detokenizer(sentencepiece_like, [0, hello])
    assert [detokenizer.feed(token) for token in (world, hello)] == [" world", " Hello"]


def test_bytes_join_to_a_character(sentencepiece_like):
    ids = sentencepiece_like.convert_tokens_to_ids([f"<0x{byte:02X}>" for byte in "é漢".encode()])
    detokenizer = Detokenizer(sentencepiece_like, [0])
    assert [detokenizer.feed(token) for token in ids] == ["", "é", "", "", "漢"]


def test_bytes_that_are_no_character_do_not_hold_the_text_up(tokenizer):
    noise = tokenizer("漢", add_special_tokens=False).input_ids[1:2] * 30  # continuation bytes only
    detokenizer = Detokenizer(tokenizer, [0])
    pieces = [detokenizer.feed(token) for token in noise]
    assert "".join(pieces).count("\N{REPLACEMENT CHARACTER}") >= 16
    letters = tokenizer("ab", add_special_tokens=False).input_ids
    assert "".join(detokenizer.feed(token) for token in letters).endswith("ab")


@pytest.mark.parametrize("seed", range(20))
def test_stop_strings_cut_however_the_text_is_split(seed):
    rng = random.Random(seed)
    text = "".join(rng.choices("ab\n", k=60))
    stops = ["".join(rng.choices("ab\n", k=rng.randint(2, 5))) for _ in range(rng.randint(0, 3))]
    ends = [text.find(stop) for stop in stops if stop in text]
    matcher, given, position, met = StopStrings(stops), "", 0, False
    while position < len(text) and not met:
        step = rng.randint(1, 4)
        piece, met = matcher.feed(text[position : position + step])
        given, position = given + piece, position + step
    assert met == bool(ends)
    assert given + ("" if met else matcher.flush()) == (text[: min(ends)] if ends else text)


def test_text_is_held_back_only_while_it_may_become_a_stop_string():
    matcher = StopStrings(["<end>", "stop"])
    assert [matcher.feed(piece)[0] for piece in ("a", "<", "en", "x", "<s", "t", "ep")] == [
        "a", "", "", "<enx", "<", "", "step",
    ]  # fmt: skip


def test_an_empty_stop_string_is_refused():
    with pytest.raises(UsageError, match="stop string is empty"):
        StopStrings(["a", ""])


def test_prompts_open_with_begin_of_text(tokenizer, sentencepiece_like):
    assert encode_prompt(tokenizer, "") == [tokenizer.bos_token_id]
    with pytest.raises(UsageError, match="prompt is empty"):
        encode_prompt(sentencepiece_like, "")


MESSAGES = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Yes"},
    {"role": "user", "content": "So"},
]


def test_a_chat_without_template_is_a_transcript(tokenizer):
    ids, stops = encode_chat(tokenizer, MESSAGES)
    assert tokenizer.decode(ids) == "<s>User: Hi\nAssistant: Yes\nUser: So\nAssistant:"
    assert "\nUser:" in stops


def test_a_chat_template_decides(tokenizer, monkeypatch):
    template = (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'bad' %}{{ raise_exception('no such role') }}"
        "{% endif %}[{{ m.role }}]{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    monkeypatch.setattr(tokenizer, "chat_template", template)
    ids, stops = encode_chat(tokenizer, MESSAGES)
    assert tokenizer.decode(ids) == "<s>[user]Hi[assistant]Yes[user]So[assistant]"
    assert stops == ()
    with pytest.raises(UsageError, match="no such role"):
        encode_chat(tokenizer, [{"role": "bad", "content": ""}])


@pytest.mark.parametrize("messages", [[], [{"role": "user"}], [{"role": "user", "content": 3}]], ids=str)
def test_malformed_messages_are_refused(messages, tokenizer):
    with pytest.raises(UsageError, match="message"):
        encode_chat(tokenizer, messages)
