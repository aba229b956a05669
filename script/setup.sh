#!/usr/bin/env bash
# Makes .venv and installs requirements.txt into it; does nothing when that was done for the same requirements.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

python=""
for candidate in python3 python3.13 python3.12 python3.11 python3.10 python; do
  if command -v "$candidate" >/dev/null && "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
    python=$candidate
    break
  fi
done
if [ -z "$python" ]; then
  echo "error: no Python of 3.10 or later is on the path: install one, then run this again" >&2
  exit 2
fi

wanted=$(cat requirements.txt tests/requirements.txt | cksum)
if [ -x .venv/bin/python ] && [ "$(cat .venv/installed 2>/dev/null)" = "$wanted" ]; then
  exit 0
fi
echo "installing into .venv (the first time, some minutes) ..." >&2
if [ ! -x .venv/bin/python ] && ! "$python" -m venv .venv; then
  rm -rf .venv
  echo "error: $python cannot make a virtual environment: install its venv module (on Debian: apt install python3-venv), then run this again" >&2
  exit 2
fi
.venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt -r tests/requirements.txt
echo "$wanted" > .venv/installed
