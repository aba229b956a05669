#!/usr/bin/env bash
# MC-SMoE's merge (arXiv 2310.01334): experts join the most used ones that are routed alike, hidden units aligned, weighted by usage.
# bash script/surgery/merge.sh RUN, a finished run's folder. Any flag of surgery.py may follow.
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
"$PYTHON" -u surgery.py --method merge --keep 8 --from "$@"
