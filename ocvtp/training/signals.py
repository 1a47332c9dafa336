"""Signals that end a run, as an error of ours: at Ctrl-C Lightning would leave the process."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from ocvtp.training.lifecycle import Interrupted


class Signals:
    """Ctrl-C, SIGTERM and SIGUSR1 raise `Interrupted`, or ask for it.

    Attributes:
        number: of the one that ends the run, or None; another process may have been sent it.
        waits: whether the first one is only noted; a second one is always raised.
        told: whether that is said to the user.
    """

    def __init__(self) -> None:
        self._process = os.getpid()
        self._came = False
        self.number: int | None = None
        self.waits = False
        self.told = True

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Answer the signals while the block runs."""
        before = {number: signal.getsignal(number) for number in _signals()}
        self.listen()
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def listen(self) -> None:
        """Answer them again: Lightning puts its own answer to SIGTERM there."""
        for number in _signals():
            signal.signal(number, self._answer)

    def _answer(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a process that loads data: the main one ends it
            if number == signal.SIGTERM:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        again, self._came = self._came, True
        if again or self.number is None:  # the processes of a run are not sent it at one moment
            self.number = number
        if again or not self.waits:
            raise Interrupted
        if self.told:
            os.write(2, b"\nstopping after this step; once more to stop at once\n")


def _signals() -> tuple[signal.Signals, ...]:
    if threading.current_thread() is not threading.main_thread():
        return ()  # only the main thread can
    return (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
