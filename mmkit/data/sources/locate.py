"""From what a recipe writes to the files of a data set."""

from __future__ import annotations

import os
import re
from pathlib import Path

from mmkit.data.remote import is_remote, remote_glob
from mmkit.errors import InputError

HUB = "hf:"
_BRACES = re.compile(r"\{([^{}]*)\}")


def expand(location: str, suffix: str) -> list[str]:
    """Files of ``a-{000..123}.tar``, ``{train,more}/*.tar``, a glob, a folder, an address, or one file, in name order.

    Args:
        location: Paths, or addresses that fsspec knows.
        suffix: What the files of a folder end in.

    Raises:
        InputError: A named file does not exist, or none matches. Whether an address exists shows when it is read.
    """
    found: list[str] = []
    missing: list[str] = []
    for name in _braces(location):
        if is_remote(name):
            found += remote_glob(name) if _is_pattern(name) else [name]
        elif os.path.isdir(name):
            # Strings from the listing itself: a hundred thousand Paths would take a second.
            folder = str(Path(name))
            found += sorted(f"{folder}/{entry}" for entry in os.listdir(folder) if entry.endswith(suffix))  # noqa: PTH208
        elif _is_pattern(name) and not os.path.exists(name):
            # Path.glob takes relative patterns only, hence the detour over the anchor.
            anchor = Path(name).anchor
            found += sorted(str(p) for p in Path(anchor or ".").glob(name.removeprefix(anchor)))
        else:
            found.append(name)
            # A range names its shards, so a missing one is an error; a glob would train on fewer in silence.
            if not os.path.isfile(name):
                missing.append(name)
    if missing or not found:
        what = f"{len(missing)} shards are missing, the first is {missing[0]}" if missing else f"no {suffix} shard matches"
        if missing == [location]:
            what = "no such file"
        raise InputError(what, where=location, mend="check data.train")
    return found


def _braces(location: str) -> list[str]:
    """``{000..123}`` and ``{a,b}`` written out, as a shell does; digits keep their zeros."""
    # A file whose name really holds braces is a file first. os.path: a list written out may be longer than a name can be.
    match = None if os.path.exists(location) else _BRACES.search(location)
    if match is None:
        return [location]
    inside = re.fullmatch(r"(\d+)\.\.(\d+)", match[1])
    if inside:
        first, last = inside.groups()
        choices = [f"{i:0{len(first)}d}" for i in range(int(first), int(last) + 1)]
    elif "," in match[1]:
        choices = match[1].split(",")
    else:
        return [location]
    return [more for c in choices for more in _braces(location[: match.start()] + c + location[match.end() :])]


def _is_pattern(name: str) -> bool:
    return any(c in name for c in "*?[")


def guess_kind(location: str) -> str:
    """The kind of a data set by its name and by what lies there."""
    if location.startswith(HUB) and not is_remote(location):
        return "hf"
    path = Path(location)
    if os.path.isdir(location):
        return _kind_of_folder(path)
    suffix = path.suffix.lower()
    if suffix == ".json":
        return "llava" if _is_list(path) else "coco"
    # Globs and brace ranges may have no telling suffix; most of them are shards.
    return {".jsonl": "pairs", ".parquet": "parquet"}.get(suffix, "webdataset")


def _kind_of_folder(folder: Path) -> str:
    suffixes = {os.path.splitext(name)[1] for name in os.listdir(folder)}  # noqa: PTH122, PTH208  there may be a hundred thousand
    # Tars first: img2dataset writes a Parquet file of metadata beside each.
    for suffix, kind in ((".tar", "webdataset"), (".parquet", "parquet")):
        if suffix in suffixes:
            return kind
    # What save_to_disk of Hugging Face's datasets writes.
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        return "hf"
    # Even an empty one: the reader's message says what it looked for.
    return "folder" if any(p.is_file() or p.is_dir() for p in folder.iterdir()) else "webdataset"


def _is_list(path: Path) -> bool:
    """Whether a JSON file begins as a list: LLaVA's do, COCO's are objects."""
    if not os.path.isfile(path):
        return False
    with path.open("rb") as file:
        return file.read(64).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"["
