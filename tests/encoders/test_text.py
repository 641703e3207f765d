"""The text tower against open_clip: tokens, pairings, weights; its folder."""

from __future__ import annotations

import json
import math
import pickle
from pathlib import Path

import open_clip
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.model import CLIPTextCfg, _build_text_tower
from open_clip.tokenizer import SimpleTokenizer

from mmkit.encoders.text import CaptionTokens, TextTower, load_text, save_text, text_settings
from mmkit.errors import InputError

TINY = {"embed_dim": 12, "width": 16, "heads": 2, "layers": 2, "context_length": 9}
TEXTS = [
    "",
    "a dog",
    "A photo of TWO dogs &amp; a cat's 10 toys, in the rain",
    "naïve café — ﬁne “quotes” \u200b\t日本語 🐶🐶 don't",
    "word " * 100,
]


@pytest.fixture(scope="module")
def reference() -> SimpleTokenizer:
    return SimpleTokenizer()


def tiny(kind: str = "infonce", seed: int = 0) -> TextTower:
    torch.manual_seed(seed)
    return TextTower(20, **TINY, kind=kind)


@pytest.mark.parametrize("length", [3, 8, 77])
def test_tokens_are_open_clips(reference, length):
    torch.manual_seed(0)
    tower = TextTower(20, **{**TINY, "context_length": length})
    found = tower.tokenize(TEXTS)
    assert found.dtype == torch.int64 and torch.equal(found, reference(TEXTS, length))
    assert tower.tokenize([]).shape == (0, length)


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=60))
def test_tokens_of_any_text_are_open_clips(caption):
    assert CaptionTokens(12)(caption) == SIMPLE(caption, 12)[0].tolist()


SIMPLE = SimpleTokenizer()


def test_marks_written_out_in_a_caption_do_not_end_it(reference):
    # open_clip would take its picture of the caption in the middle of it.
    assert CaptionTokens(8)("a <end_of_text> dog") == reference("a dog", 8)[0].tolist()


def test_tokens_travel_to_workers_without_their_vocabulary():
    row = CaptionTokens(16)
    row("a dog")
    packed = pickle.dumps(row)
    assert len(packed) < 200 and pickle.loads(packed)("a dog") == row("a dog")


@pytest.mark.parametrize(
    "name", ["ViT-S-16", "ViT-M-16", "ViT-B-16", "ViT-L-16", "ViT-H-14", "ViT-g-14", "ViT-bigG-14", "ViT-e-14"]
)
def test_pairings_are_open_clips(name):
    config = json.loads((Path(open_clip.__path__[0]) / "model_configs" / f"{name}.json").read_text())
    text = {key: config["text_cfg"][key] for key in ("width", "heads", "layers", "context_length")}
    assert text_settings(config["vision_cfg"]["width"]) == {"embed_dim": config["embed_dim"], **text}


@pytest.mark.parametrize(
    ("width", "wanted"),
    [
        (32, (32, 32, 1, 2)),
        (128, (128, 128, 2, 4)),
        (192, (192, 192, 3, 6)),
        (200, (200, 200, 2, 6)),
        (1152, (768, 768, 12, 12)),
        (2048, (1024, 1024, 16, 24)),
    ],
)
def test_other_widths_follow_the_rule(width, wanted):
    assert tuple(text_settings(width).values()) == (*wanted, 77)


def test_given_sizes_stay_and_heads_must_divide():
    found = text_settings(768, embed_dim=40, width=96, layers=3, context_length=20)
    assert found == {"embed_dim": 40, "width": 96, "heads": 1, "layers": 3, "context_length": 20}
    assert text_settings(768, heads=4)["heads"] == 4
    with pytest.raises(InputError, match=r"text.heads: 5 heads do not divide a width of 512"):
        text_settings(768, heads=5)


