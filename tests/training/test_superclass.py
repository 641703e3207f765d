"""SuperClass through the real command line: losses, IDF modes, stop words, patch dropping, going on from other weights."""

from __future__ import annotations

import itertools
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pipeline
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from mmkit.config import LossConfig, load_recipe
from mmkit.data.images import decode_image, fit_square
from mmkit.data.sources import open_pairs
from mmkit.encoders.idf import OnlineIDF, load_table
from mmkit.encoders.labels import CaptionLabels
from mmkit.encoders.loss_kinds import KINDS, Asymmetric, Softmax, TwoWay
from mmkit.encoders.ragged import pack_labels
from mmkit.encoders.save import load_encoder
from mmkit.errors import InputError
from mmkit.recipes import find_recipe
from mmkit.training.stages.pairs import Augmentation, PairSample, PairSamples
from mmkit.training.stages.superclass import LabelledBatch, make_loss


def run(folder, *more: str):
    """A finished tiny run with further overrides."""
    assert pipeline.mmkit(*pipeline.superclass(folder, *more)) == 0
    return folder


def captions(count: int | None = None) -> list[str]:
    """Captions of the training shards' pairs, by way of the index."""
    return [p.caption for p in open_pairs(str(pipeline.root() / "world" / "shards")).pairs][:count]


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "softmax"])
def test_every_loss_trains(kind, tmp_path):
    losses = pipeline.losses(run(tmp_path / kind, f"loss.kind={kind}", "train.lr=3e-3", "train.steps=8"))
    assert len(losses) == 8 and losses[-1] < losses[0]
    assert losses[0] != pytest.approx(pipeline.losses(pipeline.trained("superclass"))[0], rel=1e-3)


def test_the_numbers_of_a_loss_reach_it(tmp_path):
    assert make_loss(LossConfig()) == Softmax()
    assert make_loss(LossConfig(kind="asl", gamma_negative=2.0, clip=0.0)) == Asymmetric(gamma_negative=2.0, clip=0.0)
    assert make_loss(LossConfig(kind="two_way", temperature_positive=2.0)) == TwoWay(temperature_positive=2.0)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["loss.kind=bce", "loss.gamma_negative=2"], "gamma_negative belong to kind asl, not to bce"),
        (["loss.clip=0.1"], "clip belong to kind asl, not to the default"),
        (["loss.kind=infonce"], "needs a text tower: use stage=clip"),
        (["stage=clip", "loss.kind=bce"], "needs labels: use stage=superclass"),
        (["stage=lit"], "give encoder.init"),
        (["data.idf=file"], "idf=file and idf_file=PATH go together"),
        (["data.idf_file=x"], "idf=file and idf_file=PATH go together"),
        (["encoder.init_head=true"], "give encoder.init too"),
        (["monitor.every=5"], "nothing to look at"),
        (["monitor.images=[a.jpg]"], "give every=STEPS too"),
        (["monitor.every=5", "monitor.knn_train=a"], "knn_train and knn_test go together"),
        (["data.color_jitter=[0.1,0.1,0.1,0.6]"], "hue is at most 0.5"),
    ],
)
def test_keys_that_do_not_fit_each_other_are_refused(overrides, message):
    with pytest.raises(InputError, match=message):
        load_recipe(find_recipe("demo-superclass"), overrides)


def test_one_line_turns_it_into_its_baseline():
    recipe = load_recipe(find_recipe("superclass-vit-b16"), ["stage=clip"])
    ours = load_recipe(find_recipe("superclass-vit-b16"))
    assert recipe.stage == "clip"
    same = ("encoder", "data", "train", "seed")
    assert all(getattr(recipe, key) == getattr(ours, key) for key in same)


def test_the_product_keeps_its_document_counts():
    table = load_file(pipeline.trained("superclass") / "model" / "idf.safetensors")
    labels = CaptionLabels(str(pipeline.root() / "world" / "tokenizers" / "bpe"))
    df, n = load_table(
        pipeline.trained("superclass") / "model" / "idf.safetensors", sha256=labels.sha256(), vocab_size=labels.vocab_size
    )
    assert n == 4 * 8 and torch.equal(df, table["df"]) and int(df.max()) <= n and int((df > 0).sum()) > 10


