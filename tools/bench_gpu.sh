#!/usr/bin/env bash
# Speed and memory of whole steps on one GPU, in under ten minutes. Usage:
#   bash tools/bench_gpu.sh [--out DIR] [--only ROWS] [--list] [--wheels DIR] [--tests] [--dry_run] [--minutes N]
#     --out DIR     where table.md, results.json, operations.txt and the traces go (default: $OUT, else out/bench_gpu)
#     --only ROWS   rows by name or pattern, with commas between; `first`: what fits into the first eight minutes
#     --list        the rows, ranked, and what each decides; measures nothing and needs no device
#     --wheels DIR  without a network, beside an installed PyTorch: install what this project needs and the machine lacks
#                   from these wheels into a temporary folder. Collect them where the project is installed, for the
#                   Python of the GPU machine:
#                     pip wheel --no-deps 'deepspeed>=0.19,<0.20' -w DIR
#                     pip download --no-deps --only-binary=:all: --python-version 3.12 -d DIR \
#                         $(python -m d2v_scale.benchmarks.device_packages --pins)
#     --tests       first run the tests marked gpu, in four of the ten minutes
#     --dry_run     tiny models on whatever device there is: a rehearsal
# Uses .venv where there is one, else python3. What to expect, and what each number decides: docs/first_gpu_hour.md.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

out="${OUT:-$root/out/bench_gpu}" wheels="" tests=0 minutes=9 list=0 only=() device=() arguments=()
while [ $# -gt 0 ]; do
    case "$1" in
        --out) out="$2"; shift ;;
        --wheels) wheels="$2"; shift ;;
        --only) only=(--only "$2"); shift ;;
        --list) list=1 ;;
        --tests) tests=1 minutes=5 ;;
        --minutes) minutes="$2"; shift ;;
        --dry_run) device=(--any_device) arguments+=("$1") ;;
        *) arguments+=("$1") ;;
    esac
    shift
done

python=python3
[ -x "$root/.venv/bin/python" ] && python="$root/.venv/bin/python"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
# What costs nothing first: the names of the rows, then the PyTorch that is here.
rows="$("$python" -m d2v_scale.benchmarks.device_rows "${only[@]}")" || exit 2
if [ "$list" -eq 1 ]; then
    echo "$rows"
    exit 0
fi
"$python" -m d2v_scale.benchmarks.device_torch "${device[@]}" || exit 2
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
"$python" "$root/tools/bench.py" device --out "$out" --minutes "$minutes" "${only[@]}" "${arguments[@]}" || code=$?
exit "$code"
