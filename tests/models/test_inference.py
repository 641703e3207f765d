from __future__ import annotations

import json
import shutil

import pipeline
import pytest
import torch
from PIL import Image

import mmkit
from mmkit.data.images import mean_colour
from mmkit.errors import InputError
from mmkit.models.generation import add_stop_tokens, stop_ids
from mmkit.models.inference import Captioner, Mllm, Tagger, load_model
from mmkit.models.llava import build_llava, save_mllm
from mmkit.models.processor import processor_for

from .tiny import llama, siglip, tokenizer

MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    return [Image.open(path).convert("RGB") for path in pipeline.pictures()[:4]]


def test_every_kind_is_recognised():
    kinds = {"superclass": Tagger, "clipcap": Captioner, "finetune": Mllm, "lora": Mllm}
    for stage, kind in kinds.items():
        run = pipeline.trained(stage)
        assert type(mmkit.load(run)) is kind and type(load_model(str(run / "model"))) is kind


def test_tags_are_words_with_falling_probabilities(pictures):
    tags = mmkit.load(pipeline.trained("superclass")).predict(pictures, max_new_tokens=3)
    assert len(tags) == 4
    for row in tags:
        values = [float(tag.rpartition(" ")[2]) for tag in row.split(", ")]
        assert len(values) == 3 and values == sorted(values, reverse=True)


def test_features_are_those_of_the_encoder(pictures):
    opened = mmkit.load(pipeline.trained("superclass"))
    features = opened.features(pictures)
    assert features.shape == (4, opened.encoder.width)
    alone = torch.cat([opened.features([p]) for p in pictures])
    assert torch.allclose(features, alone, atol=1e-5)


def test_an_encoder_without_a_head_gives_features_but_no_tags(tmp_path, pictures):
    folder = tmp_path / "encoder"
    shutil.copytree(pipeline.trained("superclass") / "model", folder)
    (folder / "head.safetensors").unlink()
    opened = mmkit.load(folder)
    assert opened.features(pictures).shape[0] == 4
    with pytest.raises(InputError, match="this encoder has no label head"):
        opened.predict(pictures)


SAMPLE = {"decoding": "sample", "temperature": 1.3, "top_k": 100, "seed": 5}


@pytest.mark.parametrize("way", [{}, {"num_beams": 2}, SAMPLE, {"decoding": "paper"}], ids=["greedy", "beam", "sample", "paper"])
def test_captions_do_not_depend_on_the_batch(pictures, way):
    opened = mmkit.load(pipeline.trained("clipcap"))
    together = opened.predict(pictures, max_new_tokens=8, **way)
    assert together == [opened.predict([p], max_new_tokens=8, **way)[0] for p in pictures]
    with pytest.raises(InputError, match="a captioner takes no prompt"):
        opened.predict(pictures, ["What?"] * 4)


@pytest.mark.parametrize("way", [{"num_beams": 1}, {"num_beams": 2}, SAMPLE], ids=["greedy", "beam", "sample"])
def test_answers_do_not_depend_on_the_batch(pictures, way):
    opened = mmkit.load(pipeline.trained("finetune"))
    prompts = ["What?", "How many red circles are there in this picture?", "Is it blue?", "Read the word, please."]
    together = opened.predict(pictures, prompts, max_new_tokens=6, **way)
    pairs = zip(pictures, prompts, strict=True)
    assert together == [opened.predict([i], [p], max_new_tokens=6, **way)[0] for i, p in pairs]
    assert opened.predict(pictures, max_new_tokens=6) == opened.predict(pictures, ["Describe the picture."] * 4, max_new_tokens=6)


@pytest.mark.parametrize("stage", ["clipcap", "finetune"])
def test_a_seed_gives_the_same_texts_again(stage, pictures):
    opened = mmkit.load(pipeline.trained(stage))
    first, again, other = (opened.predict(pictures, **{**SAMPLE, "seed": seed}, max_new_tokens=12) for seed in (5, 5, 6))
    assert first == again != other


