"""Pictures with a class: image folders, JSON lines, webdataset tars and Hugging Face data sets, behind one small class.

Strict where pairs are lenient: a score over other pictures than the next system's is another score, so nothing is left out.
"""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from mmkit.config import LabelledDataConfig
from mmkit.data.bounds import MAX_BYTES
from mmkit.data.images import ImageRef
from mmkit.data.pairs import safe_image_path
from mmkit.data.sidecar import Omitted
from mmkit.data.sources.columns import data_roots, follow_picture, load_rows
from mmkit.data.sources.effect import LABELLED_KEYS, check_keys, defaults_of
from mmkit.data.sources.locate import HUB, expand
from mmkit.data.sources.tars import IMAGE_SUFFIXES, FileBytes, group_members
from mmkit.errors import InputError
from mmkit.files import hash_text


# A picture is a byte range of a file or a row of an Arrow table; readers of features and probes need not know which.
class Pictures(Protocol):
    """Encoded pictures by number; pickles, so that loader processes can have it."""

    def read(self, index: int) -> bytes:
        """Bytes of a picture. Raises SampleError when there are none."""
        ...


@dataclasses.dataclass(frozen=True)
class LabelledSource:
    """A labelled set.

    Attributes:
        location: As the user gave it.
        pictures: Bytes on demand.
        keys: A name for each picture, which an error message or a table can show.
        labels: The class name of each picture, as the data have it.
        classes: All classes of the whole set, also of what a limit left away; numbers in their order, names by alphabet, and
            a Hugging Face data set's in its own order.
        fingerprint: Hash of names, sizes and classes: what the set is.
        pictures_fingerprint: Hash of names, sizes and times of writing, without classes: what features of it depend on.
    """

    location: str
    pictures: Pictures
    keys: list[str]
    labels: list[str]
    classes: list[str]
    fingerprint: str
    pictures_fingerprint: str

    def __len__(self) -> int:
        """Number of pictures."""
        return len(self.labels)

    def targets(self, classes: Sequence[str]) -> list[int]:
        """The number of each picture's class in a list of classes.

        Raises:
            InputError: A class is not in the list.
        """
        number = {name: i for i, name in enumerate(classes)}
        # A test class that training never saw would count as an error of the model; it is one of the data.
        if unknown := sorted(set(self.labels) - set(number)):
            what = f"classes {', '.join(unknown[:5])} are not in the training set"
            raise InputError(what, where=self.location, mend="fix labels")
        return [number[label] for label in self.labels]


@dataclasses.dataclass(frozen=True)
class _Files:
    """Pictures in files, or in slices of tars."""

    refs: list[ImageRef]
    max_bytes: int = MAX_BYTES

    def read(self, index: int) -> bytes:
        return self.refs[index].read(self.max_bytes)

    def take(self, kept: list[int]) -> _Files:
        return dataclasses.replace(self, refs=[self.refs[i] for i in kept])

    def stamps(self) -> tuple[list[str], list[str]]:
        """Place and size of each picture, and the time its file was written; a missing file has neither."""
        # One stat a file: a tar of thousands of pictures would be asked for each of them otherwise.
        seen: dict[str, tuple[int, int]] = {}
        for path in {ref.path for ref in self.refs}:
            # A missing picture is no fault here: it is named when it is decoded, and a limit may leave it away.
            stat = Path(path).stat() if Path(path).exists() else None
            seen[path] = (stat.st_size, stat.st_mtime_ns) if stat else (-1, -1)
        return (
            [f"{ref.path} {ref.offset} {ref.size} {seen[ref.path][0]}" for ref in self.refs],
            [str(seen[ref.path][1]) for ref in self.refs],
        )


@dataclasses.dataclass(frozen=True)
class _Column:
    """Pictures in a column of a Hugging Face data set that is not decoded."""

    rows: Any
    column: str
    numbers: list[int]
    roots: tuple[Path, ...]
    max_bytes: int = MAX_BYTES

    def read(self, index: int) -> bytes:
        # An undecoded picture is {"bytes", "path"}, either of which may be None.
        return follow_picture(self.rows[self.numbers[index]][self.column], self.roots, self.max_bytes)

    def take(self, kept: list[int]) -> _Column:
        return dataclasses.replace(self, numbers=[self.numbers[i] for i in kept])

    def stamps(self) -> tuple[list[str], list[str]]:
        """Row numbers; the data set's own fingerprint stands for the content."""
        # It changes with every transformation of the set, so no row has to be read to notice other content.
        own = [f"{self.rows._fingerprint} {number}" for number in self.numbers]
        return own, own


