"""Loading JSON and JSON lines: every fault is one `InputError` that names file and place, and a cut file is called so."""

from __future__ import annotations

import functools
import gc
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mmkit.errors import InputError

Source = str | Path | list[Any] | dict[str, Any]
# A broken file can have a fault in each of 200,000 rows, and the message is one line.
_SHOWN = 5


@contextmanager
def collector_paused() -> Iterator[None]:
    """No garbage collection for a while: it would look at millions of new objects again and again, at twice the time."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        # What is read has no cycles, so that nothing waits for the collector meanwhile.
        yield
    finally:
        if was_on:
            gc.enable()


def listed(items: Iterable[object]) -> str:
    """Name at most five things and say how many more there are."""
    names = [str(item) for item in items]
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def load_json(source: Source, label: str, *, unique: bool = False, lines: bool = False) -> tuple[Any, str]:
    """Read JSON from a path, or pass loaded data through.

    Args:
        source: A path, or data already loaded.
        label: What to call loaded data in messages.
        unique: Refuse an object that has a key twice, for files whose keys are ids; Python would take the last.
        lines: Read JSON lines as well, as the list of their rows.

    Returns:
        The data and the name to use for it in messages.

    Raises:
        InputError: The file is missing, is not UTF-8, or is not JSON (with line and column; cut files are named so).
    """
    if not isinstance(source, (str, Path)):
        return source, label
    name = str(source)
    # Else open() would call it a permission or an odd kind of file.
    if Path(source).is_dir():
        raise InputError(f"cannot read the {label} file: this is a folder", where=name, mend="give the file")
    try:
        # utf-8-sig: editors on Windows put a byte order mark in front.
        text = Path(source).read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise InputError(f"cannot read the {label} file: {error.strerror}", where=name, mend="check the path") from None
    except UnicodeDecodeError as error:
        what = f"byte {error.start} is not UTF-8"
        raise InputError(what, where=name, mend="save the file as UTF-8") from None
    # A name that no file system can have.
    except ValueError as error:
        raise InputError(f"cannot read the {label} file: {error}", where=repr(name), mend="check the path") from None
    try:
        with collector_paused():
            return json.loads(text, object_pairs_hook=functools.partial(_unique_keys, name) if unique else None), name
    except json.JSONDecodeError as error:
        rows = json_lines(text, name)
        if rows is None:
            raise _json_error(text, error, name) from None
    # A file of brackets alone reaches the parser's recursion limit; that is the file's fault, not a bug.
    except RecursionError:
        raise InputError("nested too deeply for an annotation file", where=name, mend="check the file") from None
    if not lines:
        what = f"this is JSON lines, {len(rows)} of them; the {label} are one JSON document"
        raise InputError(what, where=name, mend="give the official file; are predictions and annotations the wrong way round?")
    with collector_paused():
        return [json_line(line, where, last) for where, line, last in rows], name


def json_lines(text: str, name: str) -> list[tuple[str, str, bool]] | None:
    """``(file:line, text, is the last)`` of JSON lines; None of anything else (`load_json` says what).

    Args:
        text: Of a file.
        name: The file.
    """
    # Not splitlines: it breaks at U+2028 as well, which may stand inside a JSON string.
    lines = [(f"{name}:{n}", line) for n, line in enumerate(text.split("\n"), start=1) if line.strip()]
    # A single object may be a row or a whole answer file; the caller knows which.
    if len(lines) < 2 or not lines[0][1].lstrip().startswith("{"):
        return None
    try:
        # An indented JSON file begins with "{", too, but its first line is no object.
        json.loads(lines[0][1])
    except (json.JSONDecodeError, RecursionError):
        return None
    return [(where, line, n == len(lines)) for n, (where, line) in enumerate(lines, start=1)]


def json_line(text: str, where: str, last: bool) -> Any:
    """One line of JSON.

    Raises:
        InputError: It is none.
    """
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        # Only the last line can be half a line.
        cut = "; the file looks cut off" if last else ""
        raise InputError(f"not JSON ({error}){cut}", where=where, mend="copy or write the file again, whole") from None


def _unique_keys(name: str, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of a file whose keys may come once only."""
    found = dict(pairs)
    if len(found) < len(pairs):
        refuse_repeated([key for key, _ in pairs], kind="key", name=name)
    return found


def _json_error(text: str, error: json.JSONDecodeError, name: str) -> InputError:
    """Tell a file that ends too early from one that is wrong in the middle."""
    if not text.strip():
        return InputError("the file is empty", where=name, mend="write or fetch it again")
    where = f"{name}:{error.lineno}:{error.colno}"
    # A string that never ends is reported where it starts, so its place says nothing about the end of the file.
    if error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated string"):
        what = f"not JSON (line {error.lineno} column {error.colno}: {error.msg}); the file looks cut off"
        return InputError(what, where=where, mend="copy or download it again, whole")
    what = f"not JSON (line {error.lineno} column {error.colno}: {error.msg})"
    return InputError(what, where=where, mend="mend that place, or write the file again")


def refuse_repeated(ids: Sequence[int | str], *, kind: str, name: str) -> None:
    """Refuse ids that come twice; taking the first or the last in silence would change the score.

    Raises:
        InputError: Some do, with their rows.
    """
    # One pass of a set is enough for the usual case; rows are looked for only when there is something to name.
    if len(set(ids)) == len(ids):
        return
    places: dict[int | str, list[int]] = {}
    for row, value in enumerate(ids, start=1):
        places.setdefault(value, []).append(row)
    repeated = [f"{value} (rows {listed(rows)})" for value, rows in places.items() if len(rows) > 1]
    raise InputError(f"more than one row for {kind} {listed(repeated)}", where=name, mend=f"keep one for each {kind}")
