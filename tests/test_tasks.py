"""Tasks: what the lines of a file become, and how a written answer is judged."""

import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from teal.errors import TealError, UsageError
from teal.tasks import ANSWER, CHOICE, WORD, Item, is_right, last_number, read_task

QUERY = {"query": "The sky is", "choices": ["blue.", "a kind of cheese."], "gold": 0}
QUESTION = {"query": "Question: What is red?\n", "choices": ["blood", "grass", "milk"], "label": 0}
CONTEXTS = {
    "context_options": ["It is in the bag, so the box", "so the bag"],
    "continuation": "is small.",
    "gold": 1,
}
SENTENCE = {"context": "He asked her twice, and twice she said", "continuation": "no"}
SUM = {"question": "What is 2 + 3?", "answer": "2 + 3 = 5\n#### 5", "id": 7}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "some.jsonl"


def write(path: Path, *lines: Any) -> None:
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))


class TestKinds:
    def test_choices(self, path: Path) -> None:
        write(path, QUERY, "", QUERY)
        task = read_task(path)
        item = Item((("The sky is", " blue."), ("The sky is", " a kind of cheese.")), 0, (5, 17))
        assert (task.name, task.kind, task.items, task.chance) == ("some", CHOICE, (item, item), 0.5)

    def test_a_question_asks_for_its_answer(self, path: Path) -> None:
        write(path, QUESTION)
        (item,) = read_task(path).items
        assert item.pairs[1] == ("Question: What is red?\nAnswer:", " grass")
        assert item.gold == 0

    def test_choices_of_contexts_have_no_length_to_normalize_by(self, path: Path) -> None:
        write(path, CONTEXTS)
        (item,) = read_task(path).items
        assert item == Item((("It is in the bag, so the box", " is small."), ("so the bag", " is small.")), 1)

    def test_last_word(self, path: Path) -> None:
        write(path, SENTENCE)
        task = read_task(path, name="other")
        assert (task.name, task.kind, task.chance) == ("other", WORD, 0.0)
        assert task.items == (Item((("He asked her twice, and twice she said", " no"),)),)

    def test_exact_answer(self, path: Path) -> None:
        write(path, SUM)
        task = read_task(path)
        assert task.kind == ANSWER
        assert task.items[0].pairs == (("Question: What is 2 + 3?\nAnswer:", " 2 + 3 = 5\n#### 5"),)

    @pytest.mark.parametrize(
        ("context", "continuation"), [("ends in a line\n", "so"), ("ends", "\nso"), ("ends ", "so")]
    )
    def test_no_space_where_white_space_stands(self, context: str, continuation: str, path: Path) -> None:
        write(path, {"context": context, "continuation": continuation})
        assert read_task(path).items[0].pairs == ((context, continuation),)

    def test_guessing_among_different_numbers_of_choices(self, path: Path) -> None:
        write(path, QUERY, QUESTION)
        assert read_task(path).chance == pytest.approx((1 / 2 + 1 / 3) / 2)


class TestExamples:
    def test_the_first_items_are_shown_solved(self, path: Path) -> None:
        write(
            path,
            QUESTION,
            SUM | {"query": "Question: What is round?", "choices": ["a ball", "a box"], "gold": 1},
            QUERY,
        )
        task = read_task(path, shots=2)
        shown = "Question: What is red?\nAnswer: blood\n\nQuestion: What is round?\nAnswer: a box\n\n"
        assert task.shots == 2
        assert [item.pairs[1] for item in task.items] == [(shown + "The sky is", " a kind of cheese.")]
        assert task.items[0].lengths == (5, 17)

    def test_a_limit_counts_what_is_asked(self, path: Path) -> None:
        write(path, *(SENTENCE | {"continuation": word} for word in "abcd"))
        asked = read_task(path, shots=1, limit=2).items
        assert [item.pairs[0][1] for item in asked] == [" b", " c"]
        assert len(read_task(path, limit=9).items) == 4


class TestRefused:
    @pytest.mark.parametrize(
        ("line", "says"),
        [
            ("{", "line 2 is not JSON"),
            ([1], "line 2 is no item of a task; an item has one of these pairs of fields: query and choices;"),
            ({"text": "x"}, "line 2 is no item of a task"),
            (SENTENCE, "line 2 is of the kind 'last word', the lines before of the kind 'multiple choice'"),
            (QUERY | {"choices": ["one"]}, "field 'choices' must be a list of at least 2 texts"),
            (QUERY | {"choices": ["one", 2]}, "field 'choices' is int, expected text"),
            (QUERY | {"query": " "}, "field 'query' is empty"),
            (QUERY | {"choices": ["one", ""]}, "field 'choices' is empty"),
            (QUERY | {"gold": 2}, "the right choice must be 0 to 1, in 'gold' or 'label', got 2"),
            (QUERY | {"gold": "0"}, "got '0'"),
            (QUERY | {"gold": True}, "got True"),
            ({"query": "x", "choices": ["one", "two"]}, "got None"),
            (SUM | {"answer": "none"}, "the answer 'none' holds no number"),
        ],
    )  # fmt: skip
    def test_lines(self, line: Any, says: str, path: Path) -> None:
        write(path, QUERY, line)
        with pytest.raises(TealError) as error:
            read_task(path)
        assert says in str(error.value)
        assert str(path) in str(error.value)

    def test_nothing_left_to_ask(self, path: Path) -> None:
        write(path, QUERY, QUERY)
        with pytest.raises(UsageError, match="holds 2 items, which leaves none to ask after 2 examples"):
            read_task(path, shots=2)
        write(path)
        with pytest.raises(UsageError, match="holds 0 items"):
            read_task(path)

    def test_no_file(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match=r"is a directory; name a \.jsonl file"):
            read_task(tmp_path)
        with pytest.raises(UsageError, match=r"does not exist; name a \.jsonl file"):
            read_task(tmp_path / "none.jsonl")


class TestAnswers:
    @pytest.mark.parametrize(
        ("text", "number"),
        [
            ("5 apples and 1,234 pears", "1234"), ("it is -3.50.", "-3.5"), ("$18", "18"), ("#### 007", "7"),
            ("12:30", "30"), ("1,2", "12"),
        ],
    )  # fmt: skip
    def test_last_number(self, text: str, number: str) -> None:
        assert last_number(text) == Decimal(number)

    def test_compared_as_numbers(self) -> None:
        assert is_right("so 2 + 3 = 5.00", "#### 5")
        assert not is_right("5, no, 6", "#### 5")
        assert not is_right("five", "#### 5")
        assert last_number("five") is None
