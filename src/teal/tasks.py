"""Tasks from JSON Lines: multiple choice, the last word, and exact answers (docs/formats.md describes the files)."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

from teal.data import read_json_lines, text_of
from teal.errors import TealError, UsageError

CHOICE, WORD, ANSWER = "multiple choice", "last word", "exact answer"
STOP = ("Question:",)  # where a written answer ends: the next question
BETWEEN_EXAMPLES = "\n\n"
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


@dataclass(frozen=True)
class Item:
    """One item. `pairs`: a context and a continuation for each choice, or the only pair; `gold`: the right one.

    `lengths`: characters of each choice, to normalize by; None where choices do not differ in what is scored.
    An exact answer has one pair, of which the continuation is the right answer.
    """

    pairs: tuple[tuple[str, str], ...]
    gold: int = 0
    lengths: tuple[int, ...] | None = None

    @property
    def solved(self) -> str:
        """The item with its right answer, as an example before others."""
        context, continuation = self.pairs[self.gold]
        return context + continuation

    def per_character(self, log_likelihoods: Sequence[float]) -> list[float]:
        """The log-likelihood of each choice divided by its length."""
        return [value / length for value, length in zip(log_likelihoods, self.lengths or (), strict=True)]

    def after(self, examples: str) -> "Item":
        """The item with `examples` before each context."""
        return Item(tuple((examples + context, rest) for context, rest in self.pairs), self.gold, self.lengths)


@dataclass(frozen=True)
class Task:
    """Items of one `kind`; `chance` is the accuracy of guessing (0 where there is nothing to choose from)."""

    name: str
    kind: str
    items: tuple[Item, ...]
    shots: int = 0

    @property
    def chance(self) -> float:
        if self.kind != CHOICE:
            return 0.0
        return sum(1 / len(item.pairs) for item in self.items) / len(self.items)


def read_task(path: Path, *, name: str | None = None, shots: int = 0, limit: int | None = None) -> Task:
    """Read a task: the first `shots` items become examples before each of the `limit` items that follow (None: all).

    Raises UsageError if there is no such file or nothing is left to ask, TealError for a line that is no item,
    or of another kind than the first.
    """
    if not path.is_file():
        reason = "is a directory" if path.is_dir() else "does not exist"
        raise UsageError(f"{path} {reason}; name a .jsonl file with one item a line")
    items: list[Item] = []
    kind = ""
    for where, value in read_json_lines(path):
        if limit is not None and len(items) == shots + limit:
            break
        found, item = _read_item(value, where)
        kind = kind or found
        if found != kind:
            raise TealError(f"{where} is of the kind {found!r}, the lines before of the kind {kind!r}; split the file")
        items.append(item)
    if len(items) <= shots:
        raise UsageError(f"{path} holds {len(items)} items, which leaves none to ask after {shots} examples")
    examples = "".join(item.solved + BETWEEN_EXAMPLES for item in items[:shots])
    return Task(name or path.stem, kind, tuple(item.after(examples) for item in items[shots:]), shots)


def last_number(text: str) -> Decimal | None:
    """The last number in `text`, without thousands separators; None if there is none."""
    found = NUMBER.findall(text)
    return Decimal(found[-1].replace(",", "")) if found else None


def is_right(written: str, answer: str) -> bool:
    """Whether what a model wrote ends in the number that the right answer ends in."""
    return last_number(written) == last_number(answer)


def _read_item(value: Any, where: str) -> tuple[str, Item]:
    readers: tuple[tuple[str, Callable[[dict[str, Any], str], Item], tuple[str, ...]], ...] = (
        (CHOICE, _choice, ("query", "choices")),
        (CHOICE, _choice_of_contexts, ("context_options", "continuation")),
        (WORD, _last_word, ("context", "continuation")),
        (ANSWER, _answer, ("question", "answer")),
    )
    if isinstance(value, dict):
        for kind, read, fields in readers:
            if all(field in value for field in fields):
                return kind, read(value, where)
    known = "; ".join(" and ".join(fields) for _, _, fields in readers)
    raise TealError(f"{where} is no item of a task; an item has one of these pairs of fields: {known}")


def _choice(value: dict[str, Any], where: str) -> Item:
    query, choices = _text(value, "query", where), _texts(value, "choices", where)
    if query.startswith("Question:"):
        query = query.rstrip() + "\nAnswer:"
    pairs = tuple(_join(query, choice) for choice in choices)
    return Item(pairs, _gold(value, len(choices), where), tuple(map(len, choices)))


def _choice_of_contexts(value: dict[str, Any], where: str) -> Item:
    contexts, continuation = _texts(value, "context_options", where), _text(value, "continuation", where)
    return Item(tuple(_join(context, continuation) for context in contexts), _gold(value, len(contexts), where))


def _last_word(value: dict[str, Any], where: str) -> Item:
    return Item((_join(_text(value, "context", where), _text(value, "continuation", where)),))


def _answer(value: dict[str, Any], where: str) -> Item:
    question, answer = _text(value, "question", where), _text(value, "answer", where)
    if last_number(answer) is None:
        raise TealError(f"{where}: the answer {answer!r} holds no number to compare with")
    return Item((_join(f"Question: {question}\nAnswer:", answer),))


def _join(context: str, continuation: str) -> tuple[str, str]:
    """A space stands between the two, unless there is white space already."""
    apart = context[-1].isspace() or continuation[0].isspace()
    return context, continuation if apart else f" {continuation}"


def _text(value: dict[str, Any], field: str, where: str) -> str:
    text = text_of(value[field], f"{where}: field {field!r}")
    if not text.strip():
        raise TealError(f"{where}: field {field!r} is empty")
    return text


def _texts(value: dict[str, Any], field: str, where: str) -> Sequence[str]:
    found = value[field]
    if not isinstance(found, list) or len(found) < 2:
        raise TealError(f"{where}: field {field!r} must be a list of at least 2 texts")
    return [_text({field: text}, field, where) for text in found]


def _gold(value: dict[str, Any], choices: int, where: str) -> int:
    """The number of the right choice, from 0, in `gold` or `label`."""
    gold = value.get("gold", value.get("label"))
    if not isinstance(gold, int) or isinstance(gold, bool) or not 0 <= gold < choices:
        raise TealError(f"{where}: the right choice must be 0 to {choices - 1}, in 'gold' or 'label', got {gold!r}")
    return gold
