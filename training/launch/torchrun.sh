#!/usr/bin/env bash
# Start mmkit on all GPUs of one machine or of several, by torchrun: one process, or DDP.
#
#   usage      training/launch/torchrun.sh train RECIPE [key=value ...]
#   several    run it on every machine: NNODES=4 NODE_RANK=0..3 MASTER_ADDR=host0 training/launch/torchrun.sh train RECIPE
#   hardware   NGPU GPUs a machine (default 8)
#   time       that of the recipe, see its head; the same command goes on where it was stopped
set -euo pipefail

NGPU=${NGPU:-8}
NNODES=${NNODES:-1}
PYTHON=${PYTHON:-python}

if [ "$NNODES" -gt 1 ]; then
  exec torchrun --nnodes "$NNODES" --node_rank "${NODE_RANK:?set NODE_RANK, 0 to NNODES - 1}" \
    --master_addr "${MASTER_ADDR:?set MASTER_ADDR, the name of machine 0}" --master_port "${MASTER_PORT:-29500}" \
    --nproc_per_node "$NGPU" -m mmkit "$@"
fi
if [ "$NGPU" -gt 1 ]; then
  # --standalone finds a free port, so that two runs can share a machine.
  exec torchrun --standalone --nproc_per_node "$NGPU" -m mmkit "$@"
fi
exec "$PYTHON" -m mmkit "$@"
