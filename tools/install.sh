#!/usr/bin/env bash
# Makes .venv in the repository root and installs the project into it. Idempotent.
# Usage: bash tools/install.sh [extra,extra...]      e.g. demo,test
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

extras="${1:-}"
python="${PYTHON:-python3}"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "$python is $("$python" --version 2>&1); Python 3.11 or newer is needed. Set PYTHON to one." >&2
    exit 2
}
[ -x .venv/bin/python ] || { echo "Making .venv ..." && "$python" -m venv .venv; }

# One stamp for each set of extras: an unchanged project is not installed twice.
stamp=".venv/.installed-$(cat pyproject.toml setup.py | sha256sum | cut -c1-16)-${extras//,/-}"
if [ ! -f "$stamp" ]; then
    if [ -L .venv ]; then
        echo ".venv is a link to $(readlink -f .venv): installing would turn that environment to this tree." >&2
        echo "Remove the link, and the next call makes an environment of this tree's own." >&2
        exit 2
    fi
    echo "Installing d2v_scale${extras:+[$extras]} into .venv, some minutes the first time ..."
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -e ".${extras:+[$extras]}"
    touch "$stamp"
fi
