#!/usr/bin/env bash
# The whole way: pretrain an encoder, probe it, captioner, align, fine-tune, evaluate, one report. Run it again after any failure.
#
#   usage      training/pipeline.sh [key=value ...]                  the real recipes; key=value goes to every training stage
#              SCALE=demo training/pipeline.sh [key=value ...]       the same on the built-in demo world, on a CPU
#   override   by environment:
#              RUNS=runs, DATA=data, NAME=pipeline-ENCODER           everything of one encoder lies in $RUNS/$NAME
#              PRETRAIN=superclass-vit-l16                           its recipe; ENCODER=RUN or timm:NAME: a finished one instead
#              LLM=lmsys/vicuna-7b-v1.5                              another one's template: FINETUNE_ARGS=template=chatml
#              ALIGN=llava-7b-align, FINETUNE=llava-7b-finetune, CLIPCAP=clipcap-superclass     their recipes
#              {PRETRAIN,PROBE,CLIPCAP,ALIGN,FINETUNE,EVAL}_ARGS     key=value words for one stage (EVAL: of the questions)
#              STAGES="pretrain probe clipcap align finetune eval report"    those to run
#              SYSTEM=NAME, BLIND=1 (demo) or 0                      row label; the baseline with shuffled pictures
#              LAUNCHER=deepspeed|torchrun|slurm                     of align and fine-tune; slurm: pretraining too, sbatch --wait
#              NGPU=8, HOSTFILE=, RESTARTS=, ...                     training/launch/common.sh
#              DRY_RUN=1                                             print the commands
#              demo: MMKIT_DEMO=runs/demo, WORLD="--train 400 --heldout 40", SYSTEMS="superclass random"
#   needs      $DATA/datacomp/shards, imagenet/{train,val} (else no probe), llava_pretrain, llava, coco, vqav2, textvqa
#              (eval/prepare.sh), and the hub: the LLM and gpt2
#   hardware   NGPU GPUs of 80 GB; demo: 2 CPU cores, 4 GiB of memory
#   time       docs/plan.md has it by stage and number of GPUs, by arithmetic; not measured by us. demo: minutes (LOG.md)
#
# What is finished returns at once, what was interrupted goes on, so the same command is the way out of every failure. It leaves
# with 75 where a signal stopped it.
set -euo pipefail

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
LAUNCH=$HERE/training/launch
SCALE=${SCALE:-real}
STAGES=${STAGES:-pretrain probe clipcap align finetune eval report}
overrides=("$@")
runs=()
child="" stopped=""
# The running command stops after a checkpoint; bash itself would wait for its end before it did anything.
trap 'stopped=1; again=1; [ -z "$child" ] || kill -TERM "$child" 2>/dev/null || true' TERM USR1 HUP INT

# step COMMAND...: run it to its end, or show it.
step() {
  if [ "${DRY_RUN:-0}" = 1 ]; then
    printf '%q ' "$@"
    echo
    return
  fi
  local code=0
  "$@" &
  child=$!
  again=1
  while [ "$again" = 1 ]; do
    again=0
    wait "$child" && code=0 || code=$?
  done
  child=""
  # Told to stop, a command without checkpoints dies of the signal; it starts anew with the next turn.
  if [ -n "$stopped" ] && { [ "$code" -eq 0 ] || [ "$code" -gt 128 ]; }; then
    code=75
  fi
  [ "$code" -eq 0 ] || exit "$code"
}

# wanted STAGE: whether it is among those to run.
wanted() { [[ " $STAGES " == *" $1 "* ]]; }

# check_words: STAGES and LAUNCHER hold known words; told now, not after days of pretraining.
check_words() {
  local stage
  for stage in $STAGES; do
    case "$stage" in
      pretrain | probe | clipcap | align | finetune | eval | report) ;;
      *) echo "pipeline.sh: STAGES has $stage: use pretrain probe clipcap align finetune eval report" >&2 && exit 2 ;;
    esac
  done
  case "${LAUNCHER:-deepspeed}" in
    slurm | deepspeed | torchrun) ;;
    *) echo "pipeline.sh: LAUNCHER=$LAUNCHER: use deepspeed, torchrun or slurm" >&2 && exit 2 ;;
  esac
}

# check STAGE RECIPE ARGS [key=value ...]: the recipe of a wanted stage, with its words, before the first stage takes GPUs.
check() {
  local more
  if wanted "$1" && [ -n "$2" ] && [ "${VALIDATE:-1}" = 1 ]; then
    mapfile -t more < <(words "$3")
    mmkit validate "$2" "${@:4}" "${more[@]}" >/dev/null
  fi
}

