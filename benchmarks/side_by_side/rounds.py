"""The parent's part: child processes that take turns, paired ratios with their spread, agreement of logits."""

import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from teal.errors import TealError

WORKER = Path(__file__).with_name("worker.py")


class Worker:
    """One side in a child process. `details` is what it says of itself once its model is loaded."""

    def __init__(self, task: dict[str, Any], trap_hint: str = "") -> None:
        self.side: str = task["side"]
        self._trap_hint = trap_hint
        self._process = subprocess.Popen(
            [sys.executable, str(WORKER), json.dumps(task)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        try:
            self.details = self._reply()
        except BaseException:
            self.close()
            raise

    def ask(self, do: str, **request: Any) -> dict[str, Any]:
        """Send one request and wait for its reply. Raises TealError if the child fails or dies."""
        assert self._process.stdin is not None
        try:
            print(json.dumps({"do": do, **request}), file=self._process.stdin, flush=True)
        except BrokenPipeError:
            raise self._death() from None
        return self._reply()

    def close(self) -> None:
        """End the child and give its memory back."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.kill()
        self._process.wait()
        self._process.stdout.close()
        with suppress(BrokenPipeError):  # a request that the child did not live to read
            self._process.stdin.close()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _reply(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise self._death()
        reply = json.loads(line)
        if "error" in reply:
            raise TealError(f"{self.side}: {reply['error']}")
        return reply

    def _death(self) -> TealError:
        code = self._process.wait()
        if code == -signal.SIGILL:
            return TealError(f"{self.side} died of an illegal instruction. {self._trap_hint}")
        if code == -signal.SIGKILL:
            return TealError(f"{self.side} was killed, probably for want of memory; choose a smaller shape or format")
        return TealError(f"{self.side} died with exit code {code}")


@dataclass(frozen=True)
class Spread:
    """The median of some measurements, the lowest and the highest."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        return cls(statistics.median(values), min(values), max(values))

    def text(self, digits: int = 2) -> str:
        return f"{self.median:.{digits}f} ({self.low:.{digits}f}-{self.high:.{digits}f})"


def tokens_per_second(seconds: Sequence[float], steps: int) -> Spread:
    return Spread.of([steps / value for value in seconds])


def speedup(seconds: Sequence[float], baseline: Sequence[float]) -> Spread:
    """How much faster than the baseline, compared round by round, so that a machine's drift cancels."""
    return Spread.of([slow / fast for fast, slow in zip(seconds, baseline, strict=True)])


def rotated(items: Sequence[Any], count: int) -> list[Any]:
    """The same items, starting further on: over the rounds everyone goes first, and after everyone else."""
    start = count % len(items)
    return [*items[start:], *items[:start]]


@dataclass(frozen=True)
class Agreement:
    """How alike two sides' logits are: the lowest correlation over the tokens, and the share of equal first choices."""

    correlation: float
    top1: float

    @classmethod
    def of(cls, one: np.ndarray, other: np.ndarray) -> "Agreement":
        """Logits [tokens, vocabulary] each. Raises TealError if shapes differ or values are not finite."""
        if one.shape != other.shape or not (np.isfinite(one).all() and np.isfinite(other).all()):
            raise TealError(f"logits of shapes {one.shape} and {other.shape} do not compare or are not finite")
        correlations = [float(np.corrcoef(a, b)[0, 1]) for a, b in zip(one, other, strict=True)]
        return cls(min(correlations), float((one.argmax(axis=1) == other.argmax(axis=1)).mean()))


class Quiet:
    """How much of the machine's processors others use while one side is measured; steal by other machines counts.

    Threads that spin at barriers lose several times what is taken from them, and not alike on both sides.
    """

    def __init__(self) -> None:
        self._started, self._busy = time.perf_counter(), busy_seconds()

    def others(self, processor_seconds: float) -> float | None:
        """The share since the start that is not `processor_seconds`; None where the system does not tell."""
        busy = busy_seconds()
        if busy is None or self._busy is None:
            return None
        elapsed = (time.perf_counter() - self._started) * (os.cpu_count() or 1)
        return max(0.0, busy - self._busy - processor_seconds) / elapsed


def busy_seconds(path: Path = Path("/proc/stat")) -> float | None:
    """Seconds that all processors together were not idle since the start of the system, as Linux counts them."""
    try:
        user, nice, system, _, _, *rest = map(int, path.read_text(encoding="utf-8").split("\n", 1)[0].split()[1:])
    except (OSError, ValueError):
        return None
    return (user + nice + system + sum(rest[:3])) / os.sysconf("SC_CLK_TCK")  # rest: irq, softirq, steal


def wait_policy() -> str:
    """How idle OpenMP threads wait in the children, which inherit this."""
    return os.environ.get("OMP_WAIT_POLICY", "libgomp's default")
