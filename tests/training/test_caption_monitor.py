"""Validation captions while a captioner trains: the evaluation's numbers, shared over processes, and the best step's product."""

from __future__ import annotations

import json
import shutil
import types
from pathlib import Path

import numpy as np
import pipeline
import pytest
import torch

import mmkit
from mmkit.config import CaptionMonitorConfig, ClipcapRecipe, DecodingConfig
from mmkit.config.load import check_recipe
from mmkit.errors import InputError
from mmkit.files import read_json
from mmkit.training.stages.caption_monitor import CaptionMonitor, in_step


def looking(run: Path, *more: str) -> list[str]:
    """Arguments of a tiny captioner that captions the eight held-out pictures every other step."""
    world = pipeline.root() / "world"
    data = [f"data.val={world}/captions_heldout.json", f"data.val_image_root={world}/images/heldout"]
    looks = ["monitor.every=2", "monitor.batch_size=3", "monitor.samples=2", "generation={max_new_tokens: 12}"]
    return pipeline.clipcap(run, *data, *looks, *more)


def looks_of(run: Path) -> list[dict]:
    return [row for row in pipeline.rows(run / "metrics.jsonl") if "val_CIDEr" in row]


@pytest.fixture(scope="module")
def watched() -> Path:
    run = pipeline.root() / "watched"
    assert pipeline.mmkit(*looking(run, "train.steps=5")) == 0
    return run


def test_the_last_number_is_that_of_an_evaluation(watched, tmp_path):
    rows = looks_of(watched)
    assert [row["step"] for row in rows] == [2, 4, 5]
    assert pipeline.mmkit("eval", "demo-eval-captioner", f"model={watched}", f"run={tmp_path / 'eval'}",
                          "tasks.0.generation.max_new_tokens=12") == 0  # fmt: skip
    scores = read_json(tmp_path / "eval" / "scores.json")["tasks"]["coco-caption"]["metrics"]
    assert {name: rows[-1][f"val_{name}"] for name in ("CIDEr", "Bleu_4", "ROUGE_L")} == pytest.approx(
        {name: scores[name] for name in ("CIDEr", "Bleu_4", "ROUGE_L")}, abs=1e-8
    )


def test_a_few_captions_are_kept_with_their_references(watched):
    shown = pipeline.rows(watched / "samples.jsonl")
    assert [row["step"] for row in shown] == [2, 2, 4, 4, 5, 5]
    # The pictures of the file's first two captions.
    found = read_json(pipeline.root() / "world" / "captions_heldout.json")
    first = list(dict.fromkeys(row["image_id"] for row in found["annotations"]))[:2]
    wanted = [[row["caption"] for row in found["annotations"] if row["image_id"] == i] for i in first]
    assert [row["references"] for row in shown[-2:]] == wanted
    from PIL import Image

    pictures = [Image.open(row["image"]).convert("RGB") for row in shown[-2:]]
    # The product writes as the recipe's `generation` says, without being told.
    assert mmkit.load(watched).predict(pictures) == [row["prediction"] for row in shown[-2:]]


def test_looking_changes_nothing(watched, tmp_path):
    assert pipeline.mmkit(*pipeline.clipcap(tmp_path / "run", "train.steps=5")) == 0
    assert pipeline.largest_difference(tmp_path / "run", watched) == 0
    assert not (tmp_path / "run" / "samples.jsonl").exists()


def test_pictures_beyond_the_limit_are_not_captioned(tmp_path):
    assert pipeline.mmkit(*looking(tmp_path / "run", "monitor.pictures=3", "monitor.samples=9", "train.steps=2")) == 0
    assert len(pipeline.rows(tmp_path / "run" / "samples.jsonl")) == 3
    assert pipeline.mmkit(*looking(tmp_path / "none", "monitor.samples=0", "train.steps=2")) == 0
    assert not (tmp_path / "none" / "samples.jsonl").exists()


STOP = "train.early_stopping={metric: val_CIDEr, mode: max, patience: 1}"


