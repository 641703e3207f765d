"""Every pair of tower and language model, saved and opened in a process without mmkit; what vLLM's loader expects to find."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from encoders.helpers import tiny_encoder
from PIL import Image
from safetensors import safe_open
from transformers import GenerationConfig

from mmkit.data.conversations import encode_conversation, encode_prompt, stop_tokens
from mmkit.encoders import build_encoder
from mmkit.models.adapters import freeze_for
from mmkit.models.generation import add_stop_tokens, stop_ids
from mmkit.models.inference import Mllm
from mmkit.models.llava import build_llava, llava_loss_sum, load_mllm, save_mllm
from mmkit.models.llm import build_llm
from mmkit.models.processor import processor_for
from mmkit.models.projectors import image_size, num_image_tokens
from mmkit.models.towers import vision_tower

from .tiny import clip, gpt2, llama, siglip, tokenizer

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
QUESTION = "What is this?"


# Weights large enough that a tiny model's words depend on what it is shown.
WIDE = {"max_position_embeddings": 256, "initializer_range": 0.3}


def language_model(kind: str, **more: Any) -> Callable[[Any], Any]:
    """A tiny random model of a family; two key-value heads for four query heads."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = {"model_type": kind, **sizes, "num_key_value_heads": 2, **WIDE, **more}
    return lambda tok: build_llm(None, config=config, tokenizer=tok)


LANGUAGE_MODELS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "llama": ("sp", lambda tok: llama(tok, **WIDE)),
    "smollm: a tied llama, byte-level tokens": ("bpe", lambda tok: llama(tok, tie_word_embeddings=True, **WIDE)),
    "mistral, window of 24": ("sp", language_model("mistral", sliding_window=24)),
    "qwen2, tied": ("bpe", language_model("qwen2", tie_word_embeddings=True)),
    "qwen2, window in the upper layer": (
        "bpe",
        language_model("qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=1),
    ),
    "qwen3, wide heads, untied": ("bpe", language_model("qwen3", head_dim=16)),
    "gpt2": ("bpe", lambda tok: gpt2(tok, initializer_range=0.3)),
}
TOWERS: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "clip": (clip, {}),
    "clip, class token kept": (clip, {"feature_select": "full"}),
    "dinov2": (lambda: vision_tower(tiny_encoder(layout="native", init_values=0.1)), {}),
    "siglip, last block": (siglip, {"feature_layer": -1}),
    "linear": (siglip, {"projector": "linear"}),
    "pixel shuffle": (lambda: siglip(size=64), {"projector": "pixel_shuffle"}),
    "pixel shuffle by 4 behind a class token": (
        lambda: vision_tower(tiny_encoder(layout="native", pre_norm=True)),
        {"projector": "pixel_shuffle", "pixel_shuffle": 4},
    ),
    "convnext": (
        lambda: vision_tower(build_encoder("convnext_atto", image_size=64, seed=0).eval()),
        {"feature_layer": -1},
    ),
}
OPEN_WITHOUT_MMKIT = """
import sys
sys.modules["mmkit"] = None
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
for folder in sys.argv[2:]:
    model, info = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    processor = AutoProcessor.from_pretrained(folder)
    content = [{"type": "image"}, {"type": "text", "text": "What is this?"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    batch = processor(images=[Image.open(sys.argv[1])], text=[text], return_tensors="pt")
    with torch.no_grad():
        logits = model(**batch).logits
        made = model.generate(**batch, max_new_tokens=4, do_sample=False)
    keys = {k: sorted(v) for k, v in info.items() if k in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    found = {"ids": batch["input_ids"], "pixels": batch["pixel_values"], "logits": logits, "made": made, "keys": keys}
    torch.save({**found, "eos": model.generation_config.eos_token_id, "class": type(model).__name__}, folder + "/out.pt")
"""


def assemble(kind: str, llm: Callable[[Any], Any], vision: Any, **more: Any) -> tuple[Any, Any]:
    tok = tokenizer(kind, image=False)
    return build_llava(vision, llm(tok), tok, **more), tok


