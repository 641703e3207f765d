#!/usr/bin/env bash
# Start mmkit on all GPUs of one machine or of several, by torchrun: one process, or DDP (or DeepSpeed, where the recipe says so).
#
#   usage      training/launch/torchrun.sh train RECIPE [key=value ...]
#   several    run it on every machine: NNODES=4 NODE_RANK=0..3 MASTER_ADDR=host0 training/launch/torchrun.sh train RECIPE
#   override   NGPU, RESTARTS, LOGS, VALIDATE, ...: see common.sh; MASTER_PORT=29500 for several machines
#   hardware   NGPU GPUs a machine (default 8)
#   time       that of the recipe, see its head; the same command goes on where it was stopped
set -euo pipefail

# shellcheck source=training/launch/common.sh disable=SC1091
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
NGPU=${NGPU:-8}
NNODES=${NNODES:-1}
if [ "$NNODES" -gt 1 ]; then
  : "${NODE_RANK:?set NODE_RANK, 0 to NNODES - 1}" "${MASTER_ADDR:?set MASTER_ADDR, the name of machine 0}"
fi
prepare "$NGPU" "$@"

ranks=(--nproc_per_node "$NGPU" --no-python bash "$LAUNCH/rank.sh")
if [ "$NNODES" -gt 1 ]; then
  where=(--nnodes "$NNODES" --node_rank "$NODE_RANK" --master_addr "$MASTER_ADDR" --master_port "${MASTER_PORT:-29500}")
  run_ranks torchrun "${where[@]}" "${ranks[@]}" "$@"
elif [ "$NGPU" -gt 1 ]; then
  # --standalone finds a free port, so that two runs can share a machine.
  run_ranks torchrun --standalone "${ranks[@]}" "$@"
else
  run_ranks bash "$LAUNCH/rank.sh" "$@"
fi