def test_a_frozen_table_weighs_the_labels_and_does_not_move(tmp_path, capsys):
    table, world = tmp_path / "idf.safetensors", pipeline.root() / "world"
    assert pipeline.mmkit("data", "inspect", world / "shards", "--labels", world / "tokenizers" / "bpe", "--idf", table) == 0
    assert "captions without a label: 0" in capsys.readouterr().out
    labels = CaptionLabels(str(world / "tokenizers" / "bpe"))
    by_hand = OnlineIDF(labels.vocab_size)
    by_hand.update(*pack_labels(labels.encode(captions())))
    df, n = load_table(table, sha256=labels.sha256(), vocab_size=labels.vocab_size)
    assert torch.equal(df, by_hand.df) and n == int(by_hand.n)
    made = run(tmp_path / "run", "data.idf=file", f"data.idf_file={table}")
    after, n_after = load_table(made / "model" / "idf.safetensors", sha256=labels.sha256(), vocab_size=labels.vocab_size)
    assert torch.equal(after, df) and n_after == n
    losses = [
        pipeline.losses(folder) for folder in (made, pipeline.trained("superclass"), run(tmp_path / "none", "data.idf=none"))
    ]
    assert len({round(found[0], 5) for found in losses}) == 3


def test_a_table_of_another_vocabulary_is_refused(tmp_path, capsys):
    table = tmp_path / "idf.safetensors"
    assert pipeline.mmkit("data", "inspect", pipeline.root() / "world" / "shards", "--idf", table) == 0  # clip's labels
    capsys.readouterr()
    arguments = pipeline.superclass(tmp_path / "run", "data.idf=file", f"data.idf_file={table}")
    assert pipeline.mmkit(*arguments) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "idf.safetensors" in said and "vocabulary" in said
    assert pipeline.mmkit("validate", *arguments[1:]) == 2


def test_a_vocabulary_that_does_not_exist_is_refused(tmp_path, capsys):
    assert pipeline.mmkit(*pipeline.superclass(tmp_path / "run", f"data.labels={tmp_path / 'none.json'}")) == 2
    assert capsys.readouterr().err.count("\n") == 1 and not (tmp_path / "run").exists()


def test_a_head_goes_on_with_the_same_labels_only(tmp_path, capsys):
    before = pipeline.trained("superclass")
    same = run(tmp_path / "same", f"encoder.init={before}", "encoder.init_head=true", "train.steps=1", "train.lr=1e-12")
    old, new = (load_file(folder / "model" / "head.safetensors") for folder in (before, same))
    assert torch.allclose(old["weight"], new["weight"], atol=1e-6)
    assert int(load_file(same / "model" / "idf.safetensors")["n"]) == 4 * 8 + 8
    fresh = run(tmp_path / "fresh", f"encoder.init={before}", "train.steps=1", "train.lr=1e-12", "seed=5")
    assert not torch.allclose(old["weight"], load_file(fresh / "model" / "head.safetensors")["weight"], atol=1e-2)
    capsys.readouterr()
    arguments = pipeline.superclass(tmp_path / "other", f"encoder.init={before}", "encoder.init_head=true", "data.labels=clip")
    assert pipeline.mmkit(*arguments) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "vocabulary" in said and "clip" in said


def test_resolution_fine_tuning_interpolates_positions(tmp_path):
    made = run(
        tmp_path / "run", f"encoder.init={pipeline.trained('superclass')}", "encoder.init_head=true", "encoder.image_size=48"
    )
    before, after = (load_file(f / "model" / "model.safetensors") for f in (pipeline.trained("superclass"), made))
    assert before["pos_embed"].shape[1] == 16 and after["pos_embed"].shape[1] == 36
    assert json.loads((made / "model" / "config.json").read_text())["pretrained_cfg"]["input_size"] == [3, 48, 48]
    # It begins where the smaller one ended, so its first loss is below a fresh tower's.
    assert pipeline.losses(made)[0] < pipeline.losses(pipeline.trained("superclass"))[0]


def test_patches_are_dropped_in_training_and_the_drop_depends_on_the_sample_alone(tmp_path):
    whole = run(tmp_path / "whole", "encoder.patch_drop=0.5")
    assert pipeline.losses(whole) != pytest.approx(pipeline.losses(pipeline.trained("superclass")), abs=1e-4)
    parts = run(tmp_path / "parts", "encoder.patch_drop=0.5", "train.micro_batch_size=2")
    assert pipeline.losses(parts) == pytest.approx(pipeline.losses(whole), abs=1e-5)


