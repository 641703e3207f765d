#!/usr/bin/env bash
# Start mmkit by the deepspeed launcher: on the GPUs of this machine, or on all machines of a hostfile.
#
#   usage      training/launch/deepspeed_hostfile.sh train RECIPE [key=value ...]
#   several    HOSTFILE=hostfile training/launch/deepspeed_hostfile.sh train RECIPE
#              hostfile: a line a machine, "host0 slots=8"; passwordless ssh, pdsh, the same paths on all of them
#   override   NGPU, RESTARTS, LOGS, VALIDATE, ...: see common.sh; MASTER_PORT=29500 with a hostfile; PASS="NAME NAME ..." names
#              further variables that the other machines shall have (DATA, RUNS and those of common.sh go anyway)
#   hardware   NGPU GPUs (default 8), or those of the hostfile
#   time       that of the recipe, see its head; the same command goes on where it was stopped
set -euo pipefail

# shellcheck source=training/launch/common.sh disable=SC1091
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
NGPU=${NGPU:-8}
HOSTFILE=${HOSTFILE:-}
if [ -n "$HOSTFILE" ]; then
  [ -f "$HOSTFILE" ] || refuse "no hostfile $HOSTFILE: write a line a machine, e.g. host0 slots=8"
  # Runs lie where all machines see them, so exit codes can meet there.
  export SHARED=${SHARED:-$(realpath -m "${RUNS:-runs}")/.launch}
  where=(--hostfile "$HOSTFILE" --master_port "${MASTER_PORT:-29500}")
elif [ -n "${DS_ACCELERATOR:-}" ] && [ "$DS_ACCELERATOR" = cpu ]; then
  # On CPUs the launcher counts sockets unless it is told.
  where=(--num_accelerators "$NGPU")
else
  where=(--num_gpus "$NGPU")
fi
prepare "$NGPU" "$@"

if [ -n "$HOSTFILE" ]; then
  # The launcher hands NCCL's and Python's variables to the other machines by itself, and what this file names.
  read -r -a passed <<<"DATA RUNS LOGS PYTHON MMKIT_CODES OMP_NUM_THREADS PYTORCH_CUDA_ALLOC_CONF HF_HOME ${PASS:-}"
  for name in "${passed[@]}"; do
    if [ -n "${!name:-}" ]; then
      echo "$name=${!name}"
    fi
  done >"$MMKIT_CODES/environment"
  export DS_ENV_FILE=$MMKIT_CODES/environment
fi
# Ranks come from the environment; the launcher's extra --local_rank argument is switched off.
run_ranks deepspeed "${where[@]}" --no_python --no_local_rank bash "$LAUNCH/rank.sh" "$@"
