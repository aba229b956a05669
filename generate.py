"""Writes on from a prompt, byte by byte, with a trained Transformer-XL at any number of active experts.

    python generate.py --checkpoint runs/laptop/enwik8/smoe_dropout-seed1 --k 8 --prompt "The "
    python generate.py --checkpoint RUN < text > more

What it writes goes to stdout, prompt included; how fast it was to stderr. `python generate.py --help` lists the flags.
"""

import sys
import time

from utils.cli.generate import load, parse
from utils.errors import exit_on_user_error
from utils.models.sampling import write

if __name__ == "__main__":
    with exit_on_user_error():  # before torch is imported
        FLAGS, SOURCE, MADE = parse(sys.argv[1:])

import torch

from utils.models.flops import active_parameters


def main() -> None:
    if FLAGS.threads:
        torch.set_num_threads(FLAGS.threads)
    model = load(FLAGS, SOURCE, MADE)
    torch.manual_seed(FLAGS.seed)
    prompt = FLAGS.prompt.encode() if FLAGS.prompt is not None else b"" if sys.stdin.isatty() else sys.stdin.buffer.read()
    prompt = prompt or b"\n"
    out, begin, count = sys.stdout.buffer, time.perf_counter(), 0
    out.write(prompt)
    try:
        for byte in write(model, prompt, FLAGS.length, FLAGS.temperature, FLAGS.top_p, MADE.tgt_len):
            out.write(bytes([byte]))
            out.flush()
            count += 1
    except KeyboardInterrupt:
        pass
    seconds, k = time.perf_counter() - begin, (FLAGS.k or MADE.moe_num_expert) if MADE.moe else None
    at = "dense" if k is None else f"k = {k} of {MADE.moe_num_expert}"
    print(
        f"\n{count} bytes in {seconds:.1f} s, {count / seconds:,.0f} bytes/s; {at}, {active_parameters(model, k)[0]:,} active parameters",
        file=sys.stderr,
    )


if __name__ == "__main__":
    with exit_on_user_error():
        main()
