"""The public names, what importing costs, and products that open without mmkit."""

from __future__ import annotations

import json

import numpy as np
import pipeline
import pytest
import torch
from PIL import Image

import mmkit
from mmkit.data.images import fit_square
from mmkit.errors import InputError
from mmkit.models.inference import _pixels

WITHOUT_MMKIT = """
import sys
sys.modules["mmkit"] = None
import timm, torch
from transformers import AutoModelForImageTextToText, AutoProcessor
given = torch.load(sys.argv[1], weights_only=True)
encoder = timm.create_model("local-dir:" + given["encoder"], pretrained=True).eval()
config = timm.data.resolve_data_config({}, model=encoder)
mean, std = (torch.tensor(config[k]).view(1, 3, 1, 1) for k in ("mean", "std"))
model = AutoModelForImageTextToText.from_pretrained(given["mllm"]).eval()
processor = AutoProcessor.from_pretrained(given["mllm"])
with torch.inference_mode():
    features = encoder((given["pixels"].float() / 255 - mean) / std)
    text = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}], add_generation_prompt=True
    )
    image = given["pixels"][0]
    inputs = processor(text=text, images=image, return_tensors="pt")
    logits = model(**inputs).logits[:, -1]
    answer = model.generate(**inputs, max_new_tokens=6, do_sample=False)[:, inputs["input_ids"].shape[1] :]
answer = processor.tokenizer.batch_decode(answer, skip_special_tokens=True)[0].strip()
assert "mmkit" not in [name for name, module in sys.modules.items() if module is not None]
torch.save({"features": features, "logits": logits, "answer": answer, "ids": inputs["input_ids"]}, sys.argv[2])
"""


def test_the_stable_names():
    from mmkit.encoders import CaptionLabels, OnlineIDF, soft_label_loss

    assert mmkit.__all__ == ["__version__", "load", "score"] and callable(mmkit.load) and callable(mmkit.score)
    assert all(callable(part) for part in (CaptionLabels, OnlineIDF, soft_label_loss))


def test_importing_is_light():
    heavy = ("torch", "transformers", "timm", "deepspeed", "accelerate", "matplotlib")
    code = f"import sys, mmkit, mmkit.cli, mmkit.encoders; print([m for m in {heavy} if m in sys.modules])"
    done = pipeline.python("-c", code)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_score_takes_rows_and_refuses_unknown_settings():
    annotations = {
        "info": {}, "licenses": [], "images": [{"id": 1}, {"id": 2}],
        "annotations": [{"image_id": i, "id": i, "caption": f"a dog number {i}"} for i in (1, 2)],
    }  # fmt: skip
    rows = [{"image_id": i, "caption": f"a dog number {i}"} for i in (1, 2)]
    found = mmkit.score("coco-caption", rows, annotations)
    assert found["metrics"]["Bleu_4"] == pytest.approx(1.0, abs=1e-6) and found["n"] == 2
    with pytest.raises(InputError, match=r"unknown setting 'tokeniser'; did you mean tokenizer\?"):
        mmkit.score("coco-caption", rows, annotations, tokeniser="none")


def test_score_equals_the_command_line(tmp_path, capsys):
    run, world = pipeline.root() / "eval-api", pipeline.root() / "world"
    model = pipeline.trained("clipcap")
    assert pipeline.mmkit("eval", "demo-eval-captioner", f"run={run}", f"model={model}") == 0
    results, annotations = run / "results" / "coco-caption.json", world / "captions_heldout.json"
    out = tmp_path / "score.json"
    assert pipeline.mmkit("score", "coco-caption", "--predictions", results, "--annotations", annotations, "--out", out) == 0
    assert json.loads(out.read_text()) == json.loads(json.dumps(mmkit.score("coco-caption", results, annotations)))


@pytest.mark.slow
def test_products_open_without_mmkit_and_say_the_same(tmp_path):
    encoder, mllm = pipeline.trained("superclass"), pipeline.trained("finetune")
    opened, answering = mmkit.load(encoder), mmkit.load(mllm)
    pictures = [Image.open(path).convert("RGB") for path in pipeline.pictures()[:2]]
    # The same square pixels on both sides: resizing is the caller's.
    pixels = torch.from_numpy(np.stack([fit_square(p, 32, fit="squash") for p in pictures]))
    squares = [Image.fromarray(p.permute(1, 2, 0).numpy()) for p in pixels]
    assert torch.equal(_pixels(squares, 32), pixels)
    given = {"encoder": str(encoder / "model"), "mllm": str(mllm / "model"), "pixels": pixels}
    torch.save(given, tmp_path / "given.pt")
    done = pipeline.python("-c", WITHOUT_MMKIT, tmp_path / "given.pt", tmp_path / "found.pt", PYTHONPATH="")
    assert done.returncode == 0, done.stderr
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    with torch.inference_mode():
        assert torch.allclose(found["features"], opened.features(squares), atol=1e-5)
    assert found["answer"] == answering.predict(squares[:1], ["What is it?"], max_new_tokens=6)[0]
    assert found["ids"].shape[1] > answering.meta["num_image_tokens"]
