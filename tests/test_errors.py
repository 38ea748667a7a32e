"""What other libraries' errors become."""

import pytest

from teal.errors import reason_of


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ValueError("one\ntwo"), "one"),
        (ValueError("\n  Class validation error:\n\n    hidden size must divide\nmore"),
         "Class validation error: hidden size must divide"),
        (ValueError("nothing follows:"), "nothing follows:"),
        (KeyError("added_tokens"), "KeyError 'added_tokens'"),
        (RuntimeError(), "RuntimeError"),
    ],
)  # fmt: skip
def test_the_reason_is_one_line(error: Exception, reason: str) -> None:
    assert reason_of(error) == reason
