"""Requests to stop: a run takes note of SIGTERM and Ctrl-C, saves, and leaves."""

import signal
import threading
from types import FrameType
from typing import Any

from examples.screen import tell

INTERRUPTED = 130  # exit status of a program that Ctrl-C has ended


class Stopping:
    """Whether someone has asked the run to stop. A second Ctrl-C stops at once.

    Attributes:
      signal: the one that asked; None if nobody has.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Stopping":
        for number in (signal.SIGTERM, signal.SIGINT) if threading.current_thread() is threading.main_thread() else ():
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        if self.signal == signal.SIGINT == number:
            raise KeyboardInterrupt
        self.signal = number
        again = "; Ctrl-C again stops at once, without" if number == signal.SIGINT else ""
        tell(f"{signal.Signals(number).name}: saving after the step under way{again}")

    @property
    def status(self) -> int:
        """Exit status of a run that was asked to stop and has saved."""
        return INTERRUPTED if self.signal == signal.SIGINT else 0
