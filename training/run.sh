#!/usr/bin/env bash
# Stage 2 of training/pipeline.sh alone: both language models on a finished encoder, the GPT-2 captioner and LLaVA 7B.
#
#   usage      training/run.sh [ENCODER] [key=value ...]          ($RUNS/superclass-vit-l16 unless told otherwise;
#              key=value goes to the training stages)             FINETUNE=llava-7b-lora training/run.sh for LoRA
#   override   NAME=models-ENCODER: everything lies in $RUNS/NAME; the rest as for training/pipeline.sh
#   needs      $DATA/llava_pretrain, $DATA/llava, $DATA/coco (eval/prepare.sh), and the hub: lmsys/vicuna-7b-v1.5, gpt2
#   hardware   NGPU GPUs of 80 GB (default 8; of 40 GB with ALIGN_ARGS=train.micro_batch_size=16), or the machines of HOSTFILE
#   time       3.5 h + 10 h on 8 A100 with LLaVA's 576 tokens a picture (LLaVA README), the captioner on one GPU some hours more;
#              not measured by us. Run it again after a failure: what is finished returns at once.
set -euo pipefail

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export ENCODER=${RUNS:-runs}/superclass-vit-l16
# A word with = in it is a setting and no encoder.
if [ $# -gt 0 ] && [[ $1 != *=* ]]; then
  ENCODER=$1
  shift
fi
export NAME=${NAME:-models-$(basename "$ENCODER" | tr ':/' '--')} STAGES="clipcap align finetune"
exec "$HERE/training/pipeline.sh" "$@"
