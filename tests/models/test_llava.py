from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from mmkit.data.conversations import encode_conversation, encode_prompt
from mmkit.errors import InputError
from mmkit.models.adapters import freeze_for, has_lora, merge_lora, set_train_mode
from mmkit.models.llava import build_llava, llava_loss_sum, load_mllm, save_mllm
from mmkit.models.processor import build_processor

from .tiny import clip, gpt2, llama, siglip, tokenizer

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
TURNS = [("<image>\nWhat is this?", "a red circle"), ("how many", "three")]
OPEN_WITHOUT_MMKIT = """
import sys
sys.modules["mmkit"] = None
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
folder = sys.argv[1]
model, processor = AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
content = [{"type": "image"}, {"type": "text", "text": "What is this?"}]
text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
batch = processor(images=[Image.open(folder + "/picture.png")], text=[text], return_tensors="pt")
with torch.no_grad():
    logits = model(**batch).logits
torch.save({"ids": batch["input_ids"], "pixels": batch["pixel_values"], "logits": logits}, folder + "/out.pt")
"""


def make(kind="sp", vision=None, llm=None, **more):
    tok = tokenizer(kind, image=False)
    made = llm(tok) if llm else llama(tok)
    return build_llava(vision or siglip(), made, tok, **more), tok


def batch(model, tok, lengths=((TURNS, 4), (TURNS[1:], 0), (TURNS[:1], 4)), seed=0):
    """Rows with and without a picture, padded on the right."""
    image_id = model.config.image_token_id
    rows = [
        encode_conversation(t, tok, "demo", num_images=min(n, 1), tokens_per_image=n, image_token_id=image_id, max_length=200)
        for t, n in lengths
    ]
    width = max(len(row.input_ids) for row in rows)
    ids = torch.tensor([row.input_ids + [0] * (width - len(row.input_ids)) for row in rows])
    labels = torch.tensor([row.labels + [-100] * (width - len(row.labels)) for row in rows])
    mask = torch.tensor([[1] * len(r.input_ids) + [0] * (width - len(r.input_ids)) for r in rows])
    pixels = torch.randn(sum(n > 0 for _, n in lengths), 3, 32, 32, generator=torch.Generator().manual_seed(seed))
    return ids, mask, labels, pixels


def grads(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_parts_are_moved_in_not_copied():
    vision, tok = siglip(), tokenizer("sp")
    llm = llama(tok)
    head, embed, patch = llm.lm_head.weight, llm.model.embed_tokens.weight, vision.embeddings.patch_embedding.weight
    model = build_llava(vision, llm, tok)
    assert model.lm_head.weight is head
    assert model.get_input_embeddings().weight is embed
    assert model.model.vision_tower.embeddings.patch_embedding.weight is patch
    assert not any(t.is_meta for t in (*model.parameters(), *model.buffers()))
    assert not model.training


@pytest.mark.parametrize(("tower", "select", "layer"), [(siglip, "full", -2), (siglip, "full", -1), (clip, "default", -2)])
def test_image_features_are_the_projected_hidden_states(tower, select, layer):
    model, _ = make(vision=tower(), feature_select=select, feature_layer=layer)
    pixels = torch.randn(2, 3, 32, 32)
    hidden = tower()(pixels, output_hidden_states=True).hidden_states[layer]
    hidden = hidden[:, 1:] if select == "default" else hidden
    expected = model.model.multi_modal_projector(hidden)
    got = torch.stack(tuple(model.get_image_features(pixels, return_dict=True).pooler_output))
    torch.testing.assert_close(got, expected)
    assert got.shape == (2, 4, 32) == (2, model.config.image_seq_length, 32)


def test_language_model_logits_are_unchanged_and_padding_is_masked():
    tok = tokenizer("sp")
    llm = llama(tok)
    ids = torch.tensor([tok("a red circle on the table").input_ids])
    expected = llm(ids).logits.clone()
    model = build_llava(siglip(), llm, tok)
    torch.testing.assert_close(model(ids).logits, expected)
    padded = torch.cat([ids, torch.full((1, 3), 5)], dim=1)
    mask = (torch.arange(padded.shape[1]) < ids.shape[1]).long()[None]
    both = model(padded.repeat(2, 1), attention_mask=torch.cat([mask, torch.ones_like(mask)])).logits
    torch.testing.assert_close(both[0, : ids.shape[1]], expected[0])


def test_image_token_is_added_once_and_new_rows_are_the_mean():
    tok = tokenizer("sp", image=False)
    llm = llama(tok)
    old, size = llm.model.embed_tokens.weight.detach().clone(), len(tok)
    model = build_llava(siglip(), llm, tok)
    assert len(tok) == size + 1 == model.get_input_embeddings().num_embeddings == model.config.text_config.vocab_size
    assert tok("<image>", add_special_tokens=False).input_ids == [model.config.image_token_id] == [size]
    new = model.get_input_embeddings().weight
    torch.testing.assert_close(new[:-1], old)
    torch.testing.assert_close(new[-1], old.mean(dim=0))
    assert model.lm_head.weight.shape[0] == size + 1
    build_llava(siglip(), llama(tok), tok)
    assert len(tok) == size + 1


def test_tied_heads_stay_tied_through_saving(tmp_path):
    tok = tokenizer("sp", image=False)
    model = build_llava(siglip(), llama(tok, tie_word_embeddings=True), tok)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    save_mllm(model, processor(tok), tmp_path, meta={})
    again, _, _ = load_mllm(tmp_path)
    assert again.lm_head.weight is again.get_input_embeddings().weight
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)


