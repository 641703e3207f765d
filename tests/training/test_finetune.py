"""Full fine-tuning: the objective against twins, and tiny real runs from an encoder to a score."""

from __future__ import annotations

import json
import pickle
import random
from pathlib import Path

import numpy as np
import pipeline
import pytest
import torch
from PIL import Image
from timm.data.mixup import mixup_target
from torch.nn import functional as F

from mmkit.config import FinetuneRecipe, LabelledDataConfig
from mmkit.data.labelled import open_labelled
from mmkit.distributed.engine import Engine
from mmkit.encoders import VisionEncoder, build_encoder, load_encoder, save_encoder
from mmkit.errors import InputError
from mmkit.files import read_json
from mmkit.run import Run
from mmkit.training.loop import train
from mmkit.training.optim import parameter_groups
from mmkit.training.stages.finetune import (
    FinetuneObjective,
    build_finetune,
    decayed_rates,
    load_classifier,
    score_finetuned,
)
from mmkit.training.stages.labelled import Augment, FinetuneSamples, collate_labelled_pictures, mix
from mmkit.training.step_log import LoopSettings

COLOURS = {"black": (0, 0, 0), "red": (255, 0, 0), "white": (255, 255, 255)}


def tiny(depth: int = 2, **more: object) -> VisionEncoder:
    args = {"depth": depth, "embed_dim": 32, "num_heads": 2, **more}
    return build_encoder("vit_tiny_patch16_224", image_size=32, patch_size=8, model_args=args, seed=0)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Solid pictures by class, and a tiny encoder without training."""
    folder = tmp_path_factory.mktemp("world")
    for split, count in (("train", 12), ("test", 4)):
        for name, colour in COLOURS.items():
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                shade = tuple(min(255, c + i) if c < 128 else c - i for c in colour)
                Image.new("RGB", (40, 36), shade).save(folder / split / name / f"{i:02d}.png")
    save_encoder(tiny(), folder / "encoder")
    return folder


def recipe(world: Path, run: Path, **more: object) -> FinetuneRecipe:
    keys = {"run": str(run), "stage": "finetune", "encoder": str(world / "encoder"), "label_smoothing": 0.1, **more}
    config = {"batch_size": 12, "steps": 20, "lr": 3e-3, "precision": "fp32", "log_every": 1}
    keys["train"] = {**config, **more.get("train", {})}  # type: ignore[dict-item]
    keys["data"] = {"train": str(world / "train"), "test": str(world / "test"), "workers": 0}
    keys["track"] = {"kind": "none"}
    return FinetuneRecipe.model_validate(keys)


def trained(config: FinetuneRecipe, *, stop_after: int | None = None) -> Run:
    """What the command does, on one process; optionally killed and continued in between."""
    torch.set_num_threads(1)
    run = Run(Path(config.run))
    for limit in [stop_after, None] if stop_after else [None]:
        engine = Engine(precision="fp32", deepspeed=None, batch_size=12, micro_batch_size=None, clip=None)
        torch.manual_seed(config.seed)
        stage = build_finetune(config, engine)
        state = run.state(config, stage.parents)
        run.start(config, stage.parents, state=state, data_fingerprint=stage.data_fingerprint, kind="train")
        run.note(samples_in_data=len(stage.samples))
        settings = LoopSettings(seed=config.seed, workers=0, max_skipped=config.max_skipped, title="test")
        if limit:
            with pytest.raises(RuntimeError, match="killed"):
                train(killed_at(stage, limit), engine, run, config.train, settings)
        else:
            train(stage, engine, run, config.train, settings)
            stage.save_product(run.model)
            run.finish("done")
        engine.close()
    return run


def killed_at(stage: object, step: int) -> object:
    """The stage, but its objective raises at a step."""
    calls, forward = [0], stage.objective.forward  # type: ignore[attr-defined]

    def fragile(batch: dict) -> torch.Tensor:
        calls[0] += 1
        if calls[0] > step:
            raise RuntimeError("killed")
        return forward(batch)

    stage.objective.forward = fragile  # type: ignore[attr-defined]
    return stage


def test_an_encoder_learns_its_classes_and_is_scored(world: Path, tmp_path: Path) -> None:
    config = recipe(world, tmp_path / "run", train={"val_every": 10})
    run = trained(config)
    losses = pipeline.losses(run.path)
    assert losses[0] == pytest.approx(np.log(3), abs=0.1) and losses[-1] < 0.6
    scores = score_finetuned(run, config)["tasks"]["finetune"]
    assert json.loads((run.path / "scores.json").read_text())["tasks"]["finetune"] == scores
    assert scores["metrics"] == {"accuracy": 1.0} and scores["n"] == 12
    assert scores["settings"]["model_fingerprint"] == read_json(run.path / "manifest.json")["product"]
    validated = [row for row in pipeline.rows(run.path / "metrics.jsonl") if "val_accuracy" in row]
    assert [row["step"] for row in validated] == [10, 20] and validated[-1]["val_accuracy"] == 1.0
    encoder, classifier, classes = load_classifier(run.path)
    assert classes == sorted(COLOURS) and classifier.weight.shape == (3, 32)
    # The product is an encoder like any other, and its weights moved.
    moved = [
        not torch.equal(a, b) for a, b in zip(encoder.parameters(), load_encoder(world / "encoder").parameters(), strict=True)
    ]
    assert all(moved)


def test_a_killed_run_continues_to_the_same_weights(world: Path, tmp_path: Path) -> None:
    more = {"mixup": 0.8, "cutmix": 1.0, "drop_path": 0.2, "rand_augment": "rand-m9-mstd0.5-inc1"}
    short = {"steps": 6, "checkpoint_every": 2}
    whole = trained(recipe(world, tmp_path / "whole", **more, train=short))
    parts = trained(recipe(world, tmp_path / "parts", **more, train=short), stop_after=3)
    assert pipeline.losses(whole.path) == pipeline.losses(parts.path)
    assert pipeline.largest_difference(whole.path, parts.path) == 0.0


def test_another_size_interpolates_positions_and_drop_path_reaches_the_model(world: Path, tmp_path: Path) -> None:
    config = recipe(world, tmp_path / "run", image_size=48, drop_path=0.3, train={"steps": 0})
    engine = Engine(precision="fp32", deepspeed=None, batch_size=12, micro_batch_size=None, clip=None)
    stage = build_finetune(config, engine)
    engine.close()
    encoder, before = stage.objective.encoder, load_encoder(world / "encoder")
    assert encoder.image_size == 48 and encoder.num_tokens == 36
    assert encoder.backbone.blocks[-1].drop_path1.drop_prob == pytest.approx(0.3)
    assert stage.samples.load(0, np.random.default_rng(0)).pixels.shape == (3, 48, 48)
    old = before.backbone.pos_embed.detach().reshape(1, 4, 4, 32).permute(0, 3, 1, 2)
    new = F.interpolate(old, size=(6, 6), mode="bicubic", antialias=True, align_corners=False)
    torch.testing.assert_close(encoder.backbone.pos_embed.detach(), new.flatten(2).transpose(1, 2))
    assert torch.equal(encoder.backbone.blocks[0].attn.qkv.weight, before.backbone.blocks[0].attn.qkv.weight)
    stage.save_product(tmp_path / "model")
    assert load_encoder(tmp_path / "model").image_size == 48


def test_rates_fall_from_the_top_block_by_block() -> None:
    objective = FinetuneObjective(tiny(depth=12), 3)
    rates = decayed_rates(objective.encoder, 1.0, 0.5)
    groups = parameter_groups(objective.named_parameters(), lr=1.0, weight_decay=0.1, lr_of=rates)
    rate_of = {id(p): group["base_lr"] for group in groups for p in group["params"]}  # type: ignore[attr-defined]
    for name, parameter in objective.named_parameters():
        if ".blocks." in name:
            expected = 0.5 ** (12 - int(name.split(".blocks.")[1].split(".")[0]))
        elif name.startswith("classifier"):
            expected = 1.0
        else:
            expected = 0.5 if ".norm." in name else 0.5**13
        assert rate_of[id(parameter)] == expected, name


def test_layer_decay_is_used(world: Path, tmp_path: Path) -> None:
    # So strong that only the classifier moves.
    run = trained(recipe(world, tmp_path / "run", layer_decay=1e-9, train={"steps": 2, "weight_decay": 0.0}))
    after, before = load_encoder(run.path).backbone, load_encoder(world / "encoder").backbone
    assert all(torch.allclose(a, b, rtol=0, atol=1e-7) for a, b in zip(after.parameters(), before.parameters(), strict=True))
    assert float(load_classifier(run.path)[1].weight.detach().abs().max()) > 0.02


def test_the_loss_is_smoothed_cross_entropy_in_training_only() -> None:
    torch.manual_seed(0)
    objective, batch = FinetuneObjective(tiny(), 5, label_smoothing=0.2), some_batch(6)
    logits = objective.classifier(objective.encoder(batch["pixels"]))
    target = F.one_hot(batch["targets"], 5) * 0.8 + 0.2 / 5
    torch.testing.assert_close(objective.train()(batch), -(target * logits.log_softmax(1)).sum())
    plain = -logits.log_softmax(1)[torch.arange(6), batch["targets"]].sum()
    torch.testing.assert_close(objective.eval()(batch), plain)
    right = int((logits.argmax(1) == batch["targets"]).sum())
    assert objective.evaluate(batch) == {"accuracy": right} and objective.count(batch) == 6


def some_batch(size: int, classes: int = 5) -> dict:
    generator = torch.Generator().manual_seed(size)
    pixels = torch.randint(0, 256, (size, 3, 32, 32), dtype=torch.uint8, generator=generator)
    return {"pixels": pixels, "targets": torch.randint(0, classes, (size,), generator=generator)}


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0.0), (0.0, 1.0)])
def test_mixed_losses_equal_soft_targets(mixup: float, cutmix: float) -> None:
    """The twin takes timm's soft targets for the share that was drawn."""
    batch = some_batch(5)
    objective = FinetuneObjective(tiny(), 5, label_smoothing=0.1, mixup=mixup, cutmix=cutmix).train()
    torch.manual_seed(4)
    mixed = mix(objective.encoder.normalise(batch["pixels"]), mixup=mixup, cutmix=cutmix)
    assert 0 < mixed.share < 1
    target = mixup_target(batch["targets"], 5, lam=mixed.share, smoothing=0.1)
    logits = objective.classifier(objective.encoder(mixed.pixels))
    torch.manual_seed(4)
    torch.testing.assert_close(objective(batch), -(target * logits.log_softmax(1)).sum())
    # Another step draws other numbers.
    torch.manual_seed(5)
    assert not torch.equal(objective(batch), -(target * logits.log_softmax(1)).sum())


