#!/bin/bash
# A sweep as a job array, two at a time: sbatch slurm/sweep.sh --data '/shards/in1k-{0000..1281}.tar' [train.py arguments]
#SBATCH --job-name=d2v-sweep
#SBATCH --array=0-3%2
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=12:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%A_%a.out

# This file runs as a copy in Slurm's spool: the repository is where the original lies, or where it was submitted.
repository=$(scontrol show job "$SLURM_JOB_ID" | sed -n '/^ *Command=/{s///;s|/slurm/[^/ ]*\.sh.*||p;q}')
[[ -f $repository/slurm/lib.sh ]] || repository=$SLURM_SUBMIT_DIR
source "$repository/slurm/lib.sh" || { echo "error: no slurm/lib.sh where this file lay, nor in $SLURM_SUBMIT_DIR"; exit 2; }

export D2V_SCALE_MEASURE=${D2V_SCALE_MEASURE:-0} # what is compared is computed alike
learning_rates=(2.5e-4 5e-4 1e-3 2e-3)
point=(--optim.lr "${learning_rates[SLURM_ARRAY_TASK_ID]:-}")
[[ -z ${D2V_SCALE_SWEEP:-} ]] || read_point # tools/sweep.py --slurm has made a list
train d2v2_vision_base zero1.json "${point[@]}" "$@"
