#!/usr/bin/env bash
# Installs what is needed, then runs the linter and all tests on the CPU. Arguments go to pytest, such as tests/library/test_reference.py -k curve.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
bash script/setup.sh
.venv/bin/python -m ruff check .
export OMP_NUM_THREADS=1  # one process a core
exec .venv/bin/python -m pytest --numprocesses auto "$@"
