#!/usr/bin/env bash
# Four nodes with eight GPUs each under SLURM, one process a GPU: sbatch launch/slurm.sh
# Processes find each other by SLURM's variables. VENV has the package with its extra cuda12 or cuda13; VENV, CORPUS and RUNS are on a
# file system that all nodes share. Prepare the corpus once (transformer prepare) before the first job. The job saves two minutes before its
# time ends and when it is preempted; the same command goes on with the run.
#SBATCH --job-name=transformer
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

set -euo pipefail
: "${VENV:=$HOME/venv}" "${CORPUS:=$HOME/corpus.jsonl}" "${RUNS:=$HOME/runs}"
source "$VENV/bin/activate"

# A task must see all GPUs of its node: JAX takes the one with the task's number there (so no --gpus-per-task).
srun --kill-on-bad-exit=1 transformer train llama_1b \
    --data.source "$CORPUS" \
    --data.data-dir "$RUNS/datasets" \
    --workdir "$RUNS/llama_1b"
