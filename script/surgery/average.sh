#!/usr/bin/env bash
# Baseline: experts in groups, averaged as they are.
# bash script/surgery/average.sh RUN, a finished run's folder. Any flag of surgery.py may follow.
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
"$PYTHON" -u surgery.py --method average --keep 8 --from "$@"
