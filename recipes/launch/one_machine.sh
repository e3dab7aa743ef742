#!/usr/bin/env bash
# All GPUs of this machine train one model; started again, the run goes on from its last checkpoint.
#
#   recipes/launch/one_machine.sh RECIPE OUT [--section.key value ...]
#   PROCESSES=2 recipes/launch/one_machine.sh ...      fewer of them, or processes on a CPU
set -euo pipefail

recipe=$1 out=$2
shift 2
processes=${PROCESSES:-$(nvidia-smi --list-gpus | wc -l)}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-8}

exec torchrun --standalone --nproc-per-node "$processes" --no-python \
    lapilli train "$recipe" --out "$out" "$@"
