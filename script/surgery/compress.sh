#!/usr/bin/env bash
# MC-SMoE's compression (arXiv 2310.01334): W = U V + S in every expert, S pruned while train.py --start_from OUT --teacher RUN goes on.
# bash script/surgery/compress.sh RUN, a finished run's folder. Any flag of surgery.py may follow.
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
"$PYTHON" -u surgery.py --method compress --rank 32 --kept 0.1 --from "$@"
