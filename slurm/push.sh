#!/usr/bin/env bash
# Publish a run or a merged model on the Hub, from a node with a network.
#   sbatch [...] slurm/push.sh RUN|DIR --repo-id USER/NAME [...]
#SBATCH --job-name=push
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
    "${WRAPPER[@]}" python3 -m scalepeft push "$@"