def test_early_stopping_gives_the_product_of_the_best_step(tmp_path, capsys):
    run = tmp_path / "run"
    arguments = looking(run, "train.steps=40", "train.schedule=constant", "train.lr=2e-3", "monitor.every=1", STOP)
    assert pipeline.mmkit(*arguments) == 0
    manifest, rows = pipeline.manifest(run), looks_of(run)
    values = [row["val_CIDEr"] for row in rows]
    assert manifest["ended"]["step"] == len(values) < 40 and manifest["best"]["step"] == len(values) - 1
    # Not weights in memory but the product: scored again, it has the best number.
    assert pipeline.mmkit("eval", "demo-eval-captioner", f"model={run}", f"run={tmp_path / 'eval'}",
                          "tasks.0.generation.max_new_tokens=12") == 0  # fmt: skip
    score = read_json(tmp_path / "eval" / "scores.json")["tasks"]["coco-caption"]["metrics"]["CIDEr"]
    assert score == pytest.approx(manifest["best"]["value"], abs=1e-8) and manifest["best"]["value"] == max(values)
    # Killed before its last look: it goes on and ends as before.
    straight = tmp_path / "straight"
    shutil.copytree(run, straight)
    shutil.rmtree(run / "model")
    shutil.rmtree(sorted((run / "checkpoints").iterdir())[-1])
    (run / "manifest.json").write_text(json.dumps({**manifest, "status": "running"}))
    assert pipeline.mmkit(*arguments) == 0
    assert pipeline.largest_difference(run, straight) == 0 and looks_of(run) == rows
    assert pipeline.manifest(run)["best"] == manifest["best"]
    shown = [pipeline.rows(r / "samples.jsonl") for r in (run, straight)]
    assert shown[0] == shown[1]


@pytest.mark.slow
@pytest.mark.parametrize("way", ["ddp", "zero3"])
@pytest.mark.parametrize("generation", ["{max_new_tokens: 12}", "{max_new_tokens: 12, decoding: paper}"])
def test_processes_share_the_pictures(tmp_path, way, generation):
    # Eight pictures less one, in batches of three: the processes have four and three, and captions of unequal length.
    more = ["train.steps=3", "monitor.pictures=7", "train.micro_batch_size=2", f"generation={generation}"]
    stop = "train.early_stopping={metric: val_CIDEr, mode: min, patience: 1}"
    assert pipeline.mmkit(*looking(tmp_path / "one", *more, stop)) == 0
    # Nothing is small enough to stay whole, or weights as few as these would never be in pieces.
    zero = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0, "overlap_comm": False}}
    (tmp_path / "zero.json").write_text(json.dumps(zero))
    both = [*looking(tmp_path / "two", *more, stop), *([f"train.deepspeed={tmp_path}/zero.json"] if way == "zero3" else [])]
    if way == "zero3" and torch.cuda.is_available():
        pytest.skip("DeepSpeed on CPUs and CUDA do not mix in one environment")
    done = pipeline.torchrun(*both)
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (looks_of(tmp_path / name) for name in ("one", "two"))
    assert [r["step"] for r in one] == [r["step"] for r in two]
    for first, second in zip(one, two, strict=True):
        assert second["val_CIDEr"] == pytest.approx(first["val_CIDEr"], abs=1e-4)
    assert pipeline.manifest(tmp_path / "one")["best"]["step"] == pipeline.manifest(tmp_path / "two")["best"]["step"]
    assert pipeline.largest_difference(tmp_path / "one", tmp_path / "two") < 1e-4


@pytest.mark.parametrize("world", [2, 3, 5])
def test_every_process_writes_equally_many_and_the_order_is_kept(monkeypatch, world):
    batches: list[list[int]] = []
    from mmkit.training.stages import caption_monitor

    def write(model, tokenizer, features, how, **more):
        batches[-1].append(len(features))
        return [f"picture {int(row[0])}" for row in features]

    monkeypatch.setattr(caption_monitor, "write_captions", write)
    image = [types.SimpleNamespace(path=str(i)) for i in range(7)]
    # Two captions a picture, in turns, so that rows and pairs differ.
    pairs = [types.SimpleNamespace(image=image[i % 7].path, caption=f"c{i}", name=f"n{i}") for i in range(14)]
    samples = types.SimpleNamespace(pairs=pairs, rows=np.arange(14) % 7, features_of=lambda n: torch.tensor([float(n % 7)]))
    monitor = CaptionMonitor(None, None, samples, CaptionMonitorConfig(every=1, batch_size=2), DecodingConfig())
    assert monitor.captions[3] == ["c3", "c10"]
    parts: list[list[str]] = []

    def engine(rank, gather):
        return types.SimpleNamespace(
            world_size=world, rank=rank, device=torch.device("cpu"), gather=gather, uses_deepspeed=False
        )  # fmt: skip

    for rank in range(world):
        batches.append([])
        monitor._write(engine(rank, lambda texts: parts.append(texts) or texts * world))
    assert len({tuple(sizes) for sizes in batches}) == 1
    batches.append([])
    flat = [text for part in parts for text in part]
    assert monitor._write(engine(0, lambda texts: flat)) == [f"picture {i}" for i in range(7)]


