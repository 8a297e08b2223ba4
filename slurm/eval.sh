#!/bin/bash
# Measure what an encoder is worth (k-NN, linear, attentive or CTC probe, or a fine-tuned model's own head) on one GPU:
#   sbatch slurm/eval.sh runs/d2v-base-7 --task linear --data '/shards/train-*.tar' --test '/shards/val-*.tar'
# A running job deletes old checkpoints: measure an export of its teacher. The result goes to the run's record, too:
#   python tools/export.py runs/d2v-base-7 exports/now --to safetensors && sbatch slurm/eval.sh exports/now --task linear
#SBATCH --job-name=d2v-eval
#SBATCH --nodes=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --output=%x-%j.out

# This file runs as a copy in Slurm's spool: the repository is where the original lies, or where it was submitted.
repository=$(scontrol show job "$SLURM_JOB_ID" | sed -n '/^ *Command=/{s///;s|/slurm/[^/ ]*\.sh.*||p;q}')
[[ -f $repository/slurm/lib.sh ]] || repository=$SLURM_SUBMIT_DIR
source "$repository/slurm/lib.sh" || { echo "error: no slurm/lib.sh where this file lay, nor in $SLURM_SUBMIT_DIR"; exit 2; }

run_once probe.py "$@"
