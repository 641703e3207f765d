"""Pairs whose index is read into memory as a whole: COCO captions, LLaVA conversations, folders of pictures."""

from __future__ import annotations

import json
from pathlib import Path

from mmkit.data.images import ImageRef
from mmkit.data.pairs import Pair, clean_caption, decode_caption, safe_image_path
from mmkit.data.skipped import LeftOut, SampleError
from mmkit.data.sources.tars import IMAGE_SUFFIXES
from mmkit.errors import InputError
from mmkit.files import hash_file, hash_text, read_json

# What Hugging Face's imagefolder calls its table of captions, in the folder itself.
METADATA = "metadata.jsonl"
Read = tuple[list[Pair], list[LeftOut], str]


def read_coco(location: str, root: Path) -> Read:
    """COCO caption annotations: a pair for each caption. Wrong fields and unknown images are refused, not left out."""
    from mmkit.eval.scorers.formats import read_captions

    path = Path(location)
    read_captions(path)  # the scorer's strict reader: one set of rules for what a caption file is
    data = read_json(path, mend="check data.train")
    files = {image["id"]: image.get("file_name") for image in data["images"]}
    pairs: list[Pair] = []
    left_out: list[LeftOut] = []
    for number, row in enumerate(data["annotations"], start=1):
        # Annotation ids are optional: nothing but messages needs them.
        key = f"{path.name}#{row.get('id', f'row {number}')}"
        try:
            name = files[row["image_id"]]
            image = safe_image_path(root, name)
            pairs.append(Pair(location, f"{key} {name}", ImageRef(str(image)), clean_caption(row["caption"])))
        except ValueError as error:
            left_out.append(LeftOut(location, key, str(error)))
    return pairs, left_out, hash_file(path)


def read_conversation_pairs(location: str, kind: str, image_root: str | None) -> Read:
    """Conversations as pairs: the first answer about a picture is its caption, as in LLaVA's alignment data.

    Args:
        location: As `mmkit.data.message_rows.open_conversations` takes it.
        kind: ``llava`` or ``messages``.
        image_root: Folder that names of pictures are relative to; None: that of the file.
    """
    # They import transformers, which no other kind of pairs needs.
    from mmkit.data.message_rows import open_conversations
    from mmkit.data.pieces import IMAGE_MARKER

    items, left_out, fingerprint = open_conversations(location, kind, image_root=image_root)
    pairs = []
    for index in range(len(items)):
        try:
            item = items[index]
            # Of several pictures the answer may describe any, or what sets them apart.
            if len(item.images) != 1:
                raise SampleError(f"{len(item.images)} pictures" if item.images else "no picture")
            caption = clean_caption(next(answer for question, answer in item.turns if IMAGE_MARKER in question))
        # Of rows of tables what is wrong shows when they are read.
        except ValueError as error:
            left_out.append(LeftOut(location, items.name(index), str(error)))
            continue
        pairs.append(Pair(location, item.id, item.images[0], caption))
    return pairs, left_out, fingerprint


def read_folder(location: str, root: Path) -> Read:
    """Pictures of a folder and of those below it, each with its caption in a ``.txt`` of its name, or in ``metadata.jsonl``.

    Raises:
        InputError: No such folder, or no picture in it.
    """
    folder = Path(location)
    if not folder.is_dir():
        raise InputError("no such folder", where=location, mend="check data.train")
    if (folder / METADATA).is_file():
        return _read_metadata(folder)
    # Sorted: the file system's order differs between machines. Hidden ones are other programs' thumbnails.
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith("."))
    if not files:
        raise InputError("no picture in this folder", where=location, mend="give pictures with a .txt beside each, or shards")
    pairs: list[Pair] = []
    left_out: list[LeftOut] = []
    for file in files:
        key = file.relative_to(folder).as_posix()
        try:
            caption = decode_caption(file.with_suffix(".txt").read_bytes())
            pairs.append(Pair(location, key, ImageRef(str(file)), caption))
        except FileNotFoundError:
            left_out.append(LeftOut(location, key, "no .txt caption"))
        except (OSError, ValueError) as error:
            left_out.append(LeftOut(location, key, " ".join(str(error).split())))
    # Without the pictures: hashing them would read all of them before the first step.
    return pairs, left_out, hash_text(*(f"{p.key}\t{p.caption}" for p in pairs))


def _read_metadata(folder: Path) -> Read:
    """Rows ``{"file_name", "text"}`` of Hugging Face's imagefolder layout; ``caption`` and ``image`` are taken for them too."""
    pairs: list[Pair] = []
    left_out: list[LeftOut] = []
    # Split at \n only: str.splitlines would also split inside JSON strings (U+2028 is legal there).
    for number, line in enumerate((folder / METADATA).read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not line.strip():
            continue
        key = f"{METADATA}:{number}"
        try:
            row = json.loads(line.decode("utf-8"))
            if not isinstance(row, dict):
                raise ValueError(f"row is a {type(row).__name__}, not an object")
            name = row.get("file_name", row.get("image"))
            caption = clean_caption(row.get("text", row.get("caption")))
            pairs.append(Pair(str(folder), f"{key} {name}", ImageRef(str(safe_image_path(folder, name))), caption))
        except UnicodeDecodeError as error:
            left_out.append(LeftOut(str(folder), key, f"invalid UTF-8 at byte {error.start}"))
        except (ValueError, RecursionError, SampleError) as error:
            left_out.append(LeftOut(str(folder), key, " ".join(str(error).split())))
    return pairs, left_out, hash_file(folder / METADATA)
