"""Image-text pairs: COCO caption JSON, JSON lines, and webdataset tar shards, behind one small class.

A source is an indexed list: picture and caption of sample ``i`` can be read without reading the others, so the order of a run is
a pure function of (seed, epoch, position).
"""

from __future__ import annotations

import dataclasses
import json
import re
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

from mmkit.data.images import ImageRef
from mmkit.data.skipped import LeftOut
from mmkit.errors import InputError
from mmkit.files import hash_file, hash_text, read_json

_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")
# A caption is one line; every Unicode line end would otherwise shift line-based tools (evaluation.md section 2).
_LINE_ENDS = re.compile(r"[\r\n\x0b\x0c\x85\u2028\u2029\x00]+")


@dataclasses.dataclass(frozen=True)
class Pair:
    """One sample: a picture and its caption."""

    source: str
    key: str
    image: ImageRef
    caption: str


@dataclasses.dataclass(frozen=True)
class PairSource:
    """All pairs of a data set.

    Attributes:
        pairs: The usable ones, in file order.
        left_out: Rows that cannot be used, with reasons.
        fingerprint: Hash of the index files.
    """

    pairs: list[Pair]
    left_out: list[LeftOut]
    fingerprint: str


def open_pairs(location: str, *, kind: str = "auto", image_root: str | None = None) -> PairSource:
    """Read the index of a pair data set.

    Args:
        location: ``.jsonl`` rows ``{"image", "caption"}``, COCO caption ``.json``, or tar shards
            (``shards/train-{00000..00009}.tar``, a glob, or a folder of tars).
        kind: ``pairs``, ``coco``, ``webdataset``, or ``auto`` by the name.
        image_root: Folder that image names are relative to; default: the index file's own folder.

    Raises:
        InputError: Nothing there, broken JSON, or no usable sample.
    """
    if kind == "auto":
        suffix = Path(location).suffix
        # Folders, globs and brace ranges have no telling suffix; all of them are shards.
        kind = {".jsonl": "pairs", ".json": "coco"}.get(suffix, "webdataset")
    readers: dict[str, Callable[[str, Path], PairSource]] = {
        "pairs": _read_jsonl,
        "coco": _read_coco,
        "webdataset": lambda where, _: _read_shards(where),
    }
    if kind not in readers:
        raise InputError(f"data type {kind!r} holds no image-text pairs", where=location, mend=f"use {', '.join(readers)}")
    source = readers[kind](location, Path(image_root) if image_root else Path(location).parent)
    # With the first reason: a wrong image root or key makes every row bad in the same way, and that one line explains it.
    if not source.pairs:
        first = source.left_out[0] if source.left_out else None
        why = f" ({len(source.left_out)} left out, the first, {first.key}: {first.reason})" if first else ""
        raise InputError(f"no usable sample{why}", where=location, mend="check the path and the file's content")
    return source


def clean_caption(text: object) -> str:
    """One line of text.

    Raises:
        ValueError: Not a string, or empty; the message is the reason.
    """
    if not isinstance(text, str):
        raise ValueError(f"caption is {type(text).__name__}, not a string")
    # JSON may spell a lone surrogate, which no tokenizer and no file takes; it becomes a question mark.
    line = _LINE_ENDS.sub(" ", text).encode("utf-8", "replace").decode("utf-8").strip()
    if not line:
        raise ValueError("caption is empty")
    return line


def safe_image_path(root: Path, name: object) -> Path:
    """A picture's path below ``root``.

    Raises:
        ValueError: Missing, absolute, or climbing out of the root: data must not name files outside it.
    """
    if not isinstance(name, str) or not name:
        raise ValueError("image is missing")
    path = Path(name)
    name.encode("utf-8")  # raises a ValueError on a lone surrogate, which no file name holds
    if "\0" in name:
        raise ValueError(f"image {name!r} is no file name")
    # By parts, not by resolving: a data folder may itself be a link, or hold links to where the pictures lie.
    if path.is_absolute() or ".." in path.parts:
        raise ValueError(f"image {name!r} points outside the data folder")
    # No look whether it exists: millions of stats at start; a missing picture is found, replaced and listed when it is read.
    return root / path