def test_kept_patches_are_a_sorted_random_share():
    how = Augmentation((1.0, 1.0), None, 0.0, num_tokens=16, patch_drop=0.75)
    draws = [how.kept_patches(np.random.default_rng(seed)) for seed in range(50)]
    assert all(len(d) == 4 and (np.diff(d) > 0).all() and d.min() >= 0 and d.max() < 16 for d in draws)
    assert len({tuple(d) for d in draws}) > 40 and set(np.concatenate(draws)) == set(range(16))
    assert Augmentation((1.0, 1.0), None, 0.0, 16, 0.0).kept_patches(np.random.default_rng(0)) is None


def test_stop_words_are_no_labels(tmp_path):
    made = run(tmp_path / "run", "data.labels=clip", "data.stop_words=english")
    counts = load_file(made / "model" / "idf.safetensors")["df"]
    with_all = load_file(run(tmp_path / "all", "data.labels=clip") / "model" / "idf.safetensors")["df"]
    labels = CaptionLabels("clip")
    (a,), (red,) = labels.encode(["a"])[0:1], labels.encode(["red"])[0:1]
    assert int(counts[a]) == 0 < int(with_all[a]) and torch.equal(counts[red], with_all[red])


def test_captions_without_a_label_leave_the_mean(tmp_path):
    for name, texts in (("some", ["the", "red door", "the", "blue wall"]), ("none", ["the", "of and to"])):
        rows = []
        for i in range(16):
            Image.new("RGB", (32, 32), (10 * i, 90, 90)).save(tmp_path / f"{i}.png")
            rows.append({"image": f"{i}.png", "caption": texts[i % len(texts)]})
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    more = ["data.labels=clip", "data.stop_words=english", "train.batch_size=16", "train.weight_decay=0", "train.steps=2"]
    some = run(tmp_path / "some", f"data.train={tmp_path / 'some.jsonl'}", *more)
    assert [row["counted"] for row in pipeline.rows(some / "metrics.jsonl")] == [8.0, 8.0] and pipeline.losses(some)[0] > 5
    # Not one label in a batch: the loss is 0, the weights stay as they are, nothing breaks.
    none = run(tmp_path / "none", f"data.train={tmp_path / 'none.jsonl'}", *more)
    assert pipeline.losses(none) == [0.0, 0.0]
    assert {row["counted"] for row in pipeline.rows(none / "metrics.jsonl")} == {0.0}
    start = run(tmp_path / "start", f"data.train={tmp_path / 'none.jsonl'}", *more, "train.steps=0")
    assert pipeline.largest_difference(none, start) == 0


def test_recall_is_logged_at_several_k(tmp_path):
    world = pipeline.root() / "world"
    validation = [f"data.val={world / 'captions_heldout.json'}", f"data.val_image_root={world / 'images' / 'heldout'}"]
    made = run(tmp_path / "run", *validation, "train.val_every=2")
    row = next(r for r in pipeline.rows(made / "metrics.jsonl") if "val_loss" in r)
    assert 0 <= row["val_recall@1"] <= row["val_recall@5"] <= row["val_recall@10"] <= 1


def test_a_batch_keeps_captions_and_labels_together():
    labels = CaptionLabels("clip")
    collate = pickle.loads(pickle.dumps(LabelledBatch(labels)))
    captions = ["a red bus", "", "two dogs & a cat"] * 4
    keep = np.arange(3)
    batch = collate([PairSample(np.full((3, 4, 4), i, np.uint8), c, str(i), keep + i) for i, c in enumerate(captions)])
    wanted = [labels.encode_one(caption) for caption in captions]
    assert [batch["ids"][a:b].tolist() for a, b in itertools.pairwise(batch["offsets"].tolist())] == wanted
    assert batch["pixels"][:, 0, 0, 0].tolist() == list(range(12)) and batch["keys"] == [str(i) for i in range(12)]
    assert batch["keep"][:, 0].tolist() == list(range(12))


@pytest.mark.parametrize("route", ["file", "head"])
def test_counts_without_stop_words_are_not_taken_for_counts_with_them(route, tmp_path, capsys):
    before = run(tmp_path / "before", "data.labels=clip", "data.stop_words=english", "train.steps=1")
    table = before / "model" / "idf.safetensors"
    more = {"file": ["data.idf=file", f"data.idf_file={table}"], "head": [f"encoder.init={before}", "encoder.init_head=true"]}[
        route
    ]
    capsys.readouterr()
    assert pipeline.mmkit(*pipeline.superclass(tmp_path / "wrong", "data.labels=clip", *more)) == 2
    assert "stop words" in capsys.readouterr().err
    run(tmp_path / "right", "data.labels=clip", "data.stop_words=english", "train.steps=1", *more)


