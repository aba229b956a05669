"""Runs the fault campaign, whole or sampled, and prints a report; exit code 1 if there is a failure.

python -m tests.faults                                   # whole
python -m tests.faults --kind damage --sample 200
python -m tests.faults --try kill:train:57:half          # one try again; its folder is kept
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

from tests import tiny
from tests.faults import wrong
from tests.faults.campaign import KINDS, attempt, campaign, report
from tests.faults.world import World


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description="Runs the fault campaign and prints a report.")
    parser.add_argument("--kind", choices=KINDS, action="append", help="only this kind; repeat it for several")
    parser.add_argument("--sample", type=int, metavar="N", help="draw so many tries of each kind")
    parser.add_argument("--seed", type=int, default=2303, help="of what is drawn (default: 2303)")
    parser.add_argument("--jobs", type=int, default=2, help="tries at a time (default: 2)")
    parser.add_argument("--report", type=Path, metavar="FILE", help="write the report into this file too")
    parser.add_argument("--root", type=Path, metavar="DIR", help="folder to work in, whose contents serve again (default: a temporary one)")
    parser.add_argument("--try", dest="label", metavar="LABEL", help="repeat one try of a report, and keep its folder")
    args = parser.parse_args()
    if args.label:
        root = args.root or Path(tempfile.mkdtemp(prefix="fault-"))
        if args.label.startswith("wrong:"):
            wrong.prepare(World(root))
        with tiny._server().Pool(1) as pool:
            _, failures = pool.apply(attempt, (root, args.label, args.seed, True))
        print("\n".join(map(": ".join, failures or ())) or "no failure", f"see {root}", sep="\n")
        return bool(failures)
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="faults-") as temporary:
        kinds, root = args.kind or list(KINDS), args.root or Path(temporary)
        outcomes = campaign(root, kinds, args.sample, args.seed, args.jobs, lambda line: print(line, file=sys.stderr, flush=True))
    text = report(outcomes, args.seed, time.monotonic() - begin)
    print(text, end="")
    if args.report:
        args.report.write_text(text)
    return any(failures for _, failures in outcomes)


if __name__ == "__main__":
    sys.exit(main())