class _Read:
    """What a reader found: parallel lists, and the classes in their order if the data set has one."""

    def __init__(self, pictures: _Files | _Column, keys: list[str], labels: list[str], classes: list[str] | None = None) -> None:
        self.pictures, self.keys, self.labels, self.classes = pictures, keys, labels, classes


def open_labelled(location: str, data: LabelledDataConfig) -> LabelledSource:
    """Read the index of a labelled set.

    Args:
        location: Image folder with a sub-folder a class; ``.jsonl`` rows; tar shards with ``.cls`` (a number or a name) beside
            each picture; or ``hf:NAME_OR_FOLDER[@SPLIT]``.
        data: Kind, keys, root folder and limits.

    Raises:
        InputError: Nothing there, a bad row or shard, or a picture outside the data folder.
    """
    kind = _kind(location) if data.type == "auto" else data.type
    # With its sister set: they are read by the same keys, of which one may need none.
    places = [location, *(place for place in (data.train, data.test) if place is not None)]
    kinds = [_kind(place) if data.type == "auto" else data.type for place in places]
    check_keys(data, defaults_of(LabelledDataConfig), kinds, where=location, readers=LABELLED_KEYS)
    readers = {"folder": _read_folder, "jsonl": _read_jsonl, "webdataset": _read_shards, "hf": _read_hugging_face}
    found = readers[kind](location, data)
    if not found.keys:
        mend = f"give an image folder, rows with {data.image} and {data.label}, tars with .cls, or hf:NAME"
        raise InputError("no labelled picture", where=location, mend=mend)
    # Before the limit: class numbers must not depend on which pictures are drawn.
    classes = found.classes or sort_classes(found.labels)
    pictures, keys, labels = dataclasses.replace(found.pictures, max_bytes=data.max_bytes), found.keys, found.labels
    if data.limit is not None and data.limit < len(keys):
        # Image folders come sorted by class: the first N would be one class.
        # A fixed seed, not the recipe's: runs that differ in their seed must still be measured on the same pictures.
        kept = sorted(random.Random(0).sample(range(len(keys)), data.limit))
        pictures, keys, labels = pictures.take(kept), [keys[i] for i in kept], [labels[i] for i in kept]
    what, when = pictures.stamps()
    return LabelledSource(
        location=location,
        pictures=pictures,
        keys=keys,
        labels=labels,
        classes=classes,
        # Without times: files fetched again are still the same set, though its features are extracted anew.
        fingerprint=hash_text(*what, *labels),
        pictures_fingerprint=hash_text(*what, *when),
    )


def sort_classes(labels: Sequence[str]) -> list[str]:
    """Each class once: in the order of numbers if all are numbers, else by alphabet."""
    names = set(labels)
    # By alphabet 10 would come before 2; the name breaks the tie of "1" and "01".
    return sorted(names, key=lambda name: (int(name), name)) if all(map(is_number, names)) else sorted(names)


def is_number(label: str) -> bool:
    """Whether a class is a number from 0 on."""
    # isdigit alone is true of superscripts too, which int() refuses.
    return label.isascii() and label.isdigit()


def _kind(location: str) -> str:
    """The kind of a set by its name and what lies there."""
    path = Path(location)
    if location.startswith(HUB):
        return "hf"
    if path.is_dir():
        # Image folders hold their pictures in sub-folders, so a tar right here decides.
        return "webdataset" if any(path.glob("*.tar")) else "folder"
    # A file whose name really holds a bracket is a file first, a pattern second.
    if path.suffix == ".tar" or (not path.exists() and any(c in location for c in "{*?[")):
        return "webdataset"
    return "jsonl"


def _read_folder(location: str, data: LabelledDataConfig) -> _Read:
    """Pictures in a sub-folder a class."""
    if not Path(location).is_dir():
        raise InputError("no such folder", where=location, mend="check data.train and data.test")
    # Sorted: glob gives the file system's order, which differs between machines.
    files = sorted(p for p in Path(location).glob("*/*") if p.suffix.lower() in IMAGE_SUFFIXES)
    return _Read(_Files([ImageRef(str(p)) for p in files]), [str(p) for p in files], [p.parent.name for p in files])


