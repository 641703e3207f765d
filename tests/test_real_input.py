"""Photographs instead of the drawn world, by overrides of the demo recipes alone."""

from __future__ import annotations

import json
from pathlib import Path

import pipeline
import pytest

import mmkit
from mmkit.models.llm import train_bpe_tokenizer, train_sentencepiece_tokenizer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
FEW = ["train.steps=5", "train.batch_size=8", "train.warmup=0", "train.log_every=1"]


def run(*arguments: object) -> None:
    assert pipeline.mmkit(*map(str, arguments)) == 0


def test_every_stage_on_photographs(shared, tmp_path, capsys):
    coco = shared / "coco-mini"
    captions = [row["caption"] for row in json.loads((coco / "captions_train.json").read_text())["annotations"]]
    turns = [t["value"] for item in json.loads((coco / "llava_train.json").read_text()) for t in item["conversations"]]
    train_bpe_tokenizer(captions, tmp_path / "bpe", vocab_size=400)
    train_sentencepiece_tokenizer(captions + turns, tmp_path / "sentencepiece", vocab_size=500)
    pictures = ["data.type=coco", f"data.train={coco / 'captions_train.json'}", f"data.image_root={coco / 'images' / 'train'}"]
    held_out = [f"data.val={coco / 'captions_val.json'}", f"data.val_image_root={coco / 'images' / 'val'}"]
    talks = [f"data.train={coco / 'llava_train.json'}", f"data.image_root={coco}"]

    # The recipe's own labels: CLIP's whole vocabulary.
    encoder = tmp_path / "encoder"
    validate = ["train.val_every=5", "train.val_batches=1"]
    run("train", "demo-superclass", f"run={encoder}", *pictures, *held_out, *FEW, *validate, "data.crop_scale=[0.9,1.0]")
    no_validation = ["data.val=null", "train.val_every=null"]
    run("train", "demo-clipcap", f"run={tmp_path / 'clipcap'}", f"encoder={encoder}", *pictures, *no_validation,
        f"llm.tokenizer={tmp_path / 'bpe'}", *FEW)  # fmt: skip
    run("train", "demo-llava-align", f"run={tmp_path / 'align'}", f"encoder={encoder}", *talks, "template=demo", "max_length=384",
        f"llm.tokenizer={tmp_path / 'sentencepiece'}", *FEW)  # fmt: skip
    run("train", "demo-llava-finetune", f"run={tmp_path / 'mllm'}", f"model={tmp_path / 'align'}", *talks, *FEW)
    for name in ("encoder", "clipcap", "align", "mllm"):
        check_training(tmp_path / name)
    row = [r for r in pipeline.rows(encoder / "metrics.jsonl") if "val_loss" in r][-1]
    assert 0 < row["val_loss"] < 12 and 0 <= row["val_recall@10"] <= 1

    decode = ["tasks.0.generation.max_new_tokens=8", "tasks.0.generation.batch_size=16"]
    run("eval", "demo-eval-captioner", f"run={tmp_path / 'eval-captioner'}", f"model={tmp_path / 'clipcap'}", *decode,
        f"tasks.0.annotations={coco / 'captions_val.json'}", f"tasks.0.image_root={coco / 'images' / 'val'}")  # fmt: skip
    vqa = f"{{task: vqav2, annotations: {coco / 'vqa_val_annotations.json'}, questions: {coco / 'vqa_val_questions.json'}, "
    vqa += f"image_root: {coco / 'images' / 'val'}, limit: 40, generation: {{max_new_tokens: 4, batch_size: 20}}}}"
    run("eval", "demo-eval-mllm", f"run={tmp_path / 'eval-mllm'}", f"model={tmp_path / 'mllm'}", f"tasks=[{vqa}]")
    check_scores(tmp_path, coco)

    capsys.readouterr()
    photograph = sorted((coco / "images" / "val").glob("*.jpg"))[0]
    run("predict", encoder, photograph, "--max-new-tokens", 5)
    assert capsys.readouterr().out.count(",") >= 4
    run("report", tmp_path / "eval-captioner", tmp_path / "eval-mllm", encoder, "--out", tmp_path / "report")
    html = (tmp_path / "report" / "report.html").read_text(encoding="utf-8")
    assert "CIDEr" in html and "vqav2" in html.lower() and "data:image/" in html
    assert (tmp_path / "report" / "report.json").is_file()


