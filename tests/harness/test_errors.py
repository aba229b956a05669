"""The last net of the programs: whatever comes from outside ends them with an exit code and at most one sentence."""

import os
import signal
import subprocess
import sys

import pytest

from tests.conftest import ROOT

PROGRAM = """
import os, sys, time
from utils.errors import ConfigError, TrainingError, UserError, exit_on_user_error

def interrupted(error):
    print("ready", flush=True)
    try:
        time.sleep(60)
    except KeyboardInterrupt:
        raise error from None

with exit_on_user_error():
    {body}
{after}
"""


def as_in_a_terminal() -> None:
    """Ctrl-C counts, though the tests may run in the background, where it is ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def start(body: str, after: str = "", **options) -> subprocess.Popen:
    words = [sys.executable, "-c", PROGRAM.format(body=body, after=after)]
    return subprocess.Popen(
        words, cwd=ROOT, text=True, preexec_fn=as_in_a_terminal, **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    )


@pytest.mark.parametrize(
    ("body", "code", "said"),
    [
        ("raise UserError('--lr -1 must be above 0')", 2, "error: --lr -1 must be above 0\n"),
        ("raise TrainingError('not finite')", 1, "error: not finite\n"),
        ("raise ConfigError('top_k 9')", 2, "error: top_k 9\n"),
        (r"raise UserError('a\nb \x1b[1m \udcff é')", 2, "error: a\\nb \\x1b[1m \\udcff é\n"),
        ("open('/dev/null/x')", 2, "error: /dev/null/x cannot be used (Not a directory): "),
        ("open('x' * 300)", 2, f"error: {'x' * 300} cannot be used (File name too long): "),
        ("raise OSError(28, 'No space left on device')", 2, "error: a file or connection cannot be used (No space left on device): "),
        ("import numpy; numpy.empty(1 << 58)", 2, "error: there is not enough memory (Unable to allocate"),
        ("raise RuntimeError('CUDA out of memory. Tried to allocate')", 2, "error: there is not enough memory (CUDA out of memory. Tried"),
        ("print('x' * 100_000, file=open('/dev/full', 'w'))", 2, "error: a file or connection cannot be used (No space left on device): "),
        ("sys.exit(7)", 7, ""),
    ],
)
def test_errors_from_outside_are_one_sentence(body, code, said):
    process = start(body)
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out) == (code, "") and err.startswith(said) and err.count("\n") == bool(said)


def test_letters_that_the_terminal_lacks_are_escaped():
    out, err = start(r"print('\u2009\ud800')", env={**os.environ, "PYTHONIOENCODING": "ascii"}).communicate()
    assert (out, err) == ("\\u2009\\ud800\n", "")


def test_a_mistake_of_the_program_keeps_its_traceback():
    process = start("{}['x']")
    assert "KeyError: 'x'" in process.communicate(timeout=20)[1] and process.returncode == 1


@pytest.mark.parametrize("body", ["print('x' * 100_000)", "print('x')", "print('x'); sys.exit(3)"])
def test_a_closed_pipe_is_silent(body):
    process = start("sys.stdin.read(); " + body, stdin=subprocess.PIPE)
    process.stdout.close()
    process.stdin.close()
    assert (process.wait(20), process.stderr.read()) == (141, "")


def test_a_full_disk_behind_the_output_is_one_sentence():
    with open("/dev/full", "w") as full:
        process = start("print('x')", stdout=full)
    assert process.stderr.read().startswith("error: a file or connection cannot be used (No space left") and process.wait(20) == 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    ("body", "after"),
    [
        ("interrupted(KeyboardInterrupt)", ""),
        ("interrupted(ImportError)", ""),
        ("interrupted(SystemExit(0))", ""),
        ("pass", "interrupted(0)"),
    ],
    ids=["in the block", "C code that makes another error of it", "a program that ends by itself", "between blocks"],
)
def test_signals_leave_no_traceback(number, body, after):
    process = start(body, after)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    assert (process.wait(20), process.stderr.read()) == (128 + number, f"stopped by {number.name}\n")


MODULES = ("doctor", "microscope", "reporting", "reporting.ablations", "training.routing", "cli.train", "cli.finetune")


@pytest.mark.parametrize("name", MODULES)
def test_ctrl_c_while_a_module_is_imported_leaves_no_traceback(name, tmp_path):
    (tmp_path / "msgspec.py").write_text("import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(9)")
    words = [sys.executable, "-m", f"utils.{name}", "nowhere"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    found = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, preexec_fn=as_in_a_terminal)
    assert found.returncode in (-signal.SIGINT, 128 + signal.SIGINT) and "Traceback" not in found.stderr, found.stderr
