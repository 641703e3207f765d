"""MMBench's table (TSV, pictures in base64), and the forms in which its answers come."""

from __future__ import annotations

import base64
import binascii
import contextlib
import csv
import hashlib
import string
import sys
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openpyxl import load_workbook
from openpyxl.utils.exceptions import InvalidFileException

from mmkit.errors import InputError
from mmkit.eval.scorers.answer_files import TEXTS, Found, Row, add_answer, field, read_answers, refuse_unknown
from mmkit.eval.scorers.json_files import Source, listed

# Rows from here on ask the question of row ``index % ROTATIONS`` with its options rotated.
ROTATIONS = 1_000_000
IDS = ("question_id", "index")


@dataclass(frozen=True)
class TableRow:
    """One row.

    Attributes:
        where: ``file:line``.
        index: The id.
        cells: Column -> text, without the picture.
        image: The picture in base64, or the index of the row that has it; empty where the table has no such column.
        picture: Digest of that cell, or the index in it: rows of one picture have the same. Kept where the picture is not.
    """

    where: str
    index: int
    cells: Mapping[str, str]
    image: str
    picture: str = ""

    def cell(self, name: str) -> str:
        """A cell; empty where the table has no such column or pandas wrote its "nan" for nothing."""
        text = self.cells.get(name, "")
        return "" if text.strip().lower() == "nan" else text

    @property
    def options(self) -> dict[str, str]:
        """Letter -> text of the options there are."""
        # Columns of one capital letter: newer tables have more than four.
        return {name: self.cell(name) for name in self.cells if name in string.ascii_uppercase and self.cell(name)}

    @property
    def base(self) -> int:
        """The index of the question that this row is a rotation of; its own where it is none."""
        return self.index % ROTATIONS

    @property
    def l2_category(self) -> str:
        """The coarse category, which the copy on Hugging Face spells with a capital."""
        return self.cell("l2-category") or self.cell("L2-category")


def read_table(source: Source, *, images: bool = True) -> list[TableRow]:
    """Read the table.

    Args:
        source: The TSV, or its rows as dictionaries.
        images: Keep the pictures, which are nearly all of a table.

    Returns:
        Rows in the order of the file.

    Raises:
        InputError: Missing, empty or cut off; no column ``index``, ``question`` or ``A``; a repeated or odd index; a row without
            options; a rotation of a question that is not there.
    """
    name = str(source) if isinstance(source, (str, Path)) else "annotations"
    rows: list[TableRow] = []
    # Row by row, so that the text of pictures that nobody wants is never all in memory.
    with _long_fields():
        for where, record in _records(Path(source)) if isinstance(source, (str, Path)) else _loaded(source):
            lacking = [column for column in ("index", "question", "A") if column not in record]
            if lacking:
                what = f"no column {', '.join(lacking)}; this is no MMBench table"
                raise InputError(what, where=name, mend="give mmbench_dev_20230712.tsv or its like")
            rows.append(_row(where, record, images))
    if not rows:
        raise InputError("the table has no rows", where=name, mend="fetch it again")
    _check(rows)
    return rows


@contextlib.contextmanager
def _long_fields() -> Iterator[None]:
    """Let the csv module read pictures: its limit of 128 KiB a field is one setting for the whole process."""
    limit = csv.field_size_limit(sys.maxsize)
    try:
        yield
    finally:
        csv.field_size_limit(limit)


def _loaded(source: object) -> Iterator[tuple[str, dict[str, str]]]:
    """Rows that a notebook has loaded, as texts."""
    if not isinstance(source, list):
        raise InputError(f"the table is {type(source).__name__}", where="annotations", mend="give the TSV, or a list of rows")
    for number, row in enumerate(source, start=1):
        where = f"annotations: row {number}"
        if not isinstance(row, dict):
            raise InputError("a row is no dictionary", where=where, mend="give column -> text")
        yield where, {str(key): "" if value is None else str(value) for key, value in row.items()}


def _records(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """``(file:line, column -> text)`` of a TSV, quoted as pandas reads it."""
    line = 1
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, delimiter="\t", strict=True)
            header = next(reader, [])
            for cells in reader:
                line = reader.line_num
                if len(cells) != len(header):
                    what = f"{len(cells)} columns, where the first line has {len(header)}"
                    raise InputError(what, where=f"{path}:{line}", mend="fetch the table again; is it cut off?")
                yield f"{path}:{line}", dict(zip(header, cells, strict=True))
    except OSError as error:
        raise InputError(f"cannot read the table: {error.strerror}", where=path, mend="check the path") from None
    except UnicodeDecodeError as error:
        what = f"after line {line} comes a byte that is not UTF-8 ({error.reason})"
        raise InputError(what, where=path, mend="fetch it again") from None
    except csv.Error as error:
        what = f"after line {line} it is no table ({error})"
        raise InputError(what, where=f"{path}:{line}", mend="fetch it again; is it cut off?") from None


def _row(where: str, record: Mapping[str, str], images: bool) -> TableRow:
    """A row with a whole number for its index, and options."""
    # pandas writes whole numbers as 5.0 where a column has gaps.
    text = record["index"].strip().removesuffix(".0")
    if not (text.isascii() and text.isdigit()):
        raise InputError(f"index {text!r:.30} is no whole number", where=where, mend="fetch the table again")
    cells = {name: value for name, value in record.items() if name != "image"}
    image = record.get("image", "").strip()
    picture = image if _names_a_row(image) else hashlib.blake2b(image.encode(errors="replace"), digest_size=16).hexdigest()
    row = TableRow(where, int(text), cells, image if images else "", picture if image else "")
    if not row.options:
        raise InputError(f"question {row.index} has no options", where=where, mend="fetch the table again")
    return row


