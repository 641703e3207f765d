"""Recipes: overrides, checks, messages that name the nearest key, and the round trip through YAML."""

from __future__ import annotations

import string
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmkit.config import STAGES, DataConfig, EvalRecipe, LlavaRecipe, SuperclassRecipe, check_recipe, dump_recipe, load_recipe
from mmkit.errors import InputError

TRAIN = {"batch_size": 8, "steps": 4, "lr": 0.001}
GPT = {"config": {"model_type": "gpt2", "n_embd": 8}, "tokenizer": "some/tokenizer"}
PLAIN: dict[str, dict[str, Any]] = {
    "superclass": {
        "stage": "superclass",
        "run": "runs/a",
        "encoder": {"architecture": "vit_tiny_patch16_224", "model_args": {"depth": 2}},
        "data": {"train": "pairs.jsonl"},
        "train": TRAIN,
    },
    "clip": {
        "stage": "clip",
        "run": "runs/f",
        "encoder": {"architecture": "vit_tiny_patch16_224"},
        "data": {"train": "pairs.jsonl"},
        "loss": {"kind": "sigmoid"},
        "text": {"layers": 2},
        "train": TRAIN,
    },
    "lit": {
        "stage": "lit",
        "run": "runs/g",
        "encoder": {"architecture": "vit_tiny_patch16_224", "init": "runs/a"},
        "data": {"train": "pairs.jsonl"},
        "train": TRAIN,
    },
    "finetune": {
        "stage": "finetune",
        "run": "runs/h",
        "encoder": "runs/a",
        "data": {"train": "train", "test": "test", "classes": "names.txt"},
        "train": TRAIN,
    },
    "clipcap": {
        "stage": "clipcap",
        "run": "runs/b",
        "encoder": "runs/a",
        "llm": GPT,
        "data": {"train": "c.json"},
        "train": TRAIN,
    },
    "llava": {
        "stage": "llava",
        "run": "runs/c",
        "encoder": "runs/a",
        "llm": GPT,
        "tune": "lora",
        "template": "plain",
        "data": {"train": "llava.json"},
        "train": TRAIN,
    },
    "probe": {"stage": "probe", "run": "runs/d", "encoder": "timm:vit", "data": {"train": "a.jsonl", "test": "b.jsonl"}},
    "eval": {
        "stage": "eval",
        "run": "runs/e",
        "model": "runs/c",
        "tasks": [
            {"task": "coco-caption", "annotations": "a.json", "image_root": "i"},
            {"task": "textvqa", "annotations": "t.json", "image_root": "i", "ocr": "reference"},
        ],
    },
}


def write(folder: Path, plain: object) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(plain), encoding="utf-8")
    return path


def load(folder: Path, stage: str, *overrides: str) -> Any:
    return load_recipe(write(folder, PLAIN[stage]), overrides)


def refusal(folder: Path, stage: str, *overrides: str) -> str:
    with pytest.raises(InputError) as caught:
        load(folder, stage, *overrides)
    message = str(caught.value)
    assert "\n" not in message
    assert str(folder / "recipe.yaml") in message
    return message


def test_defaults_are_the_published_ones(tmp_path: Path) -> None:
    recipe = load(tmp_path, "superclass")
    assert isinstance(recipe, SuperclassRecipe)
    assert (recipe.seed, recipe.data.labels, recipe.data.crop_scale) == (0, "clip", (0.9, 1.0))
    assert recipe.encoder.mean is None  # OpenAI CLIP's, or those of the weights that training starts from
    assert (recipe.loss.kind, recipe.track.kind, recipe.monitor.every) == (None, "tensorboard", None)
    assert (recipe.data.max_pixels, recipe.data.max_bytes, recipe.data.decoder) == (100_000_000, 64 * 2**20, "fast")
    with pytest.raises(ValueError, match="frozen"):
        recipe.seed = 3


def test_overrides_are_yaml_and_typed(tmp_path: Path) -> None:
    words = ("train.lr=1e-3", "train.betas=[0.9,0.98]", "seed=7", "system=a b", "data.limit=null", "train.compile=true")
    recipe = load(tmp_path, "superclass", *words, "encoder.model_args.drop=1e-1", "run=2026-11-23", "train.steps=9")
    assert recipe.train.lr == 1e-3
    assert recipe.train.betas == (0.9, 0.98)
    assert (recipe.seed, recipe.system, recipe.data.limit, recipe.train.compile) == (7, "a b", None, True)
    # PyYAML alone reads 1e-1 as a word, and a date as a date.
    assert recipe.encoder.model_args == {"depth": 2, "drop": 0.1}
    assert (recipe.run, recipe.train.steps) == ("2026-11-23", 9)