def test_gpt2_with_its_other_names_survives_saving(tmp_path):
    model, tok = make("bpe", llm=gpt2)
    save_mllm(model, processor(tok), tmp_path, meta={})
    again, _, _ = load_mllm(tmp_path)
    ids = torch.tensor([tok("a red circle").input_ids])
    assert torch.equal(again(ids).logits, model(ids).logits)


def processor(tok, template="demo", **more):
    return build_processor(tok, image_size=32, patch_size=16, mean=MEAN, std=STD, template=template, **more)


@pytest.mark.parametrize(("tower", "select", "class_token"), [(siglip, "full", False), (clip, "default", True)])
def test_folder_opens_without_mmkit_with_equal_logits(tower, select, class_token, tmp_path):
    model, tok = make(vision=tower(), feature_select=select)
    made = processor(tok, feature_select=select, class_token=class_token)
    save_mllm(model, made, tmp_path, meta={"encoder": {"path": "encoder", "fingerprint": "f"}})
    pixels = np.random.default_rng(0).integers(0, 255, (48, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    # The same number of threads on both sides: another one sums in another order, and the last bit may differ.
    env = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    subprocess.run([sys.executable, "-c", OPEN_WITHOUT_MMKIT, str(tmp_path)], check=True, cwd=tmp_path, env=env)
    out = torch.load(tmp_path / "out.pt")
    image_id = model.config.image_token_id
    ids = encode_prompt("What is this?", tok, "demo", num_images=1, tokens_per_image=4, image_token_id=image_id)
    assert out["ids"].tolist() == [ids]
    with torch.no_grad():
        assert torch.equal(model(out["ids"], pixel_values=out["pixels"]).logits, out["logits"])
    again, made2, meta = load_mllm(tmp_path)
    assert meta == {"kind": "mllm", "encoder": {"path": "encoder", "fingerprint": "f"}}
    assert not again.training
    assert torch.equal(made2(images=Image.fromarray(pixels), text="<image>", return_tensors="pt")["pixel_values"], out["pixels"])


def test_processor_uses_the_encoders_own_mean_and_std():
    made = processor(tokenizer("sp"))
    flat = Image.new("RGB", (20, 50), (102, 204, 51))
    pixels = made.image_processor(flat, return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 32, 32)
    expected = (torch.tensor([102, 204, 51]) / 255 - torch.tensor(MEAN)) / torch.tensor(STD)
    torch.testing.assert_close(pixels[0], expected[:, None, None].expand(3, 32, 32).float())
    assert made.tokenizer.padding_side == "left"


@pytest.mark.parametrize("tune", ["projector", "full"])
def test_loss_and_gradients_equal_transformers_own(tune):
    model, tok = make()
    freeze_for(model, tune)
    ids, mask, labels, pixels = batch(model, tok)
    loss, count = llava_loss_sum(model, ids, mask, labels, pixels)
    loss.backward()
    got = grads(model)
    model.zero_grad()
    twin = model(input_ids=ids, attention_mask=mask, labels=labels, pixel_values=pixels).loss * count
    twin.backward()
    assert count == (labels[:, 1:] != -100).sum() > 0
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, twin, rtol=1e-5, atol=1e-5)
    expected = grads(model)
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-5, msg=name)


