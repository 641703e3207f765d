"""mmkit export --format llava: a plain folder, reopened and compared before it appears."""

from __future__ import annotations

import json

import pipeline
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from mmkit.errors import InputError
from mmkit.models import export
from mmkit.models.export import export_llava
from mmkit.models.llava import build_llava, load_mllm, save_mllm
from mmkit.models.processor import processor_for

from .test_projectors import _narrow_tower
from .tiny import llama, siglip, tokenizer


@pytest.fixture
def folder(tmp_path):
    def save(tower, **more):
        tok = tokenizer("sp", image=False)
        model = build_llava(tower, llama(tok), tok, **more)
        save_mllm(model, processor_for(model, tok, mean=[0.5] * 3, std=[0.5] * 3, template="demo"), tmp_path / "model", meta={})
        return tmp_path / "model"

    return save


@pytest.mark.parametrize("stage", ["finetune", "lora"])
def test_a_run_on_the_command_line(stage, tmp_path, capsys):
    run = pipeline.trained(stage)
    assert pipeline.mmkit("export", run, tmp_path / "out", "--format", "llava") == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"done: {tmp_path / 'out'}"
    # Nothing of mmkit's, and no adapter: LoRA is in the weights.
    assert not {"mmkit.json", "adapter_config.json"} & {path.name for path in (tmp_path / "out").iterdir()}
    ours, theirs = load_mllm(run / "model")[0], AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    assert all(torch.equal(value, theirs.state_dict()[name]) for name, value in ours.state_dict().items())
    assert AutoProcessor.from_pretrained(tmp_path / "out").chat_template
    assert pipeline.mmkit("export", run, tmp_path / "out", "--format", "llava") == 2
    assert "is in the way" in capsys.readouterr().err


def test_other_kinds_are_refused(tmp_path, capsys):
    assert pipeline.mmkit("export", pipeline.trained("superclass"), tmp_path / "out", "--format", "llava") == 2
    assert "this model's kind is 'encoder', not 'mllm'" in capsys.readouterr().err
    assert pipeline.mmkit("export", pipeline.trained("superclass"), tmp_path / "out", "--format", "gguf") == 2
    assert "use one of timm, siglip, open_clip, or llava for an MLLM" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_linear_projector_is_written_for_vllm(folder, tmp_path, caplog):
    with caplog.at_level("INFO", logger="mmkit"):
        export_llava(str(folder(_narrow_tower(), projector="linear")), tmp_path / "out")
    assert "written with relu" in caplog.text and "logits differ by at most" in caplog.text
    assert json.loads((tmp_path / "out" / "config.json").read_text())["projector_hidden_act"] == "relu"


def test_what_vllm_cannot_open_is_said(folder, tmp_path, caplog):
    source = folder(siglip(size=64), projector="pixel_shuffle")
    with caplog.at_level("WARNING", logger="mmkit"):
        export_llava(str(source), tmp_path / "out")
    assert "not aya_vision with a siglip_vision_model tower" in caplog.text
    wide = tokenizer("sp", image=False)
    model = build_llava(siglip(), llama(wide), wide, projector="linear")
    save_mllm(model, processor_for(model, wide, mean=[0.5] * 3, std=[0.5] * 3, template="demo"), tmp_path / "wide", meta={})
    with caplog.at_level("WARNING", logger="mmkit"):
        export_llava(str(tmp_path / "wide"), tmp_path / "out2")
    assert "vLLM has no linear projector" in caplog.text


@pytest.mark.parametrize(
    ("damage", "message"), [("weights", "logits differ by"), ("nan", "logits differ by nan"), ("processor", "other pixel_values")]
)
def test_a_folder_that_reopens_otherwise_does_not_appear(damage, message, folder, tmp_path, monkeypatch):
    source = folder(siglip())
    save = export.save_mllm

    def broken(model, processor, out, **more):
        if damage == "processor":
            processor.image_processor.image_mean = [0.1, 0.1, 0.1]
        with torch.no_grad():
            # A hundredth: far less than a lost layer, far more than rounding.
            value = {"weights": 1.01, "nan": float("nan"), "processor": 1.0}[damage]
            model.lm_head.weight *= value
        save(model, processor, out, **more)

    monkeypatch.setattr(export, "save_mllm", broken)
    with pytest.raises(InputError, match=message):
        export_llava(str(source), tmp_path / "out")
    assert not (tmp_path / "out").exists()
