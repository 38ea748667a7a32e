"""Text in, blocks of tokens out: every kind of source, seeds, and what is refused."""

import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from helpers import BEGIN, byte_tokenizer, tiny_model

from teal.data import TokenBlocks, check_tokens, detokenize_wikitext, hash_tokens, read_documents, token_blocks
from teal.errors import TealError, UsageError

TOKENIZER = byte_tokenizer()


def decode(ids: torch.Tensor) -> str:
    return TOKENIZER.decode(ids.tolist(), skip_special_tokens=True)


def write(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8"))
    return path


def give_stdin(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))


def fake_datasets(monkeypatch: pytest.MonkeyPatch, rows: Any) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Put a module `datasets` in place whose load_dataset gives `rows`; returns the calls it gets."""
    calls = []

    def load_dataset(*positions: Any, **names: Any) -> Iterator[dict[str, Any]]:
        calls.append((positions, names))
        if isinstance(rows, Exception):
            raise rows
        return iter(rows)

    module = ModuleType("datasets")
    module.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    return calls


class TestSources:
    def test_a_text_file_is_one_document(self, tmp_path: Path) -> None:
        assert list(read_documents(write(tmp_path / "a.txt", "grüße\n\nzwei"))) == ["grüße\n\nzwei"]

    def test_a_byte_order_mark_is_no_text(self, tmp_path: Path) -> None:
        assert list(read_documents(write(tmp_path / "a.txt", "\ufeffone"))) == ["one"]

    def test_jsonl_has_one_document_per_line(self, tmp_path: Path) -> None:
        lines = ['{"text": "one"}', "", '{"text": "two", "other": 1}', '{"text": "  "}']
        assert list(read_documents(write(tmp_path / "a.jsonl", "\n".join(lines)))) == ["one", "two"]

    def test_jsonl_field(self, tmp_path: Path) -> None:
        path = write(tmp_path / "a.jsonl", '{"body": "one", "text": "no"}\r\n{"body": "two"}\r\n')
        assert list(read_documents(path, field="body")) == ["one", "two"]

    def test_line_separators_inside_json_strings_end_no_line(self, tmp_path: Path) -> None:
        text = "one\u2028two\x85three"
        path = write(tmp_path / "a.jsonl", json.dumps({"text": text}, ensure_ascii=False))
        assert list(read_documents(path)) == [text]

    def test_a_directory_is_read_in_order(self, tmp_path: Path) -> None:
        (tmp_path / "sub").mkdir()
        write(tmp_path / "b.txt", "second")
        write(tmp_path / "a.md", "first")
        write(tmp_path / "empty.txt", "\n")
        write(tmp_path / "picture.png", b"\xff\xfe")
        write(tmp_path / "sub" / "c.jsonl", '{"text": "third"}')
        assert list(read_documents(tmp_path)) == ["first", "second", "third"]

    def test_standard_input(self, monkeypatch: pytest.MonkeyPatch) -> None:
        give_stdin(monkeypatch, "grüße".encode())
        assert list(read_documents("-")) == ["grüße"]

    def test_wikitext(self, tmp_path: Path) -> None:
        path = write(tmp_path / "wiki.tokens", " = Title = \n \n One @-@ two , three . \n")
        assert list(read_documents(path, wikitext=True)) == ["= Title =\n\nOne-two, three.\n"]


class TestDatasets:
    @pytest.mark.parametrize(
        ("source", "expected"),
        [
            ("hf:wikitext", ("wikitext", None, "train")),
            ("hf:allenai/c4:en", ("allenai/c4", "en", "train")),
            ("hf:allenai/c4:en:validation", ("allenai/c4", "en", "validation")),
            ("hf:wikitext::test", ("wikitext", None, "test")),
        ],
    )
    def test_name_configuration_and_split(
        self, source: str, expected: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        calls = fake_datasets(monkeypatch, [{"text": "one"}, {"text": ""}, {"text": "two"}])
        assert list(read_documents(source)) == ["one", "two"]
        assert calls == [(expected[:2], {"split": expected[2], "streaming": True})]

    def test_an_endless_dataset_is_read_only_as_far_as_needed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        read = []

        def rows() -> Iterator[dict[str, str]]:
            while True:
                read.append(len(read))
                yield {"text": f"{read[-1]:09} "}

        fake_datasets(monkeypatch, rows())
        blocks = token_blocks(["hf:endless"], TOKENIZER, length=26, count=2, seed=0)
        assert len(read) == 5  # 2 x 25 tokens of 10 each
        assert blocks.ids.shape == (2, 26)
        assert blocks.sources == ("hf:endless",)

    def test_without_the_library(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "datasets", None)
        with pytest.raises(TealError, match=r"needs: pip install 'teal-llm\[datasets\]'"):
            list(read_documents("hf:wikitext"))

    @pytest.mark.parametrize(
        ("rows", "message"),
        [
            ([], "hf:some holds no text"),
            ([{"body": "x", "id": 1}], "dataset some has no field 'text'; it has body, id"),
            ([{"text": None}], "dataset some: field 'text' is NoneType, expected text"),
            (ConnectionError("no network\nat all"), "dataset some could not be read: no network$"),
            (ValueError(), "dataset some could not be read: ValueError$"),
        ],
        ids=["empty", "no-field", "null", "no-network", "no-reason"],
    )
    def test_what_cannot_be_used(self, rows: Any, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
        fake_datasets(monkeypatch, rows)
        with pytest.raises(TealError, match=message):
            list(read_documents("hf:some"))

    def test_an_error_in_the_middle(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def rows() -> Iterator[dict[str, str]]:
            yield {"text": "one"}
            raise OSError("connection lost")

        fake_datasets(monkeypatch, rows())
        with pytest.raises(TealError, match="could not be read: connection lost"):
            list(read_documents("hf:some"))


class TestRefusedSources:
    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("a.txt", "", r"a\.txt holds no text"),
            ("a.txt", " \n\t", r"a\.txt holds no text"),
            ("a.jsonl", "\n\n", r"a\.jsonl holds no text"),
            ("a.txt", b"ab\xffcd", r"a\.txt is not UTF-8 text \(byte 2\)"),
            ("a.jsonl", '{"text": "x"}\n{"text": ', r"a\.jsonl, line 2 is not JSON"),
            ("a.jsonl", '{"body": "x"}', r"a\.jsonl, line 1 has no field 'text'; name the field that holds the text"),
            ("a.jsonl", '["text"]', r"a\.jsonl, line 1 has no field 'text'"),
            ("a.jsonl", '"text"', r"a\.jsonl, line 1 has no field 'text'"),
            ("a.jsonl", '{"text": 3}', r"a\.jsonl, line 1: field 'text' is int, expected text"),
            ("a.jsonl", r'{"text": "a\ud800b"}', r"a\.jsonl, line 1: field 'text' holds half a character"),
        ],
        ids=[
            "empty", "blank", "blank-jsonl", "no-utf-8", "no-json", "no-field", "list", "string", "number", "surrogate",
        ],
    )  # fmt: skip
    def test_file(self, tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
        with pytest.raises(TealError, match=message):
            list(read_documents(write(tmp_path / name, content)))

    def test_missing(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match=r"nowhere\.txt does not exist; name a text file"):
            list(read_documents(tmp_path / "nowhere.txt"))

    def test_directory_without_text(self, tmp_path: Path) -> None:
        with pytest.raises(TealError, match=r"holds no \.txt"):
            list(read_documents(tmp_path))

    def test_a_model_is_no_text(self, tmp_path: Path) -> None:
        write(tmp_path / "config.json", "{}")
        write(tmp_path / "README.md", "a model card")
        with pytest.raises(UsageError, match="is a model, not a text; name the model first"):
            list(read_documents(tmp_path))

    def test_file_that_cannot_be_read(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*_: object, **__: object) -> None:
            raise PermissionError(13, "Permission denied")

        path = write(tmp_path / "a.txt", "x")
        monkeypatch.setattr(Path, "read_text", fail)
        with pytest.raises(TealError, match=r"cannot read .*a\.txt: Permission denied"):
            list(read_documents(path))

    @pytest.mark.parametrize(("data", "message"), [(b"", "- holds no text"), (b"ab\xff", "not UTF-8 text")])
    def test_standard_input(self, data: bytes, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
        give_stdin(monkeypatch, data)
        with pytest.raises(TealError, match=message):
            list(read_documents("-"))


class TestBlocks:
    @pytest.fixture
    def text(self, tmp_path: Path) -> Path:
        return write(tmp_path / "text.txt", "".join(f"{number:03} " for number in range(250)))  # 1000 tokens

    def test_blocks_follow_the_text_and_open_with_begin_of_text(self, text: Path) -> None:
        blocks = token_blocks([text], TOKENIZER, length=41)
        assert blocks.ids.shape == (25, 41)
        assert blocks.ids.dtype == torch.int64
        assert (blocks.ids[:, 0] == BEGIN).all()
        assert "".join(decode(row) for row in blocks.ids) == text.read_text()

    def test_a_rest_is_left_out(self, text: Path) -> None:
        assert token_blocks([text], TOKENIZER, length=301).ids.shape == (3, 301)

    def test_without_a_begin_of_text_token(self, text: Path) -> None:
        tokenizer = byte_tokenizer()
        tokenizer.bos_token = None
        blocks = token_blocks([text], tokenizer, length=40)
        assert "".join(decode(row) for row in blocks.ids) == text.read_text()

    def test_sources_follow_one_another(self, tmp_path: Path) -> None:
        paths = [write(tmp_path / name, name * 3) for name in ("one.txt", "two.txt")]
        blocks = token_blocks(paths, TOKENIZER, length=43)
        assert decode(blocks.ids[0]) == "one.txt" * 3 + "two.txt" * 3
        assert blocks.sources == ("one.txt", "two.txt")

    def test_count_takes_the_first(self, text: Path) -> None:
        every, few = (token_blocks([text], TOKENIZER, length=41, count=count) for count in (None, 3))
        assert torch.equal(few.ids, every.ids[:3])

    def test_the_same_seed_gives_the_same_blocks(self, text: Path) -> None:
        def blocks(seed: int | None) -> TokenBlocks:
            return token_blocks([text], TOKENIZER, length=41, count=10, seed=seed)

        assert torch.equal(blocks(3).ids, blocks(3).ids)
        assert not torch.equal(blocks(3).ids, blocks(4).ids)
        assert not torch.equal(blocks(3).ids, blocks(None).ids)

    def test_the_default_device_does_not_matter(self, text: Path) -> None:
        for seed in (None, 0):
            with torch.device("meta"):
                blocks = token_blocks([text], TOKENIZER, length=41, count=10, seed=seed)
            assert torch.equal(blocks.ids, token_blocks([text], TOKENIZER, length=41, count=10, seed=seed).ids)

    def test_a_seed_takes_blocks_of_the_text_without_repetition(self, text: Path) -> None:
        every = {tuple(row) for row in token_blocks([text], TOKENIZER, length=41).ids.tolist()}
        taken = {tuple(row) for row in token_blocks([text], TOKENIZER, length=41, count=25, seed=1).ids.tolist()}
        assert taken == every

    def test_what_is_recorded(self, text: Path) -> None:
        blocks = token_blocks([text], TOKENIZER, length=41, count=2, seed=5)
        assert blocks.describe() == {
            "text": ["text.txt"], "blocks": 2, "block_length": 41, "seed": 5, "tokens_sha256": hash_tokens(blocks.ids),
        }  # fmt: skip

    def test_fewer_tokens_than_asked(self, text: Path) -> None:
        with pytest.raises(TealError, match=r"the text gives 1000 tokens, 1040 are needed \(26 x 41\); give more text"):
            token_blocks([text], TOKENIZER, length=41, count=26)

    def test_less_than_one_block(self, text: Path) -> None:
        with pytest.raises(TealError, match=r"gives 1000 tokens, 1001 are needed \(1 x 1002\)"):
            token_blocks([text], TOKENIZER, length=1002)

    @pytest.mark.parametrize(
        ("length", "count", "message"), [(1, None, "at least 2 tokens, got 1"), (8, 0, "at least 1 block")]
    )
    def test_impossible_blocks(self, text: Path, length: int, count: int | None, message: str) -> None:
        with pytest.raises(UsageError, match=message):
            token_blocks([text], TOKENIZER, length=length, count=count)


class TestHash:
    def test_depends_on_the_tokens_alone(self) -> None:
        ids = torch.arange(12).view(3, 4)
        assert hash_tokens(ids) == hash_tokens(ids.to(torch.int32)) == hash_tokens(ids.t().contiguous().t())
        assert hash_tokens(ids) != hash_tokens(ids.flip(0))


class TestCheckTokens:
    def test_known_tokens(self) -> None:
        check_tokens(torch.tensor([[0, 257]]), tiny_model())

    @pytest.mark.parametrize("wrong", [-1, 258])
    def test_unknown_tokens(self, wrong: int) -> None:
        with pytest.raises(TealError, match=f"token id {wrong} is outside the model's vocabulary of 258"):
            check_tokens(torch.tensor([[5, wrong]]), tiny_model())

    @pytest.mark.parametrize("shape", [(4,), (0, 4), (2, 0)])
    def test_shapes(self, shape: tuple[int, ...]) -> None:
        with pytest.raises(TealError, match=r"tokens must be of shape \[sequences, length\]"):
            check_tokens(torch.zeros(shape, dtype=torch.int64), tiny_model())


@pytest.mark.parametrize(
    ("tokenized", "text"),
    [
        (" He had a guest @-@ starring role . \n", "He had a guest-starring role.\n"),
        ("It cost 1 @,@ 000 @.@ 5 dollars ", "It cost 1,000.5 dollars "),
        (" = = Career = = \n", "= = Career = =\n"),
        ('the play " Herons " , written by him ( 2001 ) ; ', 'the play "Herons", written by him (2001); '),
        ("he did n't , it 's and they 've", "he didn't, it's and they've"),
        ("the players ' union", "the players' union"),
        ("for $ 5 and 50 % of 1990 – 1995", "for $5 and 50% of 1990–1995"),
        (" <unk> stays \n", "<unk> stays\n"),
    ],
)  # fmt: skip
def test_detokenized_wikitext(tokenized: str, text: str) -> None:
    assert detokenize_wikitext(tokenized) == text
