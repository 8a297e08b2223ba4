#!/usr/bin/env bash
# Installs the Slurm that the tests in this folder run on (Debian and Ubuntu). Starts no service.
# Called by `tools/test.sh --with-slurm`; never run unasked.
set -euo pipefail

if command -v sbatch slurmctld slurmd munged > /dev/null; then
    echo "Slurm is installed: $(command -v sbatch slurmctld slurmd munged | tr "\n" " ")"
    exit 0
fi
command -v apt-get > /dev/null || { echo "no apt-get here: install slurm-wlm and munge by hand" >&2; exit 1; }
as_root=()
if [[ $(id -u) -ne 0 ]]; then
    command -v sudo > /dev/null || { echo "run as root: apt-get install slurm-wlm munge" >&2; exit 1; }
    as_root=(sudo)
fi
install=(env DEBIAN_FRONTEND=noninteractive RUNLEVEL=1 apt-get install -y --no-install-recommends slurm-wlm munge)
"${as_root[@]}" "${install[@]}" || { "${as_root[@]}" apt-get update && "${as_root[@]}" "${install[@]}"; }
echo "Slurm is installed: $(command -v sbatch slurmctld slurmd munged | tr "\n" " ")"