def test_only_where_weights_may_be_in_pieces_do_processes_ask_each_other():
    sums = []
    engine = types.SimpleNamespace(
        world_size=2, uses_deepspeed=True, numbers=lambda *v: torch.tensor(v), sum=lambda t: sums.append(t) or t + 1
    )
    ask = in_step(engine)
    assert ask is not None and ask(False) is True and len(sums) == 1
    for world, deepspeed in ((1, True), (2, False)):
        engine.world_size, engine.uses_deepspeed = world, deepspeed
        assert in_step(engine) is None


def recipe(**more):
    plain = {
        "stage": "clipcap", "run": "r", "encoder": "timm:x", "llm": {"name": "gpt2"},
        "data": {"train": "a", "val": "b"}, "train": {"batch_size": 4, "steps": 4, "lr": 1e-3},
    }  # fmt: skip
    for key, value in more.items():
        plain[key] = {**plain[key], **value} if isinstance(plain.get(key), dict) else value
    return check_recipe(plain, where="test")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({}, r"data\.val .* and train\.val_every or monitor\.every .* go together"),
        ({"data": {"val": None}, "monitor": {"every": 2}}, "go together"),
        ({"monitor": {"pictures": 5}, "train": {"val_every": 2}}, "give every=STEPS too"),
        ({"monitor": {"every": 2, "pictures": 1}}, "monitor.pictures=1"),
        (
            {"train": {"val_every": 2, "early_stopping": {"metric": "val_CIDEr", "mode": "max"}}},
            r"metric val_CIDEr is not looked at \(looked at: val_loss\)",
        ),
        (
            {"monitor": {"every": 2}, "train": {"early_stopping": {"metric": "val_cider", "mode": "max"}}},
            r"val_cider is not looked at \(looked at: val_CIDEr, val_Bleu_4, val_ROUGE_L\)",
        ),
        ({"monitor": {"every": 2}, "train": {"early_stopping": {"metric": "val_CIDEr", "mode": "best"}}}, "'max' or 'min'"),
        ({"monitor": {"every": 2}, "generation": {"top_p": 0.9}}, "top_p belong to decoding=sample"),
    ],
)
def test_looks_that_do_not_fit_are_refused(more, message):
    with pytest.raises(InputError, match=message):
        recipe(**more)


def test_the_resolved_recipe_loads_again():
    from omegaconf import OmegaConf

    from mmkit.config import dump_recipe

    for more in ({"train": {"val_every": 2}}, {"monitor": {"every": 2}, "generation": {"decoding": "paper"}}):
        made = recipe(**more)
        assert isinstance(made, ClipcapRecipe)
        again = OmegaConf.to_container(OmegaConf.create(dump_recipe(made)))
        assert check_recipe(again, where="again") == made
    assert made.generation.num_beams == 5


def test_one_picture_has_no_cider(tmp_path, capsys):
    world = pipeline.root() / "world"
    found = read_json(world / "captions_heldout.json")
    one = found["images"][0]["id"]
    found["images"] = found["images"][:1]
    found["annotations"] = [row for row in found["annotations"] if row["image_id"] == one]
    (tmp_path / "one.json").write_text(json.dumps(found))
    assert pipeline.mmkit(*looking(tmp_path / "run", f"data.val={tmp_path / 'one.json'}")) == 2
    assert "data.val: captions are scored on two pictures or more" in capsys.readouterr().err


def test_captions_longer_than_the_language_model_are_refused_at_the_start(tmp_path, capsys):
    assert pipeline.mmkit(*pipeline.clipcap(tmp_path / "run", "generation.max_new_tokens=93")) == 2
    assert "93 new tokens are more than the 92 positions that the prefix leaves" in capsys.readouterr().err
    assert pipeline.mmkit(*pipeline.clipcap(tmp_path / "run", "max_length=93")) == 2
    assert "prefix_length 4 and max_length 93 are more than its 96 positions" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("end", ["period", "none"])
def test_captions_without_an_end_token(tmp_path, end):
    run = tmp_path / "run"
    assert pipeline.mmkit(*looking(run, f"caption_end={end}", "train.steps=2")) == 0
    meta = read_json(run / "model" / "mmkit.json")
    assert meta["caption_end"] == end and meta["encoder"]["fingerprint"] and meta["llm"]["config"]["model_type"] == "gpt2"
    opened = mmkit.load(run)
    stop = opened.model.lm.generation_config.eos_token_id
    assert opened.tokenizer.decode(stop) == "." and opened.tokenizer.eos_token_id not in stop
