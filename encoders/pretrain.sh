#!/usr/bin/env bash
# Stage 1: SuperClass pretraining of an encoder, then its ImageNet probe where the pictures are there.
#
#   usage      encoders/pretrain.sh [RECIPE] [key=value ...]      (superclass-vit-b16 unless told otherwise)
#              RUN=folder for another run directory than $RUNS/RECIPE
#   needs      $DATA/datacomp/shards (webdataset tars); for the probe $DATA/imagenet/{train,val}
#   hardware   NGPU GPUs of 80 GB (default 8)
#   time       6 h (B/16) to days (L/14), see the recipe's head; not measured by us. Run it again after a failure: it goes on.
set -euo pipefail

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export DATA=${DATA:-data} RUNS=${RUNS:-runs}
RECIPE=${1:-superclass-vit-b16}
shift || true
RUN=${RUN:-$RUNS/$(basename "$RECIPE" .yaml)}

"$HERE/training/launch/torchrun.sh" train "$RECIPE" "$@" "run=$RUN"

if [ -d "$DATA/imagenet/train" ]; then
  mmkit probe probe-imagenet "encoder=$RUN" "run=$RUN-probe"
else
  echo "no $DATA/imagenet/train: the probe is left out" >&2
fi
