"""Progress shown during a run: a line that is kept up to date on a terminal, plain lines in a log."""

import sys
import time

from utils.formatting import duration


class Progress:
    """Prints the speed since this process started and the time left, on the main process only."""

    def __init__(self, first_step: int, last_step: int, enabled: bool):
        self.first_step, self.last_step, self.enabled = first_step, last_step, enabled
        self.begin = time.perf_counter()
        self.paused = 0.0
        self.terminal = sys.stdout.isatty()

    def say(self, sentence: str) -> None:
        if self.enabled:
            print(("\r\033[K" if self.terminal else "") + sentence, flush=True)

    def update(self, step: int, line: str, keep: bool) -> None:
        """Prints a line about a step. On a terminal it is overwritten by the next one unless `keep`; in a log only kept lines appear."""
        if not self.enabled or not (keep or self.terminal):
            return
        elapsed = time.perf_counter() - self.begin - self.paused
        rate = (step - self.first_step) / elapsed if elapsed > 0 else 0.0
        left = duration((self.last_step - step) / rate) if rate else "?"
        text = f"step {step:>{len(str(self.last_step))}}/{self.last_step} | {line} | {rate:.2f} steps/s | {left} left"
        print(("\r\033[K" if self.terminal else "") + text, end="\n" if keep or not self.terminal else "", flush=True)
