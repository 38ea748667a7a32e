"""Text in, seeded blocks of tokens out."""

import hashlib
import json
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from teal.checkpoint import EMBEDDED
from teal.errors import TealError, UsageError

CALIBRATION_TEXT = EMBEDDED / "calibration.txt"
EVALUATION_TEXT = EMBEDDED / "evaluation.txt"
DATASET = "hf:"  # what the name of a Hugging Face dataset starts with
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


def describe(tokens: Tensor | TokenBlocks) -> dict[str, Any]:
    """For the record: where tokens come from and their hash, of mere ids the hash alone."""
    return tokens.describe() if isinstance(tokens, TokenBlocks) else {"tokens_sha256": hash_tokens(tokens)}


def token_ids(tokens: Tensor | TokenBlocks) -> Tensor:
    """The ids [B, L] of blocks, or ids as they are."""
    return tokens.ids if isinstance(tokens, TokenBlocks) else tokens


def hash_tokens(ids: Tensor) -> str:
    """SHA-256 of the token ids: the same text, tokenizer and seed give the same hash."""
    return hashlib.sha256(ids.to("cpu", torch.int64).contiguous().numpy().tobytes()).hexdigest()


def check_tokens(ids: Tensor, model: Any) -> None:
    """Raise TealError unless `ids` are tokens [B, L] that `model` has embeddings for."""
    if ids.ndim != 2 or ids.numel() == 0:
        raise TealError(f"tokens must be of shape [sequences, length] and not empty, got {tuple(ids.shape)}")
    known = model.get_input_embeddings().num_embeddings
    if not 0 <= int(ids.min()) <= int(ids.max()) < known:
        wrong = next(token for token in ids.flatten().tolist() if not 0 <= token < known)
        raise TealError(f"token id {wrong} is outside the model's vocabulary of {known}; is the tokenizer another's?")


def read_documents(source: str | Path, field: str = "text", wikitext: bool = False) -> Iterator[str]:
    """The documents of one source, in order, read as they are asked for.

    `source` is a text file (one document), a .jsonl file (one per line, in `field`), a directory (its text
    and .jsonl files, sorted), "-" (standard input), or "hf:NAME[:CONFIG[:SPLIT]]" (a Hugging Face dataset,
    streamed; needs `datasets`). `wikitext` undoes WikiText's tokenization.
    Raises UsageError for a missing source, TealError for one that holds no text or is damaged.
    """
    empty = True
    for text in _read(str(source), field):
        if text.strip():
            empty = False
            yield detokenize_wikitext(text) if wikitext else text
    if empty:
        raise TealError(f"{source} holds no text")


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
    or at random without repetition if there is a `seed`; None takes all. A dataset may be endless: it is read
    only until there is text for `count` blocks.
    Raises TealError if the text gives fewer tokens than asked.
    """
    if length < 2:
        raise UsageError(f"a block of text must have at least 2 tokens, got {length}")
    if count is not None and count < 1:
        raise UsageError(f"at least 1 block of text is needed, got {count}")
    opening = opening_tokens(tokenizer)
    body = length - len(opening)
    stream: list[int] = []
    for source in map(str, sources):
        for document in read_documents(source, field, wikitext):
            stream.extend(tokenizer(document, add_special_tokens=False, verbose=False).input_ids)
            if source.startswith(DATASET) and count is not None and len(stream) >= count * body:
                break
    available, wanted = len(stream) // body, count or 1
    if available < wanted:
        raise TealError(
            f"the text gives {len(stream)} tokens, {wanted * body} are needed ({wanted} x {length}); "
            "give more text, or ask for fewer or shorter blocks"
        )
    starts: Sequence[int] = range(available)
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        starts = torch.randperm(available, generator=generator, device="cpu").tolist()  # whatever the default device is
    rows = [opening + stream[start * body : (start + 1) * body] for start in starts[:count]]
    names = (source if source.startswith(DATASET) else Path(source).name for source in map(str, sources))
    return TokenBlocks(torch.tensor(rows, dtype=torch.int64, device="cpu"), tuple(names), seed)


def opening_tokens(tokenizer: Any) -> list[int]:
    """What every sequence opens with: the begin-of-text token, if the tokenizer has one."""
    return [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]


def read_stdin() -> str:
    """All of standard input. Raises TealError if it is not UTF-8."""
    try:
        return sys.stdin.buffer.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise TealError(f"standard input is not UTF-8 text (byte {error.start})") from None


def _read(source: str, field: str) -> Iterator[str]:
    if source == "-":
        yield read_stdin()
        return
    if source.startswith(DATASET):
        yield from _read_dataset(source.removeprefix(DATASET), field)
        return
    path = Path(source)
    if (path / "config.json").is_file():
        raise UsageError(f"{source} is a model, not a text; name the model first, before the options")
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
    if path.suffix != ".jsonl":
        yield _read_whole(path)
        return
    for where, value in read_json_lines(path):
        if not isinstance(value, dict) or field not in value:
            raise TealError(f"{where} has no field {field!r}; name the field that holds the text")
        yield text_of(value[field], f"{where}: field {field!r}")


def read_json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """The values of a .jsonl file with where each stands. Raises TealError for what is not JSON or cannot be read."""
    for number, line in enumerate(_read_whole(path).split("\n"), start=1):  # splitlines() also splits JSON strings
        where = f"{path}, line {number}"
        if line.strip():
            try:
                yield where, json.loads(line)
            except json.JSONDecodeError as error:
                raise TealError(f"{where} is not JSON ({error})") from None


def _read_whole(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise TealError(f"{path} is not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise TealError(f"cannot read {path}: {error.strerror}") from error


def _read_dataset(name: str, field: str) -> Iterator[str]:
    try:
        datasets = import_module("datasets")
    except ImportError:
        raise TealError("reading a Hugging Face dataset needs: pip install 'teal-llm[datasets]'") from None
    path, _, rest = name.partition(":")
    config, _, split = rest.partition(":")
    try:
        rows = datasets.load_dataset(path, config or None, split=split or "train", streaming=True)
        for row in rows:
            if field not in row:
                raise TealError(f"dataset {name} has no field {field!r}; it has {', '.join(row)}")
            yield text_of(row[field], f"dataset {name}: field {field!r}")
    except TealError:
        raise
    except Exception as error:  # the hub raises many kinds; the user needs the one line
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise TealError(f"dataset {name} could not be read: {reason}") from error


def text_of(value: Any, where: str) -> str:
    """`value` if it is text that tokenizers take. Raises TealError naming `where` otherwise."""
    if not isinstance(value, str):
        raise TealError(f"{where} is {type(value).__name__}, expected text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise TealError(f"{where} holds half a character ({value[error.start]!r})") from None
    return value


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
    (re.compile(r"^ +", re.MULTILINE), ""),
]


def detokenize_wikitext(text: str) -> str:
    """Undo WikiText's tokenization: ` @-@ ` joins, spaces before punctuation, spaced quotes.

    `<unk>` stays as it is: the word behind it is not in the file.
    """
    for pattern, replacement in _DETOKENIZE:
        text = pattern.sub(replacement, text)
    return text