def test_overrides_reach_list_items_and_can_empty_a_key(tmp_path: Path) -> None:
    recipe = load(tmp_path, "eval", "tasks.1.limit=5", "tasks.0.generation.num_beams=3")
    assert isinstance(recipe, EvalRecipe)
    assert [t.limit for t in recipe.tasks] == [None, 5]
    assert [t.generation.num_beams for t in recipe.tasks] == [3, 1]
    swapped = load(tmp_path, "superclass", "train.steps=", "train.epochs=0.5")
    assert (swapped.train.steps, swapped.train.epochs) == (None, 0.5)


@pytest.mark.parametrize(
    ("stage", "override", "key", "near"),
    [
        ("superclass", "train.lrr=1", "'train.lrr'", "did you mean train.lr?"),
        ("superclass", "sead=1", "'sead'", "did you mean seed?"),
        ("superclass", "lr=1", "'lr'", "did you mean train.lr?"),
        ("superclass", "train.workers=1", "'train.workers'", "did you mean data.workers?"),
        ("superclass", "data.crop_sale=[1,1]", "'data.crop_sale'", "did you mean data.crop_scale?"),
        ("clipcap", "llm.nme=gpt2", "'llm.nme'", "did you mean llm.name?"),
        ("llava", "lora.rr=3", "'lora.rr'", "did you mean lora.r?"),
        ("eval", "tasks.0.limt=5", "'tasks.0.limt'", "did you mean tasks.0.limit?"),
        ("eval", "tasks.1.generation.num_beam=5", "'tasks.1.generation.num_beam'", "tasks.1.generation.num_beams?"),
        ("superclass", "clipcap=1", "'clipcap'", "known keys here: data, encoder,"),
    ],
)
def test_unknown_key_names_the_nearest(tmp_path: Path, stage: str, override: str, key: str, near: str) -> None:
    message = refusal(tmp_path, stage, override)
    assert f"unknown key {key}" in message
    assert near in message
    assert "known keys here: " in message