# words VARIABLE: its words, as lines; none if it is unset.
words() {
  local found
  read -r -a found <<<"${!1:-}"
  [ "${#found[@]}" -eq 0 ] || printf '%s\n' "${found[@]}"
}

# by LAUNCHER train RECIPE...: start a training stage.
by() {
  case "$1" in
    slurm) step sbatch --wait "$LAUNCH/slurm.sbatch" "${@:2}" ;;
    deepspeed) step "$LAUNCH/deepspeed_hostfile.sh" "${@:2}" ;;
    torchrun) step "$LAUNCH/torchrun.sh" "${@:2}" ;;
    # For stages of minutes to hours that one GPU carries; it is the first one.
    one) step env NGPU=1 NNODES=1 "$LAUNCH/torchrun.sh" "${@:2}" ;;
    *) echo "pipeline.sh: LAUNCHER=$1: use deepspeed, torchrun or slurm" >&2 && exit 2 ;;
  esac
}

# one_encoder BASE ENCODER LABEL: everything that is made from an encoder, in $BASE.
one_encoder() {
  local base=$1 encoder=$2 label="system=$3" more
  if wanted probe && [ -n "$PROBE" ]; then
    mapfile -t more < <(words PROBE_ARGS)
    step mmkit probe "$PROBE" "run=$base/probe" "encoder=$encoder" "$label" "${more[@]}"
    runs+=("$base/probe")
  fi
  if wanted clipcap; then
    mapfile -t more < <(words CLIPCAP_ARGS)
    by one train "$CLIPCAP" "run=$base/clipcap" "encoder=$encoder" "$label" "${overrides[@]}" "${more[@]}"
  fi
  if wanted align; then
    mapfile -t more < <(words ALIGN_ARGS)
    by "$LAUNCHER" train "$ALIGN" "run=$base/llava-align" "encoder=$encoder" "${llm[@]}" "$label" "${overrides[@]}" "${more[@]}"
  fi
  if wanted finetune; then
    # From the aligned model, not from encoder and LLM: the second stage goes on with the first one's projector.
    mapfile -t more < <(words FINETUNE_ARGS)
    by "$LAUNCHER" train "$FINETUNE" "run=$base/$TUNED" "model=$base/llava-align" "$label" "${overrides[@]}" "${more[@]}"
  fi
  if wanted eval; then
    scores "$base" "$base" "$3"
    # What the second stage adds: after the first alone the model captions whatever it is asked.
    mapfile -t more < <(words EVAL_ARGS)
    step mmkit eval "$EVAL_ANSWERS" "run=$base/eval-align" "model=$base/llava-align" "system=$3, align only" "${more[@]}"
  fi
  runs+=("$base/eval-captioner" "$base/$ANSWERED" "$base/eval-align")
}

# scores TO FROM LABEL [key=value ...]: captioner and MLLM of $FROM, scored into $TO.
scores() {
  local more
  mapfile -t more < <(words EVAL_ARGS)
  step mmkit eval "$EVAL_CAPTIONS" "run=$1/eval-captioner" "model=$2/clipcap" "system=$3" "${@:4}"
  step mmkit eval "$EVAL_ANSWERS" "run=$1/$ANSWERED" "model=$2/$TUNED" "system=$3" "${@:4}" "${more[@]}"
}

# blind BASE: the trained models, shown another sample's picture; what is left is what language alone can do.
blind() {
  if wanted eval && [ "$BLIND" = 1 ]; then
    scores "$2" "$1" "blind (pictures shuffled)" blind=true
    runs+=("$2/eval-captioner" "$2/$ANSWERED")
  fi
}

