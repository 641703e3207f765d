#!/usr/bin/env bash
# SuperClass against CLIP at equal samples: both encoders from one recipe, LiT for the first, probes of both, one report.
#
#   usage      encoders/rivals.sh [SIZE] [key=value ...]      (b16 unless told otherwise; also s16, l16)
#              overrides go to both encoders and to LiT, e.g. train.samples=128000000
#   needs      $DATA/datacomp/shards (webdataset tars), $DATA/imagenet/{train,val}
#   hardware   NGPU GPUs of 80 GB (default 8)
#   time       b16: 6 h SuperClass, 9 h CLIP (its accumulated micro-batches run forward twice), 3 h LiT, by arithmetic on 8 H200;
#              not measured by us. Run it again after a failure: what is done returns at once.
set -euo pipefail

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export DATA=${DATA:-data} RUNS=${RUNS:-runs}
SIZE=${1:-b16}
shift || true
RECIPE=superclass-vit-$SIZE
OURS=$RUNS/rivals-$SIZE/superclass THEIRS=$RUNS/rivals-$SIZE/clip LOCKED=$RUNS/rivals-$SIZE/lit
train() { VALIDATE=0 "$HERE/training/launch/torchrun.sh" train "$@"; }

# A typing error is found here, not after the first encoder.
mmkit validate "$RECIPE" "$@" "run=$OURS"
mmkit validate "$RECIPE" stage=clip "$@" "run=$THEIRS"
mmkit validate "lit-vit-$SIZE" "$@" "encoder.init=$OURS" "run=$LOCKED"

train "$RECIPE" "$@" "run=$OURS" system=SuperClass
train "$RECIPE" stage=clip "$@" "run=$THEIRS" system=CLIP
train "lit-vit-$SIZE" "$@" "encoder.init=$OURS" "run=$LOCKED" "system=SuperClass"

mmkit probe probe-imagenet "encoder=$OURS" "run=$OURS-probe" system=SuperClass
mmkit probe probe-imagenet "encoder=$THEIRS" "run=$THEIRS-probe" system=CLIP
mmkit probe zeroshot-imagenet "encoder=$LOCKED" "run=$OURS-zeroshot" system=SuperClass
mmkit probe zeroshot-imagenet "encoder=$THEIRS" "run=$THEIRS-zeroshot" system=CLIP
mmkit report "$OURS-probe" "$THEIRS-probe" "$OURS-zeroshot" "$THEIRS-zeroshot" --out "$RUNS/rivals-$SIZE/report" \
  --title "SuperClass and CLIP, $SIZE"
