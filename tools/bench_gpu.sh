#!/usr/bin/env bash
# Speed and memory of whole steps on one GPU, in under ten minutes. Usage:
#   bash tools/bench_gpu.sh [--out DIR] [--wheels DIR] [--tests] [--dry_run] [--minutes N]
#     --out DIR     where table.md, results.json, operations.txt and the traces go (default: $OUT, else out/bench_gpu)
#     --wheels DIR  without a network, beside an installed PyTorch: install what this project needs and the machine lacks
#                   from these wheels into a temporary folder. Collect them where the project is installed, for the
#                   Python of the GPU machine:
#                     pip wheel --no-deps 'deepspeed>=0.19,<0.20' -w DIR
#                     pip download --no-deps --only-binary=:all: --python-version 3.12 -d DIR \
#                         $(python -m d2v_scale.benchmarks.device_packages --pins)
#     --tests       first run the tests marked gpu, in four of the ten minutes
#     --dry_run     tiny models on whatever device there is: a rehearsal
# Uses .venv where there is one, else python3.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

out="${OUT:-$root/out/bench_gpu}" wheels="" tests=0 minutes=9 arguments=()
while [ $# -gt 0 ]; do
    case "$1" in
        --out) out="$2"; shift ;;
        --wheels) wheels="$2"; shift ;;
        --tests) tests=1 minutes=5 ;;
        *) arguments+=("$1") ;;
    esac
    shift
done

python=python3
[ -x "$root/.venv/bin/python" ] && python="$root/.venv/bin/python"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
temporary="$(mktemp -d)"
trap 'rm -rf "$temporary"' EXIT
if [ -n "$wheels" ]; then
    site="$temporary/site"
    "$python" -m pip install --quiet --no-index --no-deps --no-compile --target "$site" "$wheels"/*.whl
    export PYTHONPATH="$PYTHONPATH:$site"
fi
"$python" -m d2v_scale.benchmarks.device_packages || {
    echo "Install the project (pip install -e .), or give --wheels DIR." >&2
    exit 2
}

code=0
if [ "$tests" -eq 1 ]; then
    (cd "$root" && grep -rlZ 'mark\.gpu' tests | xargs -0 timeout 240 "$python" -m pytest -m gpu) || code=$?
fi
mkdir -p "$out"
export TORCHINDUCTOR_CACHE_DIR="${TORCHINDUCTOR_CACHE_DIR:-$temporary/inductor}"
"$python" "$root/tools/bench.py" device --out "$out" --minutes "$minutes" "${arguments[@]}" || code=$?
exit "$code"
