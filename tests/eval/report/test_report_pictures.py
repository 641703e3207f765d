"""Curves and gallery."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path

import pytest
from PIL import Image
from report_runs import row, say

from mmkit.eval.report.collect import Prediction, collect
from mmkit.eval.report.curves import panels_of
from mmkit.eval.report.gallery import build_gallery, mark_of, truth_of
from mmkit.eval.report.pictures import read_picture, read_thumbnail
from mmkit.eval.report.plots import COLOURS, Line, chart_svg, thin
from mmkit.eval.report.systems import system_rows


def opened(uri: str) -> Image.Image:
    assert uri.startswith("data:image/")
    return Image.open(io.BytesIO(base64.b64decode(uri.split(",", 1)[1])))


def gallery_of(paths: list[Path], **settings: int):
    return build_gallery(system_rows([r for r in collect(paths).runs if r.kind == "eval"]), **settings)


def test_thin_keeps_the_mean_and_drops_what_is_not_finite() -> None:
    steps, values = thin(range(1000), [float(i) for i in range(1000)], most=100)
    assert len(steps) == 100 and steps[-1] == 999 and sum(values) / 100 == pytest.approx(499.5)
    assert thin([1, 2, 3], [1.0, float("nan"), 3.0]) == ([1, 3], [1.0, 3.0])
    assert thin([], []) == ([], [])


def test_svg_is_small_inline_and_reproducible() -> None:
    steps = [float(i) for i in range(9999)]
    lines = [Line(1, steps, [1 / (i + 1) for i in steps]), Line(1, [5.0], [0.5], marks=True)]
    svg = chart_svg(lines, name="panel0", label="loss")
    assert svg.startswith("<svg viewBox=") and svg.endswith("</svg>") and len(svg) < 30_000
    assert COLOURS[1] in svg and "currentColor" in svg and ">loss<" in svg
    # No style of its own: the page's policy would drop it.
    assert not re.search(r"https?:|xlink|<metadata|<!--|#010203|<style|style=", svg) and 'stroke-dasharray="' in svg
    assert svg == chart_svg(lines, name="panel0", label="loss")
    ids = [set(re.findall(r'id="(p[0-9a-f]{8,})"', chart_svg(lines, name=n, label="loss"))) for n in ("panel0", "panel1")]
    assert ids[0] and not ids[0] & ids[1]


def test_curves_of_a_panel_never_look_alike(runs) -> None:
    def looks(paths: list[Path]) -> list[list[tuple[str, str]]]:
        found = collect(paths)
        rows = system_rows([run for run in found.runs if run.kind == "eval"])
        return [[(c.colour, c.dashes) for c in panel.curves] for panel in panels_of(found, rows)]

    # Two settings of one system, and twenty runs without one: nothing but the curves is in such a report.
    (pair,) = looks([runs.train(name, "superclass", system="SuperClass") for name in ("lr-1", "lr-2")])
    assert len(set(pair)) == 2
    (many,) = looks([runs.train(f"run{i}", "superclass") for i in range(20)])
    assert len(set(many)) == 20
    # One system has one look in all its stages.
    stages = looks([runs.train(f"{name}-{stage}", stage, system=name) for name in "AB" for stage in ("superclass", "clipcap")])
    assert stages[0] == stages[1] and len(set(stages[0])) == 2


def test_one_panel_per_stage_with_the_systems_colours(world: list[Path]) -> None:
    found = collect(world)
    rows = system_rows([run for run in found.runs if run.kind == "eval"])
    panels = panels_of(found, rows)
    assert [p.title for p in panels] == ["superclass", "clipcap", "llava", "llava, step 2"]
    assert [c.label for c in panels[0].curves] == ["SuperClass, blind", "random frozen"]
    assert [c.label for c in panels[1].curves] == ["SuperClass", "random frozen"]
    assert {c.colour for p in panels for c in p.curves if "SuperClass" in c.label} == {COLOURS[0]}
    first = panels[0].curves[0]
    assert len(first.values("loss")) == 60 and len(first.values("val_loss")) == 1 and first.points("lr")[0] == (1.0, 1e-3)
    assert [c.title for c in panels[0].charts] == ["Loss", "Learning rate", "Throughput", "Data wait"]


def test_training_runs_alone_are_labelled_by_name(runs) -> None:
    found = collect([runs.train("enc", "superclass"), runs.train("other", "superclass", system="Mine")])
    (panel,) = panels_of(found, [])
    assert [c.label for c in panel.curves] == ["enc", "Mine"]


def test_a_run_without_rows_has_an_empty_loss_chart(runs) -> None:
    (panel,) = panels_of(collect([runs.run("frozen", "train")]), [])
    assert [c.title for c in panel.charts] == ["Loss"] and not panel.curves[0].series


def test_the_draw_depends_on_the_seed_alone(world: list[Path]) -> None:
    first, again = gallery_of(world, count=5, seed=1), gallery_of(world, count=5, seed=1)
    assert first == again and len(first.entries) == 5 and first.pool == 15
    names = [e.picture.name for e in first.entries]
    assert names != [e.picture.name for e in gallery_of(world, count=5, seed=2).entries]
    # Other answers and scores, same pictures: the same draw.
    assert names == [e.picture.name for e in gallery_of([world[-1]], count=5, seed=1).entries]
    whole = gallery_of(world, count=99, seed=1)
    # The sample on the page has its own limit; a smaller gallery is the beginning of a larger one.
    assert len(whole.entries) == 12 and len(whole.names) == 15 and whole.names[:5] == first.names
    assert not gallery_of(world, count=0, seed=0).entries


def test_an_entry_has_truth_and_answers_of_every_system(world: list[Path]) -> None:
    entry = gallery_of(world, count=1, seed=0).entries[0]
    assert [i.question for i in entry.items] == ["", "What colour is the circle?", "How many circles are there?"]
    caption, colour, _ = entry.items
    assert caption.truth.endswith("circle on grey") and len(caption.more_truths) == 2
    assert re.fullmatch(r"\w+ \(9\), round \(1\)", colour.truth)
    assert [a.score.split()[0] for a in caption.answers if a] == ["CIDEr"] * 3
    assert all(a is not None and a.mark in ("right", "wrong", "partly") for a in colour.answers)
    seeing, _, blind = caption.answers
    assert seeing is not None and seeing.shown is None
    assert blind is not None and blind.shown is not None and blind.shown.name != entry.picture.name
    assert [i.answers[2].shown_before for i in entry.items if i.answers[2]] == [False, True, True]


def test_systems_that_were_not_asked_have_no_answer_and_questions_are_limited(runs) -> None:
    image = runs.picture("a.png")
    many = [row(i, image, "x", ["x"], {"accuracy": 1.0}, question=f"q{i}") for i in range(7)]
    a = runs.eval("a", "A", {"vqav2": many})
    b = runs.eval("b", "B", {"coco-caption": say([image], 1.0)["coco-caption"]})
    gallery = gallery_of([a, b], count=3, seed=0)
    (entry,) = gallery.entries
    assert len(entry.items) == 1 + 4 and entry.left_out == 3
    assert [[x is None for x in item.answers] for item in entry.items] == [[True, False]] + [[False, True]] * 4


def test_small_pictures_keep_their_pixels_large_ones_shrink(runs) -> None:
    run = collect([runs.train("enc", "superclass")]).runs[0]
    small = read_picture(str(runs.picture("s.png", size=(64, 48))), run, side=224)
    assert small.pixelated and (small.width, small.height) == (192, 144) and opened(small.uri).size == (64, 48)
    assert opened(small.uri).format == "PNG"
    large = read_picture(str(runs.picture("l.jpg", size=(1200, 800))), run, side=224)
    assert not large.pixelated and (large.width, large.height) == (224, 149)
    assert opened(large.uri).format == "JPEG" and opened(large.uri).size == (320, 213)
    thumb = read_picture(str(runs.pictures / "s.png"), run, side=56)
    assert (thumb.width, thumb.height) == (56, 42)


def test_thumbnails_are_small_and_drawings_keep_their_pixels(runs) -> None:
    run = collect([runs.train("enc", "superclass")]).runs[0]
    large = read_thumbnail(str(runs.picture("l.jpg", size=(1200, 800))), run, side=96)
    assert (large.width, large.height) == opened(large.uri).size == (96, 64) and not large.pixelated
    assert opened(large.uri).format == "WEBP" and len(large.uri) < 2000
    drawing = runs.picture("s.png", size=(64, 48))
    small = read_thumbnail(str(drawing), run, side=96)
    assert (small.width, small.height) == (64, 48) and small.pixelated
    with Image.open(drawing) as image:
        assert list(opened(small.uri).convert("RGB").getdata()) == list(image.convert("RGB").getdata())


def test_pictures_are_encoded_anew_upright_and_without_exif(runs) -> None:
    run = collect([runs.train("enc", "superclass")]).runs[0]
    image = Image.new("RGB", (100, 50), "red")
    exif = image.getexif()
    exif[0x0112], exif[0x010E] = 6, "secret place"
    image.save(runs.pictures / "turned.jpg", exif=exif)
    picture = read_picture(str(runs.pictures / "turned.jpg"), run, side=224)
    assert opened(picture.uri).size == (50, 100)
    assert b"secret" not in base64.b64decode(picture.uri.split(",")[1])


def test_missing_and_damaged_pictures_become_placeholders(runs) -> None:
    run = collect([runs.train("enc", "superclass")]).runs[0]
    gone = read_picture(str(runs.pictures / "gone.png"), run, side=224)
    assert (gone.name, gone.uri, gone.missing) == ("gone.png", "", "file not found")
    whole = runs.picture("cut.jpg", size=(300, 300)).read_bytes()
    (runs.pictures / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (runs.pictures / "text.png").write_text("<svg onload='x'/>")
    for name in ("cut.jpg", "text.png"):
        assert read_picture(str(runs.pictures / name), run, side=224).missing
    assert read_picture("", run, side=224).name == "(no name)"


@pytest.mark.parametrize(
    ("score", "expected"),
    [
        ({"accuracy": 1.0}, ("right", "")),
        ({"accuracy": 0.3}, ("partly", "30 %")),
        ({"accuracy": 0.0}, ("wrong", "")),
        ({"CIDEr": 1.234, "Bleu_4": 0.1}, ("", "CIDEr 123")),
        ({}, ("", "")),
        ({"perception": 1.0}, ("", "perception 1")),
        ({"correct": 1.0}, ("right", "")),
        ({"correct": 1.0, "accuracy": 0.0}, ("wrong", "")),
    ],
)
def test_marks(score: dict[str, float], expected: tuple[str, str]) -> None:
    assert mark_of(Prediction("t", "1", "a", "a", "", "x", [], None, score)) == expected


def test_truths() -> None:
    assert truth_of([]) == "" and truth_of(["red"] * 10) == "red"
    assert truth_of(["a", "b", "a", "c", "d"]) == "a (2), b (1), c (1)"
