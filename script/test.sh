#!/usr/bin/env bash
# Installs what is needed, then runs the linter and all tests on the CPU. Arguments go to pytest, such as tests/library/test_reference.py.
# Packages of tests/extras.txt that cannot be installed are left out, and the tests that need them skipped.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
bash script/setup.sh

extras=$(cat requirements.txt tests/extras.txt | cksum)
if [ "$(cat .venv/extras 2>/dev/null)" != "$extras" ]; then
  echo "installing tests/extras.txt into .venv ..." >&2
  pip=(.venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint requirements.txt)
  if ! "${pip[@]}" -r tests/extras.txt; then
    grep -v '^#' tests/extras.txt | while IFS= read -r package; do
      "${pip[@]}" "$package" || echo "$package cannot be installed: the tests that need it are skipped" >&2
    done
  fi
  echo "$extras" > .venv/extras
fi

.venv/bin/python -m ruff check .
.venv/bin/python -m ruff format --check --quiet .
export OMP_NUM_THREADS=1  # one process per core
# a file is one process's, which makes its fixtures once; files in their order, so that the long ones do not come last
exec .venv/bin/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder "$@"
