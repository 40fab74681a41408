# What your cluster needs, in one place: every script of this folder reads this file at its start, on the first node of its job.
# Another file is named by SCALEPEFT_ENVIRONMENT=FILE. Lines of bash, of which the last must succeed; docs/cluster.md has examples.
# shellcheck shell=bash disable=SC1091,SC2034  # .venv is not in the repository; the scripts use what is set here

# Modules, and the Python environment that holds scalepeft: `python3` is the one that runs.
# module load cuda
if [[ -f .venv/bin/activate ]]; then source .venv/bin/activate; fi

# Caches that all nodes see, filled by `scalepeft fetch RECIPE` where there is a network.
# export SCALEPEFT_CACHE=/shared/$USER/scalepeft HF_HOME=/shared/$USER/huggingface

# The network between the nodes, where it is not the one that host names lead to.
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0

# A container: words before `python3`, or options of srun.
# WRAPPER=(apptainer exec --nv --bind /shared image.sif)
# SRUN_OPTIONS=(--container-image=image.sqsh --container-mounts=/shared)

# How often a job may be queued again, whether for its time limit, for a job that goes before it, or for a lost node.
# export SCALEPEFT_MAX_RESTARTS=20