def test_a_run_does_not_go_on_with_other_labels(tmp_path, capsys):
    words = tmp_path / "words.json"
    shards = pipeline.root() / "world" / "shards"
    assert pipeline.mmkit("data", "inspect", shards, "--words", words, "--min-count", "1") == 0
    arguments = pipeline.superclass(tmp_path / "run", f"data.labels={words}", "train.checkpoint_every=2")
    assert pipeline.mmkit(*arguments) == 0
    found = json.loads(words.read_text())
    words.write_text(json.dumps({**found, "words": found["words"][::-1]}))
    note = tmp_path / "run" / "manifest.json"
    note.write_text(json.dumps({**json.loads(note.read_text()), "status": "stopped"}))
    capsys.readouterr()
    assert pipeline.mmkit(*arguments) == 2
    assert "the labels have changed since this run began" in capsys.readouterr().err


def test_unusable_validation_pictures_are_listed(tmp_path):
    world = pipeline.root() / "world"
    folder = tmp_path / "heldout"
    shutil.copytree(world / "images" / "heldout", folder)
    broken = sorted(folder.glob("*.jpg"))[:3]
    for picture in broken:
        picture.write_bytes(b"no picture")
    validation = [f"data.val={world / 'captions_heldout.json'}", f"data.val_image_root={folder}", "train.val_every=4"]
    made = run(tmp_path / "run", *validation, "train.val_batches=100", "data.max_skipped=1")
    listed = pipeline.rows(made / "skipped.jsonl")
    assert {name for name in (p.name for p in broken) if any(name in row["key"] for row in listed)} == {p.name for p in broken}
    assert pipeline.manifest(made)["skipped"] == len(listed) >= 3


@pytest.mark.parametrize(
    ("recipe", "overrides", "message"),
    [
        ("demo-superclass", ["stage=clip", "text.heads=5", "text.width=32"], "5 heads do not divide a width of 32"),
        ("superclass-vit-b16", ["encoder.architecture=resnet18", "encoder.patch_drop=0.5"], "cannot leave patches out"),
        ("demo-superclass", ["encoder.pretrained=true", "encoder.init=runs/x"], "both pretrained and init"),
        ("demo-superclass", ["data.val=null"], "go together"),
        ("demo-superclass", ["train.val_every=null"], "go together"),
    ],
)
def test_validate_finds_what_training_would_refuse(recipe, overrides, message, capsys):
    assert pipeline.mmkit("validate", recipe, *overrides) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and message in said


def test_colours_change_in_training_only(tmp_path):
    plain = pipeline.losses(pipeline.trained("superclass"))
    jittered = run(tmp_path / "jitter", "data.color_jitter=[0.4,0.4,0.4,0.1]", "data.color_jitter_prob=1")
    assert pipeline.losses(jittered) != pytest.approx(plain, abs=1e-4)
    never = run(tmp_path / "never", "data.color_jitter=[0.4,0.4,0.4,0.1]", "data.color_jitter_prob=0")
    assert pipeline.losses(never) == pytest.approx(plain, abs=1e-6)
    gray = run(tmp_path / "gray", "data.gray_scale_prob=1")
    assert pipeline.losses(gray) != pytest.approx(plain, abs=1e-4)
    encoder = load_encoder(gray)
    pairs = open_pairs(str(pipeline.root() / "world" / "shards"))
    how = Augmentation((1.0, 1.0), None, 1.0, encoder.num_tokens, 0.0)
    seen = PairSamples(pairs, size=32, max_pixels=10**8, augmentation=how).load(0, np.random.default_rng(0)).pixels
    whole = PairSamples(pairs, size=32, max_pixels=10**8).load(0, np.random.default_rng(0)).pixels
    assert (seen[0] == seen[1]).all() and not (whole[0] == whole[1]).all()


def photographs(folder, count: int = 6):
    """Pairs of JPEGs that are large enough to be decoded shrunk."""
    folder.mkdir()
    rows = []
    for i in range(count):
        small = np.random.default_rng(i).integers(0, 256, (9, 12, 3), dtype=np.uint8)
        Image.fromarray(small).resize((160, 120), Image.Resampling.BICUBIC).save(folder / f"{i}.jpg")
        rows.append(json.dumps({"image": f"{i}.jpg", "caption": f"picture {i}"}))
    (folder / "pairs.jsonl").write_text("\n".join(rows))
    return open_pairs(str(folder / "pairs.jsonl"))


