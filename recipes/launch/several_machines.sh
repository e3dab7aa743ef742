#!/usr/bin/env bash
# Start this on every machine, with the same arguments; OUT, data and checkpoints lie on a disk that
# all of them see. torchrun ends all processes when one fails, and starts them up to 3 times again
# from the last checkpoint.
#
#   MACHINES=8 FIRST=node0 recipes/launch/several_machines.sh RECIPE OUT [--section.key value ...]
#
# MACHINES   how many; FIRST  the name of one of them, where all meet; RUN  a name for this run
set -euo pipefail

recipe=$1 out=$2
shift 2
processes=${PROCESSES:-$(nvidia-smi --list-gpus | wc -l)}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-8}

exec torchrun --nnodes "$MACHINES" --nproc-per-node "$processes" --max-restarts 3 \
    --rdzv-backend c10d --rdzv-endpoint "$FIRST:${PORT:-29500}" --rdzv-id "${RUN:-lapilli}" --no-python \
    lapilli train "$recipe" --out "$out" "$@"