def cases() -> dict[str, Callable[[], tuple[Any, Any]]]:
    made: dict[str, Callable[[], tuple[Any, Any]]] = {}
    for name, (kind, llm) in LANGUAGE_MODELS.items():
        made[name] = lambda kind=kind, llm=llm: assemble(kind, llm, siglip())
    for name, (tower, more) in TOWERS.items():
        made[name] = lambda tower=tower, more=more: assemble("sp", lambda tok: llama(tok, **WIDE), tower(), **more)
    return made


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, Any, Path, dict[str, Any]]]:
    """All cases: model, tokenizer, folder, and what a fresh process without mmkit made of the folder."""
    root = tmp_path_factory.mktemp("assembled")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 40, 3), dtype=np.uint8)).save(root / "picture.png")
    models = {}
    for number, (name, make) in enumerate(cases().items()):
        model, tok = make()
        processor = processor_for(model, tok, mean=MEAN, std=STD, template="demo")
        config = model.config
        meta = {
            "template": "demo",
            "image_fit": "squash",
            "image_size": image_size(config.vision_config),
            "mean": MEAN,
            "std": STD,
        }
        save_mllm(model, processor, root / str(number), meta={**meta, "num_image_tokens": num_image_tokens(config)})
        models[name] = (model, tok, root / str(number))
    # The same number of threads on both sides: another one sums in another order, and the last bit may differ.
    env = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    folders = [str(folder) for *_, folder in models.values()]
    # One process for all, since importing takes most of its time.
    command = [sys.executable, "-c", OPEN_WITHOUT_MMKIT, str(root / "picture.png"), *folders]
    subprocess.run(command, check=True, cwd=root, env=env)
    return {name: (*rest, torch.load(rest[-1] / "out.pt")) for name, rest in models.items()}


@pytest.mark.parametrize("name", cases())
def test_a_stranger_gets_the_same_logits_and_words(name: str, opened: dict[str, Any]) -> None:
    model, tok, _, out = opened[name]
    assert out["class"] == type(model).__name__
    assert not any(out["keys"].values()), "weights were left out or made up"
    # The processor's expansion is what training counted, and its prompt what training encodes.
    count = num_image_tokens(model.config)
    image_id = model.config.image_token_id
    assert count == int((out["ids"] == image_id).sum()) == model.config.image_seq_length
    ids = encode_prompt(QUESTION, tok, "demo", num_images=1, tokens_per_image=count, image_token_id=image_id)
    assert out["ids"].tolist() == [ids]
    with torch.no_grad():
        torch.testing.assert_close(model(out["ids"], pixel_values=out["pixels"]).logits, out["logits"], rtol=0, atol=1e-6)
        made = model.generate(input_ids=out["ids"], pixel_values=out["pixels"], max_new_tokens=4, do_sample=False)
    assert torch.equal(made, out["made"])


@pytest.mark.parametrize("name", cases())
def test_pictures_matter_and_loading_keeps_every_weight(name: str, opened: dict[str, Any]) -> None:
    model, _, folder, out = opened[name]
    again, _, _ = load_mllm(folder)
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items())
    assert (
        again.lm_head.weight.data_ptr() == again.get_input_embeddings().weight.data_ptr() or not model.config.tie_word_embeddings
    )
    with torch.no_grad():
        # The last position sees the picture through the projector alone.
        blank = model(out["ids"], pixel_values=torch.zeros_like(out["pixels"])).logits[:, -1]
    assert not torch.allclose(blank, out["logits"][:, -1], atol=1e-5)


@pytest.mark.parametrize("name", cases())
def test_batch_1_equals_batch_n_in_every_assembly(name: str, opened: dict[str, Any]) -> None:
    """Token by token in fp32: learnt positions (GPT-2), windows and rotary positions must not feel the padding on the left."""
    mllm = Mllm(str(opened[name][2]), torch.device("cpu"))
    noise = np.random.default_rng(1).integers(0, 256, (3, 48, 40, 3), dtype=np.uint8)
    pictures = [Image.fromarray(values) for values in noise]
    rows: list[Any] = [pictures[0], None, pictures[1], pictures[1:]]
    questions = ["hi", "How many red circles are on the table near the small dog?", "What is this?", "two <image> or <image>?"]
    together = mllm.answer_ids(rows, questions, max_new_tokens=6)
    stops = stop_ids(mllm.model)
    for row, question, ids in zip(rows, questions, together, strict=True):
        alone = mllm.answer_ids([row], [question], max_new_tokens=6)[0].tolist()
        # Up to and with the end token: after it the batch pads.
        length = next((i + 1 for i, token in enumerate(alone) if token in stops), len(alone))
        assert ids.tolist()[:length] == alone[:length]
    assert len({tuple(row.tolist()) for row in together}) > 1, "all rows say the same, so nothing was told apart"


