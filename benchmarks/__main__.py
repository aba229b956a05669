"""python -m benchmarks {layer,step,data} [--threads N] [--rounds N] [--precision fp32 bf16] ...: measures, writes a record, prints a table.

Ratios hold only where nothing else runs on the machine's cores.
"""

import sys
from collections.abc import Sequence

import torch
import tyro

from benchmarks import data, layer, step
from benchmarks.tables import markdown

BENCHMARKS = {"layer": layer, "step": step, "data": data}
FLAGS = {"layer": layer.LayerFlags, "step": step.StepFlags, "data": data.DataFlags}


def main(argv: Sequence[str] | None = None) -> None:
    """One benchmark."""
    flags = tyro.extras.subcommand_cli_from_dict(FLAGS, prog="benchmarks", args=list(sys.argv[1:] if argv is None else argv))
    name = next(name for name, kind in FLAGS.items() if type(flags) is kind)
    torch.set_num_threads(flags.threads)
    print(markdown(BENCHMARKS[name].run(flags)))


if __name__ == "__main__":
    main()
