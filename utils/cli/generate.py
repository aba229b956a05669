"""The command line of generate.py. Imports no torch."""

from collections.abc import Sequence

from utils.checkpoints.origin import Source, open_run
from utils.cli.pipeline import Program, decide
from utils.flags.derive import routes_by_position
from utils.flags.fields import GenerateFlags
from utils.flags.models import MODELS


def parse(argv: Sequence[str] | None = None) -> tuple[GenerateFlags, Source]:
    """The flags of a command line, and the checkpoint. Raises UserError listing all mistakes."""
    return decide(PROGRAM, argv)


def _mistakes(flags: GenerateFlags, source: Source) -> list[str]:
    made, found = source.made, []
    if not MODELS[made.model].causal:
        known = ", ".join(name for name, model in MODELS.items() if model.causal)
        found.append(f"{flags.checkpoint} holds a {made.model}, which cannot continue a text; these can: {known}")
    elif "vocabulary_sha256" in source.flags:
        found.append(f"{flags.checkpoint} reads tokens, and generate.py continues bytes: give a model trained on a text of bytes")
    elif made.attn_type > 1:
        found.append(f"{flags.checkpoint} has --attn_type {made.attn_type}, whose positions move with every byte: give one of 0 or 1")
    if flags.k is not None and not made.moe:
        found.append(f"--k {flags.k}: the run in {flags.checkpoint} is dense; leave it out")
    elif flags.k is not None and not 1 <= flags.k <= made.moe_num_expert:
        found.append(f"--k {flags.k} must be from 1 to the {made.moe_num_expert} experts of the run")
    elif made.moe and flags.draft_k is not None and flags.draft_k >= (k := flags.k or made.moe_num_expert):
        found.append(f"--draft_k {flags.draft_k} must be less than the {k} active experts (--k) that verify the drafts")
    if flags.draft_k is not None and not made.moe:
        found.append(f"--draft_k {flags.draft_k}: the run in {flags.checkpoint} is dense and cannot draft with fewer experts; leave it out")
    if flags.draft_k is not None and made.moe and routes_by_position(made):
        found.append(f"--draft_k {flags.draft_k}: --method {made.method} chooses experts by the bytes that are read together; leave it out")
    if flags.draft_k is not None and flags.precision == "bf16":
        found.append(f"--draft_k {flags.draft_k}: in bf16 several bytes are rounded otherwise than one, which changes the text; use fp32")
    if flags.draft_length is not None and flags.draft_k is None:
        found.append(f"--draft_length {flags.draft_length} needs --draft_k: give the number of experts that draft")
    if flags.precision == "int8" and not made.moe:
        found.append(f"--precision int8: the run in {flags.checkpoint} is dense, and only experts are stored in int8; use bf16")
    return found


PROGRAM = Program("generate.py", GenerateFlags, "checkpoint", True, open_run, mistakes=_mistakes)
