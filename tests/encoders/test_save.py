"""Encoder folders: opened by timm without mmkit, by us with head and labels; damaged ones are named."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
import torch
from safetensors.torch import load_file, save_file

from mmkit.encoders import CaptionLabels, SuperClassHead, build_encoder, load_encoder, load_tagger, save_encoder
from mmkit.errors import InputError

from .helpers import pictures, tiny_encoder

STRANGER = """
import sys
sys.modules["mmkit"] = None
import timm, torch
from timm.data import resolve_model_data_config
from safetensors.torch import load_file, save_file
model = timm.create_model("local-dir:" + sys.argv[1], pretrained=True).eval()
data = resolve_model_data_config(model)
mean, std = (torch.tensor(data[k]).view(1, 3, 1, 1) for k in ("mean", "std"))
x = (load_file(sys.argv[2])["x"] / 255 - mean) / std
with torch.inference_mode():
    y = model(x)
print(data["input_size"], data["interpolation"], data["crop_pct"])
save_file({"y": y}, sys.argv[3])
"""


@pytest.fixture
def vocabulary_file(tmp_path: Path) -> Path:
    """A ten-word vocabulary of the user's."""
    words = {w: i for i, w in enumerate(["a", "red", "blue", "bus", "dog", "cat", "on", "the", "sky", "sea"])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="a"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    path = tmp_path / "words.json"
    tokenizer.save(str(path))
    return path


def test_timm_opens_the_folder_without_mmkit(tmp_path: Path) -> None:
    encoder, x = tiny_encoder(seed=3), pictures(3)
    folder = save_encoder(encoder, tmp_path / "encoder")
    save_file({"x": x}, tmp_path / "x.safetensors")
    run = subprocess.run(
        [sys.executable, "-c", STRANGER, str(folder), str(tmp_path / "x.safetensors"), str(tmp_path / "y.safetensors")],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "(3, 32, 32) bicubic 1.0"
    with torch.inference_mode():
        torch.testing.assert_close(load_file(tmp_path / "y.safetensors")["y"], encoder(x), rtol=0, atol=1e-6)


@pytest.mark.parametrize("layout", ["superclass", "native"])
def test_loading_gives_the_same_encoder(tmp_path: Path, layout: str) -> None:
    encoder, x = tiny_encoder(layout=layout), pictures()
    loaded = load_encoder(save_encoder(encoder, tmp_path / "encoder"))
    assert torch.equal(loaded(x), encoder(x)) and not loaded.training
    for name in ("architecture", "model_args", "image_size", "width", "num_tokens", "mean", "std"):
        assert getattr(loaded, name) == getattr(encoder, name), name


def test_patch_dropping_and_compiling_leave_no_trace_in_the_folder(tmp_path: Path) -> None:
    plain, used = tiny_encoder(), tiny_encoder()
    used.compile_backbone(backend="eager")
    with torch.no_grad():
        used(pictures(), keep=torch.arange(8).expand(2, -1))
    one, two = save_encoder(plain, tmp_path / "plain"), save_encoder(used, tmp_path / "used")
    for name in ("config.json", "model.safetensors"):
        assert (one / name).read_bytes() == (two / name).read_bytes()


def test_own_statistics_dtype_and_other_models_survive(tmp_path: Path) -> None:
    encoder = build_encoder("resnet10t", image_size=64, mean=(0.1, 0.2, 0.3), std=(0.5, 0.5, 0.5), seed=0)
    encoder.eval().to(torch.bfloat16)
    loaded = load_encoder(save_encoder(encoder, tmp_path / "encoder"))
    assert loaded.mean == (0.1, 0.2, 0.3) and loaded.image_size == 64
    x = pictures(size=64)
    assert torch.equal(loaded(x), encoder(x))


def test_a_run_directory_means_its_model(tmp_path: Path) -> None:
    encoder = tiny_encoder()
    save_encoder(encoder, tmp_path / "run" / "model")
    assert torch.equal(load_encoder(tmp_path / "run")(pictures()), encoder(pictures()))


def test_saving_replaces_and_leaves_nothing_behind(tmp_path: Path) -> None:
    save_encoder(tiny_encoder(seed=1), tmp_path / "encoder", extra={"note": 1})
    second = tiny_encoder(seed=2)
    save_encoder(second, tmp_path / "encoder")
    assert [path.name for path in tmp_path.iterdir()] == ["encoder"]
    assert json.loads((tmp_path / "encoder" / "mmkit.json").read_text()) == {"kind": "encoder"}
    assert torch.equal(load_encoder(tmp_path / "encoder")(pictures()), second(pictures()))


def test_tagger_comes_back_with_head_and_labels(tmp_path: Path, vocabulary_file: Path) -> None:
    encoder, labels = tiny_encoder(), CaptionLabels(str(vocabulary_file), context_length=12)
    head = SuperClassHead(encoder.width, labels.vocab_size)
    save_encoder(encoder, tmp_path / "encoder", head=head, labels=labels, extra={"steps": 7})
    note = json.loads((tmp_path / "encoder" / "mmkit.json").read_text())
    assert note["extra"] == {"steps": 7} and note["labels"]["vocab_size"] == 10
    vocabulary_file.unlink()  # the folder has its own copy
    loaded, loaded_head, loaded_labels = load_tagger(tmp_path / "encoder")
    features = loaded(pictures())
    assert torch.equal(loaded_head.logits(features), head.logits(encoder(pictures())))
    assert loaded_labels.encode(["a red bus"]) == [[0, 1, 3]]
    assert loaded_labels.context_length == 12
    tags = loaded_head.top_tags(features, loaded_labels, k=3)
    assert len(tags) == 2 and all(len(row) == 3 for row in tags)
    assert all(row[0][1] >= row[1][1] >= row[2][1] > 0 for row in tags)
    assert tags[0][0][0] == labels.decode_tag(int(head.logits(features)[0].argmax()))


def test_a_changed_vocabulary_is_refused(tmp_path: Path, vocabulary_file: Path) -> None:
    encoder, labels = tiny_encoder(), CaptionLabels(str(vocabulary_file))
    save_encoder(encoder, tmp_path / "encoder", head=SuperClassHead(encoder.width, 10), labels=labels)
    file = tmp_path / "encoder" / "labels.json"
    file.write_text(file.read_text().replace("dog", "fox"))
    with pytest.raises(InputError, match="not the one of training"):
        load_tagger(tmp_path / "encoder")


def test_no_head_nothing_there_or_damaged(tmp_path: Path) -> None:
    folder = save_encoder(tiny_encoder(), tmp_path / "encoder")
    with pytest.raises(InputError, match="no tagging head"):
        load_tagger(folder)
    with pytest.raises(InputError, match="no such folder"):
        load_encoder(tmp_path / "nothing")
    with pytest.raises(InputError, match="no encoder here"):
        load_encoder(tmp_path)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(InputError, match="weights cannot be read") as caught:
        load_encoder(folder)
    assert "\n" not in str(caught.value)
    (folder / "config.json").write_text('{"architecture": ')
    with pytest.raises(InputError, match="not readable JSON"):
        load_encoder(folder)
    (folder / "config.json").write_text('{"model_type": "llava"}')
    with pytest.raises(InputError, match="no timm encoder"):
        load_encoder(folder)
    with pytest.raises(InputError, match="timm has no model"):
        load_encoder("timm:vit_bace")


def test_head_starts_as_the_reference() -> None:
    head = SuperClassHead(64, 5000)
    assert head.weight.std().item() == pytest.approx(64**-0.5, rel=0.02)
    assert not head.bias.any()
    features = torch.randn(3, 64) * 5 + 2
    torch.testing.assert_close(head(features).mean(dim=1), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(head.logits(features), head(features) @ head.weight.T + head.bias)