def check_training(folder: Path) -> None:
    """A finished run whose loss is finite and whose pictures were all readable."""
    manifest = pipeline.manifest(folder)
    assert manifest["status"] == "done" and manifest["skipped"] == 0, folder
    losses = pipeline.losses(folder)
    assert len(losses) == 5 and all(0 < loss < 12 for loss in losses), losses
    assert pipeline.weights(folder)


def check_scores(folder: Path, coco: Path) -> None:
    """Scores over the official denominators, the same from the result file alone."""
    captions = json.loads((folder / "eval-captioner" / "scores.json").read_text())["tasks"]["coco-caption"]
    pictures = len(json.loads((coco / "captions_val.json").read_text())["images"])
    assert captions["n"] == pictures and set(captions["metrics"]) >= {"CIDEr", "Bleu_4", "ROUGE_L"}
    again = mmkit.score("coco-caption", folder / "eval-captioner" / "results" / "coco-caption.json", coco / "captions_val.json")
    assert again["metrics"] == captions["metrics"]
    answers = json.loads((folder / "eval-mllm" / "scores.json").read_text())["tasks"]["vqav2"]
    assert answers["n"] == 40 and 0 <= answers["metrics"]["accuracy"] <= 1


def test_superclass_against_clip_at_equal_samples(shared, tmp_path):
    coco = shared / "coco-mini"
    captions = [row["caption"] for row in json.loads((coco / "captions_train.json").read_text())["annotations"]]
    train_bpe_tokenizer(captions, tmp_path / "bpe", vocab_size=400)
    pictures = ["data.type=coco", f"data.train={coco / 'captions_train.json'}", f"data.image_root={coco / 'images' / 'train'}"]
    held_out = [f"data.val={coco / 'captions_val.json'}", f"data.val_image_root={coco / 'images' / 'val'}"]
    scores = []
    for system, more in (("SuperClass", []), ("CLIP", ["stage=clip", "text.context_length=32"])):
        encoder, captioner, scored = (tmp_path / f"{system}-{name}" for name in ("encoder", "captioner", "eval"))
        run("train", "demo-superclass", f"run={encoder}", f"system={system}", *pictures, *held_out, *FEW, "train.val_every=5",
            "train.val_batches=2", *more)  # fmt: skip
        run("train", "demo-clipcap", f"run={captioner}", f"encoder={encoder}", f"system={system}", *pictures, "data.val=null",
            "train.val_every=null", f"llm.tokenizer={tmp_path / 'bpe'}", *FEW)  # fmt: skip
        run("eval", "demo-eval-captioner", f"run={scored}", f"model={captioner}", f"system={system}",
            f"tasks.0.annotations={coco / 'captions_val.json'}", f"tasks.0.image_root={coco / 'images' / 'val'}",
            "tasks.0.generation.max_new_tokens=8", "tasks.0.limit=20")  # fmt: skip
        scores.append(scored)
        assert len(pipeline.losses(encoder)) == 5
    # The same pictures in the same order: the two runs read the same samples.
    ours, theirs = (pipeline.manifest(tmp_path / f"{s}-encoder") for s in ("SuperClass", "CLIP"))
    assert ours["data"]["fingerprint"] == theirs["data"]["fingerprint"] and ours["steps"] == theirs["steps"]
    run("report", *scores, "--out", tmp_path / "report")
    text = (tmp_path / "report" / "report.md").read_text(encoding="utf-8")
    assert "SuperClass" in text and "CLIP" in text and "CIDEr" in text
