#!/usr/bin/env bash
# Train a recipe on any number of nodes; stopped by a time limit, pre-emption or a lost node, it is queued again and goes on.
#   sbatch [--nodes N] [--gpus-per-node G] [--time T] ... slurm/train.sh [RECIPE] [section.key=value ...] [--launch LAYOUT] [--fresh]
# It ends COMPLETED only when run.json says complete. docs/cluster.md says the rest; slurm/environment.sh is for your cluster.
#SBATCH --job-name=scalepeft
#SBATCH --ntasks-per-node=1
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@120
set -o pipefail

warned='' ended=''
trap 'warned=yes' USR1 # by --signal: the time is nearly up
trap 'ended=yes' TERM  # Slurm ends the job: cancelled, queued again, or out of time

SRUN_OPTIONS=() WRAPPER=()
environment=${SCALEPEFT_ENVIRONMENT:-slurm/environment.sh}
# shellcheck source=environment.sh
if [[ -f $environment || -n ${SCALEPEFT_ENVIRONMENT:-} ]]; then source "$environment" || exit; fi

cluster() { "${WRAPPER[@]}" python3 -m scalepeft.cluster "$@"; }
on_nodes() { srun --nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1 --mpi=none --cpu-bind=none --input=none "$@"; }

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
mapfile -d '' -t plan < <(cluster plan --head "$(scontrol --oneliner show node "$head")" "$@")
wait $! || exit
run=${plan[0]} before=${plan[1]} nodes=${plan[2]} arguments=("${plan[@]:3}")

# Each process of the training has handlers of its own. The launcher would give them 30 seconds after a signal, and what is
# still importing would die of it: both are told again. A node that ends otherwise than well ends the others, but lets them say
# why they ended; of a request to stop (130) it is the first node that tells, whose processes may still be saving.
export PET_SIGNALS_TO_HANDLE=SIGINT
# shellcheck disable=SC2016  # expanded on each node
on_each='trap "" TERM USR1
"$@" --machine-rank "$SLURM_NODEID"
status=$?
((status != 130 || SLURM_NODEID == 0)) || exit 0
((status == 0 || SLURM_STEP_NUM_NODES == 1)) || sleep 10
exit $status'
on_nodes --kill-on-bad-exit=1 "${SRUN_OPTIONS[@]}" bash -c "$on_each" node \
    "${WRAPPER[@]}" python3 -m scalepeft "${arguments[@]}" &
step=$!

while kill -0 $step 2>/dev/null; do
    if [[ $warned && ! $ended ]]; then
        if [[ $warned == yes ]]; then
            echo "the time is nearly up: the training is told to save" >&2
            end=$(date -d "$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%e)" +%s) || end=$((2 ** 62))
            warned=told
        fi
        (($(date +%s) < end - 10)) || break
        scancel --signal=TERM "$SLURM_JOB_ID"
        sleep 5 &
        wait -n $step $!
    else
        wait $step # returns at a signal, too
    fi
done
[[ ! $ended ]] || exit 143

status=0 lost=''
kill -0 $step 2>/dev/null || wait $step || status=$?
if ((status && nodes > 1)); then on_nodes --overlap --immediate=30 timeout 30 true || lost=yes; fi
cluster verdict "$run" --before "$before" --status $status --job "$(scontrol --oneliner show job "$SLURM_JOB_ID")" \
    ${warned:+--warned} ${lost:+--lost}
status=$?
((status == 75)) || exit $status
[[ ! $ended ]] || exit 143
scontrol requeue "$SLURM_JOB_ID" || exit 1
sleep infinity & # Slurm ends this script, and takes a job whose script has ended by itself for finished
wait
