#!/usr/bin/env bash
# The evidence table: small models on real sets. See tools/evidence.py --help.
# Usage: bash tools/evidence.sh [--data DIR] [--quick] [...]
set -euo pipefail
repository="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
bash "$repository/tools/install.sh" >&2
export DS_ACCELERATOR="${DS_ACCELERATOR:-cpu}" OMP_NUM_THREADS=1
exec "$repository/.venv/bin/python" "$repository/tools/evidence.py" "$@"
