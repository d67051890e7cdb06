"""Requests to stop: a run takes note of SIGTERM, Ctrl-C and a terminal that is closed, saves, and leaves."""

import signal
import threading
from types import FrameType
from typing import Any

from examples.screen import tell

INTERRUPTED = 130  # exit status of a program that Ctrl-C has ended
REQUESTS = ("SIGTERM", "SIGINT", "SIGHUP")


class Stopping:
    """Whether someone has asked the run to stop. A second Ctrl-C stops at once.

    Attributes:
      signal: the one that asked; None if nobody has.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Stopping":
        if threading.current_thread() is not threading.main_thread():
            return self  # Python gives signals to the main thread alone
        for number in (getattr(signal, name) for name in REQUESTS if hasattr(signal, name)):
            if number == signal.SIGINT or signal.getsignal(number) != signal.SIG_IGN:  # as nohup has SIGHUP
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
