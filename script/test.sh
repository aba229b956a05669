#!/usr/bin/env bash
# Installs what is needed, then runs the linter and all tests on the CPU. Arguments go to pytest, such as tests/library/test_reference.py.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
bash script/setup.sh
.venv/bin/python -m ruff check .
.venv/bin/python -m ruff format --check --quiet .
export OMP_NUM_THREADS=1  # one process per core
exec .venv/bin/python -m pytest --numprocesses auto "$@"
