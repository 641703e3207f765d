"""Runs that were moved, renamed or made anew after they were evaluated."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from report_runs import Runs, row

from mmkit.eval.report import build_report
from mmkit.eval.report.collect import collect
from mmkit.eval.report.moved import follow, move_of


def pipeline(folder: Path) -> tuple[Path, Path]:
    """An encoder and an evaluation on pictures in the same folder, all named absolutely, as a recipe with such paths does."""
    folder.mkdir()
    runs = Runs(folder)
    encoder = runs.train("encoder", "superclass")
    rows = [row(i, runs.picture("a b#?%.png"), "x", ["x"], {"accuracy": 1.0}, question="q") for i in range(3)]
    path = runs.eval("eval", "A", {"vqav2": rows}, parents=[{"role": "model", "path": str(encoder), "fingerprint": "e" * 32}])
    for run in (encoder, path):
        (run / "recipe.yaml").write_text(f"stage: x\nrun: {run}\nseed: 0\n")
    return encoder, path


def test_a_renamed_folder_of_relative_runs_keeps_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "launch").mkdir()
    monkeypatch.chdir(tmp_path / "launch")
    pipeline(Path("demo"))
    there = tmp_path / "backup of the demo"
    shutil.move("demo", there)
    found = collect([there / "runs" / "eval"])
    assert [run.path for run in found.ancestors] == [there / "runs" / "encoder"]
    assert "file not found" not in build_report([there / "runs" / "eval"], tmp_path / "out").read_text()


def test_a_moved_folder_keeps_its_pictures_and_its_lineage(tmp_path: Path) -> None:
    pipeline(tmp_path / "cluster")
    here = tmp_path / "laptop" / "copy"
    here.parent.mkdir()
    shutil.move(tmp_path / "cluster", here)
    found = collect([here / "runs" / "eval"])
    assert [run.path for run in found.ancestors] == [here / "runs" / "encoder"]
    page = build_report([here / "runs" / "eval"], tmp_path / "out").read_text()
    assert "file not found" not in page and 'alt="a b#?%.png"' in page and "from elsewhere" not in page
    # The folder that named the pictures is gone, and another one is not taken for it.
    (here / "pictures" / "a b#?%.png").unlink()
    assert "a b#?%.png (file not found)" in build_report([here / "runs" / "eval"], tmp_path / "out").read_text()


def test_relative_pictures_are_found_from_any_folder(runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs.picture("a.png")
    path = runs.eval("eval", "A", {"vqav2": [row(1, Path("pictures/a.png"), "x", ["x"], {"accuracy": 1.0}, question="q")]})
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert "file not found" not in build_report([path], elsewhere / "out").read_text()


def test_moves(tmp_path: Path) -> None:
    new = tmp_path / "new" / "runs" / "eval"
    recipe = "# run: /not/this\nrun: '/old/demo/runs/eval'\nprobe:\n  run: /nor/this\n"
    move = move_of(new, recipe)
    assert move is not None and (str(move[0]), move[1]) == ("/old/demo", tmp_path / "new")
    assert follow("/old/demo/world/a.png", move) == tmp_path / "new" / "world" / "a.png"
    assert follow("/other/a.png", move) is None and follow("world/a.png", move) is None and follow("/old/demo/x", None) is None
    # Relative to where the command was started: moved there, renamed above, or in its place.
    for text, old, here in (
        ("run: runs/eval", ".", tmp_path / "new"),
        ("run: ../there/runs/eval", "../there", tmp_path / "new"),
        ("run: eval", ".", new.parent),
    ):
        move = move_of(new, text)
        assert move is not None and (str(move[0]), move[1]) == (old, here)
        assert follow(f"{old}/world/a.png", move) == here / "world" / "a.png"
    # Renamed itself, not told, or still in its place.
    for text in ("run: /old/demo/runs/other", "", "run: .", "run: /", f"run: {tmp_path}/x/eval\n"):
        (tmp_path / "x" / "eval").mkdir(parents=True, exist_ok=True)
        assert move_of(new, text) is None


def test_a_parent_that_was_made_anew_is_said(tmp_path: Path) -> None:
    encoder, path = pipeline(tmp_path / "all")
    manifest = json.loads((encoder / "manifest.json").read_text())
    for product, lines in (("e" * 32, 0), ("f" * 32, 1), (None, 0)):
        (encoder / "manifest.json").write_text(json.dumps({**manifest, "product": product}))
        notes = collect([path]).notes
        assert len(notes) == lines
    (encoder / "manifest.json").write_text(json.dumps({**manifest, "product": "f" * 32}))
    (note,) = collect([path]).notes
    assert (
        note.startswith(f"{path}: its model {encoder} was made anew since (fingerprint then eeee")
        and note in build_report([path], tmp_path / "out").read_text()
    )
