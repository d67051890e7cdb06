"""Requests to stop: after SIGTERM, Ctrl-C or a closed terminal, a run saves a checkpoint and exits."""

import signal
import threading
from types import FrameType
from typing import Any

from examples.screen import print_error

INTERRUPTED = 130  # exit status of a program stopped by Ctrl-C
REQUESTS = ("SIGTERM", "SIGINT", "SIGHUP")


class Stopping:
    """Signal handlers that record a request to stop; a second Ctrl-C stops at once, without saving.

    Attributes:
      signal: number of the last signal received; None before the first.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Stopping":
        if threading.current_thread() is not threading.main_thread():
            return self  # only the main thread may set signal handlers
        for number in (getattr(signal, name) for name in REQUESTS if hasattr(signal, name)):
            if number == signal.SIGINT or signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        if self.signal == signal.SIGINT == number:
            raise KeyboardInterrupt
        self.signal = number
        again = "; Ctrl-C again stops at once, without saving" if number == signal.SIGINT else ""
        print_error(f"{signal.Signals(number).name}: saving after the current call{again}")

    @property
    def status(self) -> int:
        """Exit status of a run that has saved: 130 after Ctrl-C, else 0."""
        return INTERRUPTED if self.signal == signal.SIGINT else 0
