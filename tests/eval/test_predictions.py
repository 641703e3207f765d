from __future__ import annotations

import io
import json
from pathlib import Path

from PIL import Image

from mmkit.eval.examples import Example, Picture
from mmkit.eval.predictions import PictureFiles, prediction_rows, write_predictions


def encoded(kind: str, value: int = 0) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 4), (value, 0, 0)).save(file, kind)
    return file.getvalue()


def test_rows_say_what_was_asked_shown_answered_and_parsed(tmp_path):
    one, two, other = Picture("a.jpg"), Picture("b.jpg"), Picture("c.jpg")
    truth = [
        Example(1, (one,), "Q?", "Q?", ["yes"], "yes/no"),
        Example("x", (one, two), "<image> <image>?", "both?", []),
        Example(3, (), "text?", "text?", ["4"]),
    ]
    shown = [Example(1, (other,), "Q?", "Q?", ["yes"], "yes/no"), *truth[1:]]
    per_sample = [{"id": 1, "accuracy": 1.0, "parsed": "yes"}, {"id": "x", "accuracy": 0.0}]
    rows = prediction_rows("t", truth, shown, {1: "Yes.", "x": "no", 3: ""}, per_sample, PictureFiles(tmp_path), cut={"x"})
    assert rows[0] == {
        "task": "t",
        "id": 1,
        "image": "a.jpg",
        "image_shown": "c.jpg",
        "prompt": "Q?",
        "question": "Q?",
        "prediction": "Yes.",
        "parsed": "yes",
        "type": "yes/no",
        "references": ["yes"],
        "score": {"accuracy": 1.0},
    }
    assert rows[1]["images"] == ["a.jpg", "b.jpg"] and "parsed" not in rows[1] and rows[1]["score"] == {"accuracy": 0.0}
    assert [row.get("cut") for row in rows] == [None, True, None]
    # No picture, and left out by the rule.
    assert (rows[2]["image"], rows[2]["image_shown"], rows[2]["score"]) == ("", "", {}) and "images" not in rows[2]
    write_predictions(tmp_path / "predictions.jsonl", rows)
    assert [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()] == rows


def test_odd_file_names_survive(tmp_path):
    write_predictions(tmp_path / "p.jsonl", [{"image": b"\xff.jpg".decode("utf-8", "surrogateescape"), "text": "ü"}])
    assert json.loads((tmp_path / "p.jsonl").read_text()) == {"image": "\udcff.jpg", "text": "ü"}


def test_pictures_of_tables_get_files_of_their_own(tmp_path):
    files = PictureFiles(tmp_path)
    jpeg, png, broken = Picture("../../etc/x y", encoded("JPEG")), Picture("image_1", encoded("PNG")), Picture("image_1", b"no")
    paths = [Path(files.path(p)) for p in (jpeg, png, broken, Picture("", encoded("PNG", 9)))]
    assert len(set(paths)) == 4 and {path.parent for path in paths} == {tmp_path / "pictures"}
    assert [path.suffix for path in paths] == [".jpg", ".png", "", ".png"]
    assert paths[0].read_bytes() == jpeg.data and paths[2].read_bytes() == b"no"
    # Once: another start of the run finds them.
    before = paths[1].stat().st_mtime_ns
    assert Path(PictureFiles(tmp_path).path(png)) == paths[1] and paths[1].stat().st_mtime_ns == before
    assert files.path(Picture("there.jpg")) == "there.jpg"