def test_mixing_adds_or_pastes_the_reverse_batch() -> None:
    x = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 3, 16, 16)
    torch.manual_seed(0)
    kinds = set()
    for _ in range(40):
        mixed = mix(x, mixup=0.8, cutmix=1.0)
        own = (mixed.pixels == x).all(1).float().mean((1, 2))
        other = (mixed.pixels == x.flip(0)).all(1).float().mean((1, 2))
        if bool(((own + other - 1).abs() < 1e-6).all()):
            kinds.add("cutmix")
            assert own.tolist() == pytest.approx([mixed.share] * 4)  # the area counts, also of a clipped box
        else:
            kinds.add("mixup")
            torch.testing.assert_close(mixed.pixels, mixed.share * x + (1 - mixed.share) * x.flip(0))
    assert kinds == {"cutmix", "mixup"} and x[0].max() == 0  # the pictures themselves stay


def samples(world: Path, augment: Augment | None) -> FinetuneSamples:
    source = open_labelled(str(world / "train"), LabelledDataConfig(test=""))
    return FinetuneSamples(source, source.targets(source.classes), size=32, max_pixels=10_000, augment=augment)


def test_augmentation_depends_on_the_sample_alone(world: Path, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (36, 40, 3), dtype=np.uint8)
    (tmp_path / "train" / "a").mkdir(parents=True)
    Image.fromarray(noise).save(tmp_path / "train" / "a" / "0.png")
    found = {}
    for name, augment in {
        "crop": Augment((0.5, 1.0), False, None),
        "flip": Augment((0.5, 1.0), True, None),
        "all": Augment((0.5, 1.0), True, "rand-m9-n2-mstd0.5-inc1"),
    }.items():
        part = samples(tmp_path, augment)
        first = [part.load(0, np.random.default_rng(seed)).pixels for seed in range(8)]
        random.seed(1)
        np.random.seed(1)  # noqa: NPY002
        state = random.getstate()
        again = [pickle.loads(pickle.dumps(part)).load(0, np.random.default_rng(seed)).pixels for seed in range(8)]
        assert random.getstate() == state and np.random.get_state()[1][0] == 1  # noqa: NPY002
        assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
        found[name] = first
    flipped = [np.array_equal(a, b[:, :, ::-1]) for a, b in zip(found["crop"], found["flip"], strict=True)]
    same = [np.array_equal(a, b) for a, b in zip(found["crop"], found["flip"], strict=True)]
    assert any(flipped) and any(same) and all(f != s for f, s in zip(flipped, same, strict=True))
    assert any(not np.array_equal(a, b) for a, b in zip(found["flip"], found["all"], strict=True))


