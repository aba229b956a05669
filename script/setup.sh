#!/usr/bin/env bash
# Makes .venv and installs requirements.txt and tests/requirements.txt into it, unless these very requirements are installed already.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

python=""
for candidate in python3 python3.13 python3.12 python3.11 python3.10 python; do
  if command -v "$candidate" >/dev/null && "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
    python=$candidate
    break
  fi
done
if [ -z "$python" ]; then fail "no Python 3.10 or later on the path: install one, then rerun"; fi

wanted=$(cat requirements.txt tests/requirements.txt | cksum)
if [ -x .venv/bin/python ] && [ "$(cat .venv/installed 2>/dev/null)" = "$wanted" ]; then exit 0; fi
echo "installing into .venv (takes minutes the first time) ..." >&2
if [ ! -x .venv/bin/python ] && ! "$python" -m venv .venv; then
  rm -rf .venv
  fail "$python cannot make a virtual environment: install its venv module (on Debian: apt install python3-venv), then rerun"
fi
.venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt -r tests/requirements.txt
echo "$wanted" > .venv/installed
