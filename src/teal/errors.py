"""Errors a user can act on: one line that says what is wrong and what to do."""


class TealError(Exception):
    """The work could not be done; the command line prints the message and exits with 1."""

    exit_code = 1


class UsageError(TealError):
    """The request itself is wrong; the command line prints the message and exits with 2."""

    exit_code = 2


class UnsupportedModelError(TealError):
    """The decode engine does not know this architecture or a feature of it; transformers may."""


def reason_of(error: BaseException) -> str:
    """The first line of another library's error, and the next where the first ends in a colon."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    reason = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    return f"{type(error).__name__} {reason}".strip() if not reason or isinstance(error, KeyError) else reason