def test_decoding_on_the_command_line(capsys, pictures):
    run, file = pipeline.trained("clipcap"), pipeline.pictures()[0]
    opened = mmkit.load(run)
    ways = {
        ("--decoding", "paper"): {"decoding": "paper"},
        ("--num-beams", "3", "--length-penalty", "0.2"): {"num_beams": 3, "length_penalty": 0.2},
        ("--decoding", "sample", "--temperature", "1.5", "--top-p", "0.9", "--top-k", "40", "--seed", "7"): {
            "decoding": "sample", "temperature": 1.5, "top_p": 0.9, "top_k": 40, "seed": 7,
        },
    }  # fmt: skip
    for words, way in ways.items():
        capsys.readouterr()
        assert pipeline.mmkit("predict", run, file, "--max-new-tokens", "9", *words) == 0
        assert capsys.readouterr().out == opened.predict(pictures[:1], max_new_tokens=9, **way)[0] + "\n"


def up_to_the_end(ids: torch.Tensor, stops: list[int]) -> list[int]:
    """A row's ids with its end token, without the padding after it."""
    row = ids.tolist()
    ends = [i for i, token in enumerate(row) if token in stops]
    return row[: ends[0] + 1] if ends else row


QUESTIONS = ["What?", "How many red circles are there in this picture?", "Is it blue?", "Which word do you know, and why?"]


@pytest.mark.parametrize("beams", [1, 2])
def test_batch_1_equals_batch_n_token_by_token_with_rows_of_text_alone(pictures, beams):
    opened = mmkit.load(pipeline.trained("finetune"))
    assert opened.model.dtype == torch.float32
    rows = [pictures[0], None, [pictures[1]], None]
    together = opened.answer_ids(rows, QUESTIONS, max_new_tokens=8, num_beams=beams)
    stops = stop_ids(opened.model)
    for row, question, ids in zip(rows, QUESTIONS, together, strict=True):
        alone = opened.answer_ids([row], [question], max_new_tokens=8, num_beams=beams)[0]
        assert up_to_the_end(ids, stops) == up_to_the_end(alone, stops)
    words = opened.predict(rows, QUESTIONS, max_new_tokens=8, num_beams=beams)
    assert words == [text.strip() for text in opened.tokenizer.batch_decode(together, skip_special_tokens=True)]
    # A batch without any picture runs no tower at all.
    assert torch.equal(
        opened.answer_ids([None], QUESTIONS[1:2], max_new_tokens=8, num_beams=beams)[0],
        opened.answer_ids([None, None], QUESTIONS[1:2] * 2, max_new_tokens=8, num_beams=beams)[1],
    )


def test_rows_that_do_not_fit_are_refused(pictures):
    opened = mmkit.load(pipeline.trained("finetune"))
    with pytest.raises(InputError, match="1 prompts for 2 rows"):
        opened.predict(pictures[:2], ["What?"])
    with pytest.raises(InputError, match="'What is <image>"):
        opened.predict([pictures[:2]], ["What is <image>?"])


def test_several_pictures_in_a_row_are_seen_in_their_order(pictures):
    opened = mmkit.load(pipeline.trained("finetune"))
    question = "Compare <image> with <image>."
    rows = [pictures[:2], pictures[2], [], pictures[1::-1]]
    questions = [question, "What?", "Which word?", question]
    together = opened.answer_ids(rows, questions, max_new_tokens=6)
    for row, prompt, ids in zip(rows, questions, together, strict=True):
        alone = opened.answer_ids([row], [prompt], max_new_tokens=6)[0]
        assert up_to_the_end(ids, stop_ids(opened.model)) == up_to_the_end(alone, stop_ids(opened.model))

    def logits(row):
        ids = torch.tensor([opened.encode(question, 2)])
        pixels = opened.values([opened.square(picture) for picture in row])
        return opened.model(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels).logits[0, -1]

    # Words of so small a model could be the same either way; what it computes is not.
    with torch.no_grad():
        assert not torch.allclose(logits(pictures[:2]), logits(pictures[1::-1]), atol=1e-5)


def test_generation_stops_at_every_end_token_of_the_model(tmp_path, pictures):
    """Instruct models end answers with a token that is not their tokenizer's end token."""
    tok = tokenizer("sp", image=False)
    model = build_llava(siglip(), llama(tok, initializer_range=0.5), tok)
    meta = {"template": "demo", "image_fit": "squash", "image_size": 32, "num_image_tokens": 4, "mean": MEAN, "std": STD}
    processor = processor_for(model, tok, mean=MEAN, std=STD, template="demo")
    save_mllm(model, processor, tmp_path / "a", meta=meta)
    free = load_model(str(tmp_path / "a")).answer_ids(pictures[:1], ["What?"], max_new_tokens=8)[0].tolist()
    third = free[2]
    cut = free.index(third) + 1
    assert len(free) == 8 > cut, "the model stopped by itself; the test needs one that goes on"
    # Second in the list: it is not enough to read the first.
    add_stop_tokens(model, [third])
    save_mllm(model, processor, tmp_path / "b", meta=meta)
    opened = load_model(str(tmp_path / "b"))
    assert opened.answer_ids(pictures[:1], ["What?"], max_new_tokens=8)[0].tolist() == free[:cut]
    # And with a row beside it that goes on, padding follows.
    rows = opened.answer_ids([pictures[0], None], ["What?", "hi"], max_new_tokens=8)
    assert rows[0, :cut].tolist() == free[:cut] and set(rows[0, cut:].tolist()) <= {tok.pad_token_id}