def _read_jsonl(location: str, data: LabelledDataConfig) -> _Read:
    """Rows of a JSON-lines file; those whose label is null are left away: they have no class."""
    path = Path(location)
    if not path.is_file():
        raise InputError("no such file or folder", where=location, mend="check data.train and data.test")
    root = Path(data.image_root) if data.image_root else path.parent
    files, labels = [], []
    # Split at \n only: str.splitlines would also split inside JSON strings (U+2028 is legal there).
    for number, line in enumerate(path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8"))
            if row[data.label] is not None:
                labels.append(_class_name(row[data.label]))
                files.append(str(safe_image_path(root, row.get(data.image))))
        # RecursionError: what json raises on deeply nested brackets, of which a damaged line can consist.
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            mend = f"each row needs {data.image} and {data.label!r}"
            raise InputError(f"bad row ({error})", where=f"{path}:{number}", mend=mend) from None
    return _Read(_Files([ImageRef(file) for file in files]), files, labels)


def _class_name(value: object) -> str:
    """A class as text: a number and its digits are the same class."""
    # No floats: 1.0 and 1 would be two classes.
    if not isinstance(value, str | int):
        raise TypeError(f"the class is {type(value).__name__}, not text or a whole number")
    name = str(value).strip()
    if not name:
        raise ValueError("the class is empty")
    return name


def _read_shards(location: str, data: LabelledDataConfig) -> _Read:
    """Tar shards; the class of ``KEY.jpg`` is in ``KEY.cls``."""
    refs, keys, labels = [], [], []
    mend = "write the shard again, each picture with its class in a .cls beside it"
    for shard in expand(location, ".tar"):
        left_out: list[Omitted] = []
        for key, members in group_members(FileBytes(Path(shard)), left_out):
            where = f"{shard}:{key}"
            image = next((members[s] for s in IMAGE_SUFFIXES if s in members), None)
            # Refused, where pairs leave the sample out: a score over the remaining ones would be another score.
            if image is None or ".cls" not in members:
                raise InputError(f"no {'picture' if image is None else '.cls'}", where=where, mend=mend)
            try:
                label = members[".cls"]
                labels.append(_class_name(ImageRef(shard, label.offset, label.size).read().decode("utf-8")))
            except ValueError as error:
                raise InputError(f".cls: {error}", where=where, mend=mend) from None
            refs.append(ImageRef(shard, image.offset, image.size))
            keys.append(where)
        # The shared shard reader is lenient and only lists what it left out; here each of those ends the run.
        if left_out:
            raise InputError(left_out[0].reason, where=f"{shard}:{left_out[0].key}", mend="write or fetch the shard again")
    return _Read(_Files(refs), keys, labels)


def _read_hugging_face(location: str, data: LabelledDataConfig) -> _Read:
    """A Hugging Face data set; its class labels bring their names, and -1 (the hub's mark of a hidden class) has none."""
    # Slow to import, and no other kind of set needs it.
    import datasets

    name, _, split = location.removeprefix(HUB).partition("@")
    rows = load_rows(name, split, location)
    for column in (data.image, data.label):
        if column not in rows.column_names:
            mend = f"set data.image and data.label; there are {', '.join(rows.column_names)}"
            raise InputError(f"no column {column!r}", where=location, mend=mend)
    if not isinstance(rows.features[data.image], datasets.Image):
        mend = "set data.image to a column of pictures"
        raise InputError(f"column {data.image!r} holds {rows.features[data.image]}, no pictures", where=location, mend=mend)
    feature = rows.features[data.label]
    values = rows[data.label][:]
    names = list(feature.names) if isinstance(feature, datasets.ClassLabel) else None
    # A negative number would otherwise index the names from their end and become the last class.
    numbers = [i for i, value in enumerate(values) if value is not None and not (names and value < 0)]
    try:
        labels = [names[values[i]] if names else _class_name(values[i]) for i in numbers]
    except (TypeError, ValueError) as error:
        mend = "set data.label to a column of classes"
        raise InputError(f"column {data.label!r}: {error}", where=location, mend=mend) from None
    # Without decoding: the bytes go through the same decoder as every other picture.
    pictures = rows.select_columns([data.image]).cast_column(data.image, datasets.Image(decode=False))
    undecoded = _Column(pictures, data.image, numbers, data_roots(name))
    return _Read(undecoded, [f"{location} row {i}" for i in numbers], labels, names)