real() {
  export DATA=${DATA:-data} RUNS=${RUNS:-runs}
  PRETRAIN=${PRETRAIN:-superclass-vit-l16} CLIPCAP=${CLIPCAP:-clipcap-superclass}
  ALIGN=${ALIGN:-llava-7b-align} FINETUNE=${FINETUNE:-llava-7b-finetune} LAUNCHER=${LAUNCHER:-deepspeed}
  EVAL_CAPTIONS=coco-captions EVAL_ANSWERS=vqa-textvqa PROBE=probe-imagenet BLIND=${BLIND:-0}
  # By recipe, so that a fine-tuned model and one by LoRA go on from the same alignment, side by side.
  TUNED=$(basename "$FINETUNE" .yaml)
  ANSWERED=eval-$TUNED
  # Not the recipe's own name: that is where encoders/pretrain.sh puts its run.
  SYSTEM=${SYSTEM:-$(basename "${ENCODER:-$PRETRAIN}" .yaml)}
  # Of the encoder, so that the models of two encoders do not meet in one folder.
  NAME=${NAME:-pipeline-$(basename "${ENCODER:-$PRETRAIN}" .yaml | tr ':/' '--')}
  local base=$RUNS/$NAME first=torchrun more
  llm=()
  [ -z "${LLM:-}" ] || llm=("llm.name=$LLM")
  [ "$LAUNCHER" != slurm ] || first=slurm
  if wanted probe && [ ! -d "$DATA/imagenet/train" ]; then
    PROBE=
    echo "no $DATA/imagenet/train: the probe is left out" >&2
  fi
  [ -n "${ENCODER:-}" ] || check pretrain "$PRETRAIN" PRETRAIN_ARGS "${overrides[@]}"
  check probe "$PROBE" PROBE_ARGS
  check clipcap "$CLIPCAP" CLIPCAP_ARGS "${overrides[@]}"
  check align "$ALIGN" ALIGN_ARGS "${llm[@]}" "${overrides[@]}"
  check finetune "$FINETUNE" FINETUNE_ARGS "${overrides[@]}"
  check eval "$EVAL_CAPTIONS" NONE
  check eval "$EVAL_ANSWERS" EVAL_ARGS
  if [ -z "${ENCODER:-}" ]; then
    ENCODER=$base/encoder
    if wanted pretrain; then
      mapfile -t more < <(words PRETRAIN_ARGS)
      by "$first" train "$PRETRAIN" "run=$ENCODER" "system=$SYSTEM" "${overrides[@]}" "${more[@]}"
    fi
  fi
  one_encoder "$base" "$ENCODER" "$SYSTEM"
  blind "$base" "$base/blind"
  report "$base/report" "$NAME"
}

demo() {
  # The demo recipes take every path below this folder. They are shipped and tested, so none is checked once more.
  export MMKIT_DEMO=${MMKIT_DEMO:-runs/demo} NGPU=${NGPU:-1} VALIDATE=${VALIDATE:-0}
  CLIPCAP=demo-clipcap ALIGN=demo-llava-align FINETUNE=demo-llava-finetune LAUNCHER=${LAUNCHER:-torchrun}
  EVAL_CAPTIONS=demo-eval-captioner EVAL_ANSWERS=demo-eval-mllm PROBE=demo-probe BLIND=${BLIND:-1}
  TUNED=llava-finetune ANSWERED=eval-mllm
  local world folder label
  llm=()
  read -r -a world <<<"${WORLD:-}"
  step mmkit data synth --out "$MMKIT_DEMO/world" "${world[@]}"
  for folder in ${SYSTEMS:-superclass random}; do
    case "$folder" in
      superclass) label=SuperClass ;;
      random) label="random frozen" ;;
      *) echo "pipeline.sh: SYSTEMS=$folder: use superclass, random" >&2 && exit 2 ;;
    esac
    if wanted pretrain && [ "$folder" = superclass ]; then
      by torchrun train demo-superclass "run=$MMKIT_DEMO/$folder/encoder" "${overrides[@]}"
    elif wanted pretrain; then
      # No step of training: the same architecture with its first weights is the random encoder.
      by torchrun train demo-superclass "${overrides[@]}" "run=$MMKIT_DEMO/$folder/encoder" train.steps=0 "system=$label" \
        data.val=null train.val_every=null
    fi
    one_encoder "$MMKIT_DEMO/$folder" "$MMKIT_DEMO/$folder/encoder" "$label"
  done
  blind "$MMKIT_DEMO/superclass" "$MMKIT_DEMO/blind"
  report "$MMKIT_DEMO/report" "mmkit demo"
}

# report OUT TITLE: over what was evaluated.
report() {
  if wanted report; then
    step mmkit report "${runs[@]}" --out "$1" --title "$2"
  fi
}

# In braces, so that bash has read all of it: the file may be edited while this runs for days.
{
  check_words
  case "$SCALE" in
    real) real ;;
    demo) demo ;;
    *) echo "pipeline.sh: SCALE=$SCALE: use real or demo" >&2 && exit 2 ;;
  esac
  exit 0
}
