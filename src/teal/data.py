"""Text in, seeded blocks of tokens out."""

import hashlib
import json
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from teal.checkpoint import EMBEDDED
from teal.errors import TealError, UsageError

CALIBRATION_TEXT = EMBEDDED / "calibration.txt"
EVALUATION_TEXT = EMBEDDED / "evaluation.txt"
TEXT_SUFFIXES = (".txt", ".md", ".text", ".tokens", ".jsonl")


@dataclass(frozen=True)
class TokenBlocks:
    """Blocks of tokens: `ids` [blocks, length] int64 and, for the record, where they came from."""

    ids: Tensor
    sources: tuple[str, ...]
    seed: int | None

    def describe(self) -> dict[str, Any]:
        return {
            "text": list(self.sources),
            "blocks": self.ids.shape[0],
            "block_length": self.ids.shape[1],
            "seed": self.seed,
            "tokens_sha256": hash_tokens(self.ids),
        }


def hash_tokens(ids: Tensor) -> str:
    """SHA-256 of the token ids: the same text, tokenizer and seed give the same hash."""
    return hashlib.sha256(ids.to("cpu", torch.int64).contiguous().numpy().tobytes()).hexdigest()


def read_documents(source: str | Path, field: str = "text", wikitext: bool = False) -> list[str]:
    """The documents of one source, in order.

    `source` is a text file (one document), a .jsonl file (one per line, in `field`), a directory (its text
    and .jsonl files, sorted), "-" (standard input), or "hf:NAME[:CONFIG[:SPLIT]]" (a Hugging Face dataset,
    streamed; needs `datasets`). `wikitext` undoes WikiText's tokenization.
    Raises UsageError for a missing source, TealError for one that holds no text.
    """
    documents = [text for text in _read(str(source), field) if text.strip()]
    if not documents:
        raise TealError(f"{source} holds no text")
    return [detokenize_wikitext(text) for text in documents] if wikitext else documents


def token_blocks(
    sources: Sequence[str | Path],
    tokenizer: Any,
    *,
    length: int,
    count: int | None = None,
    seed: int | None = None,
    field: str = "text",
    wikitext: bool = False,
) -> TokenBlocks:
    """Tokenize the sources and cut them into blocks of `length` tokens.

    The documents of all sources follow one another; every block opens with the tokenizer's begin-of-text
    token, if it has one, and a rest too short for a block is left out. `count` blocks are taken, in order,
    or at random without repetition if there is a `seed`; None takes all.
    Raises TealError if the text gives fewer tokens than asked.
    """
    if length < 2 or (count is not None and count < 1):
        raise UsageError(f"blocks must have at least 2 tokens and there must be at least 1, got {count} x {length}")
    stream: list[int] = []
    for source in sources:
        for document in read_documents(source, field, wikitext):
            stream.extend(tokenizer(document, add_special_tokens=False, verbose=False).input_ids)
    opening = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    body = length - len(opening)
    available = len(stream) // body
    if available < (count or 1):
        raise TealError(
            f"the text gives {len(stream)} tokens, {(count or 1) * body} are needed for {count or 1} blocks of "
            f"{length}; give more text, or ask for fewer or shorter blocks"
        )
    starts = torch.arange(available)
    if seed is not None:
        starts = torch.randperm(available, generator=torch.Generator().manual_seed(seed))
    rows = [opening + stream[start * body : (start + 1) * body] for start in starts[:count].tolist()]
    return TokenBlocks(torch.tensor(rows, dtype=torch.int64), tuple(Path(s).name for s in map(str, sources)), seed)


def _read(source: str, field: str) -> Iterator[str]:
    if source == "-":
        yield sys.stdin.read()
        return
    if source.startswith("hf:"):
        yield from _read_dataset(source[3:], field)
        return
    path = Path(source)
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in TEXT_SUFFIXES and file.is_file())
        if not files:
            raise TealError(f"{path} holds no {', '.join(TEXT_SUFFIXES)} files")
        for file in files:
            yield from _read_file(file, field)
    elif path.is_file():
        yield from _read_file(path, field)
    else:
        raise UsageError(f"{source} does not exist; name a text file, .jsonl, directory, - or hf:DATASET")


def _read_file(path: Path, field: str) -> Iterator[str]:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise TealError(f"{path} is not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise TealError(f"cannot read {path}: {error.strerror}") from error
    if path.suffix != ".jsonl":
        yield text
        return
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)[field]
        except json.JSONDecodeError as error:
            raise TealError(f"{path}, line {number} is not JSON ({error})") from None
        except (KeyError, TypeError):
            raise TealError(
                f"{path}, line {number} has no field {field!r}; name the field that holds the text"
            ) from None
        if not isinstance(value, str):
            raise TealError(f"{path}, line {number}: field {field!r} is {type(value).__name__}, expected text")
        yield value


def _read_dataset(name: str, field: str) -> Iterator[str]:
    try:
        import datasets
    except ImportError:
        raise TealError("reading a Hugging Face dataset needs: pip install 'teal-llm[datasets]'") from None
    path, _, rest = name.partition(":")
    config, _, split = rest.partition(":")
    try:
        rows = datasets.load_dataset(path, config or None, split=split or "train", streaming=True)
    except Exception as error:  # the hub raises many kinds; the user needs the one line
        raise TealError(f"dataset {name} could not be loaded: {str(error).splitlines()[0]}") from error
    for row in rows:
        if field not in row:
            raise TealError(f"dataset {name} has no field {field!r}; it has {', '.join(row)}")
        yield row[field]


_DETOKENIZE = [
    (re.compile(r" @([-,.])@ "), r"\1"),
    (re.compile(r" ([,.;:!?%)\]}])"), r"\1"),
    (re.compile(r"([(\[{$£€]) "), r"\1"),
    (re.compile(r"n? n?'t\b"), "n't"),
    (re.compile(r" '(s|re|ve|ll|d|m)\b"), r"'\1"),
    (re.compile(r"s ' "), "s' "),
    (re.compile(r' "([^"\n]*?) "'), lambda quoted: f' "{quoted.group(1).strip()}"'),
    (re.compile(r"(\d) – (\d)"), r"\1–\2"),
    (re.compile(r" +\n"), "\n"),
    (re.compile(r"\n +"), "\n"),
]


def detokenize_wikitext(text: str) -> str:
    """Undo WikiText's tokenization: ` @-@ ` joins, spaces before punctuation, spaced quotes.

    `<unk>` stays as it is: the word behind it is not in the file.
    """
    for pattern, replacement in _DETOKENIZE:
        text = pattern.sub(replacement, text)
    return text
