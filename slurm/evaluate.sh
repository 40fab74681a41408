#!/usr/bin/env bash
# Measure a complete run.
#   sbatch [...] slurm/evaluate.sh RUN [section.key=value ...] [--output FILE]
#SBATCH --job-name=evaluate
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
    "${WRAPPER[@]}" python3 -m scalepeft evaluate "$@"
