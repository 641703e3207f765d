"""Every stage through the real command line: golden losses, exact resume, accumulation, dirty data."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import pipeline
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from mmkit.models.llm import train_bpe_tokenizer, train_sentencepiece_tokenizer
from mmkit.training import loop

# Losses of four steps at seed 0 on sixteen fixed pictures; they move only when data order, initialisation, loss or optimiser do.
GOLDEN = {
    "superclass": [5.95614, 6.01722, 5.61795, 5.24966],
    "clipcap": [5.70503, 5.49121, 5.3099, 5.1974],
    "align": [5.88216, 5.86855, 5.84457, 5.87403],
    "finetune": [5.83157, 5.67506, 5.57736, 5.48201],
    "lora": [5.83157, 5.78866, 5.79322, 5.72949],
}
SIX = ["train.steps=6", "train.checkpoint_every=100"]


@pytest.fixture(scope="module")
def fixed(tmp_path_factory) -> Path:
    """Pictures and texts written down here: the demo world may be retouched, the golden losses may not."""
    folder = tmp_path_factory.mktemp("fixed")
    pairs, align, tune = [], [], []
    for i in range(16):
        colour = ("red", "blue", "green", "white")[i % 4]
        value = {"red": (200, 30, 30), "blue": (30, 30, 200), "green": (30, 160, 30), "white": (250, 250, 250)}[colour]
        # PNG: every decoder reads the same pixels.
        picture = Image.new("RGB", (32, 32), value)
        picture.paste((10 * i, 90, 90), (i, 4, i + 12, 20))
        picture.save(folder / f"{i}.png")
        caption = f"a {colour} wall with {i + 1} " + "small " * (i % 3) + "doors"
        pairs.append({"image": f"{i}.png", "caption": caption})
        question = {"from": "human", "value": "<image>\nDescribe the picture."}
        align.append({"id": str(i), "image": f"{i}.png", "conversations": [question, {"from": "gpt", "value": caption}]})
        more = [{"from": "human", "value": "Which colour is the wall?"}, {"from": "gpt", "value": colour}]
        tune.append({**align[-1], "conversations": [*align[-1]["conversations"], *more]})
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    (folder / "align.json").write_text(json.dumps(align))
    (folder / "tune.json").write_text(json.dumps(tune))
    texts = [row["caption"] for row in pairs] + ["USER: Describe the picture. ASSISTANT: Which colour is the wall?"]
    train_bpe_tokenizer(texts, folder / "bpe", vocab_size=300)
    train_sentencepiece_tokenizer(texts, folder / "sentencepiece", vocab_size=320)
    return folder


def fixed_run(stage: str, folder: Path) -> Path:
    """A run of a stage on the fixed data, made once."""
    run = folder / "runs" / stage
    if run.exists():
        return run
    data = {"superclass": "pairs.jsonl", "clipcap": "pairs.jsonl", "align": "align.json"}.get(stage, "tune.json")
    more = [f"data.train={folder / data}", f"data.image_root={folder}"]
    if stage == "superclass":
        more.append(f"data.labels={folder / 'bpe'}")
    if stage in ("clipcap", "align"):
        more.append(f"encoder={fixed_run('superclass', folder)}")
        more.append(f"llm.tokenizer={folder / ('bpe' if stage == 'clipcap' else 'sentencepiece')}")
    if stage in ("finetune", "lora"):
        more.append(f"model={fixed_run('align', folder)}")
    if stage == "lora":  # dropout draws from torch's generator, which may change between releases
        more.append("lora.dropout=0")
    assert pipeline.mmkit(*pipeline.STAGES[stage](run, *more)) == 0
    return run


@pytest.mark.parametrize("stage", GOLDEN)
def test_golden_losses(stage, fixed):
    assert pipeline.losses(fixed_run(stage, fixed)) == pytest.approx(GOLDEN[stage], abs=1e-3)


def test_what_a_finished_run_holds():
    run = pipeline.trained("finetune")
    manifest = pipeline.manifest(run)
    assert manifest["status"] == "done" and manifest["kind"] == "train" and manifest["stage"] == "llava"
    assert [(p["role"], p["path"]) for p in manifest["parents"]] == [("model", str(pipeline.trained("align")))]
    assert manifest["parents"][0]["fingerprint"] == pipeline.manifest(pipeline.trained("align"))["product"]
    assert manifest["trainable_parameters"] < manifest["parameters"] and manifest["world_size"] == 1
    assert manifest["skipped"] == 0 and not (run / "skipped.jsonl").exists()
    row = pipeline.rows(run / "metrics.jsonl")[0]
    wanted = {"step", "samples", "loss", "lr", "grad_norm", "counted", "batch_digest"}
    assert (
        set(row)
        == wanted
        | {"samples_per_second", "data_wait", "memory_gib", "seconds"}
        | {"tokens_per_second", "supervised_per_sample", "padding", "cut"}
        and row["step"] == 1
        and row["samples"] == 8
        and row["lr"] == 0.001
    )


def test_frozen_parts_do_not_move():
    before, after = (pipeline.weights(pipeline.trained(s)) for s in ("align", "finetune"))
    moved = {k for k in before if not torch.equal(before[k], after[k])}
    assert moved and not any("vision_tower" in k for k in moved)
    assert any("projector" in k for k in moved) and any("embed_tokens" in k for k in moved)
    lora = pipeline.weights(pipeline.trained("lora"))
    moved = {k for k in before if not torch.equal(before[k], lora[k])}
    assert any("q_proj" in k for k in moved) and any("projector" in k for k in moved)
    assert not any("embed_tokens" in k or "lm_head" in k or "vision_tower" in k or "norm" in k for k in moved)


def stop_after(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Send this process SIGTERM in the middle of the step before ``step``."""
    scale = loop.lr_scale

    def stopping(at: int, **more):
        if at == step - 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return scale(at, **more)

    monkeypatch.setattr(loop, "lr_scale", stopping)


