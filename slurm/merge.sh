#!/usr/bin/env bash
# Fold an adapter into its base; no GPU is needed.
#   sbatch [...] slurm/merge.sh RUN --output DIR [...]
#SBATCH --job-name=merge
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue

SRUN_OPTIONS=() WRAPPER=()
environment=${SCALEPEFT_ENVIRONMENT:-slurm/environment.sh}
# shellcheck source=environment.sh
if [[ -f $environment || -n ${SCALEPEFT_ENVIRONMENT:-} ]]; then source "$environment" || exit; fi

exec srun --ntasks=1 --mpi=none --cpu-bind=none --input=none "${SRUN_OPTIONS[@]}" \
    "${WRAPPER[@]}" python3 -m scalepeft merge "$@"
