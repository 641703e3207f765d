#!/usr/bin/env bash
# The whole pipeline on the built-in demo world, in plain shell: what `mmkit demo` does, command by command.
#
#   usage      eval/pipeline_cpu.sh [key=value ...]      (key=value goes to every training command, e.g. train.steps=5)
#              WORLD="--train 400 --heldout 40" eval/pipeline_cpu.sh    for a smaller world
#   needs      bash 4.4; no hub, no download, no GPU
#   hardware   2 CPU cores, 4 GiB of memory; a GPU is used when there is one
#   time       some minutes more than `mmkit demo` (LOG.md has its figure), because every command starts Python anew.
#              Run it again after a failure: what is finished returns at once.
set -euo pipefail

# The demo recipes take every path below this folder.
export MMKIT_DEMO=${MMKIT_DEMO:-runs/demo}
PYTHON=${PYTHON:-python}
read -r -a world <<<"${WORLD:-}"

mmkit data synth --out "$MMKIT_DEMO/world" "${world[@]}"

mmkit train demo-superclass "$@"
# No step of training: the same architecture with its first weights is the random encoder.
mmkit train demo-superclass "$@" "run=$MMKIT_DEMO/random/encoder" train.steps=0 "system=random frozen" \
  data.val=null train.val_every=null

train=("$@")
runs=()
# both FOLDER SYSTEM: everything that is made from one encoder.
both() {
  local base=$MMKIT_DEMO/$1 named="system=$2"
  mmkit probe demo-probe "run=$base/probe" "encoder=$base/encoder" "$named"
  mmkit train demo-clipcap "run=$base/clipcap" "encoder=$base/encoder" "$named" "${train[@]}"
  mmkit train demo-llava-align "run=$base/llava-align" "encoder=$base/encoder" "$named" "${train[@]}"
  mmkit train demo-llava-finetune "run=$base/llava-finetune" "model=$base/llava-align" "$named" "${train[@]}"
  mmkit eval demo-eval-captioner "run=$base/eval-captioner" "model=$base/clipcap" "$named"
  mmkit eval demo-eval-mllm "run=$base/eval-mllm" "model=$base/llava-finetune" "$named"
  runs+=("$base/probe" "$base/eval-captioner" "$base/eval-mllm")
}
both superclass SuperClass
both random "random frozen"

# The blind baseline: the trained models, shown another sample's picture.
blind=("system=blind (pictures shuffled)" blind=true)
seeing=$MMKIT_DEMO/superclass
mmkit eval demo-eval-captioner "run=$MMKIT_DEMO/blind/eval-captioner" "model=$seeing/clipcap" "${blind[@]}"
mmkit eval demo-eval-mllm "run=$MMKIT_DEMO/blind/eval-mllm" "model=$seeing/llava-finetune" "${blind[@]}"
runs+=("$MMKIT_DEMO/blind/eval-captioner" "$MMKIT_DEMO/blind/eval-mllm")

mmkit report "${runs[@]}" --out "$MMKIT_DEMO/report" --title "mmkit demo"
