"""Progress on standard error, silent unless asked for: a bar on a terminal, a line now and then in a log."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

Item = TypeVar("Item")
LINE_SECONDS = 15


def track(items: Iterable[Item], description: str, total: int, show: bool, done: int = 0) -> Iterator[Item]:
    """Iterate over `items`, showing progress with the time left if `show`.

    `done` of the `total` were finished by an earlier, interrupted run.
    """
    if show and not sys.stderr.isatty():
        yield from _lines(items, description, total, done)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), disable=not show) as progress:
        task = progress.add_task(description, total=total, completed=done)
        for item in items:
            yield item
            progress.advance(task)


def _lines(items: Iterable[Item], description: str, total: int, done: int) -> Iterator[Item]:
    started = last = time.monotonic()
    for finished, item in enumerate(items, start=1):
        yield item
        now = time.monotonic()
        if now - last > LINE_SECONDS or done + finished == total:
            last = now
            left = (now - started) / finished * (total - done - finished)
            print(f"{description} {done + finished}/{total}, {left:.0f} s left", file=sys.stderr, flush=True)
