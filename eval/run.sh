#!/usr/bin/env bash
# Stage 3: score the captioner and the MLLM, then one report over them and the encoder's probe.
#
#   usage      eval/run.sh [key=value ...]      (key=value goes to the VQA evaluation, e.g. tasks.0.limit=5000)
#              CAPTIONER=run MLLM=run OUT=folder BLIND=1 eval/run.sh    BLIND=1: also the baseline with shuffled pictures
#   needs      the runs of training/run.sh; $DATA/coco, $DATA/vqav2, $DATA/textvqa (eval/prepare.sh)
#   hardware   one GPU of 40 GB or more
#   time       about an hour and a half on one H200, nearly all of it VQAv2 val (computed for 576 tokens a picture; not measured
#              by us). Run it again after a failure: what is finished returns at once.
set -euo pipefail

export DATA=${DATA:-data} RUNS=${RUNS:-runs}
CAPTIONER=${CAPTIONER:-$RUNS/models-superclass-vit-l16/clipcap}
MLLM=${MLLM:-$RUNS/models-superclass-vit-l16/llava-7b-finetune}
OUT=${OUT:-$RUNS/report}

captions=$RUNS/eval-coco-captions-$(basename "$CAPTIONER")
answers=$RUNS/eval-vqa-textvqa-$(basename "$MLLM")
mmkit eval coco-captions "model=$CAPTIONER" "run=$captions"
mmkit eval vqa-textvqa "model=$MLLM" "run=$answers" "$@"
runs=("$captions" "$answers")

if [ "${BLIND:-0}" = 1 ]; then
  mmkit eval coco-captions "model=$CAPTIONER" "run=$captions-blind" blind=true
  mmkit eval vqa-textvqa "model=$MLLM" "run=$answers-blind" blind=true "$@"
  runs+=("$captions-blind" "$answers-blind")
fi
for probe in "$RUNS"/*-probe; do
  if [ -f "$probe/scores.json" ]; then
    runs+=("$probe")
  fi
done
mmkit report "${runs[@]}" --out "$OUT"