@pytest.mark.parametrize("stage", ["superclass", "clipcap", "lora"])
def test_stopped_and_continued_is_bit_equal_to_straight(stage, tmp_path, monkeypatch, capsys):
    # LoRA has dropout: its random numbers too are those of an undisturbed run.
    run = tmp_path / "run"
    arguments = pipeline.STAGES[stage](run, *SIX)
    assert pipeline.mmkit(*arguments) == 0
    straight = tmp_path / "straight"
    shutil.move(run, straight)
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        assert pipeline.mmkit(*arguments) == 75
    assert "mmkit: stopped by a signal after step 3 of 6; run the same command to go on" in capsys.readouterr().err
    assert pipeline.manifest(run)["status"] == "stopped" and not (run / "model").exists()
    assert [r["step"] for r in pipeline.rows(run / "metrics.jsonl")] == [1, 2, 3]
    assert pipeline.mmkit(*arguments) == 0
    assert pipeline.manifest(run)["status"] == "done"
    assert [r["step"] for r in pipeline.rows(run / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]
    assert pipeline.losses(run) == pipeline.losses(straight)
    assert pipeline.largest_difference(run, straight) == 0.0


def test_a_killed_run_goes_on_from_its_newest_checkpoint(tmp_path):
    # A kill leaves no word: rows past the checkpoint, a half line, a half checkpoint.
    run = tmp_path / "run"
    arguments = pipeline.superclass(run, "train.steps=6", "train.checkpoint_every=2", "train.keep_checkpoints=3")
    assert pipeline.mmkit(*arguments) == 0
    before = pipeline.weights(run)
    shutil.rmtree(run / "model")
    for step in (4, 6):
        shutil.rmtree(run / "checkpoints" / f"step-{step:08d}")
    shutil.copytree(run / "checkpoints" / "step-00000002", run / "checkpoints" / ".step-00000004")
    (run / "checkpoints" / ".step-00000004" / "model.safetensors").write_bytes(b"half")
    (run / "manifest.json").write_text(json.dumps({**pipeline.manifest(run), "status": "running"}))
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "lo')
    assert pipeline.mmkit(*arguments) == 0
    assert [r["step"] for r in pipeline.rows(run / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]
    after = pipeline.weights(run)
    assert all(torch.equal(before[k], after[k]) for k in before)


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "send"), [(0, "os.kill(os.getpid(), signal.SIGTERM)"), (2, "os.killpg(0, signal.SIGTERM)")])
def test_sigterm_to_a_process_or_its_group_ends_with_75(tmp_path, workers, send):
    run = tmp_path / "run"
    script = tmp_path / "stop.py"
    script.write_text(
        "import os, signal, sys\nfrom mmkit import cli\nfrom mmkit.training import loop\nscale = loop.lr_scale\n"
        "os.setpgid(0, 0)\n"
        f"def stopping(at, **more):\n    if at == 1: {send}\n    return scale(at, **more)\n"
        "loop.lr_scale = stopping\ncli.main(sys.argv[1:])\n"
    )
    done = pipeline.python(script, *pipeline.align(run, *SIX, f"data.workers={workers}"))
    assert done.returncode == 75 and "Traceback" not in done.stderr
    assert pipeline.manifest(run)["status"] == "stopped"


