#!/usr/bin/env bash
# The best experts by usage, or with --score router_norm by the norm of their router weights.
# bash script/surgery/slim.sh RUN, a finished run's folder. Any flag of surgery.py may follow.
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
"$PYTHON" -u surgery.py --method slim --keep 8 --from "$@"
