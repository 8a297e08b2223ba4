#!/usr/bin/env bash
# Installs, writes demo shards, pretrains, exports, and says what came out. Idempotent.
# Usage: bash tools/quickstart.sh [--modality vision|speech|text|video|all]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

modality=vision
while [ $# -gt 0 ]; do
    case "$1" in
        --modality) modality="${2:?--modality needs vision, speech, text, video or all}"; shift 2 ;;
        *) echo "Unknown argument: $1. Usage: bash tools/quickstart.sh [--modality vision|speech|text|video|all]" >&2; exit 2 ;;
    esac
done
case "$modality" in
    vision|speech|text|video) modalities="$modality" ;;
    all) modalities="vision speech text video" ;;
    *) echo "--modality is '$modality'; it must be vision, speech, text, video or all." >&2; exit 2 ;;
esac

# The speech demo's voices come from an optional wheel; the other demos do without it.
bash tools/install.sh demo || bash tools/install.sh
export PATH="$PWD/.venv/bin:$PATH"

gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
if [ "$gpus" -eq 0 ]; then
    export DS_ACCELERATOR=cpu OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
    processes=2
else
    processes="$gpus"
fi

for modality in $modalities; do
    # A free port, so that another run on this machine is no hindrance.
    port=$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
    run_dir="runs/quickstart-$modality"
    python tools/make_shards.py demo --modality "$modality" demo_data
    deepspeed --num_gpus "$processes" --master_port "$port" d2v_scale/train.py --recipe "demo_$modality" --run_dir "$run_dir"
    python tools/draw.py "$run_dir"
    python tools/export.py "$run_dir" "out/quickstart-$modality" --to hf
    python tools/summarize.py "$run_dir" --exported "out/quickstart-$modality"
done