# What vllm/model_executor/models/llava.py (commit 35d3c24) reads and builds, written down here since vLLM is not installed: the
# top-level architecture; text_config.architectures, by which it builds the language model; the tower by the class of
# vision_config; and weights under `vision_tower.`, `multi_modal_projector.`, `language_model.`, after this mapping of prefixes.
VLLM_PREFIXES = {
    "model.language_model.": "language_model.model.",
    "model.vision_tower.": "vision_tower.",
    "model.multi_modal_projector.": "multi_modal_projector.",
    "lm_head.": "language_model.lm_head.",
}
# Names in its activation registry (vllm/model_executor/layers/activation.py); another one is a ValueError.
VLLM_ACTIVATIONS = {
    "gelu",
    "gelu_fast",
    "gelu_new",
    "gelu_pytorch_tanh",
    "relu",
    "relu2",
    "silu",
    "quick_gelu",
    "tanh",
    "sigmoid",
}


def vllm_shapes(config: dict[str, Any]) -> dict[str, list[int]]:
    """Parameters that vLLM's model has, under the names of its checkpoints (its fused qkv and gate-up taken apart)."""
    vision, text = config["vision_config"], config["text_config"]
    width, hidden, llm = vision["hidden_size"], vision["intermediate_size"], text["hidden_size"]
    tower, clip_tower = "vision_tower.vision_model.", vision["model_type"] == "clip_vision_model"
    patches = (vision["image_size"] // vision["patch_size"]) ** 2
    shapes = {
        f"{tower}embeddings.patch_embedding.weight": [width, 3, vision["patch_size"], vision["patch_size"]],
        f"{tower}embeddings.position_embedding.weight": [patches + clip_tower, width],
    }
    if clip_tower:
        shapes[f"{tower}embeddings.class_embedding"] = [width]
        shapes |= {f"{tower}pre_layrnorm.{part}": [width] for part in ("weight", "bias")}
    else:
        shapes[f"{tower}embeddings.patch_embedding.bias"] = [width]
    shapes |= {f"{tower}post_layernorm.{part}": [width] for part in ("weight", "bias")}
    for layer in range(vision["num_hidden_layers"]):
        at = f"{tower}encoder.layers.{layer}."
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= {f"{at}self_attn.{part}.weight": [width, width], f"{at}self_attn.{part}.bias": [width]}
        shapes |= {f"{at}mlp.fc1.weight": [hidden, width], f"{at}mlp.fc1.bias": [hidden]}
        shapes |= {f"{at}mlp.fc2.weight": [width, hidden], f"{at}mlp.fc2.bias": [width]}
        shapes |= {f"{at}layer_norm{n}.{part}": [width] for n in (1, 2) for part in ("weight", "bias")}
    for name, inside in (("linear_1", width), ("linear_2", llm)):
        shapes |= {f"multi_modal_projector.{name}.weight": [llm, inside], f"multi_modal_projector.{name}.bias": [llm]}
    at, heads, kv = "language_model.model.", text["num_attention_heads"], text["num_key_value_heads"]
    head = text["head_dim"]
    shapes |= {f"{at}embed_tokens.weight": [text["vocab_size"], llm], f"{at}norm.weight": [llm]}
    shapes["language_model.lm_head.weight"] = [text["vocab_size"], llm]
    for layer in range(text["num_hidden_layers"]):
        block = f"{at}layers.{layer}."
        for part, rows in (("q_proj", heads * head), ("k_proj", kv * head), ("v_proj", kv * head)):
            shapes[f"{block}self_attn.{part}.weight"] = [rows, llm]
        shapes[f"{block}self_attn.o_proj.weight"] = [llm, heads * head]
        for part in ("gate_proj", "up_proj"):
            shapes[f"{block}mlp.{part}.weight"] = [text["intermediate_size"], llm]
        shapes[f"{block}mlp.down_proj.weight"] = [llm, text["intermediate_size"]]
        shapes |= {f"{block}{norm}.weight": [llm] for norm in ("input_layernorm", "post_attention_layernorm")}
    return shapes


@pytest.mark.parametrize("name", ["llama", "clip"])
def test_vllms_loader_finds_every_weight_and_nothing_else(name: str, opened: dict[str, Any]) -> None:
    _, tok, folder, _ = opened[name]
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["LlavaForConditionalGeneration"]
    # Without it vLLM does not know which language model to build.
    assert config["text_config"]["architectures"] == ["LlamaForCausalLM"]
    assert config["vision_config"]["model_type"] in ("clip_vision_model", "siglip_vision_model")
    assert isinstance(config["vision_feature_layer"], int) and config["multimodal_projector_bias"] is True
    # Image tokens: the grid, plus one for CLIP's class token, minus one under "default".
    assert config["vision_feature_select_strategy"] == ("default" if name == "clip" else "full")
    assert config["image_token_index"] == tok.convert_tokens_to_ids("<image>")
    assert {config["projector_hidden_act"], config["vision_config"]["hidden_act"]} <= VLLM_ACTIVATIONS
    processor = json.loads((folder / "processor_config.json").read_text())
    assert (processor["processor_class"], processor["image_token"]) == ("LlavaProcessor", "<image>")
    with safe_open(folder / "model.safetensors", framework="pt") as weights:
        found = {}
        for key in weights.keys():  # noqa: SIM118
            prefix = next((old for old in VLLM_PREFIXES if key.startswith(old)), "")
            found[VLLM_PREFIXES.get(prefix, "") + key[len(prefix) :]] = weights.get_slice(key).get_shape()
    assert found == vllm_shapes(config)


def test_a_tied_head_is_not_written_twice(opened: dict[str, Any]) -> None:
    _, _, folder, _ = opened["qwen2, tied"]
    config = json.loads((folder / "config.json").read_text())
    assert config["tie_word_embeddings"] is config["text_config"]["tie_word_embeddings"] is True
    with safe_open(folder / "model.safetensors", framework="pt") as weights:
        assert not [key for key in weights.keys() if "lm_head" in key]  # noqa: SIM118


@pytest.mark.parametrize(("kind", "llm", "expected"), [("sp", llama, "<unk>"), ("bpe", gpt2, "<|endoftext|>")])
def test_a_tokenizer_without_padding_gets_unk_or_the_end_token(kind: str, llm: Any, expected: str, tmp_path: Path) -> None:
    tok = tokenizer(kind, image=False)
    tok.pad_token = None
    if kind == "bpe":
        tok.unk_token = None
    model = build_llava(siglip(), llm(tok), tok)
    assert tok.pad_token == expected and model.generation_config.pad_token_id == tok.pad_token_id
    assert model.get_input_embeddings().num_embeddings == len(tok), "no row for padding"
    save_mllm(model, processor_for(model, tok, mean=MEAN, std=STD, template="demo"), tmp_path, meta={})
    again, processor, _ = load_mllm(tmp_path)
    assert processor.tokenizer.padding_side == "left"
    assert processor.tokenizer.pad_token == expected and again.generation_config.pad_token_id == tok.pad_token_id
    # The padding of a batch changes no row, though its id is one that also ends answers.
    texts = [f"USER: <image>\n{question} ASSISTANT:" for question in ("hi", "How many red circles are on the table?")]
    pictures = [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue")]
    both = processor(images=pictures, text=texts, padding=True, return_tensors="pt")
    alone = processor(images=pictures[:1], text=texts[:1], return_tensors="pt")
    assert both["attention_mask"][0].sum() == alone["input_ids"].shape[1] < both["input_ids"].shape[1]
    # Positions as generate counts them, from the mask.
    places = (both["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        expected_logits = again(**alone).logits[0, -1]
        torch.testing.assert_close(again(**both, position_ids=places).logits[0, -1], expected_logits, rtol=0, atol=1e-5)


def test_every_end_token_of_an_instruct_model_is_kept_and_written(tmp_path: Path) -> None:
    """Llama 3 ends an answer with <|eot_id|>, its tokenizer's end token is another one."""
    tok = tokenizer("sp", image=False, chatml=True)
    llm = llama(tok)
    llm.generation_config.eos_token_id = [7, 9]
    model = build_llava(siglip(), llm, tok)
    assert stop_ids(model) == [7, 9, tok.eos_token_id]
    end = tok.convert_tokens_to_ids("<|im_end|>")
    assert stop_tokens("chatml", tok) == [end, tok.eos_token_id]
    assert stop_tokens("vicuna_v1", tok) == stop_tokens("plain", tok) == [tok.eos_token_id]
    for _ in range(2):
        add_stop_tokens(model, stop_tokens("chatml", tok))
    save_mllm(model, processor_for(model, tok, mean=MEAN, std=STD, template="chatml"), tmp_path, meta={})
    assert json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"] == [7, 9, tok.eos_token_id, end]
    plain, tok = assemble("sp", llama, siglip())
    assert plain.generation_config.eos_token_id == tok.eos_token_id


@pytest.mark.parametrize("sampling", [False, True])
def test_published_sampling_settings_do_not_lose_the_product(sampling: bool, tmp_path: Path) -> None:
    """Vicuna's own file: transformers refuses to save it once anything in it has changed."""
    tok = tokenizer("sp", image=False)
    llm = llama(tok)
    llm.generation_config = GenerationConfig(eos_token_id=2, temperature=0.9, top_p=0.6, do_sample=sampling or None)
    model = build_llava(siglip(), llm, tok)
    add_stop_tokens(model, [5])
    save_mllm(model, processor_for(model, tok, mean=MEAN, std=STD, template="demo"), tmp_path, meta={})
    saved = json.loads((tmp_path / "generation_config.json").read_text())
    # What a model that is meant to be sampled says about it, stays.
    assert saved.get("temperature") == (0.9 if sampling else None)
    assert saved["eos_token_id"] == [2, 5]


@pytest.mark.parametrize("name", cases())
def test_loss_and_gradients_of_every_assembly_equal_transformers_own(name: str) -> None:
    """A row with a picture, one of text alone, padded on the right; and a batch without any picture."""
    model, tok = cases()[name]()
    freeze_for(model, "projector")
    count = num_image_tokens(model.config)
    turns = [[("<image>\nWhat is this?", "a red circle")], [("how many", "three")]]
    how = {"tokens_per_image": count, "image_token_id": model.config.image_token_id, "max_length": 120}
    rows = [encode_conversation(t, tok, "demo", num_images=n, **how) for t, n in zip(turns, (1, 0), strict=True)]
    width = max(len(row.input_ids) for row in rows)
    ids = torch.tensor([row.input_ids + [0] * (width - len(row.input_ids)) for row in rows])
    labels = torch.tensor([row.labels + [-100] * (width - len(row.labels)) for row in rows])
    mask = torch.tensor([[1] * len(row.input_ids) + [0] * (width - len(row.input_ids)) for row in rows])
    size = image_size(model.config.vision_config)
    pixels = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    loss, supervised = llava_loss_sum(model, ids, mask, labels, pixels)
    loss.backward()
    found = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    twin = model(input_ids=ids, attention_mask=mask, labels=labels, pixel_values=pixels).loss * supervised
    twin.backward()
    torch.testing.assert_close(loss, twin, rtol=1e-5, atol=1e-5)
    assert found and all("multi_modal_projector" in key for key in found)
    for key, gradient in found.items():
        torch.testing.assert_close(gradient, model.get_parameter(key).grad, rtol=1e-4, atol=1e-5, msg=key)
    # Without a picture: every weight that trains still gets a gradient, of zeros, or processes would wait for each other.
    model.zero_grad(set_to_none=True)
    llava_loss_sum(model, ids[1:], mask[1:], labels[1:], None)[0].backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad is not None and not p.grad.any() for p in trained)
