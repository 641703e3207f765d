"""Which files of lmms-eval belong together: the results of a folder, and the samples of ``--log_samples`` beside them."""

from __future__ import annotations

import glob
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmkit.errors import InputError
from mmkit.files import read_json

PROGRAM = "lmms-eval"
AGAIN = "give the ..._results.json that lmms-eval wrote under --output_path"
# 20260101_120000_results.json, the older results_DATE.json, and the results.json of a folder named by the date.
_RESULTS = re.compile(r"(?:\d{8}_\d{6}_results|results_\d.*|results)\.json")
_DATE = re.compile(r"\d{8}_\d{6}|\d{4}-\d\d-\d\dT\d\d[-:]\d\d[-:]\d\d")


def find_results(folder: Path, notes: list[str]) -> list[Path]:
    """The results files that a folder of lmms-eval stands for: the newest of it, or of each model's folder in it.

    Args:
        folder: What was given as ``--output_path``, or a model's folder in there.
        notes: Gets a line for each folder with several results files: which was taken, and which were not.

    Returns:
        One file for each model; none where there is no results file.
    """
    for folders in ([folder], sorted(path for path in folder.iterdir() if path.is_dir())):
        found = [newest for path in folders if (newest := _newest(path, notes)) is not None]
        if found:
            return found
    return []


def _newest(folder: Path, notes: list[str]) -> Path | None:
    """The newest results file right in a folder, by the date in its name, since a copy has the date of the copying."""
    files = sorted(
        (path for path in folder.iterdir() if _RESULTS.fullmatch(path.name) and path.is_file()),
        key=lambda path: (_date_of(path), path.name),
    )
    if len(files) > 1:
        missed = sorted({task for path in files[:-1] for task in _tasks(path)} - set(_tasks(files[-1])))
        told = f"; {', '.join(missed)} stand only in older ones: name those files too" if missed else ""
        notes.append(f"{folder.name}: {files[-1].name} was read, the newest of {len(files)} results files{told}")
    return files[-1] if files else None


def _date_of(path: Path) -> str:
    """The date in a file's name, empty where it has none."""
    found = _DATE.search(path.name)
    return found.group() if found else ""


def _tasks(path: Path) -> list[str]:
    """The tasks of a results file."""
    content = read_json(path, mend="take it out of the folder, or name the results file to be read")
    results = content.get("results") if isinstance(content, dict) else None
    return list(results) if isinstance(results, dict) else []


def refuse_samples(path: Path) -> None:
    """Refuse a file that holds the samples and not the results, and name the one to give.

    Args:
        path: A file that was given as results.

    Raises:
        InputError: It is named like a samples file.
    """
    if path.suffix != ".jsonl" or "samples_" not in path.name:
        return
    date = _date_of(path)
    beside = [p for p in path.parent.iterdir() if _RESULTS.fullmatch(p.name) and date and _date_of(p) == date]
    mend = f"give {beside[0]}, whose samples are read with it" if beside else f"{AGAIN}; its samples are read with it"
    raise InputError(f"holds the samples of {PROGRAM}, not its results", where=path, mend=mend)


def read_samples(path: Path, task: str, notes: list[str]) -> list[dict[str, Any]]:
    """Rows of a task's samples file, none if there is no such file beside the results.

    Args:
        path: The results file.
        task: The task's name in lmms-eval.
        notes: Gets a line where there are no samples.

    Returns:
        The rows, in the file's order.

    Raises:
        InputError: A row is damaged, or it cannot be told which of several files belongs to the results.
    """
    # 20260101_120000_results.json and 20260101_120000_samples_TASK.jsonl are of one run.
    date = path.name.removesuffix("results.json") if path.name.endswith("results.json") else ""
    # Of a name in an edited file no part is a folder or a pattern.
    word = re.sub(r"[/\\\0]", "_", task)
    named = [path.with_name(f"{date}samples_{word}.jsonl")]
    # Also the older results_DATE.json with samples_TASK_DATE.jsonl, and renamed results.
    pattern = glob.escape(word)
    others = sorted({*path.parent.glob(f"*samples_{pattern}.jsonl"), *path.parent.glob(f"samples_{pattern}_2*.jsonl")})
    # A run without samples has none, though another run of the task left some in the same folder.
    own = _date_of(path)
    others = [p for p in others if not own or _date_of(p) in ("", own)]
    files = [p for p in named if p.is_file()] or others
    if len(files) > 1:
        what = f"{len(files)} files may hold the samples of {task}: {', '.join(f.name for f in files[:4])}"
        raise InputError(what, where=path, mend="keep one run in a folder, with the file names lmms-eval gave")
    if not files:
        notes.append(f"no samples of {task} beside {path.name}; run lmms-eval with --log_samples to see its answers")
    return [row for file in files for row in _sample_rows(file)]


def _sample_rows(file: Path) -> Iterator[dict[str, Any]]:
    """The rows of one samples file."""
    mend = "run lmms-eval again with --log_samples"
    seen: set[object] = set()
    with file.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            where = f"{file}:{number}"
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise InputError(f"not valid JSON ({error})", where=where, mend=mend) from error
            if not isinstance(row, dict) or not isinstance(row.get("doc_id"), (int, str)) or "filtered_resps" not in row:
                raise InputError("no sample of lmms-eval (doc_id and filtered_resps)", where=where, mend=mend)
            # It appends: a second run of the same minute doubles every row.
            if row["doc_id"] in seen:
                raise InputError(f"doc_id {row['doc_id']} is there twice", where=where, mend=mend)
            seen.add(row["doc_id"])
            yield row
