#!/bin/bash
# Pretrain a base model: sbatch slurm/pretrain_base.sh --data '/shards/in1k-{0000..1281}.tar' [train.py arguments]
#SBATCH --job-name=d2v-base
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=2-00:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out

# This file runs as a copy in Slurm's spool: the repository is where the original lies, or where it was submitted.
repository=$(scontrol show job "$SLURM_JOB_ID" | sed -n '/^ *Command=/{s///;s|/slurm/[^/ ]*\.sh.*||p;q}')
[[ -f $repository/slurm/lib.sh ]] || repository=$SLURM_SUBMIT_DIR
source "$repository/slurm/lib.sh" || { echo "error: no slurm/lib.sh where this file lay, nor in $SLURM_SUBMIT_DIR"; exit 2; }

train d2v2_vision_base zero1.json "$@"