def test_the_decoder_changes_pixels_of_training_alone(tmp_path):
    pairs = photographs(tmp_path / "data")
    fast, exact = (
        PairSamples(pairs, size=32, max_pixels=10**8, augmentation=Augmentation((0.5, 1.0), None, 0.0, 4, 0.5, decoder))
        for decoder in ("fast", "exact")
    )
    for index in range(len(pairs)):
        a, b = (part.load(index, np.random.default_rng(index)) for part in (fast, exact))
        error = np.abs(a.pixels.astype(int) - b.pixels)
        assert 0 < error.mean() < 10  # the same crop; another would be 40 away
        assert (a.keep == b.keep).all()  # and the same numbers drawn after it
        whole = PairSamples(pairs, size=32, max_pixels=10**8).load(index, np.random.default_rng(0)).pixels
        assert np.array_equal(whole, fit_square(decode_image(pairs.read(index).image.read()), 32, fit="squash"))


def test_the_recipe_chooses_decoder_and_limits(tmp_path):
    photographs(tmp_path / "data")
    data = [f"data.train={tmp_path / 'data' / 'pairs.jsonl'}", "train.steps=2", "train.batch_size=4", "data.crop_scale=[0.5,1]"]
    losses = [pipeline.losses(run(tmp_path / way, *data, f"data.decoder={way}")) for way in ("fast", "exact")]
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], rel=0.05)
    sizes = sorted((tmp_path / "data" / f"{i}.jpg").stat().st_size for i in range(6))
    limited = run(tmp_path / "limited", *data, f"data.max_bytes={sizes[-2]}", "data.max_skipped=1", "train.steps=4")
    assert {row["reason"] for row in pipeline.rows(limited / "skipped.jsonl")} == {
        f"{sizes[-1]} bytes are over the limit of {sizes[-2]}"
    }


def test_loss_chunks_change_no_number(tmp_path):
    chunked = run(tmp_path / "run", "loss.chunk_rows=3")
    assert pipeline.losses(chunked) == pytest.approx(pipeline.losses(pipeline.trained("superclass")), abs=1e-5)


def test_two_way_says_that_it_sees_a_micro_batch(tmp_path, caplog):
    run(tmp_path / "whole", "loss.kind=two_way", "train.steps=1")
    assert "two_way compares" not in caplog.text
    run(tmp_path / "parts", "loss.kind=two_way", "train.steps=1", "train.micro_batch_size=2")
    assert "two_way compares the 2 pictures of a micro-batch" in caplog.text


@pytest.mark.parametrize("stage", ["superclass", "clip"])
def test_knn_can_be_watched_in_every_pretraining_stage(stage, tmp_path):
    world = pipeline.root() / "world"
    looks = [f"monitor.knn_train={world / 'probe_train.jsonl'}", f"monitor.knn_test={world / 'probe_heldout.jsonl'}"]
    made = run(tmp_path / stage, f"stage={stage}", "text.context_length=16", *looks, "monitor.label=shape", "monitor.every=4")
    found = [row["knn_accuracy"] for row in pipeline.rows(made / "metrics.jsonl") if "knn_accuracy" in row]
    assert len(found) == 1 and 0 <= found[0] <= 1


@pytest.mark.slow
def test_killed_at_any_moment_and_continued_is_bit_equal_to_straight(tmp_path):
    more = ["train.steps=60", "train.checkpoint_every=4", "encoder.patch_drop=0.25", "data.workers=1"]
    straight = run(tmp_path / "straight", *more)
    arguments = pipeline.superclass(tmp_path / "killed", *more)
    metrics = tmp_path / "killed" / "metrics.jsonl"
    for rows in (3, 14):
        started = subprocess.Popen(
            [sys.executable, "-m", "mmkit", *map(str, arguments)],
            env=pipeline.environment(),
            cwd=pipeline.root(),
            stderr=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )
        deadline = time.monotonic() + 120
        # Lines, not rows: the last one may be half written.
        while (metrics.read_bytes().count(b"\n") if metrics.exists() else 0) < rows and started.poll() is None:
            assert time.monotonic() < deadline, "the run makes no progress"
            time.sleep(0.005)
        os.killpg(started.pid, signal.SIGKILL)  # with its loader workers: nobody gets to clean up
        started.wait()
    assert not (tmp_path / "killed" / "model").exists()
    assert pipeline.mmkit(*arguments) == 0
    assert pipeline.losses(tmp_path / "killed") == pipeline.losses(straight)
    assert pipeline.largest_difference(tmp_path / "killed", straight) == 0  # document counts included
