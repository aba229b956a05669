#!/usr/bin/env bash
# UNCURL (arXiv 2409.01483): experts of each layer clustered by router logits, aligned and merged. --task sst2 decides by a task's rows.
# bash script/surgery/uncurl.sh RUN, a finished run's folder. Any flag of surgery.py may follow.
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
"$PYTHON" -u surgery.py --method uncurl --keep 8 --from "$@"