@pytest.mark.parametrize(
    ("stage", "overrides", "expected"),
    [
        ("superclass", ["train.lr=fast"], "train.lr='fast'"),
        ("superclass", ["train.lr=inf"], "finite"),
        ("superclass", ["seed=-1"], "seed=-1"),
        ("superclass", ["train.batch_size=0"], "train.batch_size=0"),
        ("superclass", ["train.precision=fp16"], "'fp32' or 'bf16'"),
        ("superclass", ["train.betas=[0.9]"], "train.betas.1"),
        ("superclass", ["train=5"], "train=5"),
        ("superclass", ["data.crop_scale=[1.0,0.5]"], "crop_scale [1.0, 0.5]"),
        ("superclass", ["data.decoder=pillow"], "'fast' or 'exact'"),
        ("superclass", ["data.max_bytes=0"], "data.max_bytes=0"),
        ("probe", ["data.max_bytes=many"], "data.max_bytes='many'"),
        ("eval", ["max_bytes=-1"], "max_bytes=-1"),
        ("superclass", ["train.micro_batch_size=3"], "batch_size 8 is no multiple of micro_batch_size 3"),
        ("superclass", ["train.epochs=2"], "exactly one of steps, epochs, samples (given: steps, epochs)"),
        ("superclass", ["train.steps="], "(given: none)"),
        ("clipcap", ["llm.name=gpt2"], "exactly one of name"),
        ("clipcap", ["llm.config=null"], "exactly one of name"),
        ("clipcap", ["llm.tokenizer=null"], "give tokenizer"),
        ("llava", ["model=runs/x"], "either `model`"),
        ("llava", ["encoder=null"], "either `model`"),
        ("llava", ["encoder=null", "llm=null"], "either `model`"),
        ("eval", ["tasks=[]"], "override: tasks=[]: should not be empty"),
        ("eval", ["tasks=vqav2-val"], "override: tasks='vqav2-val': should be a list"),
        ("eval", ["tasks.0.generation=3"], "tasks.0.generation=3: should be a section with keys"),
        ("eval", ["tasks.0.prompt={question}"], "override: tasks.0.prompt: should be a text, and YAML reads braces"),
        ("eval", ["limit=3"], "override: unknown key 'limit'; did you mean tasks.0.limit?"),
        ("eval", ["tasks.0.ocr=reference"], "ocr is a setting of textvqa, not of coco-caption"),
        (
            "eval",
            ["tasks.9.limit=5"],
            "override 'tasks.9.limit=5': tasks is a list of 2, and '9' is none of its numbers; count from 0 to 1",
        ),
        ("eval", ["tasks.-1.limit=5"], "'-1' is none of its numbers"),
        ("eval", ["tasks.x=5"], "override 'tasks.x=5': tasks is a list of 2, and 'x' is none of its numbers"),
        ("eval", ["tasks=[{task: vqav2}]", "tasks.1.limit=5"], "'1' is none of its numbers; its only one is 0"),
        ("eval", ["[=3"], "override '[=3': "),
        (
            "superclass",
            ["data.train=[a,b]", "data.train.2=c"],
            "data.train is a list of 2, and '2' is none of its numbers; count from 0 to 1",
        ),
        (
            "superclass",
            ["data.train=[]", "data.train.0=c"],
            "data.train is a list of 0, and '0' is none of its numbers; give data.train first",
        ),
        ("probe", ["probes=[linear,svm]"], "probes.1='svm'"),
        ("superclass", ["data.train=${oc.env:MMKIT_NO_SUCH_VARIABLE}"], "MMKIT_NO_SUCH_VARIABLE"),
        ("superclass", ["data.train=${data.nope}"], "nope"),
        ("superclass", ["stage=[1]"], "stage [1] is unknown"),
        ("superclass", ["stage=clipcop"], "did you mean 'clipcap'?"),
    ],
)
def test_bad_values_are_one_short_line(tmp_path: Path, stage: str, overrides: list[str], expected: str) -> None:
    message = refusal(tmp_path, stage, *overrides)
    assert expected in message
    # A rule between keys must not print the whole section.
    assert len(message) < 400 + len(str(tmp_path))


def test_a_fault_of_the_file_is_not_laid_on_an_override(tmp_path: Path) -> None:
    file = write(tmp_path, PLAIN["eval"] | {"blnd": True})
    with pytest.raises(InputError) as caught:
        load_recipe(file, ["seed=3", "modl=x"])
    assert f"{file}: unknown key 'blnd'; did you mean blind?" in str(caught.value)
    assert "override: unknown key 'modl'; did you mean model?" in str(caught.value)


@pytest.mark.parametrize("key", ["run", "encoder.architecture", "data.train", "train.lr"])
def test_missing_key_is_named(tmp_path: Path, key: str) -> None:
    plain = yaml.safe_load(yaml.safe_dump(PLAIN["superclass"]))
    holder = plain
    *parents, last = key.split(".")
    for parent in parents:
        holder = holder[parent]
    del holder[last]
    with pytest.raises(InputError, match=f"key '{key}' is missing"):
        load_recipe(write(tmp_path, plain))


def test_all_faults_are_named_at_once(tmp_path: Path) -> None:
    message = refusal(tmp_path, "superclass", "train.lrr=1", "seed=x", "data.tran=1")
    assert all(word in message for word in ("train.lrr", "seed='x'", "data.tran"))