def test_a_template_of_its_own_end_token_stops_there(tmp_path, pictures):
    """A base model tuned with ChatML: its saved settings know its old end token only."""
    tok = tokenizer("sp", image=False, chatml=True)
    model = build_llava(siglip(), llama(tok), tok)
    meta = {"template": "chatml", "image_fit": "squash", "image_size": 32, "num_image_tokens": 4, "mean": MEAN, "std": STD}
    save_mllm(model, processor_for(model, tok, mean=MEAN, std=STD, template="chatml"), tmp_path, meta=meta)
    assert stop_ids(load_model(str(tmp_path)).model) == [tok.eos_token_id, tok.convert_tokens_to_ids("<|im_end|>")]


def test_a_foreign_folder_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["BertModel"]}))
    with pytest.raises(InputError, match="a model of kind 'BertModel' cannot be opened; known: encoder, captioner, mllm"):
        mmkit.load(tmp_path)
    with pytest.raises(InputError, match="no such model"):
        mmkit.load(tmp_path / "absent")


@pytest.mark.parametrize(("stage", "more"), [("superclass", []), ("clipcap", []), ("finetune", ["--prompt", "What is it?"])])
def test_predict_on_the_command_line(stage, more, capsys, pictures):
    run, files = pipeline.trained(stage), pipeline.pictures()[:2]
    capsys.readouterr()
    assert pipeline.mmkit("predict", run, *files, "--max-new-tokens", "4", *more) == 0
    lines = capsys.readouterr().out.splitlines()
    prompts = ["What is it?"] * 2 if more else None
    expected = mmkit.load(run).predict(pictures[:2], prompts, max_new_tokens=4)
    assert lines == [f"{file}: {text}" for file, text in zip(files, expected, strict=True)]


def test_predict_refuses_what_does_not_fit(tmp_path, capsys):
    picture = pipeline.pictures()[0]
    for more, named in ((["--prompt", "What?"], "prompt"), (["--num-beams", "1", "--seed", "2"], "num_beams, seed")):
        assert pipeline.mmkit("predict", pipeline.trained("superclass"), picture, *more) == 2
        assert f"an encoder takes neither prompt nor decoding settings ({named})" in capsys.readouterr().err
    assert pipeline.mmkit("predict", pipeline.trained("clipcap"), picture, "--temperature", "0.5") == 2
    assert "temperature belong to decoding=sample, not to search" in capsys.readouterr().err
    assert pipeline.mmkit("predict", pipeline.trained("finetune"), picture, "--decoding", "paper") == 2
    assert "decoding=paper is ClipCap's, for captioners" in capsys.readouterr().err
    (tmp_path / "no.jpg").write_text("text")
    assert pipeline.mmkit("predict", pipeline.trained("clipcap"), tmp_path / "no.jpg") == 2
    assert "no.jpg: is no picture" in capsys.readouterr().err


def test_padding_has_the_encoders_own_mean_colour():
    """LLaVA pads with its tower's mean; with another tower's the bars would be a picture of their own."""
    opened = mmkit.load(pipeline.trained("finetune"))
    assert mean_colour((0.48145466, 0.4578275, 0.40821073)) == (122, 116, 104)
    opened.meta = {**opened.meta, "image_fit": "pad", "mean": [0.1, 0.5, 0.9]}
    opened._mean = torch.tensor(opened.meta["mean"]).view(1, 3, 1, 1)
    size = opened.meta["image_size"]
    values = opened.values([opened.square(Image.new("RGB", (2 * size, size), "white"))])
    # Above and below: nothing, but for rounding to a colour.
    assert values[0, :, 0].abs().max() < 1 / 255 / opened._std.min()
    assert values[0, :, size // 2].abs().min() > 0.1
