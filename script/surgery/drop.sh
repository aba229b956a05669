#!/usr/bin/env bash
# Baseline: the least used experts are dropped.
# bash script/surgery/drop.sh RUN, a finished run's folder. Any flag of surgery.py may follow.
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
"$PYTHON" -u surgery.py --method drop --keep 8 --from "$@"
