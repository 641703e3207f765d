#!/usr/bin/env bash
# One process of a run, as a launcher starts it: mmkit with these words, its exit code left where common.sh reads it.
#
#   usage      started by torchrun, deepspeed or srun with RANK (or SLURM_PROCID) in the environment; not by hand
#   hardware   one GPU
#   time       that of the recipe
set -euo pipefail

# Under Slurm the ranks are those of the tasks.
export RANK=${RANK:-${SLURM_PROCID:-0}}
export LOCAL_RANK=${LOCAL_RANK:-${SLURM_LOCALID:-0}}
echo $$ >"$MMKIT_CODES/$RANK.$HOSTNAME.pid"

if [ -n "${LOGS:-}" ]; then
  log=$LOGS/rank-$RANK.log
  if [ "$RANK" = 0 ]; then
    exec > >(tee -a "$log") 2>&1
  else
    exec >>"$log" 2>&1
  fi
fi
# Alone, mmkit must not look for others.
if [ "${WORLD_SIZE:-1}" = 1 ] && [ -z "${MASTER_ADDR:-}" ]; then
  unset RANK LOCAL_RANK
fi

"${PYTHON:-python}" -m mmkit "$@" &
child=$!
again=1
# TERM for all of them: mmkit stops at the end of the step and saves, whichever it is.
trap 'again=1; kill -TERM "$child" 2>/dev/null || true' TERM USR1 INT HUP
while [ "$again" = 1 ]; do
  again=0
  wait "$child" && code=0 || code=$?
done
number=${RANK:-0}
echo "$code" >"$MMKIT_CODES/.$number.code" && mv "$MMKIT_CODES/.$number.code" "$MMKIT_CODES/$number.code"
# A launcher kills the others when the first one ends; they are a moment from their own end, and some of them may still be saving.
# torchrun says how many report into this folder (its machine's); the others' folder is that of all machines.
if [ "$code" -eq 75 ]; then
  for _ in $(seq 300); do
    finished=("$MMKIT_CODES"/*.code)
    if [ "${#finished[@]}" -ge "${LOCAL_WORLD_SIZE:-${WORLD_SIZE:-1}}" ]; then
      break
    fi
    sleep 0.1
  done
fi
exit "$code"
