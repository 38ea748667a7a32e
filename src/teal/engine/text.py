"""Between text and tokens: prompts, chats, and streamed pieces without broken characters or stop strings."""

from collections.abc import Sequence
from typing import Any

from teal.errors import UsageError, reason_of

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # what decoders give for bytes that are no character (yet)
_PROMPT_TOKENS = 6  # of the prompt, before the continuation: whether a word opens with a space depends on them
_MAX_WAITING = 8  # tokens; a character has at most 4 bytes, so what waits longer never becomes one


def encode_prompt(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a prompt, with the begin-of-text token where the model has one.

    Raises UsageError if that gives no token at all, or for text that is no valid Unicode.
    """
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise UsageError("the text holds bytes that are no UTF-8, or half a character")
    ids = tokenizer(text, verbose=False).input_ids
    if not ids:
        raise UsageError("the prompt is empty, and this model has no begin-of-text token to start from")
    return ids


def encode_chat(tokenizer: Any, messages: Sequence[dict[str, str]]) -> tuple[list[int], tuple[str, ...]]:
    """Token ids of a chat that asks for the assistant's next message, and the stop strings it needs.

    `messages` are {"role", "content"} as everywhere. Without a chat template the chat becomes a plain
    transcript ("User: ...", "Assistant: ..."), which ends where the model writes the user's next line.
    Raises UsageError for messages that are malformed or that the template refuses.
    """
    for message in messages:
        if not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise UsageError(f"a message needs a role and a content, both text, got {message!r}")
    if not messages:
        raise UsageError("a chat needs at least one message")
    if tokenizer.chat_template is None:
        lines = [f"{message['role'].capitalize()}: {message['content']}" for message in messages]
        return encode_prompt(tokenizer, "\n".join([*lines, "Assistant:"])), ("\nUser:", "\nSystem:")
    try:
        ids = tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, return_dict=False)
    except Exception as error:  # templates raise what they like
        reason = reason_of(error)
        raise UsageError(f"the model's chat template refuses these messages: {reason}") from error
    return ids, ()


class Detokenizer:
    """Turns tokens into text as they come; the pieces join to the text of the whole.

    Only the tokens since the last full piece are decoded again, with those before as context.
    """

    def __init__(self, tokenizer: Any, prompt_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._context = list(prompt_ids[-_PROMPT_TOKENS:])  # decoded and given out
        self._waiting: list[int] = []

    def feed(self, token: int) -> str:
        """The text that `token` completes; empty while it ends inside a character."""
        self._waiting.append(token)
        text = self._text()
        if text.endswith(REPLACEMENT) and len(self._waiting) < _MAX_WAITING:
            return ""
        return self._give(text)

    def flush(self) -> str:
        """What is left at the end, without the beginning of a character that never came."""
        return self._give(self._text().rstrip(REPLACEMENT))

    def _text(self) -> str:
        before = self._decode(self._context)
        return self._decode(self._context + self._waiting)[len(before) :]

    def _give(self, text: str) -> str:
        self._context, self._waiting = self._waiting or self._context, []
        return text

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


class StopStrings:
    """Finds the first stop string in a stream of text; what may become one is held back until it is clear."""

    def __init__(self, stops: Sequence[str]) -> None:
        if not all(stops):
            raise UsageError("a stop string is empty; leave it out")
        self._stops = tuple(stops)
        self._held = ""

    def feed(self, text: str) -> tuple[str, bool]:
        """The text that is safe to give out, and whether a stop string was met (which is cut off)."""
        self._held += text
        found = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        keep = min(found) if found else len(self._held) - self._beginning()
        given, self._held = self._held[:keep], "" if found else self._held[keep:]
        return given, bool(found)

    def flush(self) -> str:
        """What was held back, once no more text comes."""
        given, self._held = self._held, ""
        return given

    def _beginning(self) -> int:
        """Length of the longest end of the held text that a stop string begins with."""
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stops):
                return length
        return 0
