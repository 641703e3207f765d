"""The llava stage on chat models' data: several pictures, rows of messages, the LLM's own chat template."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import datasets
import pipeline
import pytest
from PIL import Image
from transformers import AutoProcessor, AutoTokenizer, GenerationConfig

import mmkit
from mmkit.data.conversations import encode_prompt

TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@pytest.fixture(scope="module")
def chat_llm(tmp_path_factory) -> Path:
    """The demo's tokenizer as a chat model would have it."""
    folder = tmp_path_factory.mktemp("chat-tokenizer")
    made = AutoTokenizer.from_pretrained(pipeline.root() / "world" / "tokenizers" / "sentencepiece")
    made.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    made.chat_template = TEMPLATE
    made.save_pretrained(folder)
    return folder


def rows() -> list[dict[str, object]]:
    """Two pictures, one picture late, text only with a system text; and three that cannot be used."""
    names = [path.name for path in pipeline.pictures()[:4]]
    late = {"images": names[2:3]}
    say = {"role": "assistant", "content": "a red circle"}
    picture, text = {"type": "image"}, {"type": "text", "text": "What is this?"}
    good = [
        {"messages": [{"role": "user", "content": [picture, picture, text]}, say], "images": names[:2]},
        {"messages": [{"role": "user", "content": [text]}, say, {"role": "user", "content": [text, picture]}, say], **late},
        {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}, say], "images": []},
    ]
    bad = [
        {"messages": [{"role": "user", "content": [text]}, {**say, "content": " "}], "images": []},
        {"messages": [{"role": "user", "content": [picture]}, say], "images": []},
        {"messages": [say], "images": []},
    ]
    return [{"id": f"{kind}-{i}", **row} for i in range(4) for kind, part in (("good", good), ("bad", bad)) for row in part]


@pytest.mark.parametrize("batching", ["plain", "grouped"])
def test_messages_with_several_pictures_train_and_bad_ones_are_listed(tmp_path, chat_llm, batching):
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows()))
    more = [f"data.train={data}", "data.type=messages", f"data.image_root={pipeline.pictures()[0].parent}"]
    more.append("data.max_skipped=0.6")
    more += [f"llm.tokenizer={chat_llm}", "template=chat", f"batching.kind={batching}", f"data.cache={tmp_path / 'cache'}"]
    run = tmp_path / "run"
    assert pipeline.mmkit(*pipeline.align(run, *more)) == 0
    assert all(loss > 0 for loss in pipeline.losses(run))
    skipped = {(row["key"].partition("#")[0], row["reason"]) for row in pipeline.rows(run / "skipped.jsonl")}
    assert {reason for _, reason in skipped} == {
        "message 2: the answer is empty",
        "<image> in the text but no `image`",
        "message 1 is by assistant: user and assistant must alternate, user first",
    }
    assert len(pipeline.rows(run / "skipped.jsonl")) == 12
    if batching == "grouped":
        assert list((tmp_path / "cache" / "lengths").iterdir())


def chat_run(tmp_path: Path, chat_llm: Path) -> Path:
    """An alignment with plain text, and a tuning with the chat template that goes on from it."""
    align, tune = tmp_path / "align", tmp_path / "tune"
    assert pipeline.mmkit(*pipeline.align(align, f"llm.tokenizer={chat_llm}", "template=plain")) == 0
    assert pipeline.mmkit(*pipeline.finetune(tune, f"model={align}", "template=chat", "max_length=400")) == 0
    return tune


def test_the_llms_own_template_outlives_the_alignment_and_is_followed_in_generation(tmp_path, chat_llm):
    tune = chat_run(tmp_path, chat_llm)
    assert json.loads((tune / "model" / "mmkit.json").read_text())["chat_template"] == TEMPLATE
    processor = AutoProcessor.from_pretrained(tune / "model")
    tokenizer = processor.tokenizer
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert end in GenerationConfig.from_pretrained(tune / "model").eos_token_id
    picture = Image.open(pipeline.pictures()[0]).convert("RGB")
    content = [{"type": "image"}, {"type": "text", "text": "What is this?"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    ids = processor(images=picture, text=text).input_ids[0]
    opened = mmkit.load(tune)
    how = {"tokens_per_image": opened.meta["num_image_tokens"], "image_token_id": opened.model.config.image_token_id}
    assert list(ids) == encode_prompt("What is this?", opened.tokenizer, "chat", num_images=1, **how)
    assert isinstance(opened.predict([picture], ["What is this?"], max_new_tokens=3)[0], str)


def test_rows_of_a_saved_data_set_train(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    talk = [{"from": "human", "value": "<image>\nWhat is this?"}, {"from": "gpt", "value": "a red circle"}]
    pictures = [path.read_bytes() for path in pipeline.pictures()]
    made = datasets.Dataset.from_list([{"conversations": talk, "image": {"bytes": data, "path": None}} for data in pictures])
    made.cast_column("image", datasets.Image()).save_to_disk(str(tmp_path / "set"))
    run = tmp_path / "run"
    assert pipeline.mmkit(*pipeline.align(run, f"data.train=hf:{tmp_path / 'set'}", "train.steps=2")) == 0
    assert pipeline.manifest(run)["samples_in_data"] == len(pictures)
    assert len(pipeline.losses(run)) == 2
    shutil.rmtree(run)
    assert pipeline.mmkit(*pipeline.align(run, f"data.train=hf:{tmp_path / 'set'}", "data.limit=3", "train.steps=1")) == 0
    assert pipeline.manifest(run)["samples_in_data"] == 3


def test_a_tokenizer_without_a_chat_template_is_refused_before_training(tmp_path, capsys):
    assert pipeline.mmkit(*pipeline.align(tmp_path / "run", "template=chat")) == 2
    assert "has no chat template" in capsys.readouterr().err
