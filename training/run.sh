#!/usr/bin/env bash
# Stage 2: both language models on one encoder: LLaVA 7B (align, then fine-tune, by DeepSpeed), and the GPT-2 captioner.
#
#   usage      training/run.sh [ENCODER] [key=value ...]          ($RUNS/superclass-vit-l16 unless told otherwise;
#              key=value goes to both LLaVA stages)               FINETUNE=llava-7b-lora training/run.sh for LoRA
#   needs      $DATA/llava_pretrain, $DATA/llava, $DATA/coco (eval/prepare.sh), and the hub: lmsys/vicuna-7b-v1.5, gpt2
#   hardware   NGPU GPUs of 40 or 80 GB (default 8), or the machines of HOSTFILE
#   time       3.5 h + 10 h on 8 A100 with LLaVA's 576 tokens a picture (LLaVA README), the captioner on one GPU some hours more;
#              not measured by us. Run it again after a failure: what is finished returns at once.
set -euo pipefail

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export DATA=${DATA:-data} RUNS=${RUNS:-runs}
FINETUNE=${FINETUNE:-llava-7b-finetune}
ENCODER=${1:-$RUNS/superclass-vit-l16}
shift || true

mmkit validate llava-7b-align "encoder=$ENCODER" "$@"
mmkit validate "$FINETUNE" "$@"
"$HERE/training/launch/deepspeed_hostfile.sh" train llava-7b-align "encoder=$ENCODER" "$@"
"$HERE/training/launch/deepspeed_hostfile.sh" train "$FINETUNE" "$@"
mmkit train clipcap-superclass "encoder=$ENCODER"