def test_sum_over_rows_is_the_loss_of_the_batch():
    model, tok = make()
    ids, mask, labels, pixels = batch(model, tok)
    whole, count = llava_loss_sum(model, ids, mask, labels, pixels)
    parts = [
        llava_loss_sum(model, ids[:1], mask[:1], labels[:1], pixels[:1]),
        llava_loss_sum(model, ids[1:2], mask[1:2], labels[1:2], None),
        llava_loss_sum(model, ids[2:], mask[2:], labels[2:], pixels[1:]),
    ]
    torch.testing.assert_close(sum(loss for loss, _ in parts), whole, rtol=1e-5, atol=1e-5)
    assert sum(n for _, n in parts) == count


@pytest.mark.parametrize("pixels", [None, torch.zeros(0, 3, 32, 32)])
def test_text_only_batches_give_every_trainable_parameter_a_gradient(pixels):
    model, tok = make()
    freeze_for(model, "full")
    ids, mask, labels, _ = batch(model, tok, ((TURNS[1:], 0),))
    loss, count = llava_loss_sum(model, ids, mask, labels, pixels)
    loss.backward()
    missing = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing
    assert all(not p.grad.any() for p in model.model.multi_modal_projector.parameters())
    twin = model(input_ids=ids, attention_mask=mask, labels=labels).loss * count
    torch.testing.assert_close(loss, twin, rtol=1e-5, atol=1e-5)


def test_a_batch_without_labels_has_loss_zero_and_gradients():
    model, tok = make()
    freeze_for(model, "full")
    ids, mask, labels, pixels = batch(model, tok)
    loss, count = llava_loss_sum(model, ids, mask, torch.full_like(labels, -100), pixels)
    loss.backward()
    assert loss == 0 == count
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.requires_grad)


def test_wrong_number_of_pictures_is_an_error():
    model, tok = make()
    ids, mask, labels, pixels = batch(model, tok)
    with pytest.raises((ValueError, RuntimeError), match=r"[Ii]mage"):
        llava_loss_sum(model, ids, mask, labels, pixels[:1])


