"""SIGTERM and Ctrl-C end a run at the next step boundary, after it was saved."""

import signal
import sys


class Interrupt:
    """`signal` is the number of the signal received, 0 before one. A second one ends the process at once."""

    def __init__(self):
        self.signal = 0
        self._at_once = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._receive)

    def at_once(self) -> None:
        """From now on a signal ends the process without waiting for a step."""
        self._at_once = True

    def _receive(self, number: int, frame) -> None:
        if self._at_once or self.signal:
            sys.exit(128 + number)
        self.signal = number