def test_the_decoder_changes_pixels_of_training_alone(tmp_path: Path) -> None:
    small = np.random.default_rng(0).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    (tmp_path / "train" / "a").mkdir(parents=True)
    Image.fromarray(small).resize((100, 80), Image.Resampling.BICUBIC).save(tmp_path / "train" / "a" / "0.jpg")
    fast, exact = (samples(tmp_path, Augment((0.5, 1.0), True, None, decoder)) for decoder in ("fast", "exact"))
    errors = [
        np.abs(fast.load(0, np.random.default_rng(i)).pixels.astype(int) - exact.load(0, np.random.default_rng(i)).pixels).mean()
        for i in range(8)
    ]
    # The same crops: others would be 40 away.
    assert min(errors) > 0 and max(errors) < 10


@pytest.mark.parametrize("name", ["rand-m0", "rand-m10-n8-inc1", "rand-m9-mstd0.5-inc1"])
def test_every_strength_of_rand_augment_works(world: Path, name: str) -> None:
    # timm's posterize asks for no bits at all at its strongest.
    part = samples(world, Augment((0.9, 1.0), True, name))
    assert all(part.load(i % 36, np.random.default_rng(i)).pixels.shape == (3, 32, 32) for i in range(100))


def test_validation_sees_the_centre_and_batches_hold_classes(world: Path) -> None:
    part = samples(world, None)
    batch = collate_labelled_pictures([part.load(i, np.random.default_rng(i)) for i in (0, 35)])
    assert batch["pixels"].shape == (2, 3, 32, 32) and batch["pixels"].dtype == torch.uint8
    assert batch["targets"].tolist() == [0, 2] and part.describe(35) == (str(world / "train"), batch["keys"][1])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"rand_augment": "nothing"}, "rand_augment: no RandAugment 'nothing'"),
        ({"rand_augment": "rand-z9"}, "rand_augment: no RandAugment 'rand-z9'"),
        ({"encoder": "absent"}, "no such encoder"),
        ({"image_size": 30}, "image_size: 30 pixels are no whole number of patches of 8"),
    ],
)
def test_what_does_not_fit_is_refused(world: Path, tmp_path: Path, more: dict, message: str) -> None:
    engine = Engine(precision="fp32", deepspeed=None, batch_size=12, micro_batch_size=None, clip=None)
    try:
        with pytest.raises(InputError, match=message):
            build_finetune(recipe(world, tmp_path / "run", **more), engine)
    finally:
        engine.close()


