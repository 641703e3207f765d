"""Exported folders, opened by the libraries they were made for."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import open_clip
import pytest
import timm
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel

from mmkit.encoders import build_encoder, load_encoder, save_encoder
from mmkit.encoders.export import export_model, registry_name
from mmkit.encoders.text import TextTower, save_text, text_settings
from mmkit.encoders.vit import VisionEncoder
from mmkit.errors import InputError

from .helpers import pictures, tiny_encoder


def contrastive_run(folder: Path, encoder: VisionEncoder, kind: str = "infonce") -> TextTower:
    """The model folder of a clip or lit run."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        text = TextTower(encoder.width, **text_settings(encoder.width, layers=2, width=32, heads=2, context_length=20), kind=kind)
    save_encoder(encoder, folder, write_more=lambda temporary: save_text(text, temporary))
    return text.eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_timm_opens_its_export(tmp_path: Path, dtype: torch.dtype) -> None:
    encoder = tiny_encoder().to(dtype)
    save_encoder(encoder, tmp_path / "run" / "model")
    out = export_model(str(tmp_path / "run"), tmp_path / "out", format="timm")
    model = timm.create_model(f"local-dir:{out}", pretrained=True).to(dtype).eval()
    assert torch.equal(model(encoder.normalise(pictures())), encoder(pictures()))


def test_transformers_opens_its_export(tmp_path: Path) -> None:
    encoder = tiny_encoder()
    save_encoder(encoder, tmp_path / "model")
    out = export_model(str(tmp_path / "model"), tmp_path / "out", format="siglip")
    model, processor = AutoModel.from_pretrained(out).eval(), AutoImageProcessor.from_pretrained(out)
    image = Image.fromarray(pictures(1)[0].permute(1, 2, 0).numpy())
    pixels = processor(image, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(pixels, encoder.normalise(pictures(1)), rtol=0, atol=1e-5)
    with torch.no_grad():
        assert torch.equal(model(pixel_values=pixels).last_hidden_state, encoder.tokens(pixels))
    settings = json.loads((out / "preprocessor_config.json").read_text())
    assert settings["image_mean"] == list(encoder.mean) and settings["resample"] == 3
    assert settings["size"] == {"height": 32, "width": 32}


@pytest.mark.parametrize("kind", ["infonce", "sigmoid"])
def test_open_clip_opens_its_export(tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    encoder = tiny_encoder()
    text = contrastive_run(tmp_path / "run" / "model", encoder, kind)
    with caplog.at_level(logging.WARNING, logger="mmkit"):
        out = export_model(str(tmp_path / "run"), tmp_path / "out", format="open_clip")
    assert "timm has no name for this tower" in caplog.text
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{out}")
    model.eval()
    captions = ["a red bus", "2 dogs, it's raining"]
    tokens = open_clip.get_tokenizer(f"local-dir:{out}")(captions)
    assert torch.equal(tokens, text.tokenize(captions))
    image = Image.fromarray(pictures(1)[0].permute(1, 2, 0).numpy())
    pixels = preprocess(image).unsqueeze(0)
    torch.testing.assert_close(pixels, encoder.normalise(pictures(1)), rtol=0, atol=1e-5)
    with torch.no_grad():
        ours, theirs = text.encode_image(encoder(pixels)), model.encode_image(pixels, normalize=True)
        torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-6)
        torch.testing.assert_close(model.encode_text(tokens, normalize=True), text.encode_text(tokens), rtol=0, atol=1e-6)
        assert torch.equal(model.logit_scale, text.logit_scale.reshape(()))
        assert (model.logit_bias is None) == (kind == "infonce")
        if text.logit_bias is not None:
            assert torch.equal(model.logit_bias, text.logit_bias.reshape(()))
    # And mmkit opens it as any other open_clip model.
    assert torch.equal(load_encoder(f"open_clip:local-dir:{out}")(pixels), encoder(pixels))


def test_towers_that_timm_knows_by_name_are_exported_by_name(tmp_path: Path) -> None:
    encoder = build_encoder("resnet10t", image_size=64, seed=0).eval()
    contrastive_run(tmp_path / "run", encoder)
    out = export_model(str(tmp_path / "run"), tmp_path / "out", format="open_clip")
    config = json.loads((out / "open_clip_config.json").read_text())
    assert config["model_cfg"]["vision_cfg"]["timm_model_name"] == "resnet10t"
    assert sorted(path.name for path in out.iterdir()) == ["open_clip_config.json", "open_clip_model.safetensors"]
    moved = out.rename(tmp_path / "moved")
    open_clip.create_model(f"local-dir:{moved}")


def test_registry_names() -> None:
    def name(architecture: str, size: int, **more: object) -> str | None:
        with torch.device("meta"):
            return registry_name(build_encoder(architecture, image_size=size, **more))  # type: ignore[arg-type]

    assert name("vit_base_patch16_224", 224) == "vit_base_patch16_siglip_gap_224"
    assert name("vit_base_patch16_224", 224, layout="native") == "vit_base_patch16_224"
    assert name("vit_base_patch16_clip_224", 224, layout="native") == "vit_base_patch16_clip_224"
    assert name("vit_base_patch16_224", 224, model_args={"act_layer": "gelu_tanh"}) is None
    assert name("vit_base_patch16_224", 224, model_args={"num_heads": 6}) is None
    assert name("vit_small_patch16_224", 224) is None


def test_what_cannot_be_exported_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    save_encoder(tiny_encoder(layout="native"), tmp_path / "native")
    save_encoder(tiny_encoder(), tmp_path / "superclass")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "note.txt").write_text("mine")
    for source, out, kind, message in (
        ("native", "out", "siglip", "class token"),
        (
            "superclass",
            "out",
            "open_clip",
            r"text tower.*stage=lit, or use --format timm",
        ),
        ("superclass", "full", "timm", "is in the way"),
        ("superclass", "full/note.txt", "timm", "is in the way"),
        ("superclass", "out", "onnx", "use one of timm, siglip, open_clip"),
        ("nothing", "out", "timm", "no such folder"),
    ):
        with pytest.raises(InputError, match=message):
            export_model(str(tmp_path / source), tmp_path / out, format=kind)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "native", "superclass"]
    (tmp_path / "empty").mkdir()
    export_model(str(tmp_path / "superclass"), tmp_path / "empty", format="timm")
    assert (tmp_path / "empty" / "model.safetensors").is_file()
