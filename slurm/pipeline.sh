#!/usr/bin/env bash
# Train, evaluate, merge and push by a chain of jobs, each begun when the one before it has succeeded; run on a login node.
#   REPO_ID=alice/film-reviews slurm/pipeline.sh RECIPE [section.key=value ...] [--launch LAYOUT] [--dry-run] [... as `scalepeft submit`]
# Without REPO_ID nothing is pushed. When a job fails, those after it are cancelled.
push=()
if [[ -n ${REPO_ID:-} ]]; then push=(--then "push --repo-id $REPO_ID"); fi
exec scalepeft submit --then evaluate --then merge "${push[@]}" "$@"
