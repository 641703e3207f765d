"""Every shipped recipe: it validates, its head says what a user needs, and its numbers are the published ones."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from mmkit.config import Recipe, check_recipe, dump_recipe, load_recipe
from mmkit.distributed.settings import deepspeed_settings
from mmkit.errors import InputError
from mmkit.recipes import copy_recipe, describe, find_deepspeed, find_recipe, list_recipes, recipe_folders
from mmkit.validate import check_parts

RECIPES = list_recipes()
DEEPSPEED = sorted(recipe_folders()["deepspeed"].glob("*.json"))
VERB = {
    "superclass": "train",
    "clip": "train",
    "lit": "train",
    "finetune": "probe",
    "clipcap": "train",
    "llava": "train",
    "probe": "probe",
    "eval": "eval",
}
EXPECTED = [
    "demo-probe",
    "demo-superclass",
    "finetune-imagenet",
    "lit-vit-b16",
    "lit-vit-l16",
    "lit-vit-l16-12b",
    "lit-vit-s16",
    "probe-imagenet",
    "superclass-cc3m",
    "superclass-vit-l16-12b",
    "zeroshot-imagenet",
    "superclass-vit-b16",
    "superclass-vit-l14",
    "superclass-vit-l16",
    "superclass-vit-s16",
    "clipcap-mlp-gpt2",
    "clipcap-superclass",
    "clipcap-transformer-gpt2",
    "demo-clipcap",
    "demo-llava-align",
    "demo-llava-finetune",
    "llava-7b-align",
    "llava-7b-finetune",
    "llava-7b-lora",
    "coco-captions",
    "demo-eval-captioner",
    "demo-eval-mllm",
    "llava-1.5",
    "superclass-paper",
    "vqa-textvqa",
]


@pytest.fixture(autouse=True)
def _own_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DATA", "RUNS", "MMKIT_DEMO"):
        monkeypatch.delenv(name, raising=False)


def head(path: Path) -> list[str]:
    """The comment lines before the first key, without their mark."""
    lines = path.read_text(encoding="utf-8").splitlines()
    end = next(i for i, line in enumerate(lines) if not line.startswith("#"))
    return [line.removeprefix("#").rstrip() for line in lines[:end]]


def field(path: Path, name: str) -> str:
    """A field of the head, with its continuation lines."""
    lines = head(path)
    start = next((i for i, line in enumerate(lines) if re.match(rf" {{3}}{name}\s", line)), None)
    assert start is not None, f"{path.name} has no line {name!r} in its head"
    found = [lines[start].split(maxsplit=1)[1]]
    for line in lines[start + 1 :]:
        if not line.startswith(" " * 8):
            break
        found.append(line.strip())
    return "\n".join(found)


def plain(recipe: Recipe) -> dict[str, Any]:
    return recipe.model_dump(mode="json")


def value_at(tree: Any, key: str) -> Any:
    for part in key.split("."):
        tree = tree[int(part)] if isinstance(tree, list) else tree[part]
    return tree


def test_every_recipe_of_the_plan_is_shipped() -> None:
    assert set(EXPECTED) <= set(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_validates(name: str) -> None:
    recipe = load_recipe(find_recipe(name))
    check_parts(recipe)
    # What a run directory keeps is the same recipe again.
    assert check_recipe(yaml.safe_load(dump_recipe(recipe)), where=name) == recipe


@pytest.mark.parametrize("name", RECIPES)
def test_launch_line_starts_this_recipe(name: str) -> None:
    recipe = load_recipe(RECIPES[name])
    launch = field(RECIPES[name], "launch").splitlines()[0]
    assert re.search(rf"(mmkit|torchrun\.sh) {VERB[recipe.stage]} {name}$", launch), launch


@pytest.mark.parametrize("name", RECIPES)
def test_override_example_is_real(name: str) -> None:
    before = load_recipe(RECIPES[name])
    words = shlex.split(field(RECIPES[name], "override").splitlines()[0])
    assert words[:3] == ["mmkit", VERB[before.stage], name]
    assert len(words) > 3
    after = load_recipe(RECIPES[name], words[3:])
    check_parts(after)
    for word in words[3:]:
        key = word.partition("=")[0]
        assert value_at(plain(after), key) != value_at(plain(before), key), f"{word} changes nothing"


@pytest.mark.parametrize("name", RECIPES)
def test_head_says_hardware_time_and_score_with_their_source(name: str) -> None:
    assert len(describe(RECIPES[name])) > 20
    assert re.search(r"GPU|CPU", field(RECIPES[name], "hardware"))
    time, score = field(RECIPES[name], "time"), field(RECIPES[name], "score")
    assert time and score
    if not name.startswith("demo-"):
        assert "not measured by us" in " ".join(time.split())
        assert "not measured by us" in " ".join(score.split())
        assert re.search(r"arXiv|ClipCap|MODEL_ZOO|none", score)


@pytest.mark.parametrize("name", RECIPES)
def test_lines_fit_and_no_path_of_one_machine(name: str) -> None:
    text = RECIPES[name].read_text(encoding="utf-8")
    assert max(len(line) for line in text.splitlines() if "#" in line) <= 130
    assert not re.search(r"(^|[\s=:\"'])/(home|work|mnt|data|tmp|root)\b", text)
    if not name.startswith("demo-"):
        assert "${oc.env:RUNS,runs}/" in text


@pytest.mark.parametrize("name", RECIPES)
def test_misspelt_key_names_the_nearest(name: str) -> None:
    recipe = load_recipe(RECIPES[name])
    wrong, right = ("train.batch_sizes=8", "train.batch_size") if hasattr(recipe, "train") else ("sytem=x", "system")
    with pytest.raises(InputError) as error:
        load_recipe(RECIPES[name], [wrong])
    assert f"did you mean {right}?" in str(error.value)
    assert "\n" not in str(error.value)


def test_environment_moves_data_and_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATA", "elsewhere")
    monkeypatch.setenv("RUNS", "out")
    recipe = plain(load_recipe(RECIPES["llava-7b-finetune"]))
    assert recipe["data"]["train"] == "elsewhere/llava/llava_v1_5_mix665k.json"
    assert (recipe["model"], recipe["run"]) == ("out/llava-7b-align", "out/llava-7b-finetune")


def test_stages_hand_on_their_runs() -> None:
    """The default parents are runs of shipped recipes, so the recipes chain without an override."""
    runs = {plain(load_recipe(path))["run"] for path in RECIPES.values()}
    for name, path in RECIPES.items():
        recipe = plain(load_recipe(path))
        encoder = recipe.get("encoder")
        for parent in (recipe.get("model"), encoder.get("init") if isinstance(encoder, dict) else encoder):
            if isinstance(parent, str) and not parent.startswith("timm:"):
                assert parent in runs, f"{name}: nothing makes {parent}"


# Published values, as literals: x-cls/superclass configs/cls_schedule, facts/superclass.md section 2.
SUPERCLASS = {
    "superclass-vit-s16": ("vit_small_patch16_224", 512_000_000, 16384, 5e-4, [0.9, 0.98], 500, [0.9, 1.0]),
    "superclass-vit-b16": ("vit_base_patch16_224", 512_000_000, 16384, 5e-4, [0.9, 0.98], 500, [0.9, 1.0]),
    "superclass-vit-l16": ("vit_large_patch16_224", 512_000_000, 16384, 5e-4, [0.9, 0.98], 500, [0.9, 1.0]),
    "superclass-vit-l16-12b": ("vit_large_patch16_224", 12_800_000_000, 90112, 1e-3, [0.9, 0.95], 10000, [0.4, 1.0]),
    "superclass-vit-l14": ("vit_large_patch14_224", 12_800_000_000, 90112, 1e-3, [0.9, 0.95], 10000, [0.4, 1.0]),
}


@pytest.mark.parametrize("name", SUPERCLASS)
def test_superclass_has_the_published_values(name: str) -> None:
    recipe = plain(load_recipe(RECIPES[name]))
    architecture, samples, batch, lr, betas, warmup, crop = SUPERCLASS[name]
    train, data, encoder = recipe["train"], recipe["data"], recipe["encoder"]
    assert (encoder["architecture"], encoder["image_size"], encoder["layout"]) == (architecture, 224, "superclass")
    assert (train["samples"], train["batch_size"], train["lr"]) == (samples, batch, lr)
    assert (train["betas"], train["warmup"], data["crop_scale"]) == (betas, warmup, crop)
    assert (train["weight_decay"], train["eps"]) == (0.2, 1e-6)
    assert (train["schedule"], train["min_lr_ratio"], train["precision"]) == ("cosine", 0.0, "bf16")
    assert train["clip_grad_norm"] is None
    assert (data["labels"], data["idf"], data["context_length"]) == ("clip", "online", 77)
    assert train["batch_size"] % (train["micro_batch_size"] * 8) == 0
    # Only the 12.8 B config changes colours.
    jitter = ([0.32, 0.32, 0.32, 0.08], 0.8, 0.2) if samples > 10**10 else (None, 0.8, 0.0)
    assert (data["color_jitter"], data["color_jitter_prob"], data["gray_scale_prob"]) == jitter


@pytest.mark.parametrize("name", [n for n in SUPERCLASS if n != "superclass-vit-l14"])
def test_every_encoder_has_a_lit_stage_of_the_same_samples(name: str) -> None:
    base, lit = (plain(load_recipe(RECIPES[n])) for n in (name, name.replace("superclass", "lit")))
    assert lit["stage"] == "lit" and lit["encoder"]["init"] == base["run"]
    assert lit["encoder"]["architecture"] == base["encoder"]["architecture"]
    same = (
        "batch_size",
        "samples",
        "lr",
        "betas",
        "eps",
        "weight_decay",
        "warmup",
        "schedule",
        "clip_grad_norm",
        "checkpoint_every",
    )
    assert {k: lit["train"][k] for k in same} == {k: base["train"][k] for k in same}
    pictures = ("train", "crop_scale", "color_jitter", "color_jitter_prob", "gray_scale_prob")
    assert {k: lit["data"][k] for k in pictures} == {k: base["data"][k] for k in pictures}


@pytest.mark.parametrize("name", [*SUPERCLASS, "superclass-cc3m", "demo-superclass"])
def test_one_override_makes_it_the_baseline(name: str) -> None:
    recipe = load_recipe(RECIPES[name], ["stage=clip"])
    check_parts(recipe)
    base = load_recipe(RECIPES[name])
    assert recipe.model_dump(exclude={"stage"}) == base.model_dump(exclude={"stage"})


@pytest.mark.parametrize("name", ["clipcap-mlp-gpt2", "clipcap-transformer-gpt2", "clipcap-superclass"])
def test_clipcap_has_the_published_values(name: str) -> None:
    recipe = plain(load_recipe(RECIPES[name]))
    train = recipe["train"]
    assert recipe["llm"]["name"] == "gpt2"
    assert (train["batch_size"], train["epochs"], train["lr"], train["warmup"]) == (40, 10, 2e-5, 5000)
    assert (train["betas"], train["eps"], train["weight_decay"]) == ([0.9, 0.999], 1e-6, 0.0)
    assert (train["schedule"], train["clip_grad_norm"], train["precision"]) == ("linear", None, "fp32")
    assert recipe["tune_llm"] is (name == "clipcap-mlp-gpt2")
    # The authors stopped early; SuperClass's paper says nothing of it. Decoding is the paper's in all.
    stopping = train["early_stopping"]
    assert (stopping is None) if name == "clipcap-superclass" else (stopping["metric"], stopping["mode"]) == ("val_CIDEr", "max")
    assert recipe["data"]["val"].endswith("karpathy_val.json") and recipe["monitor"]["every"] == 566_747 // 40 + 1
    assert (recipe["generation"]["decoding"], recipe["generation"]["num_beams"]) == ("paper", 5)
    mapper = recipe["mapper"]
    assert mapper["kind"] == ("mlp" if name == "clipcap-mlp-gpt2" else "transformer")
    assert mapper["prefix_length"] == (40 if name == "clipcap-transformer-gpt2" else 10)
    assert (mapper["num_layers"], mapper["num_heads"], mapper["feature_kind"]) == (8, 8, "pooled")


# haotian-liu/LLaVA scripts/v1_5, facts/llava.md section 1.2.
LLAVA = {
    "llava-7b-align": ("projector", "plain", "crop", 256, 32, 1e-3, "zero2"),
    "llava-7b-finetune": ("full", "vicuna_v1", "pad", 128, 16, 2e-5, "zero3"),
    "llava-7b-lora": ("lora", "vicuna_v1", "pad", 128, 16, 2e-4, "zero3"),
}


@pytest.mark.parametrize("name", LLAVA)
def test_llava_has_the_published_values(name: str) -> None:
    recipe = plain(load_recipe(RECIPES[name]))
    tune, template, fit, batch, micro, lr, zero = LLAVA[name]
    train = recipe["train"]
    assert (recipe["tune"], recipe["template"], recipe["image_fit"]) == (tune, template, fit)
    assert (train["batch_size"], train["micro_batch_size"], train["lr"], train["deepspeed"]) == (batch, micro, lr, zero)
    assert train["batch_size"] == train["micro_batch_size"] * 8
    assert (train["epochs"], train["schedule"], train["warmup"], train["weight_decay"]) == (1, "cosine", 0.03, 0.0)
    assert (train["clip_grad_norm"], train["precision"]) == (None, "bf16")
    assert (recipe["max_length"], recipe["grad_checkpointing"], recipe["feature_layer"]) == (2048, True, -2)
    if name == "llava-7b-align":
        assert recipe["llm"]["name"] == "lmsys/vicuna-7b-v1.5"
    else:
        assert recipe["model"] == "runs/llava-7b-align"
    if name == "llava-7b-lora":
        assert recipe["lora"] == {"r": 128, "alpha": 256, "dropout": 0.05, "dora": False, "quantization": None}
        assert recipe["projector_lr"] == 2e-5


def test_evaluations_use_llavas_prompts() -> None:
    vqa, bare, ocr = plain(load_recipe(RECIPES["vqa-textvqa"]))["tasks"]
    assert [t["task"] for t in (vqa, bare, ocr)] == ["vqav2", "textvqa", "textvqa"]
    # Of one suite, with and without OCR tokens: two names, so that nothing puts them side by side.
    assert [t["name"] for t in (vqa, bare, ocr)] == ["vqav2-val", "textvqa-val", "textvqa-val-ocr"]
    assert [t["ocr"] for t in (vqa, bare, ocr)] == ["none", "none", "reference"]
    for task in (vqa, bare, ocr):
        assert task["prompt"] == "{question}\nAnswer the question using a single word or phrase."
        assert task["generation"]["num_beams"] == 1
    assert vqa["image_name"].format(42) == "COCO_val2014_000000000042.jpg"
    (captions,) = plain(load_recipe(RECIPES["coco-captions"]))["tasks"]
    ways = captions["generation"]
    assert (ways["decoding"], ways["num_beams"], ways["max_new_tokens"]) == ("paper", 5, 67)


# arXiv 2411.03313, table 11: SuperClass, OpenCLIP, DINOv2, MAE; points for MME, per cent elsewhere.
TABLE_11 = {
    "vqav2-val": {"accuracy": (75.24, 74.54, 73.32, 63.50)},
    "gqa-testdev-balanced": {"accuracy": (60.96, 61.03, 61.87, 54.58)},
    "vizwiz-val": {"accuracy": (54.33, 50.47, 49.15, 50.22)},
    "textvqa-val": {"accuracy": (39.20, 38.16, 14.08, 11.55)},
    "scienceqa-img-test": {"accuracy": (66.09, 67.33, 64.90, 54.75)},
    "mme": {"perception": (1371, 1434, 1336, 1175), "cognition": (322, 269, 297, 343)},
    "mmbench-en-dev": {"accuracy": (63.14, 60.73, 57.90, 42.44)},
    "pope": {"f1": (85.69, 85.52, 86.24, 80.69)},
    "mmmu-val": {"accuracy": (36.0, 35.9, 35.3, 35.7)},
}


def test_superclass_paper_has_the_papers_table() -> None:
    tasks = plain(load_recipe(RECIPES["superclass-paper"]))["tasks"]
    assert [t["name"] for t in tasks] == list(TABLE_11)
    for task in tasks:
        rows = {row["system"].removesuffix(" (paper)"): row["metrics"] for row in task["published"]}
        assert list(rows) == ["SuperClass", "OpenCLIP", "DINOv2", "MAE"]
        for metric, figures in TABLE_11[task["name"]].items():
            scale = 1 if task["name"] == "mme" else 100
            assert [row[metric] * scale for row in rows.values()] == pytest.approx(figures)
    assert next(t["ocr"] for t in tasks if t["name"] == "textvqa-val") == "none"


# docs/MODEL_ZOO.md of haotian-liu/LLaVA, LLaVA-1.5 7B.
MODEL_ZOO = {
    "vqav2-test-dev": {"accuracy": 78.5},
    "gqa-testdev-balanced": {"accuracy": 62.0},
    "vizwiz-val": {"accuracy": 50.0},
    "scienceqa-img-test": {"accuracy": 66.8},
    "textvqa-val-ocr": {"accuracy": 58.2},
    "pope": {"f1": 85.9},
    "mme": {"perception": 1510.7},
    "mmbench-en-dev": {"accuracy": 64.3},
    "mmbench-cn-dev": {"accuracy": 58.3},
}


def test_llava_15_has_the_suites_and_figures_of_its_table() -> None:
    tasks = plain(load_recipe(RECIPES["llava-1.5"]))["tasks"]
    assert [t["name"] for t in tasks] == list(MODEL_ZOO)
    for task in tasks:
        row = next(row["metrics"] for row in task["published"] if row["system"] == "LLaVA-1.5 7B")
        scale = 1 if task["name"] == "mme" else 100
        assert {k: pytest.approx(v * scale) for k, v in row.items()} == MODEL_ZOO[task["name"]]
        # The published protocol (docs/Evaluation.md): greedy.
        assert (task["generation"]["decoding"], task["generation"]["num_beams"]) == ("search", 1)
    asked = {t["name"]: t for t in tasks}
    assert asked["textvqa-val-ocr"]["ocr"] == "reference"
    assert asked["vqav2-test-dev"]["annotations"] is None, "the server keeps the answers"


def test_deepspeed_files_are_those_of_the_plan() -> None:
    assert [p.stem for p in DEEPSPEED] == ["zero0", "zero1", "zero2", "zero3-offload", "zero3"]


@pytest.mark.parametrize("path", DEEPSPEED, ids=lambda p: p.stem)
def test_deepspeed_file_takes_the_recipes_numbers(path: Path) -> None:
    assert find_deepspeed(path.stem) == path
    found = deepspeed_settings(path, micro_batch_size=16, accumulation=2, clip=None, precision="bf16")
    assert (found["train_micro_batch_size_per_gpu"], found["gradient_accumulation_steps"]) == (16, 2)
    assert (found["gradient_clipping"], found["bf16"]) == (0.0, {"enabled": True})
    zero = found["zero_optimization"]
    assert zero["stage"] == int(path.stem[4])
    # "auto" is filled from a model's config, which an objective does not have.
    assert "auto" not in json.dumps(found)
    if zero["stage"] == 3:
        assert zero["stage3_gather_16bit_weights_on_model_save"] is True
        assert zero["overlap_comm"] is True
    assert ("offload_optimizer" in zero) == path.stem.endswith("offload")


@pytest.mark.parametrize("key", ["gradient_clipping", "train_batch_size", "bf16", "fp16"])
def test_deepspeed_file_with_a_number_of_the_recipe_is_refused(key: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({key: 1, "zero_optimization": {"stage": 2}}), encoding="utf-8")
    with pytest.raises(InputError, match=f"sets {key}"):
        load_and_check("llava-7b-align", f"train.deepspeed={path}")


def test_unknown_deepspeed_name_lists_the_shipped_ones() -> None:
    with pytest.raises(InputError, match="zero2"):
        load_and_check("llava-7b-align", "train.deepspeed=zero9")


def load_and_check(name: str, *overrides: str) -> None:
    check_parts(load_recipe(RECIPES[name], overrides))


def test_a_copied_recipe_is_the_recipe(tmp_path: Path) -> None:
    copied = copy_recipe("superclass-vit-b16", tmp_path)
    assert load_recipe(copied) == load_recipe(RECIPES["superclass-vit-b16"])
    with pytest.raises(InputError, match="exists"):
        copy_recipe("superclass-vit-b16", tmp_path)
