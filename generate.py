"""Continues a prompt, byte by byte, with a trained Transformer-XL at any number of active experts.

    python generate.py --checkpoint runs/laptop/enwik8/smoe_dropout-seed1 --k 8 --prompt "The "
    python generate.py --checkpoint RUN < text > continued
    python generate.py --checkpoint RUN --draft_k 4 --prompt "The "

The text goes to stdout, prompt included; the speed to stderr. `python generate.py --help` lists the flags.
"""

import signal
import sys
import time
from dataclasses import replace

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback before exit_on_user_error handles signals

from utils.errors import exit_on_user_error

if __name__ == "__main__":
    with exit_on_user_error():  # before torch is imported, so that a wrong flag is refused at once
        from utils.cli.generate import parse

        FLAGS, SOURCE = parse()

import torch

from mem_transformer import MemTransformerLM
from smoe_dropout import slim
from smoe_dropout.sampling import Drafts, write
from utils.checkpoints import weights
from utils.checkpoints.origin import Source
from utils.flags.fields import GenerateFlags
from utils.models.build import build_model
from utils.models.flops import active_parameters


def load(flags: GenerateFlags, source: Source) -> MemTransformerLM:
    """The trained model for inference, at k."""
    made = source.made
    model = build_model(made)
    weights.load(model, source)
    dtype = {"fp32": None, "bf16": torch.bfloat16, "int8": torch.int8}[flags.precision]
    model = slim(model, flags.k or made.moe_num_expert, dtype) if made.moe else model.eval().requires_grad_(False).to(dtype)
    if not made.same_length:  # every position as far back as the last one of a training segment attends, itself included
        model.mem_len = made.mem_len + made.tgt_len
        model.config = replace(model.config, mem_len=model.mem_len, same_length=True)
    return model


def prompt_of(flags: GenerateFlags) -> bytes:
    """The bytes of --prompt, or else of standard input; a newline for none."""
    if flags.prompt is not None:
        return flags.prompt.encode(errors="surrogateescape") or b"\n"  # bytes that are no UTF-8 are continued as they are
    return (b"" if sys.stdin is None or sys.stdin.isatty() else sys.stdin.buffer.read()) or b"\n"


def main(flags: GenerateFlags, source: Source) -> None:
    if flags.threads:
        torch.set_num_threads(flags.threads)
    model, made = load(flags, source), source.made
    torch.manual_seed(flags.seed)
    prompt, drafts = prompt_of(flags), Drafts(flags.draft_k, flags.draft_length or 4) if flags.draft_k else None
    out, begin, count = sys.stdout.buffer, time.perf_counter(), 0
    out.write(prompt)
    try:
        for byte in write(model, prompt, flags.length, flags.temperature, flags.top_p, made.tgt_len, drafts):
            out.write(bytes([byte]))
            out.flush()
            count += 1
    except KeyboardInterrupt:
        pass
    seconds, k = time.perf_counter() - begin, (flags.k or made.moe_num_expert) if made.moe else None
    at = "dense model" if k is None else f"k = {k} of {made.moe_num_expert}"
    if drafts:
        at += f", {drafts.accepted:,} of {drafts.drafted:,} bytes drafted at k = {drafts.k} accepted"
    print(
        f"\n{count} bytes in {seconds:.1f} s, {count / seconds:,.0f} bytes/s; {at}, {active_parameters(model, k)[0]:,} active parameters",
        file=sys.stderr,
    )


if __name__ == "__main__":
    with exit_on_user_error():
        main(FLAGS, SOURCE)
