from __future__ import annotations

import json
from pathlib import Path

import pipeline
import pytest
import torch
from PIL import Image

from mmkit.data.images import decode_image, fit_square
from mmkit.encoders import extract_features, load_encoder, probing, save_encoder
from mmkit.encoders.text import TextTower, load_text, save_text

from .helpers import tiny_encoder

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
    common = [f"run={run}", f"encoder={encoder}", f"data.train={train}", f"data.test={test}", "batch_size=16", "k=5"]
    common += ["data.workers=0", *more]
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


def test_the_demo_probe_runs_on_the_world(tmp_path):
    world = pipeline.root() / "world"
    assert probe(tmp_path / "run", world / "probe_train.jsonl", world / "probe_train.jsonl", "probes=[knn]", "k=1") == 0
    tasks = json.loads((tmp_path / "run" / "scores.json").read_text())["tasks"]
    assert set(tasks) == {"knn"} and tasks["knn"]["metrics"]["accuracy"] == 1.0  # its own nearest neighbour


def tasks_of(run: Path) -> dict:
    return json.loads((run / "scores.json").read_text())["tasks"]


def test_shots_are_drawn_and_their_spread_is_told(colours):
    run = colours / "run"
    assert probe(run, colours / "train", colours / "test", "probes=[kshot]", "shots=3", "draws=4") == 0
    score = tasks_of(run)["kshot"]
    assert score["metrics"]["accuracy"] == pytest.approx(sum(score["settings"]["accuracies"]) / 4, abs=1e-6)
    assert len(score["settings"]["l2"]) == 4 and score["settings"]["std"] is not None and score["settings"]["shots"] == 3
    assert probe(colours / "more", colours / "train", colours / "test", "probes=[kshot]", "shots=21") == 2
    assert not (colours / "more").exists()


def test_too_few_pictures_for_the_shots_are_named(colours, capsys):
    assert probe(colours / "run", colours / "train", colours / "test", "probes=[kshot]", "shots=21") == 2
    assert "class black has 20 training pictures, for 21 shots (and 2 more" in capsys.readouterr().err


def test_features_are_made_once_for_the_same_pictures(colours, monkeypatch):
    made = []
    monkeypatch.setattr(probing, "extract_features", lambda *a, **k: made.append(k["autocast"]) or extract_features(*a, **k))
    assert probe(colours / "a", colours / "train", colours / "test") == 0
    assert made == [None, None]
    # Other probes, other labels: nothing new. Another precision: new ones.
    assert probe(colours / "b", colours / "train", colours / "test", "probes=[kshot,knn]", "shots=2", "data.workers=2") == 0
    assert probe(colours / "c", colours / "train.jsonl", colours / "test.jsonl", "data.label=colour", "probes=[knn]") == 0
    assert made == [None, None]
    assert probe(colours / "d", colours / "train", colours / "test", "probes=[knn]", "precision=bf16") == 0
    assert made == [None, None, torch.bfloat16, torch.bfloat16]
    assert tasks_of(colours / "d")["knn"]["settings"]["precision"] == "bf16"


@pytest.fixture(scope="module")
def rival(tmp_path_factory) -> Path:
    """An encoder with a text tower, as a clip or lit run leaves it."""
    torch.manual_seed(3)
    tower = TextTower(48, embed_dim=16, width=32, heads=2, layers=1, context_length=16)
    return save_encoder(tiny_encoder(), tmp_path_factory.mktemp("rival") / "model", write_more=lambda f: save_text(tower, f))


def by_name(run: Path, encoder: Path, test: Path, *more: str) -> int:
    common = [f"run={run}", f"encoder={encoder}", "data.train=null", f"data.test={test}", "data.workers=0"]
    return pipeline.mmkit("probe", "demo-probe", *common, *more)


def test_zero_shot_needs_no_training_pictures(colours, rival):
    (colours / "names.txt").write_text("night\nrose\nsnow\n")
    common = ["data.label=label", f"data.classes={colours}/names.txt", "templates=plain"]
    assert by_name(colours / "run", rival, colours / "test", "probes=[zeroshot]", *common) == 0
    score = tasks_of(colours / "run")["zeroshot"]
    tower, encoder = load_text(rival), load_encoder(rival)
    classes = tower.encode_text(tower.tokenize([f"a photo of a {name}." for name in ("night", "rose", "snow")]))
    for row in score["per_sample"]:
        picture = fit_square(decode_image(Path(row["id"]).read_bytes()), 32, fit="crop")
        with torch.inference_mode():
            cosines = tower.encode_image(encoder(torch.from_numpy(picture)[None])) @ classes.T
        assert row["accuracy"] == (sorted(COLOURS)[int(cosines.argmax())] == Path(row["id"]).parent.name)
    assert score["settings"]["templates"] == "plain" and score["settings"]["classes"].endswith("names.txt")
    assert score["n"] == 12 and "top5" not in score["metrics"]


def test_tags_need_nothing_but_the_encoder(colours):
    encoder = pipeline.trained("superclass")
    assert by_name(colours / "run", encoder, colours / "test", "probes=[tags]", "data.label=label") == 0
    score = tasks_of(colours / "run")["tags"]
    assert score["settings"]["rule"].startswith("mean over tokens of logit minus") and score["n"] == 12


def test_an_encoder_without_the_part_a_probe_needs_is_refused(colours, rival, capsys):
    assert by_name(colours / "run", pipeline.trained("superclass"), colours / "test", "probes=[zeroshot]") == 2
    assert "zero-shot needs a text tower, and this encoder has none; train stage=lit" in capsys.readouterr().err
    assert by_name(colours / "run", rival, colours / "test", "probes=[tags]") == 2
    assert "tags needs a label head, and this encoder has none; give a run of stage=superclass" in capsys.readouterr().err
    assert by_name(colours / "run", rival, colours / "test", "probes=[zeroshot]", "templates=absent.txt") == 2
    assert "absent.txt: no such file" in capsys.readouterr().err
    (colours / "names.txt").write_text("one\ntwo\n")
    assert by_name(colours / "run", rival, colours / "test", "probes=[zeroshot]", f"data.classes={colours}/names.txt") == 2
    assert "names.txt: 2 names for 3 classes" in capsys.readouterr().err
    assert not (colours / "run").exists()


def test_several_processes_are_refused(monkeypatch, capsys):
    parent = pipeline.trained("superclass")
    monkeypatch.setenv("WORLD_SIZE", "2")
    capsys.readouterr()
    assert pipeline.mmkit("probe", "demo-probe", f"encoder={parent}") == 2
    assert "runs in one process" in capsys.readouterr().err
