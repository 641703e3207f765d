"""LLaVA folders without an mmkit.json: exported ones answer as their runs do, others as transformers prepares them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pipeline
import pytest
import torch
from PIL import Image
from transformers import (
    AutoProcessor,
    CLIPImageProcessor,
    LlavaImageProcessor,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    LlavaProcessor,
    SiglipImageProcessor,
)

import mmkit
from mmkit.data.conversations import encode_prompt
from mmkit.data.images import fit_square
from mmkit.encoders.vit import build_encoder, normalise
from mmkit.errors import InputError
from mmkit.models.export import export_llava
from mmkit.models.inference import Mllm
from mmkit.models.llava import build_llava, save_mllm
from mmkit.models.processor import processor_for
from mmkit.models.projectors import num_image_tokens
from mmkit.models.published import open_mllm
from mmkit.models.towers import vision_tower

from .tiny import clip, gpt2, llama, siglip, tokenizer

QUESTIONS = ["What?", "How many red circles are there?", "Is it </s> blue?", "Compare."]
# As the published llava-hf folders have it: pictures first, each text followed by a space, the next role by its name.
PARTS = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}{% endif %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}{% generation %}{{ part['text'] + ' ' }}"
    "{% endgeneration %}{% endfor %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
TEXTS = (
    "{{ bos_token }}{% for message in messages %}{{ '[' + message['role'] + '] ' + message['content'] + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
)


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    return [Image.open(path).convert("RGB") for path in pipeline.pictures()[:3]] + [noise(50, 31)]


def published(folder: Path, *, image=None, template: str | None = PARTS, llm=llama, tower=clip, kind: str = "sp", **more) -> Path:
    """A folder as other people's software writes it: CLIP tower with its class token dropped, Vicuna's kind of tokenizer."""
    tok = tokenizer(kind)
    model = build_llava(tower(), llm(tok), tok)
    image = image or CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    number = {"num_additional_image_tokens": 1} if tower is clip else {}
    select = model.config.vision_feature_select_strategy
    processor = LlavaProcessor(
        image, tok, patch_size=16, vision_feature_select_strategy=select, chat_template=template, **number, **more
    )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("stage", ["align", "finetune", "lora"])
def test_an_exported_run_answers_as_the_run(stage, tmp_path, pictures):
    run = pipeline.trained(stage)
    export_llava(str(run), tmp_path / "out")
    ours, theirs = mmkit.load(run), mmkit.load(tmp_path / "out")
    assert type(theirs) is Mllm
    # All that answers depend on besides the weights.
    known = ("mean", "std", "image_size", "image_fit", "num_image_tokens", "template")
    assert {key: theirs.meta[key] for key in known} == {key: ours.meta[key] for key in known}
    for way in ({}, {"num_beams": 2}, {"decoding": "sample", "seed": 3}):
        found = [opened.answer_ids(pictures, QUESTIONS, max_new_tokens=8, **way).tolist() for opened in (ours, theirs)]
        assert found[0] == found[1]
    rows = [pictures[:2], None]
    assert theirs.predict(rows, ["Both?", "Hello"], max_new_tokens=8) == ours.predict(rows, ["Both?", "Hello"], max_new_tokens=8)


@pytest.mark.parametrize("more", [["image_fit=pad"], ["image_fit=crop", "template=vicuna_v1"]], ids=["pad", "crop"])
def test_the_fit_and_the_template_come_back_from_the_processor(more, tmp_path, pictures):
    run = tmp_path / "run"
    assert pipeline.mmkit(*pipeline.finetune(run, *more, "train.steps=1")) == 0
    export_llava(str(run), tmp_path / "out")
    ours, theirs = mmkit.load(run), mmkit.load(tmp_path / "out")
    assert theirs.meta["image_fit"] == more[0].partition("=")[2] and theirs.meta["template"] == ours.meta["template"]
    assert theirs.predict(pictures, QUESTIONS, max_new_tokens=8) == ours.predict(pictures, QUESTIONS, max_new_tokens=8)


def test_a_run_with_its_llms_own_template(tmp_path, pictures):
    made = tokenizer("sp", image=False, chatml=True)
    made.chat_template = (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
    made.save_pretrained(tmp_path / "tokenizer")
    run = tmp_path / "run"
    more = [f"llm.tokenizer={tmp_path / 'tokenizer'}", "template=chat", "train.steps=1"]
    assert pipeline.mmkit(*pipeline.align(run, *more)) == 0
    export_llava(str(run), tmp_path / "out")
    ours, theirs = mmkit.load(run), mmkit.load(tmp_path / "out")
    assert theirs.meta["template"] == "chat"
    assert theirs.predict(pictures, QUESTIONS, max_new_tokens=8) == ours.predict(pictures, QUESTIONS, max_new_tokens=8)


def test_on_the_command_line_and_in_an_evaluation(tmp_path, capsys):
    run, world = pipeline.trained("finetune"), pipeline.root() / "world"
    export_llava(str(run), tmp_path / "out")
    said = []
    for model in (run, tmp_path / "out"):
        capsys.readouterr()
        asked = ["predict", model, pipeline.pictures()[0], "--prompt", "What colour is it?", "--max-new-tokens", "9"]
        assert pipeline.mmkit(*asked) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]
    task = f"{{task: coco-caption, annotations: {world}/captions_heldout.json, image_root: {world}/images/heldout}}"
    found = []
    for name, model in (("a", run), ("b", tmp_path / "out")):
        words = ["eval", "demo-eval-mllm", f"run={tmp_path / name}", f"model={model}", f"tasks=[{task}]", "system=x"]
        assert pipeline.mmkit(*words) == 0
        found.append(json.loads((tmp_path / name / "results" / "coco-caption.json").read_text()))
    assert found[0] == found[1]


IMAGE = {"type": "image"}


@pytest.mark.parametrize("template", [PARTS, TEXTS], ids=["parts", "texts"])
@pytest.mark.parametrize("kind", ["sp", "bpe"])
def test_prompts_are_those_of_the_processor(template, kind, tmp_path):
    folder = published(
        tmp_path / "m", template=template.replace("</s>", "<end>"), kind=kind, llm=gpt2 if kind == "bpe" else llama
    )
    _, processor, meta = open_mllm(folder)
    for count, question in ((1, "What is this?"), (2, "Which is red?"), (0, "It's 3, not 12!")):
        text = {"type": "text", "text": question}
        content = [IMAGE] * count + [text]
        if template is TEXTS:
            content = "<image>\n" * count + question
        rendered = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        batch = processor(text=rendered.removeprefix("<s>" if kind == "sp" else ""), images=[noise(40, 40)] * count or None)
        wanted = np.asarray(batch["input_ids"]).ravel().tolist()
        common = {"tokens_per_image": meta["num_image_tokens"], "image_token_id": processor.image_token_id}
        assert encode_prompt(question, processor.tokenizer, meta["template"], num_images=count, **common) == wanted
    # Control tokens spelt out in a question are text, unlike there; the answer cannot end for them.
    end = processor.tokenizer.eos_token_id
    ids = encode_prompt(f"a {processor.tokenizer.eos_token} b", processor.tokenizer, meta["template"], num_images=0, **common)
    assert ids.count(end) <= (template is TEXTS and kind == "bpe" and ids[:1] == [end])


def test_answers_and_pictures_are_those_of_transformers(tmp_path):
    folder = published(tmp_path / "m")
    opened = mmkit.load(folder)
    processor = AutoProcessor.from_pretrained(folder)
    # Square ones: the resize itself differs by rounding only.
    shown, questions = [noise(64, 64), noise(48, 48, 1)], ["What is this?", "How many dogs?"]
    found = opened.answer_ids(shown, questions, max_new_tokens=10)
    for picture, question, row in zip(shown, questions, found.tolist(), strict=True):
        chat = [{"role": "user", "content": [IMAGE, {"type": "text", "text": question}]}]
        batch = processor(
            text=processor.apply_chat_template(chat, add_generation_prompt=True), images=[picture], return_tensors="pt"
        )
        square = torch.from_numpy(fit_square(picture, opened.meta["image_size"], fit=opened.meta["image_fit"]))[None]
        pixels = normalise(square, *(torch.tensor(opened.meta[name]).view(1, 3, 1, 1) for name in ("mean", "std")))
        assert (pixels - batch["pixel_values"]).abs().max() < 0.05
        out = opened.model.generate(**{**batch, "pixel_values": pixels}, max_new_tokens=10, do_sample=False)
        answer = out[0, batch["input_ids"].shape[1] :].tolist()
        assert row[: len(answer)] == answer


@pytest.mark.parametrize(
    ("image", "size", "fit"),
    [
        (CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}), 32, "crop"),
        (SiglipImageProcessor(size={"height": 32, "width": 32}), 32, "squash"),
        (LlavaImageProcessor(do_pad=True, size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}), 32, "pad"),
        (LlavaImageProcessor(do_pad=False, size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}), 32, "crop"),
    ],
)
def test_fits_by_the_processors_settings(image, size, fit, tmp_path):
    meta = open_mllm(published(tmp_path / "m", image=image))[2]
    assert (meta["image_size"], meta["image_fit"], meta["num_image_tokens"]) == (size, fit, 4)
    assert meta["mean"] == list(image.image_mean) and meta["std"] == list(image.image_std)


SQUARE = {"height": 32, "width": 32}


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (SiglipImageProcessor(size=SQUARE, resample=2), r"does otherwise than mmkit can \(resample"),
        (SiglipImageProcessor(size=SQUARE, do_normalize=False), r"do_normalize False"),
        (SiglipImageProcessor(size=SQUARE, rescale_factor=1 / 127.5), r"do_rescale True"),
        (SiglipImageProcessor(size={"height": 32, "width": 48}), "makes no square that mmkit knows"),
        (CLIPImageProcessor(size={"shortest_edge": 36}, crop_size=SQUARE), "makes no square that mmkit knows"),
        (SiglipImageProcessor(size={"height": 48, "width": 48}), "pictures of 48 pixels, its vision tower takes 32"),
    ],
)
def test_pictures_that_mmkit_cannot_prepare_are_refused(image, message, tmp_path):
    with pytest.raises(InputError, match=message):
        open_mllm(published(tmp_path / "m", image=image))


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "has no chat template"),
        ("{% for m in messages %}{{ m['content'] | upper }}{% endfor %}", "the processor's chat template"),
        ("{{ raise_exception('no') }}", "refuses it"),
        ("{% for m in messages %}{{ m['role'] }}{% endfor %}", "does not write every text once"),
        ("{% for m in messages %}{% for p in m['content'] %}{{ p['text'] }}{% endfor %}{% endfor %}", "0 pictures in place of 1"),
    ],
)
def test_templates_that_cannot_be_followed_are_refused(template, message, tmp_path):
    with pytest.raises(InputError, match=message):
        open_mllm(published(tmp_path / "m", template=template))


def test_other_folders_are_refused_in_our_words(tmp_path, capsys):
    folder = published(tmp_path / "m")
    tok = AutoProcessor.from_pretrained(folder).tokenizer
    LlavaNextProcessor(LlavaNextImageProcessor(), tok, patch_size=16, chat_template=PARTS).save_pretrained(folder)
    with pytest.raises(InputError, match="its processor is a LlavaNextProcessor, not LLaVA's"):
        open_mllm(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["LlavaNextForConditionalGeneration"]}))
    assert pipeline.mmkit("predict", folder, pipeline.pictures()[0]) == 2
    assert "a model of kind 'LlavaNextForConditionalGeneration' cannot be opened" in capsys.readouterr().err
    bare = tmp_path / "bare"
    shutil.copytree(published(tmp_path / "n"), bare)
    for file in [*bare.glob("*processor*"), *bare.glob("token*")]:
        file.unlink()
    capsys.readouterr()
    assert pipeline.mmkit("predict", bare, pipeline.pictures()[0]) == 2
    said = capsys.readouterr().err
    assert "fetch the whole folder again" in said and said.count("\n") == 1


def test_a_tower_without_class_token_and_a_tokenizer_without_padding(tmp_path, pictures):
    folder = published(tmp_path / "m", tower=siglip, image=SiglipImageProcessor(size=SQUARE), llm=gpt2, kind="bpe")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config.pop("pad_token", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    opened = mmkit.load(folder)
    assert opened.meta["num_image_tokens"] == 4 and opened.tokenizer.pad_token_id is not None
    together = opened.predict(pictures, QUESTIONS, max_new_tokens=5)
    assert together == [opened.predict([p], [q], max_new_tokens=5)[0] for p, q in zip(pictures, QUESTIONS, strict=True)]
    assert torch.is_tensor(opened.model.lm_head.weight)


@pytest.mark.parametrize("part", ["linear", "pixel_shuffle", "convolutional"])
def test_exported_models_of_the_other_classes_open_too(part, tmp_path, pictures):
    size = 64
    tower = siglip(size=size)
    if part == "convolutional":
        tower = vision_tower(build_encoder("resnet10t", image_size=size, seed=0).eval())
    tok = tokenizer("sp", image=False)
    projector = {"projector": part} if part != "convolutional" else {"feature_layer": -1}
    model = build_llava(tower, llama(tok), tok, **projector)
    common = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.25, 0.3]}
    processor = processor_for(model, tok, template="demo", **common)
    meta = {**common, "template": "demo", "image_fit": "squash", "image_size": size}
    meta["num_image_tokens"] = num_image_tokens(model.config)
    save_mllm(model, processor, tmp_path / "model", meta=meta)
    export_llava(str(tmp_path / "model"), tmp_path / "out")
    said = [mmkit.load(tmp_path / name).answer_ids(pictures, QUESTIONS, max_new_tokens=8).tolist() for name in ("model", "out")]
    assert said[0] == said[1]
