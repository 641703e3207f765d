"""What the gallery's script reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from report_runs import Runs, many, row

from mmkit.eval.report import build_report
from mmkit.eval.report.collect import collect
from mmkit.eval.report.gallery import build_gallery
from mmkit.eval.report.systems import system_rows
from mmkit.eval.report.viewer import CHUNK, Viewer, build_viewer, to_script


def viewer_of(paths: list[Path], *, count: int = 99, thumbnail: int = 64) -> tuple[Viewer, dict[str, Any]]:
    rows = system_rows([r for r in collect(paths).runs if r.kind == "eval"])
    viewer = build_viewer(build_gallery(rows, count=count, seed=0), thumbnail=thumbnail)
    return viewer, json.loads(viewer.content)


def test_every_sample_of_the_drawn_pictures_is_there(world: list[Path]) -> None:
    viewer, data = viewer_of(world)
    assert viewer.samples == len(data["samples"]) == 15 * 3 and data["systems"] == ["SuperClass", "random frozen", "blind"]
    assert [(t["name"], t["metric"], t["marks"]) for t in data["tasks"]] == [
        ("coco-caption", "CIDEr", 0),
        ("vqav2", "accuracy", 1),
    ]
    # Tasks one after the other, ids as numbers: 9 before 10.
    assert [s[3] for s in data["samples"][:15]] == [str(i) for i in range(15)]
    assert [s[3] for s in data["samples"][15:19]] == ["0", "1", "100", "101"]
    picture, task, kind, key, question, truths, prompt, answers = data["samples"][15]
    assert data["pictures"][picture][0] == "000.png" and data["tasks"][task]["name"] == "vqav2" and data["types"][kind] == ""
    assert (key, question, truths) == ("0", "What colour is the circle?", [["red", 9], ["round", 1]])
    assert data["prompts"][prompt] == "USER: <image>\n{question}\nASSISTANT:"
    assert len(answers) == 3 and len(answers[0]) == 2
    # The blind system saw another picture, which is among the thumbnails.
    assert data["pictures"][answers[2][3]][0] == "001.png"


def test_types_parsed_answers_and_systems_that_were_not_asked(rich: list[Path]) -> None:
    _, data = viewer_of(rich)
    sample = next(s for s in data["samples"] if data["tasks"][s[1]]["name"] == "textvqa-val" and s[3] == "1300")
    assert data["types"][sample[2]] == "colour" and sample[7][0][2] == sample[7][0][0].upper()
    # blind was not run on it, nor the part only.
    assert [bool(a) for a in sample[7]] == [True, True, False, True, False]


def test_thumbnails_come_in_chunks(runs: Runs) -> None:
    paths = many(runs, pictures=CHUNK + 20, questions=2, systems=1)
    viewer, data = viewer_of(paths, count=1000)
    assert [len(c.split("\n")) for c in viewer.chunks] == [CHUNK, 20] and data["chunk"] == CHUNK and viewer.samples == 240
    assert all(line.startswith("data:image/webp;base64,") for c in viewer.chunks for line in c.split("\n"))
    few, _ = viewer_of(paths, count=7)
    assert len(few.pictures) == 7 and few.samples == 14 and few.size < viewer.size / 10


def test_smaller_thumbnails_make_a_smaller_page(runs: Runs) -> None:
    paths = many(runs, pictures=12, questions=1, systems=1)
    small, large = (viewer_of(paths, thumbnail=side)[0] for side in (48, 192))
    assert max(max(p.width, p.height) for p in small.pictures) == 48 and large.size > 3 * small.size


def test_missing_pictures_say_why(runs: Runs) -> None:
    rows = [row(1, Path("gone.png"), "x", ["x"], {"accuracy": 1.0}, question="q")]
    viewer, data = viewer_of([runs.eval("a", "A", {"vqav2": rows})])
    assert data["pictures"] == [["gone.png", 0, 0, 0, "file not found"]] and viewer.chunks == [""]


def test_no_text_ends_the_script_element() -> None:
    evil = "</script><script>alert(1)</script><!-- \u2028 ]]>"
    assert "<" not in to_script({"text": evil}) and json.loads(to_script({"text": evil})) == {"text": evil}


def test_no_gallery_no_data(world: list[Path], tmp_path: Path) -> None:
    text = build_report(world, tmp_path / "out", gallery=0).read_text()
    assert "<script type=" not in text and 'id="gallery"' not in text
