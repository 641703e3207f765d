#!/usr/bin/env bash
# Start mmkit by the deepspeed launcher: on the GPUs of this machine, or on all machines of a hostfile.
#
#   usage      training/launch/deepspeed_hostfile.sh train RECIPE [key=value ...]
#   several    HOSTFILE=hostfile training/launch/deepspeed_hostfile.sh train RECIPE
#              hostfile: a line a machine, "host0 slots=8"; passwordless ssh, the same paths and environment on all of them
#   hardware   NGPU GPUs (default 8), or those of the hostfile
#   time       that of the recipe, see its head; the same command goes on where it was stopped
set -euo pipefail

NGPU=${NGPU:-8}
HOSTFILE=${HOSTFILE:-}

if [ -n "$HOSTFILE" ]; then
  if [ ! -f "$HOSTFILE" ]; then
    echo "deepspeed_hostfile.sh: no hostfile $HOSTFILE: write a line a machine, e.g. host0 slots=8" >&2
    exit 2
  fi
  where=(--hostfile "$HOSTFILE" --master_port "${MASTER_PORT:-29500}")
else
  where=(--num_gpus "$NGPU")
fi
# Ranks come from the environment; the launcher's extra --local_rank argument is switched off.
exec deepspeed "${where[@]}" --module mmkit "$@"
