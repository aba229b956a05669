"""How a run ends when it cannot go on: one sentence with the value, the place and the remedy."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

EXIT_USER_ERROR = 2
EXIT_TRAINING_ERROR = 1


class UserError(Exception):
    """A mistake in the input, not in the program. Its text is all the user is shown, without a traceback; exit code 2."""


class TrainingError(Exception):
    """Training cannot go on, and what was saved is good. Its text is all the user is shown; exit code 1."""


@contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Ends the process with one line on stderr where a `UserError` or a `TrainingError` leaves the block."""
    try:
        yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)
    except TrainingError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_TRAINING_ERROR)


def run_main(main: Callable[[], int | None]) -> None:
    """Calls `main` and ends the process with its return value."""
    with exit_on_user_error():
        sys.exit(main() or 0)
