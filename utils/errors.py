"""Errors shown to the user: one sentence with the value, the place and the remedy."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class UserError(Exception):
    """A mistake in the input, not in the program. Only its text is shown, without a traceback."""

    code = 2


class TrainingError(Exception):
    """Training failed; the saved checkpoints are good. Only its text is shown."""

    code = 1


@contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Prints a `UserError` or `TrainingError` raised in the block on one line, and exits with its code."""
    try:
        yield
    except (UserError, TrainingError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.code)


def run_main(main: Callable[[], int | None]) -> None:
    """Calls `main` and ends the process with its return value."""
    with exit_on_user_error():
        sys.exit(main() or 0)
