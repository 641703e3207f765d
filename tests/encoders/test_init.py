"""New towers from old weights: the same, resized, or refused with the first thing that does not fit."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from transformers import CLIPVisionConfig, CLIPVisionModel, SiglipVisionConfig, SiglipVisionModel

from mmkit.encoders import CaptionLabels, SuperClassHead, build_encoder, save_encoder
from mmkit.encoders.init import init_encoder, load_head
from mmkit.errors import InputError

from .helpers import TINY, pictures, tiny_encoder

SIZES: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "image_size": 32,
    "patch_size": 8,
}


def sized(image_size: int, patch_size: int, layout: str = "superclass", seed: int = 5) -> Any:
    """The tiny tower for other pictures or patches."""
    return build_encoder(
        "vit_tiny_patch16_224",
        image_size=image_size,
        patch_size=patch_size,
        model_args=TINY,
        layout=layout,  # type: ignore[arg-type]
        seed=seed,
    ).eval()


@pytest.mark.parametrize("layout", ["superclass", "native"])
def test_equal_sizes_give_equal_bits(tmp_path: Path, layout: str) -> None:
    source, encoder = tiny_encoder(seed=1, layout=layout), tiny_encoder(seed=2, layout=layout)
    init_encoder(encoder, str(save_encoder(source, tmp_path / "run" / "model").parent))
    for (name, ours), theirs in zip(encoder.state_dict().items(), source.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name


def test_weights_in_half_precision_fill_a_tower_in_full(tmp_path: Path) -> None:
    source = tiny_encoder(seed=1).to(torch.bfloat16)
    encoder = tiny_encoder(seed=2)
    init_encoder(encoder, str(save_encoder(source, tmp_path / "encoder")))
    weight = encoder.backbone.blocks[0].mlp.fc1.weight
    assert weight.dtype == torch.float32 and torch.equal(weight, source.backbone.blocks[0].mlp.fc1.weight.float())


@pytest.mark.parametrize("layout", ["superclass", "native"])
def test_higher_resolution_interpolates_positions(tmp_path: Path, layout: str, caplog: pytest.LogCaptureFixture) -> None:
    source, encoder = tiny_encoder(seed=1, layout=layout), sized(48, 8, layout)
    folder = save_encoder(source, tmp_path / "encoder")
    with caplog.at_level(logging.INFO, logger="mmkit"):
        init_encoder(encoder, str(folder))
    assert "positions 4x4 -> 6x6, patches 8 -> 8 pixels" in caplog.text
    prefix = encoder.num_prefix_tokens
    old = source.backbone.pos_embed[:, prefix:]
    grid = F.interpolate(old.reshape(1, 4, 4, 48).permute(0, 3, 1, 2), (6, 6), mode="bicubic", antialias=True)
    expected = torch.cat([source.backbone.pos_embed[:, :prefix], grid.permute(0, 2, 3, 1).reshape(1, 36, 48)], dim=1)
    torch.testing.assert_close(encoder.backbone.pos_embed, expected)
    # timm, asked for the same, does the same.
    theirs = timm.create_model(f"local-dir:{folder}", pretrained=True, img_size=48).eval()
    assert torch.equal(theirs(encoder.normalise(pictures(size=48))), encoder(pictures(size=48)))
    assert torch.equal(encoder.backbone.blocks[2].attn.qkv.weight, source.backbone.blocks[2].attn.qkv.weight)


def test_other_patches_are_resampled_as_timm_does(tmp_path: Path) -> None:
    source, encoder = tiny_encoder(seed=1), sized(64, 16)
    folder = save_encoder(source, tmp_path / "encoder")
    init_encoder(encoder, str(folder))
    theirs = timm.create_model(f"local-dir:{folder}", pretrained=True, img_size=64, patch_size=16).eval()
    assert torch.equal(encoder.backbone.patch_embed.proj.weight, theirs.patch_embed.proj.weight)
    assert torch.equal(encoder.backbone.pos_embed, source.backbone.pos_embed)  # 4 x 4 patches before and after


def test_convolutional_towers_start_from_their_own_kind(tmp_path: Path) -> None:
    source, encoder = (build_encoder("resnet10t", image_size=size, seed=size).eval() for size in (64, 96))
    folder = str(save_encoder(source, tmp_path / "encoder"))
    init_encoder(encoder, folder)
    assert torch.equal(encoder(pictures(size=96)), source(pictures(size=96)))
    with pytest.raises(InputError, match=r"is a ResNet, this one a VisionTransformer; use encoder.architecture=resnet10t"):
        init_encoder(tiny_encoder(), folder)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"depth": 2}, r"blocks\.2\.norm1\.weight has no place in this tower"),
        ({"depth": 4}, r"blocks\.3\.norm1\.weight of this tower is not in the weights"),
        ({"embed_dim": 96}, r"pos_embed is \[1, 16, 48\] in the weights, \[1, 16, 96\] in this tower"),
        ({"num_heads": 4}, r"num_heads is 3, this tower's 4; use encoder\.model_args\.num_heads=3"),
        ({"act_layer": "gelu_tanh"}, r"act_layer is gelu, this tower's gelu_tanh; use encoder\.model_args\.act_layer=gelu"),
        ({"act_layer": "mish"}, r"act_layer is gelu, this tower's Mish"),
        ({"fc_norm": True}, r"norm\.weight has no place in this tower"),
        ({"reg_tokens": 1, "no_embed_class": True}, r"reg_token of this tower is not in the weights; .*layout=superclass"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    folder = str(save_encoder(tiny_encoder(), tmp_path / "encoder"))
    encoder = tiny_encoder(seed=1, **arguments)
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    with pytest.raises(InputError, match=message) as caught:
        init_encoder(encoder, folder)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())


def test_a_class_token_needs_the_native_layout(tmp_path: Path) -> None:
    model = CLIPVisionModel(CLIPVisionConfig(**SIZES)).eval()
    model.save_pretrained(tmp_path / "clip")
    source = f"hf:{tmp_path / 'clip'}"
    with pytest.raises(
        InputError, match=r"class token.*use encoder\.layout=native with encoder\.architecture=vit_base_patch16_clip"
    ):
        init_encoder(tiny_encoder(act_layer="quick_gelu"), source)
    encoder = build_encoder(
        "vit_base_patch16_clip_224",
        image_size=32,
        patch_size=8,
        model_args={**TINY, "act_layer": "quick_gelu"},
        layout="native",
    ).eval()
    init_encoder(encoder, source)
    with torch.no_grad():
        expected = model(pixel_values=encoder.normalise(pictures())).pooler_output
        torch.testing.assert_close(encoder(pictures()), expected, rtol=0, atol=1e-5)


def test_siglip_starts_a_superclass_tower_without_its_pooling(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = SiglipVisionModel(SiglipVisionConfig(**SIZES)).eval()
    model.save_pretrained(tmp_path / "siglip")
    encoder = tiny_encoder(act_layer="gelu_tanh")
    with caplog.at_level(logging.INFO, logger="mmkit"):
        init_encoder(encoder, f"hf:{tmp_path / 'siglip'}")
    assert "weights of its pooling are left out" in caplog.text
    assert "was trained with mean (0.5, 0.5, 0.5)" in caplog.text and encoder.mean[0] == pytest.approx(0.48145466)
    with torch.no_grad():
        expected = model(pixel_values=encoder.normalise(pictures())).last_hidden_state
        torch.testing.assert_close(encoder.tokens(pictures()), expected, rtol=0, atol=1e-5)
    init_encoder(encoder, f"hf:{tmp_path / 'siglip'}", statistics=True)
    assert encoder.mean == encoder.std == (0.5, 0.5, 0.5)


def tagger(folder: Path, labels: CaptionLabels, **more: Any) -> SuperClassHead:
    """An encoder folder with a head."""
    head = SuperClassHead(48, labels.vocab_size)
    save_encoder(tiny_encoder(), folder, head=head, labels=labels, **more)
    return head


def words(file: Path, *vocabulary: str) -> CaptionLabels:
    """A vocabulary of these words."""
    import tokenizers

    model = tokenizers.models.WordLevel({word: index for index, word in enumerate(vocabulary)}, unk_token=vocabulary[0])
    tokenizers.Tokenizer(model).save(str(file))
    return CaptionLabels(str(file))


def test_the_head_goes_on_with_its_vocabulary_and_counts(tmp_path: Path) -> None:
    from mmkit.encoders.idf import save_table

    labels = words(tmp_path / "words.json", "a", "dog", "cat")
    head = tagger(tmp_path / "run" / "model", labels)
    loaded, table = load_head(str(tmp_path / "run"), labels)
    assert table is None
    assert all(torch.equal(a, b) for a, b in zip(head.state_dict().values(), loaded.state_dict().values(), strict=True))
    df, sha = torch.tensor([5, 2, 0]), labels.describe()["sha256"]
    tagger(tmp_path / "run" / "model", labels, write_more=lambda f: save_table(f / "idf.safetensors", df, 6, sha256=sha))
    _, table = load_head(str(tmp_path / "run"), labels)
    assert table is not None and table[0].tolist() == [5, 2, 0] and int(table[1]) == 6


def test_another_vocabulary_or_no_head_is_refused(tmp_path: Path) -> None:
    labels, other = words(tmp_path / "words.json", "a", "dog", "cat"), words(tmp_path / "other.json", "a", "dog", "cow")
    tagger(tmp_path / "model", labels)
    with pytest.raises(InputError, match=r"words\.json \(3 labels, sha256 \w{8}\), this recipe has .*other\.json \(3") as caught:
        load_head(str(tmp_path / "model"), other)
    assert "\n" not in str(caught.value)
    save_encoder(tiny_encoder(), tmp_path / "bare")
    for source in (str(tmp_path / "bare"), "timm:vit_base_patch16_224"):
        with pytest.raises(InputError, match=r"no label head.*init_head=false"):
            load_head(source, labels)
    note = json.loads((tmp_path / "model" / "mmkit.json").read_text())
    assert note["labels"]["vocab_size"] == 3
