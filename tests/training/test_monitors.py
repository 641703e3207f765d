"""k-NN and top tags while a run trains, and the trackers that show them."""

from __future__ import annotations

import json
import shutil
import sys
import types

import numpy as np
import pipeline
import pytest
import torch
from PIL import Image

from mmkit.config import MonitorConfig, TrackConfig
from mmkit.encoders import build_encoder
from mmkit.encoders.probe import knn
from mmkit.errors import InputError
from mmkit.training import track
from mmkit.training.stages.monitors import KnnMonitor, draw_tags, make_monitors
from mmkit.training.track import NoTracker, OnlineTracker, check_tracker, make_tracker


@pytest.fixture
def colours(tmp_path):
    """Rows of pictures labelled by their colour."""
    rows = {"train": [], "test": []}
    for i in range(18):
        part = "train" if i < 12 else "test"
        Image.new("RGB", (32, 32), ((250, 0, 0), (0, 250, 0), (0, 0, 250))[i % 3]).save(tmp_path / f"{i}.png")
        rows[part].append({"image": f"{i}.png", "label": ("red", "green", "blue")[i % 3]})
    for part, found in rows.items():
        (tmp_path / f"{part}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in found))
    return tmp_path


def monitor(folder, **more) -> KnnMonitor:
    encoder = build_encoder("vit_tiny_patch16_224", image_size=32, patch_size=8, model_args={"depth": 1, "embed_dim": 24}, seed=0)
    config = MonitorConfig(every=2, knn_train=str(folder / "train.jsonl"), knn_test=str(folder / "test.jsonl"), k=3, **more)
    return KnnMonitor(encoder.eval(), config, workers=0)


def test_knn_is_that_of_the_probe(colours):
    looking = monitor(colours)
    engine = types.SimpleNamespace(world_size=1, rank=0, device=torch.device("cpu"), gather_features=lambda x: (x, 0))
    with torch.no_grad():
        found = looking.look(engine).numbers
        features = [looking._features(part, engine) for part in looking.sets]
    wanted = knn(features[0], looking.targets[0], features[1], looking.targets[1], k=3)
    assert found == {"knn_accuracy": wanted.accuracy} and wanted.accuracy == 1.0


@pytest.mark.parametrize("world", [2, 5])
def test_the_ranks_share_the_pictures_and_keep_their_order(colours, world):
    looking = monitor(colours)
    alone = types.SimpleNamespace(world_size=1, rank=0, device=torch.device("cpu"), gather_features=lambda x: (x, 0))
    shares: list[torch.Tensor] = []

    def engine(rank: int, gather):
        return types.SimpleNamespace(world_size=world, rank=rank, device=torch.device("cpu"), gather_features=gather)

    with torch.no_grad():
        whole = looking._features(looking.sets[0], alone)
        for rank in range(world):
            looking._features(
                looking.sets[0], engine(rank, lambda x: (shares.append(x) or torch.zeros(world * len(x), x.shape[1]), 0))
            )
        assert len({len(s) for s in shares}) == 1
        together = looking._features(looking.sets[0], engine(0, lambda x: (torch.cat(shares), 0)))
    torch.testing.assert_close(together, whole)


def test_a_class_that_nobody_votes_for_is_refused(colours):
    (colours / "test.jsonl").write_text(json.dumps({"image": "1.png", "label": "mauve"}) + "\n")
    with pytest.raises(InputError, match="mauve"):
        monitor(colours)


def test_pictures_that_cannot_be_read_are_refused(tmp_path):
    (tmp_path / "a.jpg").write_text("no picture")
    with pytest.raises(InputError, match=r"monitor\.images .*a\.jpg"):
        make_monitors(
            MonitorConfig(every=1, images=(str(tmp_path / "a.jpg"),)), None, head=torch.nn.Identity(), labels=object()  # type: ignore[arg-type]
        )  # fmt: skip


def test_a_sheet_of_tags_has_a_place_for_every_picture():
    pictures = [Image.new("RGB", (40, 20 + i), (200, 0, 0)) for i in range(7)]
    sheet = draw_tags(pictures, [[("wide" * 20, 0.5), ("x", 0.25)]] * 7)
    assert sheet.dtype == np.uint8 and sheet.shape[2] == 3 and sheet.shape[1] == 5 * 224
    rows = sheet.shape[0] // 2
    assert (sheet[rows:, : 2 * 224] < 250).any() and (sheet[rows:, 2 * 224 :] == 255).all()


def test_a_run_shows_curves_tags_and_knn_in_tensorboard(tmp_path, colours):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    looks = [f"monitor.knn_train={colours / 'train.jsonl'}", f"monitor.knn_test={colours / 'test.jsonl'}"]
    looks += ["monitor.every=2", f"monitor.images=[{pipeline.pictures()[0]}]", "monitor.tags=3", "monitor.k=3"]
    assert pipeline.mmkit(*pipeline.superclass(tmp_path / "run", *looks)) == 0
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    rows = pipeline.rows(tmp_path / "run" / "metrics.jsonl")
    assert [r["step"] for r in rows if "knn_accuracy" in r] == [2, 4]
    shown = {(e.step, round(e.value, 5)) for e in events.Scalars("knn_accuracy")}
    assert shown == {(r["step"], round(r["knn_accuracy"], 5)) for r in rows if "knn_accuracy" in r}
    assert [round(e.value, 4) for e in events.Scalars("loss")] == [round(x, 4) for x in pipeline.losses(tmp_path / "run")]
    assert [e.step for e in events.Images("top tags")] == [2, 4] and events.Images("top tags")[0].width == 224


def test_looking_changes_nothing(tmp_path, colours):
    looks = [f"monitor.knn_train={colours / 'train.jsonl'}", f"monitor.knn_test={colours / 'test.jsonl'}", "monitor.every=1"]
    assert pipeline.mmkit(*pipeline.superclass(tmp_path / "run", *looks, "track.kind=none")) == 0
    assert pipeline.largest_difference(tmp_path / "run", pipeline.trained("superclass")) == 0
    assert not (tmp_path / "run" / "tensorboard").exists()


@pytest.mark.parametrize("kind", ["wandb", "trackio"])
def test_online_trackers_get_the_same(kind, tmp_path, monkeypatch):
    calls: list[tuple[str, object]] = []
    fake = types.ModuleType(kind)
    fake.init = lambda **more: calls.append(("init", more))  # type: ignore[attr-defined]
    fake.log = lambda values, step: calls.append(("log", (values, step)))  # type: ignore[attr-defined]
    fake.Image = lambda picture: picture.shape  # type: ignore[attr-defined]
    fake.finish = lambda: calls.append(("finish", None))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, kind, fake)
    monkeypatch.setattr(track.importlib.util, "find_spec", lambda name: object())
    folder = tmp_path / "group" / "run"
    made = make_tracker(TrackConfig(kind=kind, project="p"), folder, start=lambda: 0, settings={"seed": 1})
    assert isinstance(made, OnlineTracker)
    made.scalars(3, {"loss": 1.5})
    made.picture(3, "tags", np.zeros((2, 4, 3), np.uint8))
    made.close()
    name, options = calls[0]
    assert name == "init" and options["project"] == "p" and options["name"] == "group/run" and options["config"] == {"seed": 1}
    assert options["resume"] == "allow" and ("id" in options) == (kind == "wandb")
    assert calls[1:] == [("log", ({"loss": 1.5}, 3)), ("log", ({"tags": (2, 4, 3)}, 3)), ("finish", None)]
    # A run that goes on finds its curves again; one that starts anew in the same folder begins new ones.
    make_tracker(TrackConfig(kind=kind), folder, start=lambda: 2, settings={})
    assert calls[-1][1].get("id") == options.get("id")
    if kind == "wandb":
        shutil.rmtree(folder)
        make_tracker(TrackConfig(kind=kind), folder, start=lambda: 0, settings={})
        assert calls[-1][1]["id"] != options["id"]


def test_a_tracker_that_is_not_installed_is_refused_before_anything_starts(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(track.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"track\.kind=wandb: the package wandb is not installed.*pip install wandb"):
        check_tracker(TrackConfig(kind="wandb"))
    check_tracker(TrackConfig(kind="none"))
    assert isinstance(make_tracker(TrackConfig(kind="none"), tmp_path, start=lambda: 0, settings={}), NoTracker)
    assert pipeline.mmkit(*pipeline.superclass(tmp_path / "run", "track.kind=trackio")) == 2
    assert "trackio" in capsys.readouterr().err and not (tmp_path / "run").exists()