def test_weights_fit_open_clip_and_give_its_features():
    tower = tiny().eval()
    sizes = {key: TINY[key] for key in ("width", "heads", "layers", "context_length")}
    theirs = _build_text_tower(TINY["embed_dim"], CLIPTextCfg(**sizes)).eval()
    theirs.load_state_dict(tower.text.state_dict(), strict=True)
    tokens = tower.tokenize(TEXTS)
    wanted = torch.nn.functional.normalize(theirs(tokens), dim=-1)
    assert torch.equal(tower.encode_text(tokens), wanted)
    scalar = torch.nn.ParameterDict({"logit_scale": torch.nn.Parameter(torch.zeros(()))})
    scalar.load_state_dict({"logit_scale": tower.logit_scale})
    assert scalar["logit_scale"].item() == tower.logit_scale.item()


@pytest.mark.parametrize(("kind", "scale", "bias"), [("infonce", 1 / 0.07, None), ("sigmoid", 10.0, -10.0)])
def test_scale_bias_and_projection_start_as_published(kind, scale, bias):
    tower = tiny(kind)
    found = tower(torch.randn(5, 20), tower.tokenize(TEXTS))
    assert found.logit_scale.item() == pytest.approx(scale, rel=1e-6)
    assert (found.logit_bias is None) if bias is None else found.logit_bias.item() == bias
    assert torch.allclose(found.image.norm(dim=1), torch.ones(5)) and torch.allclose(found.text.norm(dim=1), torch.ones(5))
    wide = TextTower(256, **{**TINY, "embed_dim": 256}).image_projection
    assert wide.bias is None and wide.weight.std(correction=0).item() == pytest.approx(256**-0.5, rel=0.02)


@pytest.mark.parametrize(("start", "wanted"), [(9.0, math.log(100)), (-1.0, 0.0), (2.0, 2.0)])
def test_scale_is_kept_in_bounds_and_still_learns(start, wanted):
    tower = tiny()
    tower.logit_scale.data.fill_(start)
    found = tower(torch.randn(5, 20), tower.tokenize(TEXTS))
    assert tower.logit_scale.item() == pytest.approx(wanted) and found.logit_scale.item() == pytest.approx(math.exp(wanted), 1e-5)
    found.logit_scale.backward()
    assert tower.logit_scale.grad.item() == pytest.approx(math.exp(wanted), 1e-5)


def test_embeddings_are_fp32_under_autocast():
    tower = tiny()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = tower(torch.randn(5, 20).bfloat16(), tower.tokenize(TEXTS))
    assert found.image.dtype == found.text.dtype == found.logit_scale.dtype == torch.float32


@pytest.mark.parametrize("kind", ["infonce", "sigmoid"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_tower_opens_again(kind, dtype, tmp_path):
    tower = tiny(kind).to(dtype)
    tower.logit_scale.data.fill_(7.0)
    save_text(tower, tmp_path)
    before = torch.get_rng_state()
    again = load_text(tmp_path)
    assert torch.equal(torch.get_rng_state(), before) and not again.training
    state, wanted = again.state_dict(), tower.state_dict()
    assert state.keys() == wanted.keys() and all(torch.equal(state[k], wanted[k]) for k in state)
    assert again.logit_scale.item() == pytest.approx(math.log(100), rel=1e-2) and again.settings == tower.settings
    tokens = again.tokenize(TEXTS)
    assert torch.equal(again.encode_text(tokens), tower.eval().encode_text(tokens))


def test_no_tower_and_a_damaged_one_are_refused(tmp_path):
    with pytest.raises(InputError, match="no text tower here"):
        load_text(tmp_path)
    save_text(tiny(), tmp_path)
    (tmp_path / "text.safetensors").write_bytes(b"cut")
    with pytest.raises(InputError, match="the text tower cannot be read"):
        load_text(tmp_path)
    save_text(tiny(), tmp_path)
    (tmp_path / "text_config.json").write_text(json.dumps({**tiny().settings, "width": 32}))
    with pytest.raises(InputError, match="the text tower cannot be read"):
        load_text(tmp_path)
