from __future__ import annotations

import json
from pathlib import Path

import pipeline
import pytest
from PIL import Image

from mmkit.config import ProbeDataConfig
from mmkit.encoders.probing import read_labelled
from mmkit.errors import InputError

COLOURS = {"black": (0, 0, 0), "red": (255, 0, 0), "white": (255, 255, 255)}


@pytest.fixture
def colours(tmp_path) -> Path:
    """Solid pictures in folders by class, and the same as JSON lines: any encoder separates them."""
    for split, count in (("train", 20), ("test", 4)):
        rows = []
        for name, colour in COLOURS.items():
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(count):
                shade = tuple(min(255, c + i) if c < 128 else c - i for c in colour)
                Image.new("RGB", (32, 32), shade).save(tmp_path / split / name / f"{i:02d}.png")
                rows.append({"image": f"{split}/{name}/{i:02d}.png", "colour": name, "none": None})
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return tmp_path


def probe(run: Path, train: Path, test: Path, *more: str) -> int:
    encoder = pipeline.trained("superclass")
    common = [f"run={run}", f"encoder={encoder}", f"data.train={train}", f"data.test={test}", "batch_size=16", "k=5", *more]
    return pipeline.mmkit("probe", "demo-probe", *common)


def test_separable_classes_are_found(colours):
    run = colours / "runs" / "folder"
    assert probe(run, colours / "train", colours / "test") == 0
    tasks = json.loads((run / "scores.json").read_text())["tasks"]
    assert set(tasks) == {"linear-probe", "knn"}
    for score in tasks.values():
        assert score["metrics"] == {"accuracy": 1.0} and score["n"] == 12 and len(score["per_sample"]) == 12
        assert score["ci95"]["accuracy"] == [1.0, 1.0]
        assert score["settings"]["model_fingerprint"] == pipeline.manifest(pipeline.trained("superclass"))["product"]
    assert pipeline.manifest(run)["kind"] == "probe" and pipeline.manifest(run)["status"] == "done"


def test_rows_and_folders_are_the_same_set(colours):
    by_folder = read_labelled(str(colours / "train"), ProbeDataConfig(train="", test=""))
    by_rows = read_labelled(str(colours / "train.jsonl"), ProbeDataConfig(train="", test="", label="colour"))
    assert by_folder == by_rows and len(by_rows.images) == 60
    limited = read_labelled(str(colours / "train"), ProbeDataConfig(train="", test="", limit=3))
    # Not the first three: folders come sorted by class, and one class is no probe.
    assert len(limited.labels) == 3 and len(set(limited.labels)) > 1


def test_shuffled_labels_are_not_found(colours):
    # The probes must not see the answers: with labels that say nothing about the picture they guess.
    rows = [json.loads(line) for line in (colours / "test.jsonl").read_text().splitlines()]
    for row, colour in zip(rows, ["red"] * 4 + ["white"] * 4 + ["black"] * 4, strict=True):
        row["colour"] = colour
    (colours / "test.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert probe(colours / "run", colours / "train.jsonl", colours / "test.jsonl", "data.label=colour") == 0
    tasks = json.loads((colours / "run" / "scores.json").read_text())["tasks"]
    assert [t["metrics"]["accuracy"] for t in tasks.values()] == [0.0, 0.0]


def test_a_class_unknown_to_training_is_refused(colours, capsys):
    (colours / "test" / "black").rename(colours / "test" / "pink")
    assert probe(colours / "run", colours / "train", colours / "test") == 2
    assert "classes pink are not in the training set" in capsys.readouterr().err
    assert not (colours / "run").exists()


def test_an_unreadable_picture_stops_the_probe(colours, capsys):
    (colours / "test" / "red" / "00.png").write_bytes(b"no picture")
    assert probe(colours / "run", colours / "train", colours / "test") == 2
    assert "00.png: is no picture" in capsys.readouterr().err.splitlines()[-1]
    assert not (colours / "run" / "scores.json").exists()


@pytest.mark.parametrize("row", ["{", '{"image": "a.png"}', "[1]", '{"colour": "red"}', '{"image": "../a.png", "colour": "red"}'])
def test_a_bad_row_is_named(tmp_path, row):
    (tmp_path / "rows.jsonl").write_text('{"image": "a.png", "colour": "red"}\n' + row + "\n")
    with pytest.raises(InputError, match=r"rows\.jsonl:2: bad row .*each row needs image and 'colour'"):
        read_labelled(str(tmp_path / "rows.jsonl"), ProbeDataConfig(train="", test="", label="colour"))


def test_nothing_labelled_is_refused(tmp_path, colours):
    with pytest.raises(InputError, match="no labelled picture"):
        read_labelled(str(colours / "train.jsonl"), ProbeDataConfig(train="", test="", label="none"))
    with pytest.raises(InputError, match="no such file or folder"):
        read_labelled(str(tmp_path / "absent"), ProbeDataConfig(train="", test=""))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no labelled picture"):
        read_labelled(str(tmp_path / "empty"), ProbeDataConfig(train="", test=""))


def test_the_demo_probe_runs_on_the_world(tmp_path):
    world = pipeline.root() / "world"
    assert probe(tmp_path / "run", world / "probe_train.jsonl", world / "probe_train.jsonl", "probes=[knn]", "k=1") == 0
    tasks = json.loads((tmp_path / "run" / "scores.json").read_text())["tasks"]
    assert set(tasks) == {"knn"} and tasks["knn"]["metrics"]["accuracy"] == 1.0  # its own nearest neighbour


def test_a_limit_is_drawn_over_all_classes(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for i in range(20):
            (tmp_path / name / f"{i:02d}.jpg").touch()
    found = read_labelled(str(tmp_path), ProbeDataConfig(train=str(tmp_path), test=str(tmp_path), limit=10))
    assert len(found.images) == 10 and set(found.labels) == {"a", "b"}
    assert [p.parent.name for p in found.images] == found.labels


@pytest.mark.parametrize(("recipe", "stage"), [("demo-probe", "superclass"), ("demo-eval-mllm", "finetune")])
def test_several_processes_are_refused(recipe, stage, monkeypatch, capsys):
    command, key = ("probe", "encoder") if recipe == "demo-probe" else ("eval", "model")
    parent = pipeline.trained(stage)
    monkeypatch.setenv("WORLD_SIZE", "2")
    capsys.readouterr()
    assert pipeline.mmkit(command, recipe, f"{key}={parent}") == 2
    assert "runs in one process" in capsys.readouterr().err