def test_a_folder_without_classifier_and_an_unfinished_run_are_refused(world: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no classifier here .*; give a run of stage=finetune"):
        load_classifier(world / "encoder")
    (tmp_path / "manifest.json").write_text('{"status": "running"}')
    with pytest.raises(InputError, match="this run is not finished"):
        score_finetuned(Run(tmp_path), recipe(world, tmp_path))


def test_the_real_command_trains_scores_and_returns_at_once(tmp_path, monkeypatch, capsys):
    world = pipeline.root() / "world"
    recipe = ["finetune-imagenet", f"run={tmp_path / 'run'}", f"encoder={pipeline.trained('superclass')}", "data.label=shape"]
    recipe += [f"data.train={world / 'probe_train.jsonl'}", f"data.test={world / 'probe_heldout.jsonl'}", "data.workers=0"]
    recipe += [
        "train.batch_size=8",
        "train.micro_batch_size=4",
        "train.epochs=1",
        "train.precision=fp32",
        "train.checkpoint_every=100",
    ]
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert pipeline.mmkit("probe", *recipe) == 2
    assert "train with `mmkit train` on many processes" in capsys.readouterr().err and not (tmp_path / "run").exists()
    monkeypatch.delenv("WORLD_SIZE")
    assert pipeline.mmkit("probe", *recipe) == 0
    said = capsys.readouterr().out
    scores = json.loads((tmp_path / "run" / "scores.json").read_text())["tasks"]["finetune"]
    assert f"{scores['metrics']['accuracy']:.4f}" in said and scores["n"] > 0
    stamp = (tmp_path / "run" / "scores.json").stat().st_mtime_ns
    assert pipeline.mmkit("probe", *recipe) == 0 and (tmp_path / "run" / "scores.json").stat().st_mtime_ns == stamp
    # Trained elsewhere by `mmkit train`, scored here.
    (tmp_path / "run" / "scores.json").unlink()
    assert pipeline.mmkit("train", *recipe) == 0 and not (tmp_path / "run" / "scores.json").exists()
    assert pipeline.mmkit("probe", *recipe) == 0 and (tmp_path / "run" / "scores.json").is_file()
