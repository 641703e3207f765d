#!/usr/bin/env bash
# What the launch scripts share: environment, check of the recipe, signals, exit codes, going on after a stop. Sourced, not run.
#
#   usage      source common.sh; prepare PROCESSES "$@"; run_ranks LAUNCHER WORDS... (each process runs rank.sh and the words)
#   override   by environment, with these defaults:
#              NGPU=8            processes on a machine
#              PYTHON=python     the interpreter with mmkit in it
#              VALIDATE=1        0: do not check the recipe before GPUs are taken
#              RESTARTS=0        times to go on by itself when the ranks stopped with 75 (not when this script was told to stop)
#              LOGS=             a folder: each rank writes rank-N.log there, rank 0 to the terminal too
#              OMP_NUM_THREADS   cores / NGPU, or every process would start threads for all cores
#              NCCL_DEBUG=WARN   errors of the network with their reason
#              PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True     less memory lost in pieces too small to use
#              SHARED=           where exit codes meet; a folder that all machines see (needed by the deepspeed launcher only)
#   hardware   any
#   time       none of its own but for the check, some seconds
#
# Exit codes are mmkit's: 0 done, 2 wrong input, 75 stopped after a checkpoint, 1 anything else. torchrun ends with 1 whatever the
# ranks said, pdsh and srun with the largest number; so rank.sh writes its process's code into a folder and it is read from there.
set -euo pipefail

LAUNCH=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export LAUNCH PYTHON=${PYTHON:-python} LOGS=${LOGS:-}

# refuse TEXT: wrong input, as mmkit says it.
refuse() {
  echo "$(basename "$0"): $1" >&2
  exit 2
}

# prepare PROCESSES WORDS...: check the words, set the environment of PROCESSES on this machine, make the folder of exit codes.
prepare() {
  local processes=$1
  shift
  [[ $processes =~ ^[1-9][0-9]*$ ]] || refuse "$processes processes: give a number of 1 or more"
  case "${1:-}" in
    train | probe | eval) [ $# -ge 2 ] || refuse "no recipe: write $(basename "$0") $1 RECIPE [key=value ...]" ;;
    *) refuse "usage: $(basename "$0") train|probe|eval RECIPE [key=value ...], see its head" ;;
  esac
  local cores
  cores=$(nproc)
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > processes ? cores / processes : 1))}
  export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
  export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
  # A typing error is found here, not after the GPUs are taken.
  if [ "${VALIDATE:-1}" = 1 ]; then
    "$PYTHON" -m mmkit validate "${@:2}" >&2
  fi
  if [ -n "$LOGS" ]; then
    mkdir -p "$LOGS"
  fi
  if [ -n "${SHARED:-}" ]; then
    mkdir -p "$SHARED"
  fi
  MMKIT_CODES=$(mktemp -d "${SHARED:-${TMPDIR:-/tmp}}/mmkit-launch.XXXXXXXX")
  export MMKIT_CODES
  trap 'rm -rf "$MMKIT_CODES"' EXIT
}

# run_ranks LAUNCHER...: run it to its end, again while it stops with 75 and RESTARTS allow it; leaves with mmkit's code.
run_ranks() {
  local restarts=${RESTARTS:-0} code
  told=""
  trap 'tell_ranks TERM' TERM USR1 HUP
  trap 'tell_ranks INT' INT
  while true; do
    rm -f "$MMKIT_CODES"/*.code "$MMKIT_CODES"/*.pid
    wait_for "$@"
    code=$(meaning_of "$waited")
    if [ "$code" -ne 75 ] || [ -n "$told" ] || [ "$restarts" -le 0 ]; then
      exit "$code"
    fi
    restarts=$((restarts - 1))
    echo "$(basename "$0"): stopped after a checkpoint, going on ($restarts restarts left)" >&2
  done
}

# wait_for COMMAND...: run it apart from the terminal's signals, which come to us and go on to the ranks; its code in $waited.
wait_for() {
  setsid "$@" &
  local child=$!
  again=1
  while [ "$again" = 1 ]; do
    again=0
    # Interrupted by a signal it returns at once, and bash remembers the code of a child that has ended in between.
    wait "$child" && waited=0 || waited=$?
  done
}

# tell_ranks SIGNAL: the ranks on this machine stop after a checkpoint; not the launcher, which would give them 30 seconds.
tell_ranks() {
  again=1
  local signal=TERM file
  # Whoever presses Ctrl-C twice does not want to wait.
  if [ "$1" = INT ] && [ "$told" = INT ]; then
    signal=KILL
  fi
  told=$1
  # Of this machine only: a number of another's would be some other process here.
  for file in "$MMKIT_CODES"/*."$HOSTNAME.pid"; do
    if [ -f "$file" ]; then
      kill -s "$signal" "$(cat "$file")" 2>/dev/null || true
    fi
  done
}

# meaning_of CODE: mmkit's code of the run, from the launcher's code and those that the ranks left.
meaning_of() {
  local file code stopped="" wrong=""
  for file in "$MMKIT_CODES"/*.code; do
    [ -f "$file" ] || continue
    code=$(cat "$file")
    case "$code" in
      0) ;;
      75) stopped=1 ;;
      # Above 128: killed by a signal, as launchers do with the ranks that are left when the first one ends.
      1 | 2) wrong=$((code > ${wrong:-0} ? code : wrong)) ;;
      *) [ "$code" -gt 128 ] || wrong=${wrong:-1} ;;
    esac
  done
  if [ -n "$wrong" ]; then
    echo "$wrong"
  elif [ -n "$stopped" ]; then
    echo 75
  elif [ "$1" -gt 2 ] && [ "$1" -ne 75 ]; then
    echo 1
  else
    echo "$1"
  fi
}