@pytest.mark.parametrize("word", ["train.lr", "=3", ""])
def test_override_without_key_or_equals(tmp_path: Path, word: str) -> None:
    with pytest.raises(InputError, match="is not of the form key=value"):
        load(tmp_path, "superclass", word)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "stage None is unknown"),
        (b"- a\n- b\n", "mapping of keys"),
        (b"5\n", "cannot read the recipe"),
        (b"a: [\n", "cannot read the recipe"),
        (b"a: 1\na: 2\n", "duplicate key a"),
        (b"stage: caf\xe9\n", "cannot read the recipe"),
        (b"stage: \x00\n", "cannot read the recipe"),
        (b"stage: superclass\nencoder: 3\n", "encoder=3"),
    ],
)
def test_unreadable_recipe(tmp_path: Path, content: bytes, expected: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        load_recipe(path)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_recipe_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot read the recipe"):
        load_recipe(tmp_path / "none.yaml")


def test_interpolation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("data.train=${oc.env:MMKIT_TEST_DATA,./data}/x.jsonl", "system=${run}")
    monkeypatch.delenv("MMKIT_TEST_DATA", raising=False)
    assert load(tmp_path, "superclass", *words).data.train == "./data/x.jsonl"
    monkeypatch.setenv("MMKIT_TEST_DATA", "/elsewhere")
    recipe = load(tmp_path, "superclass", *words)
    assert (recipe.data.train, recipe.system) == ("/elsewhere/x.jsonl", "runs/a")


@pytest.mark.parametrize("stage", STAGES)
def test_dump_and_load_are_inverse(tmp_path: Path, stage: str) -> None:
    recipe = load(tmp_path, stage)
    assert type(recipe) is STAGES[stage]
    path = tmp_path / "dumped.yaml"
    path.write_text(dump_recipe(recipe), encoding="utf-8")
    again = load_recipe(path)
    assert again == recipe
    assert dump_recipe(again) == dump_recipe(recipe)


def test_llava_from_a_model_alone(tmp_path: Path) -> None:
    recipe = load(tmp_path, "llava", "encoder=null", "llm=null", "model=runs/align")
    assert isinstance(recipe, LlavaRecipe)
    assert (recipe.model, recipe.encoder, recipe.llm) == ("runs/align", None, None)


@pytest.mark.parametrize(
    ("key", "value"),
    [("image", "pic"), ("caption", "text"), ("streaming", "true"), ("shuffle_window", "7"), ("cache_gib", "2.")],
)
def test_keys_of_pairs_are_refused_for_conversations(tmp_path: Path, key: str, value: str) -> None:
    with pytest.raises(InputError, match=rf"data\.{key} are for image-text pairs and have no effect on conversations"):
        load(tmp_path, "llava", f"data.{key}={value}")
    default = DataConfig.model_fields[key].default
    # As a resolved recipe has it.
    load(tmp_path, "llava", f"data.{key}={str(default).lower()}")


# Words that YAML readers take for something else, and anything printable.
texts = st.one_of(
    st.sampled_from(["1e5", "1.5", "null", "yes", "off", "~", "0x1F", "1_000", "2026-11-23", "é: [", "- a", "#", "a\nb", " "]),
    st.text(st.characters(exclude_characters="$\\", exclude_categories=["Cs", "Cc"]), min_size=1, max_size=20),
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    run=texts,
    system=st.none() | texts,
    lr=st.floats(1e-12, 1e6),
    seed=st.integers(0, 2**40),
    scale=st.tuples(st.floats(1e-6, 0.5), st.floats(0.5, 1)),
    args=st.dictionaries(st.text(string.ascii_lowercase, min_size=1), texts | st.integers() | st.floats(-1e9, 1e9), max_size=3),
)
def test_any_value_survives_the_round_trip(
    tmp_path: Path, run: str, system: str | None, lr: float, seed: int, scale: tuple[float, float], args: dict[str, Any]
) -> None:
    plain = {**PLAIN["superclass"], "run": run, "system": system, "seed": seed, "train": {**TRAIN, "lr": lr}}
    plain["data"] = {"train": run, "crop_scale": scale}
    plain["encoder"] = {"architecture": "vit", "model_args": args}
    recipe = check_recipe(plain, where="here")
    path = tmp_path / "dumped.yaml"
    path.write_text(dump_recipe(recipe), encoding="utf-8")
    assert load_recipe(path) == recipe


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    key=st.text("abtrainlws.[]0-9$ {}", max_size=12) | st.sampled_from(["train", "tasks.0", "train.lr", "stage", "tasks"]),
    value=st.text("[]{}:,'\"!&*$ab1.e-\n", max_size=8) | texts,
)
def test_any_override_is_taken_or_refused_in_words(tmp_path: Path, key: str, value: str) -> None:
    try:
        load(tmp_path, "eval", f"{key}={value}")
    except InputError as error:
        assert "\n" not in str(error)


def test_command_line_says_one_line_and_exits_with_2(tmp_path: Path) -> None:
    path = write(tmp_path, PLAIN["eval"])
    done = subprocess.run(
        [sys.executable, "-m", "mmkit", "validate", str(path), "tasks.0.limt=3"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"mmkit: {path}: override: unknown key 'tasks.0.limt'; did you mean tasks.0.limit?")
    assert "Traceback" not in done.stderr
