"""Writing the demo world in the official formats: COCO captions, VQA v2, TextVQA, LLaVA conversations, webdataset shards."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from mmkit.data.shards import write_shard
from mmkit.data.world.draw import draw_scene, encode_jpeg
from mmkit.data.world.language import (
    TEXT_ONLY,
    Question,
    captions,
    conversation,
    questions,
    ten_answers,
    word_question,
)
from mmkit.data.world.scene import HELDOUT_FIRST, Scene, sample_split
from mmkit.errors import InputError
from mmkit.files import new_folder, read_json, write_json, write_text

# Part of the arguments: a world of an older layout is refused rather than taken for a new one.
FORMAT = 1
# Several shards even in the demo, so that reading across shard borders is exercised.
SHARD_SIZE = 1000
_INFO = {"description": "mmkit demo world", "version": "1.0", "year": 2026, "contributor": "mmkit"}
_LICENSE = {"id": 1, "name": "CC0 1.0", "url": "https://creativecommons.org/publicdomain/zero/1.0/"}
_README = """# The mmkit demo world

Generated pictures of shapes, colours, counts, places and words, made by `mmkit data synth` with the arguments in world.json.
Training and held-out pictures never share a (shapes, colours, places, word) combination. CC0 1.0.

| file | what |
|---|---|
| images/{train,heldout}/ | JPEG pictures, named by image id |
| captions_{train,heldout}.json | COCO captions, five a picture |
| pairs_train.jsonl, shards/ | the training captions as rows and as webdataset shards |
| vqa_{train,heldout}_{questions,annotations}.json | VQA v2 questions: yes/no, number, other; ten answers |
| textvqa_{train,heldout}.json | TextVQA questions about the rendered word, OCR tokens included |
| llava_align_train.json, llava_train.json | LLaVA conversations |
| tokenizers/{bpe,sentencepiece}/ | tokenizers trained on these texts, for the demo's language models |
| probe_{train,heldout}.jsonl | pictures with one group, for probes (labels: shape, color, count, place, word) |
"""


@dataclasses.dataclass
class _Picture:
    """A drawn scene with everything said about it."""

    id: int
    name: str
    scene: Scene
    jpeg: bytes
    captions: list[str]
    questions: list[Question]
    rng: np.random.Generator


def make_world(out: Path, *, train: int = 8000, heldout: int = 300, image_size: int = 64, seed: int = 0) -> dict[str, int]:
    """Make the demo world, or return at once when it is there with equal arguments.

    Args:
        out: Folder; complete or absent.
        train: Training pictures.
        heldout: Held-out pictures.
        image_size: Side in pixels.
        seed: Equal arguments give equal bytes (with the same Pillow).

    Returns:
        What was made: pictures, captions, questions, conversations.

    Raises:
        InputError: The folder holds a world of other arguments, or something else; or ids of the two splits would meet.
    """
    if train >= HELDOUT_FIRST:
        # Pictures and questions are drawn by their ids, too: both splits would hold the same.
        raise InputError(f"{train} training pictures are too many", where="--train", mend=f"at most {HELDOUT_FIRST - 1}")
    arguments = {"format": FORMAT, "train": train, "heldout": heldout, "image_size": image_size, "seed": seed}
    # An empty folder counts as none: the user may have made it in advance.
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        if not (out / "world.json").is_file():
            raise InputError("is not an empty folder and no demo world", where=out, mend="choose another --out")
        found = read_json(out / "world.json")
        # Never overwritten: runs made from it would lose the data they were measured on.
        if found.get("arguments") != arguments:
            raise InputError(
                f"holds a world made with {found.get('arguments')}", where=out, mend="choose another --out, or remove it"
            )
        counts: dict[str, int] = found["counts"]
        return counts
    with new_folder(out) as folder:
        pictures: dict[str, list[_Picture]] = {"train": [], "heldout": []}
        # All of it is held in memory: 8,000 JPEGs of 64 pixels are some tens of megabytes.
        for split, image_id, scene in sample_split(seed, train=train, heldout=heldout):
            pictures[split].append(_make_picture(image_id, scene, image_size, seed))
        counts = {}
        for split, made in pictures.items():
            counts |= _write_split(folder, split, made, image_size)
        counts["conversations"] = _write_conversations(folder, pictures["train"], seed)
        _write_pairs(folder, pictures["train"])
        write_text(folder / "README.md", _README)
        # The one file that a later call looks for. The folder appears whole, so where it is, the rest is.
        write_json(folder / "world.json", {"arguments": arguments, "counts": counts})
    return counts


def _make_picture(image_id: int, scene: Scene, size: int, seed: int) -> _Picture:
    """Draw a scene and ask about it; every picture has its own random numbers, so sets of any size agree on it."""
    rng = np.random.default_rng([seed, image_id])
    # One generator for picture, questions and answers, used in this order; another order makes another world.
    jpeg = encode_jpeg(draw_scene(scene, size, rng))
    asked = questions(scene, rng)
    about_word = word_question(scene, rng)
    every = [*asked, about_word] if about_word else asked
    return _Picture(image_id, f"{image_id:012d}.jpg", scene, jpeg, captions(scene), every, rng)


def _write_split(folder: Path, split: str, pictures: list[_Picture], size: int) -> dict[str, int]:
    """Pictures, captions, questions and probe rows of one split."""
    (folder / "images" / split).mkdir(parents=True)
    for picture in pictures:
        (folder / "images" / split / picture.name).write_bytes(picture.jpeg)
    images = [{"id": p.id, "file_name": p.name, "width": size, "height": size, "license": 1} for p in pictures]
    # Ids from the picture's: unique over both splits and independent of the world's size.
    rows = [{"image_id": p.id, "id": p.id * 10 + i, "caption": caption} for p in pictures for i, caption in enumerate(p.captions)]
    _write_rows(folder / f"captions_{split}.json", {"info": _INFO, "licenses": [_LICENSE], "images": images}, "annotations", rows)
    # VQA before TextVQA, and conversations after both: all draw from the pictures' own generators, so another order is
    # another world.
    asked = _write_vqa(folder, split, pictures)
    read = _write_textvqa(folder, split, pictures, size)
    # With two groups a picture would have two right answers for each attribute.
    probes = [_probe_row(split, p) for p in pictures if len(p.scene.groups) == 1]
    write_text(folder / f"probe_{split}.jsonl", "".join(json.dumps(row) + "\n" for row in probes))
    return {f"{split}_pictures": len(pictures), f"{split}_questions": asked, f"{split}_text_questions": read}


def _write_vqa(folder: Path, split: str, pictures: list[_Picture]) -> int:
    """VQA v2 questions and annotations."""
    head = {"info": _INFO, "license": _LICENSE, "data_type": "mmkit demo world", "data_subtype": split}
    asked, annotated = [], []
    for picture in pictures:
        # Reading is TextVQA's part; VQA v2 knows three answer types and would file it under "other".
        for i, question in enumerate(q for q in picture.questions if q.kind != "text"):
            number = picture.id * 100 + i
            asked.append({"image_id": picture.id, "question": question.text, "question_id": number})
            annotated.append(
                {
                    "question_id": number,
                    "image_id": picture.id,
                    "question_type": question.type,
                    "answer_type": question.kind,
                    "multiple_choice_answer": question.answer,
                    "answers": ten_answers(question, picture.rng),
                }
            )
    _write_rows(folder / f"vqa_{split}_questions.json", {**head, "task_type": "Open-Ended"}, "questions", asked)
    _write_rows(folder / f"vqa_{split}_annotations.json", head, "annotations", annotated)
    return len(asked)


def _write_textvqa(folder: Path, split: str, pictures: list[_Picture], size: int) -> int:
    """TextVQA 0.5.1 rows: questions about the rendered word."""
    rows = [
        {
            # 50 keeps clear of the VQA questions, which count from 0 in the same hundred.
            "question_id": p.id * 100 + 50,
            "image_id": p.id,
            "question": q.text,
            "question_tokens": q.text.lower().rstrip("?").split(),
            "answers": [a["answer"] for a in ten_answers(q, p.rng)],
            # TextVQA's official rows carry them; whether a prompt uses them is the evaluation's choice.
            "ocr_tokens": [p.scene.word],
            "image_classes": [],
            "image_width": size,
            "image_height": size,
            "flickr_original_url": "",
            "flickr_300k_url": "",
            "set_name": split,
        }
        for p in pictures
        for q in p.questions
        if q.kind == "text"
    ]
    _write_rows(folder / f"textvqa_{split}.json", {"dataset_type": split, "dataset_name": "mmkit demo world"}, "data", rows)
    return len(rows)


def _probe_row(split: str, picture: _Picture) -> dict[str, Any]:
    """A single-group picture with its attributes as labels."""
    group = picture.scene.groups[0]
    return {"image": f"images/{split}/{picture.name}", **dataclasses.asdict(group), "word": picture.scene.word}


def _write_conversations(folder: Path, pictures: list[_Picture], seed: int) -> int:
    """LLaVA conversations: one caption turn for alignment, several turns for fine-tuning, some without a picture."""
    align, tune = [], []
    for p in pictures:
        image = f"images/train/{p.name}"
        # One of the five wordings each, in turn: captions that all begin alike would teach the projector a phrase.
        align.append(_llava_item(f"{p.id:012d}", image, [("Describe the picture.", p.captions[p.id % len(p.captions)])]))
        tune.append(_llava_item(f"{p.id:012d}", image, conversation(p.scene, p.questions, p.rng)))
    rng = np.random.default_rng([seed, 11])
    # Two in a hundred, and one in the smallest world: a text-only batch takes a path of its own in the model.
    for i in range(max(1, len(pictures) // 50)):
        question, answer = TEXT_ONLY[int(rng.integers(len(TEXT_ONLY)))]
        tune.append(_llava_item(f"text-{i:05d}", None, [(question, answer)]))
    for name, items in (("llava_align_train.json", align), ("llava_train.json", tune)):
        write_text(folder / name, "[\n" + ",\n".join(json.dumps(item) for item in items) + "\n]\n")
    return len(align) + len(tune)


def _llava_item(key: str, image: str | None, turns: list[tuple[str, str]]) -> dict[str, Any]:
    """One conversation in LLaVA's format."""
    messages = []
    for i, (question, answer) in enumerate(turns):
        # One marker a conversation, in the first question, as in LLaVA's files.
        marked = f"<image>\n{question}" if image and i == 0 else question
        messages += [{"from": "human", "value": marked}, {"from": "gpt", "value": answer}]
    return {"id": key, **({"image": image} if image else {}), "conversations": messages}


def _write_pairs(folder: Path, pictures: list[_Picture]) -> None:
    """The training pairs as JSON lines, and as webdataset shards with one caption a picture copy."""
    rows = [{"image": f"images/train/{p.name}", "caption": caption} for p in pictures for caption in p.captions]
    write_text(folder / "pairs_train.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    for number, start in enumerate(range(0, len(pictures), SHARD_SIZE)):
        members = []
        for picture in pictures[start : start + SHARD_SIZE]:
            caption = picture.captions[picture.id % len(picture.captions)]
            members += [(f"{picture.id:012d}.jpg", picture.jpeg), (f"{picture.id:012d}.txt", caption.encode())]
        write_shard(folder / "shards" / f"train-{number:05d}.tar", members)


def _write_rows(path: Path, head: dict[str, Any], name: str, rows: list[Any]) -> None:
    """A JSON object whose long list has one row a line: readable, and quick to write."""
    # The official files are single lines of many megabytes, which no diff or pager can show.
    lines = ",\n".join(json.dumps(row) for row in rows)
    write_text(path, f'{json.dumps(head)[:-1]}, "{name}": [\n{lines}\n]}}\n')