def _read_jsonl(location: str, root: Path) -> PairSource:
    """Rows of a JSON-lines file; a bad row is left out with file and line."""
    path = Path(location)
    if not path.is_file():
        raise InputError("no such file", where=location, mend="check data.train")
    pairs: list[Pair] = []
    left_out: list[LeftOut] = []
    # Split at \n only: str.splitlines would also split inside captions (U+2028 is legal in JSON strings).
    for number, line in enumerate(path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not line.strip():
            continue
        key = f"{path.name}:{number}"
        try:
            row = json.loads(line.decode("utf-8"))
            if not isinstance(row, dict):
                raise ValueError(f"row is a {type(row).__name__}, not an object")
            image = safe_image_path(root, row.get("image"))
            caption = clean_caption(row.get("caption"))
            pairs.append(Pair(location, f"{key} {row['image']}", ImageRef(str(image)), caption))
        except UnicodeDecodeError as error:
            left_out.append(LeftOut(location, key, f"invalid UTF-8 at byte {error.start}"))
        # RecursionError: deeply nested brackets; json.loads raises it on a damaged line.
        except (ValueError, RecursionError) as error:
            left_out.append(LeftOut(location, key, " ".join(str(error).split())))
    # The index alone stands for the data set: hashing the pictures would read all of them before the first step.
    return PairSource(pairs, left_out, hash_file(path))


def _read_coco(location: str, root: Path) -> PairSource:
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
    return PairSource(pairs, left_out, hash_file(path))


def expand_shards(location: str) -> list[Path]:
    """Tar files of ``a-{000..123}.tar``, a glob, a folder, or one file, in name order.

    Raises:
        InputError: A named shard does not exist, or none matches.
    """
    braces = re.fullmatch(r"(.*)\{(\d+)\.\.(\d+)\}(.*)", location)
    if braces:
        head, first, last, tail = braces.groups()
        # A range names its shards, so a missing one is an error; a glob would train on fewer in silence.
        names = [Path(f"{head}{i:0{len(first)}d}{tail}") for i in range(int(first), int(last) + 1)]
    elif Path(location).is_dir():
        names = sorted(Path(location).glob("*.tar"))
    elif any(c in location for c in "*?["):
        # Path.glob takes relative patterns only, hence the detour over the anchor.
        names = sorted(Path(Path(location).anchor or ".").glob(location.removeprefix(Path(location).anchor)))
    else:
        names = [Path(location)]
    missing = [p for p in names if not p.is_file()]
    if missing or not names:
        what = f"{len(missing)} shards are missing, the first is {missing[0]}" if missing else "no tar shard matches"
        raise InputError(what, where=location, mend="check data.train")
    return names


def _read_shards(location: str) -> PairSource:
    """Index tar shards once: key, caption, and the byte range of the picture."""
    pairs: list[Pair] = []
    left_out: list[LeftOut] = []
    shards = expand_shards(location)
    for shard in shards:
        for key, members in _shard_samples(shard, left_out):
            image = next((members[s] for s in _IMAGE_SUFFIXES if s in members), None)
            # By key and never by neighbourhood: with one member missing, every later caption would slip to the next picture.
            text = members.get(".txt")
            if image is None or text is None:
                left_out.append(LeftOut(str(shard), key, f"no {'picture' if image is None else '.txt caption'}"))
                continue
            try:
                caption = clean_caption(text.read().decode("utf-8"))
                pairs.append(Pair(str(shard), key, image, caption))
            except UnicodeDecodeError as error:
                left_out.append(LeftOut(str(shard), key, f"caption: invalid UTF-8 at byte {error.start}"))
            except ValueError as error:
                left_out.append(LeftOut(str(shard), key, str(error)))
    # Names and sizes, not content: shards can be terabytes.
    sizes = "\n".join(f"{p.name} {p.stat().st_size}" for p in shards)
    return PairSource(pairs, left_out, hash_text(sizes))


def _shard_samples(shard: Path, left_out: list[LeftOut]) -> Iterator[tuple[str, dict[str, ImageRef]]]:
    """Members of a tar grouped by key (webdataset's rule: the name up to the first dot), each key once."""
    groups: dict[str, dict[str, ImageRef]] = {}
    # Keys that another key has followed: their members must lie together, a later one belongs to another sample.
    closed: set[str] = set()
    current = ""
    size = shard.stat().st_size
    try:
        # Uncompressed only: in a compressed tar a member has no byte range that could be read by itself.
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                if not member.isfile():
                    continue
                # The folder may hold dots; only those of the name end the key.
                folder, _, name = member.name.rpartition("/")
                stem, _, suffix = name.partition(".")
                key = f"{folder}/{stem}" if folder else stem
                if key != current:
                    closed.add(current)
                    current = key
                # The first one stays: which of two pictures a caption belongs to is not known.
                if key in closed or f".{suffix.lower()}" in groups.get(key, {}):
                    left_out.append(LeftOut(str(shard), member.name, f"key {key} comes twice in this shard"))
                    continue
                # tarfile hands out a member before it knows whether its data are all there.
                if member.offset_data + member.size > size:
                    left_out.append(LeftOut(str(shard), key, "the shard is cut off here"))
                    # With its other member too: a caption without its picture is of no use.
                    groups.pop(key, None)
                    break
                ref = ImageRef(str(shard), member.offset_data, member.size)
                groups.setdefault(key, {})[f".{suffix.lower()}"] = ref
            else:
                if fault := _end_fault(shard, tar.offset):
                    left_out.append(LeftOut(str(shard), current or "(start)", fault))
    except (tarfile.TarError, EOFError, OSError) as error:
        left_out.append(LeftOut(str(shard), current or "(start)", f"the shard cannot be read on from here ({error})"))
    yield from groups.items()


def _end_fault(shard: Path, offset: int) -> str:
    """What is wrong where tarfile stopped reading; empty when that is the end of a whole shard.

    tarfile takes a missing end mark and a damaged header for the end, and says nothing.
    """
    with shard.open("rb") as file:
        file.seek(offset)
        block = file.read(tarfile.BLOCKSIZE)
        # 1 MiB: tar pads with zeros to a record (10 KiB by default); more than that is another archive joined on.
        rest = file.read(1 << 20)
    if len(block) < tarfile.BLOCKSIZE:
        return "the shard is cut off after this"
    if any(block):
        return "the shard is damaged after this"
    if any(rest):
        return "there is more after the shard's end mark, which is not read (joined with cat?)"
    return "" if offset else "the shard is empty"
