"""What a model is asked: pictures, prompt, and what the report needs to show the answer."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Union

from mmkit.config import TaskConfig
from mmkit.data.bounds import MAX_BYTES, refuse_long
from mmkit.data.images import ImageRef
from mmkit.data.pairs import safe_image_path
from mmkit.errors import InputError

# COCO, VQA v2 and TextVQA number their questions; GQA, ScienceQA and MMMU name them.
Id = Union[int, str]


@dataclasses.dataclass(frozen=True)
class Picture:
    """A picture of a question: a file, or bytes that a data set's own table carries.

    Attributes:
        name: The file, or what the data set calls the picture; two of one name are one picture.
        data: Encoded bytes; None is read from the file.
    """

    name: str
    data: bytes | None = dataclasses.field(default=None, repr=False)

    def read(self, max_bytes: int = MAX_BYTES) -> bytes:
        """The encoded bytes.

        Raises:
            SampleError: Missing, unreadable or too long.
        """
        if self.data is None:
            return ImageRef(self.name).read(max_bytes)
        refuse_long(len(self.data), max_bytes)
        return self.data


@dataclasses.dataclass(frozen=True)
class Example:
    """One question to a model.

    Attributes:
        id: Image id for captions, question id otherwise.
        images: The pictures it is about, in the order of their places in the prompt; none for a question of text alone.
        prompt: What the model is asked; empty for a captioner.
        question: The question as the data set has it; None for captions.
        references: True captions or answers; none for a test set whose answers are the server's.
        type: Answer type or category as the data set has it, for the report's filter; may be empty.
    """

    id: Id
    images: tuple[Picture, ...]
    prompt: str
    question: str | None
    references: list[str]
    type: str = ""


def required(config: TaskConfig, key: str) -> str:
    """A key of the task that this suite cannot do without.

    Raises:
        InputError: It was not given.
    """
    value = getattr(config, key)
    if value is None:
        raise InputError(f"{config.task} needs {key}", where=f"tasks: {config.task}", mend=f"give {key}=PATH")
    return str(value)


def picture_file(config: TaskConfig, image_id: object, name: str | None, pattern: str) -> Picture:
    """A picture's file below the image root.

    Args:
        config: Gives ``image_root`` and ``image_name``, which wins over the file's own names.
        image_id: What the pattern is filled with.
        name: File name as the annotations have it; None where they have none.
        pattern: File name of this data set as it is published.

    Raises:
        InputError: The pattern cannot take the id, or the name leads out of the root.
    """
    if config.image_root is None:
        raise InputError("no folder for the pictures", where="image_root", mend="give image_root=FOLDER")
    try:
        if config.image_name is not None or name is None:
            name = (config.image_name or pattern).format(image_id)
        return Picture(str(safe_image_path(Path(config.image_root), name)))
    except (ValueError, IndexError, KeyError) as error:
        raise InputError(
            f"no file name for image {image_id!r} ({error})", where="image_name", mend="use a pattern such as '{:012d}.jpg'"
        ) from None


def fill_prompt(config: TaskConfig, **fields: str) -> str:
    """The task's prompt with ``{question}`` and its like replaced.

    Args:
        config: Gives the template.
        **fields: What stands for each name in braces.
    """
    text = config.prompt
    for name, value in fields.items():
        # Not str.format: braces in a question are text, and those of a template that are no field stay.
        text = text.replace("{" + name + "}", value)
    return text
