#!/usr/bin/env bash
# Compare the runs of a sweep, complete or not: the last job of `scalepeft sweep --slurm`. No GPU is needed.
#   sbatch [...] slurm/compare.sh RECIPE key=[a,b,c] ... [--output-dir DIR]
#SBATCH --job-name=compare
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
    "${WRAPPER[@]}" python3 -m scalepeft sweep "$@" --compare