def _names_a_row(image: str) -> bool:
    """Whether a cell names the row that has the picture: a base64 text is never a short number."""
    return image.isascii() and image.isdigit() and len(image) < 12


def shared_pictures(rows: Sequence[TableRow]) -> dict[int, str]:
    """Index of each row -> a name of its picture, the same for all rows that show it; without a picture, its question's."""
    by_index = {row.index: row for row in rows}
    found = {}
    for row in rows:
        holder = by_index.get(int(row.picture), row) if _names_a_row(row.picture) else row
        found[row.index] = holder.picture or f"question {row.base}"
    return found


def _check(rows: Sequence[TableRow]) -> None:
    """Refuse repeated indices and rotations without their question."""
    seen: dict[int, TableRow] = {}
    for row in rows:
        if row.index in seen:
            what = f"index {row.index} comes twice (first: {seen[row.index].where})"
            raise InputError(what, where=row.where, mend="keep one row for each")
        seen[row.index] = row
    # Circular accuracy of a question without its first row would have no category to count in.
    for row in rows:
        if row.base not in seen:
            what = f"row {row.index} is a rotation of question {row.base}, which the table lacks"
            raise InputError(what, where=row.where, mend="give the whole table")


def answer_of(row: TableRow) -> str:
    """The letter of the true option.

    Raises:
        InputError: There is none, as in a test set; or it is no option of the row.
    """
    answer = row.cell("answer").strip()
    if not answer:
        what = f"question {row.index} has no answer; a test set's are with its server"
        raise InputError(what, where=row.where, mend="send the submission file there, or give the dev table")
    # An answer that no letter can name would be wrong whatever a model says.
    if answer not in row.options:
        what = f"question {row.index} has answer {answer!r:.20}, none of {', '.join(row.options)}"
        raise InputError(what, where=row.where, mend="fetch the table again")
    return answer


def pictures(rows: Sequence[TableRow]) -> dict[int, bytes]:
    """The encoded picture of each row; a row may name another one by its index.

    Raises:
        InputError: No picture, a name that leads to none, or broken base64.
    """
    by_index = {row.index: row for row in rows}
    found: dict[int, bytes] = {}
    for row in rows:
        holder = row
        if _names_a_row(row.image):
            holder = by_index.get(int(row.image), row)
        if holder.index not in found:
            found[holder.index] = _decode(holder, row)
        # The same bytes, not a copy: the rotations of a question share its picture.
        found[row.index] = found[holder.index]
    return found


def _decode(holder: TableRow, row: TableRow) -> bytes:
    """The bytes of a picture."""
    try:
        # Line breaks inside base64 are allowed; anything else is a broken cell.
        data = base64.b64decode("".join(holder.image.split()), validate=True)
    except binascii.Error:
        data = b""
    # Four base64 digits of an index decode, too, and to next to nothing.
    if len(data) < 16:
        what = f"row {row.index} has no picture: its cell is {holder.image[:20]!r}"
        raise InputError(what, where=row.where, mend="fetch the table again")
    return data


def read_mmbench_answers(source: Source, rows: Sequence[TableRow]) -> dict[Any, Found]:
    """Read answers.

    Args:
        source: Rows with ``question_id`` (mmkit, LLaVA) or ``index`` (VLMEvalKit) and a text; or an ``.xlsx`` with the columns
            ``index`` and ``prediction`` (a submission file, VLMEvalKit's results).
        rows: The table.

    Returns:
        Index -> answer.

    Raises:
        InputError: Unreadable, fields missing or of the wrong type, repeated or unknown indices.
    """
    if isinstance(source, (str, Path)) and Path(source).suffix == ".xlsx":
        found: dict[Any, Found] = {}
        for row in _sheet(Path(source)):
            key = field(row, IDS, int)
            add_answer(found, key, Found(row.where, field(row, TEXTS[:1], str, who=f"question {key}")))
    else:
        found = read_answers(source, IDS, lambda row, names: field(row, names, int))
    refuse_unknown(found, {row.index for row in rows}, "the table")
    return found


def _sheet(path: Path) -> list[Row]:
    """The rows of a workbook's first sheet; an empty prediction is an empty text."""
    try:
        # read_only streams the rows; data_only takes a formula's value.
        book = load_workbook(path, read_only=True, data_only=True)
    except OSError as error:
        raise InputError(f"cannot be read ({error.strerror or error})", where=path, mend="check the path") from None
    # A zip file that is none, or lacks its parts.
    except (InvalidFileException, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise InputError(f"is no workbook ({error})", where=path, mend="write or fetch it again") from None
    lines = list(book.worksheets[0].iter_rows(values_only=True))
    book.close()
    if len(lines) < 2:
        raise InputError("the sheet has no rows", where=path, mend="write the columns index and prediction")
    # By name: programs put the two columns in different places.
    header = [str(name) for name in lines[0]]
    lacking = [name for name in ("index", "prediction") if name not in header]
    if lacking:
        raise InputError(f"no column {listed(lacking)}", where=path, mend="write the columns index and prediction")
    return [Row(f"{path}: row {n}", _typed(dict(zip(header, line, strict=False)))) for n, line in enumerate(lines[1:], start=2)]


def _typed(cells: Mapping[str, Any]) -> dict[str, Any]:
    """Cells as JSON would have them: a spreadsheet turns "2" into 2 and "" into nothing."""
    index, text = cells["index"], cells["prediction"]
    whole = int(index) if isinstance(index, float) and index.is_integer() else index
    return {"index": whole, "prediction": "" if text is None else str(text)}