def trainable(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


def test_what_trains():
    model, _ = make()
    freeze_for(model, "projector")
    assert trainable(model)
    assert all("multi_modal_projector" in name for name in trainable(model))
    set_train_mode(model)
    assert model.model.multi_modal_projector.training
    assert not model.model.language_model.training
    assert not model.model.vision_tower.training
    freeze_for(model, "full")
    assert not any("vision_tower" in name for name in trainable(model))
    assert {"lm_head.weight", "model.language_model.embed_tokens.weight"} <= trainable(model)
    set_train_mode(model)
    assert model.model.language_model.training
    assert not any(module.training for module in model.model.vision_tower.modules())


def test_lora_is_in_the_language_model_only_and_merges_exactly(tmp_path):
    model, tok = make()
    ids, mask, labels, pixels = batch(model, tok)
    before = llava_loss_sum(model, ids, mask, labels, pixels)[0]
    keys = model.state_dict().keys()
    freeze_for(model, "lora", lora={"r": 4, "alpha": 8, "dropout": 0.0})
    assert has_lora(model)
    names = trainable(model)
    assert all("lora_" in name or "multi_modal_projector" in name for name in names)
    # q, k, v, o, gate, up, down in two layers, two matrices each.
    assert sum("lora_" in name for name in names) == 7 * 2 * 2
    assert not any("lora_" in name and ("vision_tower" in name or "lm_head" in name) for name in names)
    torch.testing.assert_close(llava_loss_sum(model, ids, mask, labels, pixels)[0], before)
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(3):
        optimiser.zero_grad()
        loss, count = llava_loss_sum(model, ids, mask, labels, pixels)
        (loss / count).backward()
        optimiser.step()
    trained = llava_loss_sum(model, ids, mask, labels, pixels)[0]
    assert trained < before
    with pytest.raises(ValueError, match="merge_lora"):
        save_mllm(model, processor(tok), tmp_path, meta={})
    merge_lora(model)
    assert not has_lora(model)
    assert model.state_dict().keys() == keys
    torch.testing.assert_close(llava_loss_sum(model, ids, mask, labels, pixels)[0], trained, rtol=1e-4, atol=1e-4)
    save_mllm(model, processor(tok), tmp_path, meta={})
    again, _, _ = load_mllm(tmp_path)
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_batched_generation_with_left_padding_equals_one_by_one():
    model, tok = make()
    made = processor(tok)
    pictures = [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue")]
    texts = ["USER: <image>\nWhat is this? ASSISTANT:", "USER: <image>\nhow many red circle ASSISTANT:"]
    both = made(images=pictures, text=texts, padding=True, return_tensors="pt")
    out = model.generate(**both, max_new_tokens=6, do_sample=False)[:, both["input_ids"].shape[1] :]
    for row, picture, text in zip(out, pictures, texts, strict=True):
        one = made(images=[picture], text=[text], return_tensors="pt")
        alone = model.generate(**one, max_new_tokens=6, do_sample=False)[0, one["input_ids"].shape[1] :]
        assert torch.equal(row[: len(alone)], alone)


def test_same_seed_same_projector():
    first, again, other = (make(seed=s)[0].model.multi_modal_projector.linear_1.weight for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(
    ("more", "match"),
    [
        ({"projector": "mlp"}, "use mlp2x_gelu, linear, pixel_shuffle"),
        ({"projector": "pixel_shuffle", "pixel_shuffle": 3}, "2 x 2 patches cannot be joined by 3 x 3"),
        ({"projector": "pixel_shuffle", "pixel_shuffle": 4}, "2 x 2 patches cannot be joined by 4 x 4; .* multiple of 64"),
        ({"projector": "pixel_shuffle", "vision": clip(), "feature_select": "full"}, "class token has no place"),
        ({"feature_select": "patch"}, "full or default"),
        ({"feature_select": "default"}, "class token"),
        ({"feature_layer": -9}, "3 blocks"),
    ],
)
def test_impossible_choices_are_named(more, match):
    with pytest.raises(InputError, match=match):
        make(**more)


def test_unknown_tune_and_lora_settings_are_named():
    model, _ = make()
    with pytest.raises(InputError, match="projector, full or lora"):
        freeze_for(model, "all")
    with pytest.raises(InputError, match="rank"):
        freeze_for(model, "lora", lora={"rank": 4})
    with pytest.raises(InputError, match="tune"):
        freeze_for(model, "full", lora={"r": 4})


def test_a_frozen_llm_recomputes_activations_when_asked():
    model, _ = make()
    freeze_for(model, "projector")
    set_train_mode(model)
    assert not model.model.language_model.training
    model.gradient_checkpointing_enable({"use_reentrant": False})
    set_train_mode(model)
    layers = model.model.language_model.layers
    assert all(layer.training and layer.gradient_checkpointing for layer in layers)


def test_a_language_model_that_would_be_opened_as_another_class_is_refused():
    tok = tokenizer("sp", image=False)
    llm = llama(tok)
    llm.model.__class__ = type("OtherModel", (type(llm.model),), {})
    with pytest.raises(InputError, match="is built on OtherModel, but transformers would open the product with LlamaModel"):
        build_llava(siglip(), llm, tok)


def test_a_refused_choice_leaves_the_parts_as_they_were():
    tok = tokenizer("sp", image=False)
    llm, size = llama(tok), len(tok)
    with pytest.raises(InputError, match="3 blocks"):
        build_llava(siglip(), llm, tok, feature_layer=-9)
    assert len(tok) == size == llm.get_input_embeddings().num_embeddings
