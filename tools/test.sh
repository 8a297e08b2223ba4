#!/usr/bin/env bash
# Lint, types and tests in .venv. Usage: bash tools/test.sh [--full] [--with-slurm] [pytest arguments]
#   --full        also the tests marked slow (up to an hour on two cores)
#   --with-slurm  install Slurm first, where this user may, and run its tests
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

full=0 with_slurm=0 arguments=()
for argument in "$@"; do
    case "$argument" in
        --full) full=1 ;;
        --with-slurm) with_slurm=1 ;;
        *) arguments+=("$argument") ;;
    esac
done

bash tools/install.sh demo,docs,test
export PATH="$PWD/.venv/bin:$PATH" OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
python -c 'import sys, torch; sys.exit(torch.cuda.is_available())' && export DS_ACCELERATOR=cpu
if [ "$with_slurm" -eq 1 ]; then
    bash tests/slurm/install.sh || echo "Slurm could not be installed here: its tests will be skipped." >&2
fi

ruff check .
ruff format --check .
mypy
marks=()
[ "$full" -eq 1 ] || marks=(-m "not slow")
# Why a test was skipped, and which took longest. A process for each core; tests that share fixtures stay together.
python -m pytest -n logical --maxprocesses 4 --dist loadscope --no-loadscope-reorder -rs --durations=15 "${marks[@]}" "${arguments[@]}"
