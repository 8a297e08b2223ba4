#!/bin/bash
# Fine-tune a pretrained encoder on labelled shards, as a run of its own (recipes: d2v_scale/recipes/finetune_*.yaml):
#   sbatch slurm/finetune.sh runs/d2v-base-7 --recipe finetune_speech_base_100h --data '/shards/clean-100-*.tar' \
#          --evaluation.test '/shards/dev-other-*.tar'
#SBATCH --job-name=d2v-finetune
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=12:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out

# This file runs as a copy in Slurm's spool: the repository is where the original lies, or where it was submitted.
repository=$(scontrol show job "$SLURM_JOB_ID" | sed -n '/^ *Command=/{s///;s|/slurm/[^/ ]*\.sh.*||p;q}')
[[ -f $repository/slurm/lib.sh ]] || repository=$SLURM_SUBMIT_DIR
source "$repository/slurm/lib.sh" || { echo "error: no slurm/lib.sh where this file lay, nor in $SLURM_SUBMIT_DIR"; exit 2; }

checkpoint=${1:?the first argument is a run directory, a checkpoint or an exported folder to start from}
train finetune_vision_v2_base zero1.json --init_from "$checkpoint" "${@:2}"
