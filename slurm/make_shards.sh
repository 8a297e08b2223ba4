#!/bin/bash
# Make shards of raw files, each task of the array a part of them; the last one writes the index, tasks that are requeued
# or submitted again go on where they stopped:
#   sbatch slurm/make_shards.sh SRC OUT [options of d2v shards]      (texts: first `d2v tokenizer SRC OUT/tokenizer.model`)
#SBATCH --job-name=d2v-shards
#SBATCH --array=0-7
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=8
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%A_%a.out

# This file runs as a copy in Slurm's spool: the repository is where the original lies, or where it was submitted.
repository=$(scontrol show job "$SLURM_JOB_ID" | sed -n '/^ *Command=/{s///;s|/slurm/[^/ ]*\.sh.*||p;q}')
[[ -f $repository/slurm/lib.sh ]] || repository=$SLURM_SUBMIT_DIR
source "$repository/slurm/lib.sh" || { echo "error: no slurm/lib.sh where this file lay, nor in $SLURM_SUBMIT_DIR"; exit 2; }

run_once make_shards.py "$@" --part "$((SLURM_ARRAY_TASK_ID - SLURM_ARRAY_TASK_MIN))/$SLURM_ARRAY_TASK_COUNT"