def test_changed_data_are_not_gone_on_with(tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(pipeline.trained("align"), run)
    manifest = pipeline.manifest(run)
    (run / "manifest.json").write_text(json.dumps({**manifest, "status": "stopped", "data": {"fingerprint": "other"}}))
    recipe = (run / "recipe.yaml").read_text()
    (run / "recipe.yaml").write_text(recipe.replace(f"run: {pipeline.trained('align')}", f"run: {run}"))
    capsys.readouterr()
    assert pipeline.mmkit(*pipeline.align(run)) == 2
    assert "the data have changed" in capsys.readouterr().err


def test_repaired_pictures_get_new_features(tmp_path):
    world = tmp_path / "world"
    shutil.copytree(pipeline.root() / "world", world)
    picture = sorted((world / "images" / "train").glob("*.jpg"))[0]
    whole = picture.read_bytes()
    picture.write_bytes(b"")
    data = [
        f"data.train={world}/captions_train.json",
        f"data.image_root={world}/images/train",
        "data.max_skipped=0.5",
        "train.steps=1",
    ]
    assert pipeline.mmkit(*pipeline.clipcap(tmp_path / "bad", *data)) == 0
    assert pipeline.manifest(tmp_path / "bad")["skipped"] > 0
    picture.write_bytes(whole)
    assert pipeline.mmkit(*pipeline.clipcap(tmp_path / "good", *data)) == 0
    assert pipeline.manifest(tmp_path / "good")["skipped"] == 0


def state_of(run: Path) -> dict[str, tuple[int, int]]:
    return {str(p): (p.stat().st_mtime_ns, p.stat().st_size) for p in sorted(run.rglob("*"))}


@pytest.mark.parametrize("stage", pipeline.STAGES)
def test_a_finished_run_returns_at_once_and_changes_nothing(stage, capsys, monkeypatch):
    run = pipeline.trained(stage)
    before = state_of(run)
    capsys.readouterr()
    monkeypatch.setattr("mmkit.distributed.engine.Engine.__init__", lambda *_, **__: pytest.fail("training was started"))
    assert pipeline.mmkit(*pipeline.STAGES[stage](run)) == 0
    assert state_of(run) == before and capsys.readouterr().out == f"done: {run / 'model'}\n"


def test_a_changed_recipe_or_parent_is_refused(tmp_path, capsys):
    run = pipeline.trained("clipcap")
    capsys.readouterr()
    assert pipeline.mmkit(*pipeline.clipcap(run, "train.lr=5e-4")) == 2
    error = capsys.readouterr().err
    assert "(train.lr: 0.001 -> 0.0005)" in error and "--restart" in error and error.count("\n") == 1
    parent = tmp_path / "encoder"
    shutil.copytree(pipeline.trained("superclass"), parent)
    arguments = pipeline.clipcap(tmp_path / "run", f"encoder={parent}", "train.steps=1")
    assert pipeline.mmkit(*arguments) == 0
    manifest = pipeline.manifest(parent)
    (parent / "manifest.json").write_text(json.dumps({**manifest, "product": "another"}))
    capsys.readouterr()
    assert pipeline.mmkit(*arguments) == 2
    assert f"its encoder {parent} has changed since" in capsys.readouterr().err
    assert pipeline.mmkit(*arguments, "--restart") == 0


def test_accumulated_micro_batches_equal_one_batch(tmp_path):
    # Conversations differ in supervised tokens: a mean of micro-batch means would differ by far more than 1e-5.
    runs = [tmp_path / "whole", tmp_path / "parts"]
    for run, micro in zip(runs, (8, 2), strict=True):
        assert pipeline.mmkit(*pipeline.finetune(run, f"train.micro_batch_size={micro}", "train.steps=3")) == 0
    assert pipeline.largest_difference(*runs) < 1e-5
    assert pipeline.losses(runs[0]) == pytest.approx(pipeline.losses(runs[1]), abs=1e-5)
    norms = [[r["grad_norm"] for r in pipeline.rows(run / "metrics.jsonl")] for run in runs]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


def test_idf_counts_do_not_depend_on_the_micro_batch(tmp_path):
    states = []
    for micro in (8, 2):
        run = tmp_path / str(micro)
        arguments = pipeline.superclass(run, f"train.micro_batch_size={micro}", "train.checkpoint_every=3")
        assert pipeline.mmkit(*arguments) == 0
        states.append(load_file(run / "checkpoints" / "step-00000003" / "model.safetensors"))
    assert states[0]["idf.n"].tolist() == [24] and torch.equal(states[0]["idf.df"], states[1]["idf.df"])
    assert pipeline.largest_difference(tmp_path / "8", tmp_path / "2") < 1e-4


@pytest.fixture
def dirty(tmp_path) -> Path:
    """The world's training data with one picture cut off and one missing."""
    folder = tmp_path / "dirty"
    shutil.copytree(pipeline.root() / "world", folder)
    pictures = sorted((folder / "images" / "train").glob("*.jpg"))
    pictures[3].write_bytes(pictures[3].read_bytes()[:300])
    pictures[5].unlink()
    lines = (folder / "pairs_train.jsonl").read_text().splitlines()
    # One caption a picture, so that two pictures are two samples.
    (folder / "pairs_train.jsonl").write_text("\n".join(lines[::5]) + "\n")
    return folder


def skipped(run: Path) -> list[tuple[str, str]]:
    found = [(row["key"], row["reason"]) for row in pipeline.rows(run / "skipped.jsonl")]
    assert len(set(found)) == len(found)
    return found


@pytest.mark.parametrize("stage", ["superclass", "clipcap", "align", "finetune"])
def test_unreadable_pictures_are_listed_once_and_training_goes_on(stage, dirty, tmp_path, capsys):
    run = tmp_path / "run"
    data = {"align": "llava_align_train.json", "finetune": "llava_train.json"}.get(stage, "pairs_train.jsonl")
    # Three passes: each bad sample is met three times and counted once.
    common = [f"data.train={dirty / data}", f"data.image_root={dirty}", "train.steps=15"]
    assert pipeline.mmkit(*pipeline.STAGES[stage](run, *common, "data.max_skipped=0.05")) == 0, capsys.readouterr().err
    found = skipped(run)
    assert len(found) == 2 and pipeline.manifest(run)["skipped"] == 2 and pipeline.manifest(run)["status"] == "done"
    reasons = " ".join(reason for _, reason in found).lower()
    assert "truncated" in reasons and ("no such file" in reasons or "no such picture" in reasons), found
    assert len(pipeline.losses(run)) == 15
    capsys.readouterr()
    assert pipeline.mmkit(*pipeline.STAGES[stage](tmp_path / "strict", *common, "data.max_skipped=0")) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "cannot be used, over the limit of 0.00%" in error and "data.max_skipped" in error
    assert not (tmp_path / "strict" / "model").exists()


@pytest.mark.parametrize("stage", ["superclass", "clipcap", "align", "finetune"])
def test_the_limit_on_bytes_reaches_every_stage(stage, tmp_path, capsys):
    run = tmp_path / "run"
    assert pipeline.mmkit(*pipeline.STAGES[stage](run, "data.max_bytes=99")) == 2
    said = capsys.readouterr().err
    listed = run / "skipped.jsonl"
    assert "bytes are over the limit of 99" in said + (listed.read_text() if listed.is_file() else "")


@pytest.mark.parametrize("stage", ["superclass", "finetune"])
def test_a_loss_that_is_not_finite_stops_with_step_and_samples(stage, tmp_path, capsys):
    assert pipeline.mmkit(*pipeline.STAGES[stage](tmp_path / "run", "train.lr=1e30")) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    # Pairs are named with their shard, whose keys need not be those of the others.
    first = "(samples: train-00000.tar:0000" if stage == "superclass" else "(samples: 0000"
    assert "is not finite at step" in error and first in error and "lower train.lr" in error
    assert not (tmp_path / "run" / "model").exists()


def test_no_step_of_training_gives_the_initial_weights(tmp_path):
    runs = [tmp_path / "one", tmp_path / "two"]
    for run in runs:
        assert pipeline.mmkit(*pipeline.superclass(run, "train.steps=0")) == 0
    assert pipeline.largest_difference(*runs) == 0.0
    assert pipeline.largest_difference(runs[0], pipeline.trained("superclass")) > 1e-4
