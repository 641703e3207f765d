#!/usr/bin/env bash
# The whole pipeline on the built-in demo world, in plain shell: training/pipeline.sh with the demo's recipes.
#
#   usage      eval/pipeline_cpu.sh [key=value ...]      (key=value goes to every training command, e.g. train.steps=5)
#              WORLD="--train 400 --heldout 40" eval/pipeline_cpu.sh    for a smaller world
#   needs      bash 4.4; no hub, no download, no GPU
#   hardware   2 CPU cores, 4 GiB of memory; a GPU is used when there is one
#   time       some minutes more than `mmkit demo` (LOG.md has its figure), because every command starts Python anew.
#              Run it again after a failure: what is finished returns at once.
set -euo pipefail

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
SCALE=demo exec "$HERE/training/pipeline.sh" "$@"
