"""Tasks: which pictures, which questions, which references, and how the official result file looks."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mmkit.config import TaskConfig
from mmkit.data.pairs import safe_image_path
from mmkit.errors import InputError
from mmkit.eval.scorers.formats import read_captions, read_textvqa, read_vqa
from mmkit.files import read_json

# What an MLLM that gets no prompt is asked, too (`mmkit.models.inference.Mllm`).
DESCRIBE = "Describe the picture."


@dataclasses.dataclass(frozen=True)
class Example:
    """One question to a model.

    Attributes:
        id: Image id for captions, question id otherwise.
        image: The picture's file.
        prompt: What the model is asked; empty for a captioner.
        question: The question as the data set has it; None for captions.
        references: True captions or answers.
    """

    id: int
    image: Path
    prompt: str
    question: str | None
    references: list[str]


def load_task(config: TaskConfig) -> list[Example]:
    """All examples of a task, in the order of its files.

    Raises:
        InputError: Broken files, or an image name that cannot be made.
    """
    examples = _LOADERS[config.task](config)
    return examples[: config.limit]


def result_rows(task: str, predictions: dict[int, str]) -> list[dict[str, Any]]:
    """Rows of the official result file: what the evaluation servers take."""
    # TextVQA has VQA's row: question_id and answer.
    key, value = ("image_id", "caption") if task == "coco-caption" else ("question_id", "answer")
    return [{key: i, value: text} for i, text in predictions.items()]


def shuffle_pictures(examples: list[Example], seed: int) -> list[Example]:
    """The blind baseline: every picture is replaced by another one, all questions of a picture by the same other one.

    Raises:
        InputError: Fewer than two pictures.
    """
    # Pictures are shuffled, not questions: another question about the same picture could take its place.
    pictures = list(dict.fromkeys(e.image for e in examples))
    if len(pictures) < 2:
        raise InputError("blind needs at least two pictures", where="blind", mend="use a larger limit")
    shuffled = pictures.copy()
    random.Random(seed).shuffle(shuffled)
    # A cycle through all pictures leaves none in its place.
    other = dict(zip(shuffled, shuffled[1:] + shuffled[:1], strict=True))
    return [dataclasses.replace(e, image=other[e.image]) for e in examples]


def _captions(config: TaskConfig) -> list[Example]:
    """COCO captions: an example for each picture."""
    references = read_captions(config.annotations)
    # read_captions checks what scoring needs; file names are needed here alone.
    names = {image["id"]: image.get("file_name") for image in read_json(Path(config.annotations))["images"]}
    # A captioner ignores it; an MLLM is asked this, and the score's conditions say so.
    prompt = DESCRIBE if config.prompt == "{question}" else config.prompt
    return [
        # COCO 2017's file names; others are given by image_name.
        Example(i, _image(config, i, names.get(i), "{:012d}.jpg"), prompt, None, captions)
        for i, captions in references.items()
        if captions
    ]


def _vqa(config: TaskConfig) -> list[Example]:
    """VQA v2: an example for each question."""
    known = read_vqa(config.annotations, config.questions)
    # VQA v2 keeps the question texts out of the annotation file.
    texts = {row["question_id"]: row["question"] for row in read_json(Path(str(config.questions)))["questions"]}
    examples = []
    for i, question in known.items():
        image = _image(config, question.image_id, None, "{:012d}.jpg")
        answers = [answer["answer"] for answer in question.answers]
        examples.append(Example(i, image, _prompt(config, texts[i], []), texts[i], answers))
    return examples


def _textvqa(config: TaskConfig) -> list[Example]:
    """TextVQA, with or without the reference OCR tokens in the prompt."""
    rows = {row["question_id"]: row for row in read_json(Path(config.annotations))["data"]}
    examples = []
    for i in read_textvqa(config.annotations):
        row = rows[i]
        if config.ocr == "reference" and "ocr_tokens" not in row:
            # Refused, not left out: the score's conditions would claim OCR tokens that the model never saw.
            raise InputError(
                f"question {i} has no ocr_tokens", where=config.annotations, mend="use ocr=none, or the 0.5.1 files with OCR"
            )
        ocr = row["ocr_tokens"] if config.ocr == "reference" else []
        # Open Images ids are text, which a number pattern would refuse.
        image = _image(config, row["image_id"], None, "{}.jpg")
        examples.append(Example(i, image, _prompt(config, row["question"], ocr), row["question"], list(row["answers"])))
    return examples


def _prompt(config: TaskConfig, question: str, ocr: list[str]) -> str:
    """The prompt; OCR tokens go on a line after the question, as in LLaVA's file (evaluation.md section 4)."""
    text = f"{question}\nReference OCR token: {', '.join(ocr)}" if config.ocr == "reference" else question
    # Not str.format: braces in a question are text.
    return config.prompt.replace("{question}", text)


def _image(config: TaskConfig, image_id: Any, name: str | None, pattern: str) -> Path:
    """A picture's file below the image root."""
    root = Path(config.image_root)
    try:
        if config.image_name is not None or name is None:
            name = (config.image_name or pattern).format(image_id)
        # COCO files name pictures without the split's folder; ours name them relative to the annotation file.
        path = safe_image_path(root, name)
    except (ValueError, IndexError, KeyError) as error:
        raise InputError(
            f"no file name for image {image_id!r} ({error})", where="image_name", mend="use a pattern such as '{:012d}.jpg'"
        ) from None
    return path


_LOADERS: dict[str, Callable[[TaskConfig], list[Example]]] = {"coco-caption": _captions, "vqav2": _vqa, "textvqa": _textvqa}
