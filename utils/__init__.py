"""The experiment harness around the `smoe_dropout` library: flags, data, checkpoints, evaluation, records, reports."""

import signal
import sys

if sys.argv[:1] == ["-m"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # of `python -m utils.NAME`: no traceback before exit_on_user_error handles signals
