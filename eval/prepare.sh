#!/usr/bin/env bash
# Bring the published files into the layout that the recipes read: the Karpathy split of COCO, TextVQA with its OCR tokens.
#
#   usage      eval/prepare.sh
#   needs      jq; $DATA/coco/dataset_coco.json (Karpathy's split file) with the pictures in $DATA/coco/{train2014,val2014};
#              $DATA/textvqa/{TextVQA_0.5.1_val.json,TextVQA_Rosetta_OCR_v0.2_val.json}
#   hardware   any machine, about 2 GB of memory
#   time       under a minute. A file that is there already is kept; what is not found is named and left out.
set -euo pipefail

DATA=${DATA:-data}

# write FILE JQ-ARGUMENTS...: FILE is complete or absent, also when this is interrupted.
write() {
  local file=$1
  shift
  if [ -f "$file" ]; then
    return
  fi
  jq "$@" >"$file.part"
  mv "$file.part" "$file"
  echo "written: $file"
}

split=$DATA/coco/dataset_coco.json
if [ -f "$split" ]; then
  # Training takes train and restval, 113 287 pictures; validation and test have 5000 each.
  # shellcheck disable=SC2016  # jq's variables
  write "$DATA/coco/karpathy_train.jsonl" -c \
    '.images[] | select(.split == "train" or .split == "restval") | . as $i | .sentences[]
     | {image: "\($i.filepath)/\($i.filename)", caption: .raw}' "$split"
  for part in val test; do
    # shellcheck disable=SC2016
    write "$DATA/coco/karpathy_$part.json" -c --arg part "$part" \
      '[.images[] | select(.split == $part)] as $all
       | {images: [$all[] | {id: .cocoid, file_name: "\(.filepath)/\(.filename)"}],
          annotations: [$all[] | .cocoid as $id | .sentences[] | {id: .sentid, image_id: $id, caption: .raw}]}' "$split"
  done
else
  echo "no $split: the Karpathy split is left out" >&2
fi

questions=$DATA/textvqa/TextVQA_0.5.1_val.json
ocr=$DATA/textvqa/TextVQA_Rosetta_OCR_v0.2_val.json
if [ -f "$questions" ] && [ -f "$ocr" ]; then
  # shellcheck disable=SC2016
  write "$DATA/textvqa/TextVQA_0.5.1_val_ocr.json" -c --slurpfile ocr "$ocr" \
    '($ocr[0].data | INDEX(.image_id)) as $of | .data |= map(. + {ocr_tokens: ($of[.image_id].ocr_tokens // [])})' "$questions"
else
  echo "no $questions or no $ocr: TextVQA with OCR tokens is left out" >&2
fi
