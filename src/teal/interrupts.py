"""Ctrl-C: noted as well as raised, because native code in between may turn KeyboardInterrupt into another error."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupts:
    """Whether the user has interrupted what is running; to be forgotten where that is dealt with."""

    def __init__(self) -> None:
        self.noted = False

    def caused(self, error: BaseException) -> bool:
        """Whether `error` came of an interrupt, whatever has become of KeyboardInterrupt on its way."""
        return self.noted or isinstance(error, KeyboardInterrupt)

    def forget(self) -> None:
        self.noted = False

    def handle(self, signal_number: int, frame: FrameType | None) -> None:
        """The signal handler."""
        self.noted = True
        raise KeyboardInterrupt


@contextmanager
def noting_interrupts() -> Iterator[Interrupts]:
    """Within the context Ctrl-C is noted, unless somebody else already handles it or this is not the main thread."""
    interrupts = Interrupts()
    ours = (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    )
    if ours:
        signal.signal(signal.SIGINT, interrupts.handle)
    try:
        yield interrupts
    finally:
        if ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)
