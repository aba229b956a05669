"""SIGTERM and Ctrl-C end a run at the next step boundary, after it was saved."""

import signal


class Interrupt:
    """`signal` is the number of the signal received, 0 before one. A second Ctrl-C ends the process at once."""

    def __init__(self):
        self.signal = 0
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame) -> None:
        if self.signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number
