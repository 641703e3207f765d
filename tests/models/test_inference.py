from __future__ import annotations

import json
import shutil

import pipeline
import pytest
import torch
from PIL import Image

import mmkit
from mmkit.errors import InputError
from mmkit.models.inference import Captioner, Mllm, Tagger, load_model


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
