"""Refuses sizes that no memory of this machine holds, by lower bounds, so that nothing that fits is refused. Imports no torch."""

import os
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

from utils.errors import UserError
from utils.flags.derive import parse_counts, parse_layers
from utils.flags.fields import Flags
from utils.flags.models import MODELS
from utils.formatting import short_number

STATES = {"adam": 2, "adamw": 2, "adagrad": 1, "sgd": 0}  # numbers an optimiser keeps for each parameter
GPUS = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")  # devices of NVIDIA, AMD, and Windows' Linux
BYTES = 256  # symbols of a text of bytes


def refuse_if_too_large(flags: Flags, text: int | None = None) -> None:
    """Raises UserError if training cannot fit into memory. flags: decided ones. text: symbols of the training text, if they are known."""
    parameters, memory = least_parameters(flags), machine_memory()
    on_cpu = flags.device == "cpu" or (flags.device == "auto" and not any(map(os.path.exists, GPUS)))
    trained = not (flags.freeze_main_network or flags.freeze_main_network_all or flags.train_only)
    held = 4 * parameters * (1 + STATES[flags.optim] if on_cpu and trained else 1)
    besides = {f"{short_number(parameters)} parameters": 4 * parameters if on_cpu and trained else 0}  # not at the same time: gradients,
    if on_cpu:  # embeddings in validation, and what is kept for the backward pass
        besides[f"--mem_len {flags.mem_len} and --tgt_len {flags.tgt_len}"] = _evaluation_positions(flags)
    if on_cpu and text is not None:
        besides[f"--batch_size {flags.batch_size} in {flags.batch_chunk} parts"] = least_activations(flags, text)
    what = max(besides, key=besides.get)
    if (needed := held + besides[what]) > memory:
        raise UserError(
            f"{what} take at least {needed / 1e9:,.0f} GB with all that training needs, and this machine has {memory / 1e9:,.1f} GB of "
            "memory: choose smaller sizes"
        )


def least_parameters(flags: Flags) -> int:
    """A lower bound on the number of parameters: the large matrices of the layers, and embeddings."""
    layers, attention = flags.n_layer, flags.d_model if "d_head" in MODELS[flags.model].unknown_flags else flags.n_head * flags.d_head
    hidden = layers * flags.d_ff  # units of all feed-forward layers
    if flags.moe:
        chosen = parse_layers(flags.moe_index, layers)[0]
        sparse = layers if chosen is None else len(chosen)
        experts = sum(parse_counts(flags.moe_experts_by_layer) or [sparse * flags.moe_num_expert])
        dense = flags.d_ff if "dense_width" in MODELS[flags.model].unknown_flags or flags.dense_width == "all" else flags.d_inner
        hidden = (0 if flags.moe_expert_rank else experts * flags.d_inner) + (layers - sparse) * dense
    if MODELS[flags.model].from_folder:  # whose queries may share keys and values
        attention //= 2
    symbols = BYTES if "bytes" in MODELS[flags.model].reads else flags.tgt_len  # pieces: embeddings of positions, at least
    embeddings = symbols * flags.d_model
    if flags.adaptive:  # the last cluster may be small
        clusters = enumerate(pairwise((0, *parse_counts(flags.cutoffs))))
        embeddings = sum((end - start) * (flags.d_model // flags.div_val**index) for index, (start, end) in clusters)
    positions = layers * (flags.mem_len + flags.tgt_len) * {1: attention, 3: flags.d_model}.get(flags.attn_type, 0)  # of learned tables
    return embeddings + 2 * flags.d_model * hidden + 4 * layers * flags.d_model * attention + positions


def _evaluation_positions(flags: Flags) -> int:
    """Bytes of the embeddings of distances in evaluation, of the model and of each layer."""
    if "mem_len" in MODELS[flags.model].unknown_flags or not flags.mem_len or flags.attn_type:
        return 0
    return (flags.mem_len + flags.tgt_len - flags.eval_tgt_len) * (4 * flags.d_model + 2 * flags.n_layer * flags.n_head * flags.d_head)


def least_activations(flags: Flags, text: int) -> int:
    """A lower bound on the bytes kept for the backward pass of one part of a batch: a state and the attention of each layer, and logits."""
    rows = max(1, flags.batch_size // (int(os.environ.get("WORLD_SIZE", "1")) * flags.batch_chunk))
    length = min(flags.tgt_len, text // flags.batch_size)
    read_bytes = "bytes" in MODELS[flags.model].reads
    kept = flags.n_layer * 2 * (flags.d_model + (flags.n_head * length if read_bytes and flags.attn_type < 2 else 0))
    logits = 0 if not read_bytes or flags.sample_softmax > 0 else parse_counts(flags.cutoffs)[0] if flags.adaptive else BYTES
    return rows * length * (kept + 4 * logits)


def machine_memory() -> int:
    """Bytes of memory and swap space that this process may use at most."""
    total, limit = 0, None
    with suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith(("MemTotal:", "SwapTotal:")):
                total += int(line.split()[1]) << 10
    with suppress(OSError, ValueError):  # a container's limit
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text()) + int(Path("/sys/fs/cgroup/memory.swap.max").read_text())
    return min(total or 1 << 62, limit or 1 << 62)
